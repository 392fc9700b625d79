"""The statistics of evaluate.py: win rates with intervals and tests, preferences by votes, distances of image sets."""

import itertools
import math

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision

from common import InputError, brief

TAILS = (0.025, 0.975)  # quantiles of a 95% interval
FEW = 20  # a comparison of fewer prompts has no interval and no p


def win_rate(ours, theirs):
    """(rate, wins, ties, losses) of two equally long arrays of scores; a tie counts one half."""
    wins, ties = int(np.sum(ours > theirs)), int(np.sum(ours == theirs))
    return (wins + ties / 2) / len(ours), wins, ties, len(ours) - wins - ties


def rate_interval(outcomes, prompts):
    """(rate, low, high): the mean of outcomes [N] in [0, 1], and its 95% interval. All are nan if N is 0.

    The interval is Wilson's for n independent trials. Outcomes of one prompt go together, so n is below N: it is
    rate (1 - rate) / v, where v is the variance of the mean between prompts. If all agree, n is the number of prompts.
    """
    outcomes = np.asarray(outcomes, dtype=np.float64)
    if len(outcomes) == 0:
        return math.nan, math.nan, math.nan
    rate = float(outcomes.mean())
    _, prompt_of = np.unique(prompts, return_inverse=True)
    sums = np.bincount(prompt_of, outcomes - rate)                                      # [P]
    n = len(sums)
    if n > 1 and sums.any():
        variance = (sums ** 2).sum() / len(outcomes) ** 2 * n / (n - 1)
        n = min(len(outcomes), rate * (1 - rate) / variance)
    return rate, *wilson(rate, n)


def wilson(rate, n):
    """Wilson's 95% interval (J. Am. Stat. Assoc. 22, 1927) of a rate of n independent trials; nan if n is 0."""
    if n == 0:
        return math.nan, math.nan
    z = scipy.stats.norm.ppf(TAILS[1])
    middle = (rate + z ** 2 / (2 * n)) / (1 + z ** 2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z ** 2 / (4 * n ** 2)) / (1 + z ** 2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def by_prompt(values, prompts):
    """[P]: the means of values [N] over the images of each prompt, in the sorted order of the prompts."""
    _, prompt_of = np.unique(prompts, return_inverse=True)
    return np.bincount(prompt_of, values) / np.bincount(prompt_of)


def hold_against(ours, theirs):
    """{name: number} that compares a model's scores [P] with another model's, prompt by prompt.

    The win rate has Wilson's 95% interval, the mean paired difference its 95% t interval. p is that of the exact
    sign test, which leaves ties out. With fewer than FEW prompts, p and the intervals are None.
    """
    rate, wins, ties, losses = win_rate(ours, theirs)
    difference_95 = rate_95 = p = None
    if len(ours) >= FEW:
        _, *difference_95, _ = paired_difference(ours, theirs)
        rate_95 = wilson(rate, len(ours))
        p = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return {"n": len(ours), "mean": ours.mean(), "median": np.median(ours), "difference": (ours - theirs).mean(),
            "difference_95": difference_95, "win_rate": rate, "win_rate_95": rate_95, "wins": wins, "ties": ties,
            "losses": losses, "p": p, "p_holm": None}


def paired_difference(ours, theirs):
    """(mean, low, high, p) of ours - theirs [n]: 95% t interval, p of the two-sided t test. ValueError if n < 2."""
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if len(difference) < 2:
        raise ValueError(f"a paired interval needs at least 2 pairs, not {len(difference)}")
    mean = float(difference.mean())
    if not np.ptp(difference):  # without spread scipy has no answer; the interval is a point
        return mean, mean, mean, 0.0 if mean else 1.0
    test = scipy.stats.ttest_1samp(difference, 0)
    low, high = test.confidence_interval(0.95)
    return mean, float(low), float(high), float(test.pvalue)


def holm(p_values):
    """Holm's adjusted p values (Scand. J. Statist. 6, 1979), in the order of `p_values`.

    Reject each hypothesis whose adjusted p is below .05: the chance of any false rejection is then at most 5%.
    """
    n, largest = len(p_values), 0.0
    adjusted = [0.0] * n
    for rank, i in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (n - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def compare_scores(names, scores, prompts, pairs):
    """For every scorer, dicts of numbers: each folder's own mean, then folder i against folder j for (i, j) of pairs.

    The unit is the prompt: scores of its images are averaged first.

    names, scores  F folders; {scorer: [F, N] scores of their images}
    prompts        N strings
    """
    results = []
    for scorer, of_folders in scores.items():
        means = [by_prompt(values, prompts) for values in of_folders]                   # F of [P]
        for name, ours in zip(names, means):
            results.append({"images": name, "scorer": scorer, "against": None, "n": len(ours), "mean": ours.mean(),
                            "median": np.median(ours)})
        for i, j in pairs:
            numbers = hold_against(means[i], means[j])
            results.append({"images": names[i], "scorer": scorer, "against": names[j]} | numbers)
    return results


def adjust(results):
    """Set p_holm, Holm's adjusted p over all comparisons that have a p; return how many they are."""
    compared = [result for result in results if result.get("p") is not None]
    for result, p in zip(compared, holm([result["p"] for result in compared])):
        result["p_holm"] = p
    return len(compared)


def ranked_pairs(scores, min_gaps, every_pair=False):
    """[(better, worse, fault)] of a prompt's images: the best against the worst by mean rank, or every two images.

    A scorer votes for the image with the higher score if the gap is at least its min_gap. The better image has the
    votes of more than half of the scorers. The fault says why there is none; else it is None.

    scores  [n, S] of n images by S scorers; min_gaps [S] or [1]
    """
    if len(scores) < 2:
        return []
    ranks = scipy.stats.rankdata(scores, axis=0).mean(axis=1)                           # [n], the best is highest
    order = np.argsort(-ranks, kind="stable")
    found = []
    for i, j in itertools.combinations(order, 2) if every_pair else [order[[0, -1]]]:
        gaps = scores[i] - scores[j]                                                    # [S]
        wins, losses = (gaps > 0) & (gaps >= min_gaps), (gaps < 0) & (-gaps >= min_gaps)
        if max(wins.sum(), losses.sum()) > len(gaps) / 2:
            found.append((i, j, None) if wins.sum() > losses.sum() else (j, i, None))
        elif not gaps.any():
            found.append((i, j, "ties"))
        else:
            found.append((i, j, "without a majority" if wins.any() and losses.any() else "near-ties"))
    return found


def cmmd(x, y, draws=0, seed=0):
    """CMMD between two sets of images, unbiased, and its 95% interval over `draws` bootstrap samples of both sets.

    CMMD is 1000 times the squared MMD of unit vectors under the kernel exp(-|x - y|^2 / (2 * 10^2)); see
    arXiv:2401.09603. The paper has the biased estimate, we the U-statistic (Gretton et al. 2012, lemma 6). At this
    bandwidth it is close to 10 times the squared distance of the means: it misses a collapse that keeps the mean.
    A bootstrap sample never pairs an image with its own copy, and one of a single image is left out.

    x, y     embeddings [N, E] and [M, E], normalised here in float64
    returns  value, (low, high); the value may be negative. Without draws or four images the interval is None
    """
    x = F.normalize(x.double(), dim=-1)
    y = F.normalize(y.double(), dim=-1)
    rng = np.random.default_rng(seed)
    u = draw_counts(len(x), draws, rng)                                                 # [1 + draws, N]
    v = draw_counts(len(y), draws, rng)                                                 # [1 + draws, M]
    between = (u @ gaussian_kernel(x, y) * v).sum(1) / (u.sum(1) * v.sum(1))
    values = 1000 * (mean_within(u, x) + mean_within(v, y) - 2 * between)               # [1 + draws]
    if draws == 0 or min(len(x), len(y)) < 4:
        return values[0].item(), None
    low, high = np.nanquantile(values[1:], TAILS)
    return values[0].item(), (float(low), float(high))


def published_cmmd(x, y):
    """CMMD by the V-statistic of arXiv:2401.09603 and its code, to stand beside published numbers.

    It pairs an image with itself, too, and so is biased upward: by about 0.2 at 30 images and 0.005 at 1,000.
    """
    x = F.normalize(x.double(), dim=-1)
    y = F.normalize(y.double(), dim=-1)
    within = gaussian_kernel(x, x).mean() + gaussian_kernel(y, y).mean()
    return (1000 * (within - 2 * gaussian_kernel(x, y).mean())).item()


def draw_counts(n, draws, rng):
    """[1 + draws, n]: how often a sample holds each of n images. Row 0 is the set itself, the others are drawn."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    return torch.from_numpy(np.concatenate([np.ones((1, n)), drawn])).double()


def gaussian_kernel(x, y, bandwidth=10):
    """[N, M]: the kernel of unit vectors [N, E] and [M, E]. For these |x - y|^2 = 2 - 2 x.y."""
    return torch.exp((x @ y.T - 1) / bandwidth ** 2)


def mean_within(counts, x):
    """The kernel's mean over pairs of different images, for samples that hold image i of x counts[:, i] times."""
    same = (counts * counts).sum(1)  # pairs of an image with itself or its copy; their kernel is 1
    total = (counts @ gaussian_kernel(x, x) * counts).sum(1)
    return (total - same) / (counts.sum(1) ** 2 - same)


def frechet(x, y):
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features [N, E] and [M, E], in float64.

    See arXiv:1706.08500. It is strongly biased at small N: compare only values of the same N.
    """
    x, y = x.double(), y.double()
    c_x, c_y = x.T.cov(), y.T.cov()                                                     # [E, E]
    # C_x C_y has the eigenvalues of the symmetric matrix C_x^(1/2) C_y C_x^(1/2).
    eigenvalues, vectors = torch.linalg.eigh(c_x)
    root = vectors * eigenvalues.clamp_min(0).sqrt() @ vectors.T                        # C_x^(1/2)
    cross = torch.linalg.eigvalsh(root @ c_y @ root).clamp_min(0).sqrt().sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return (means + c_x.trace() + c_y.trace() - 2 * cross).item()


def inception(device):
    """A function from PIL pictures to FID's features [N, 2048]; None if torch-fidelity is not installed."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except Exception as error:
        raise InputError(f"style: the network of FID cannot be loaded ({brief(error)}); give --no-fid")

    def features(images):
        pixels = [torch.tensor(np.array(image)).permute(2, 0, 1)[None] for image in images]     # [1, 3, H, W]
        return torch.cat([network(x.to(device))[0].cpu() for x in pixels])  # one at a time: they may differ in size

    return features


def style_statistics(device):
    """A function from PIL pictures to [N, D]. Squared distances of its rows are the style loss of arXiv:1508.06576.

    A Gram matrix is G = F F^T / (c h w), F [c, h w] being VGG-19's features after relu1_1, 2_1, 3_1, 4_1 or 5_1.
    The loss is the sum over these layers of 1/5 * 1/4 * |G - G'|^2. Weights and preprocessing are torchvision's.
    """
    try:
        weights = torchvision.models.VGG19_Weights.DEFAULT
        layers = torchvision.models.vgg19(weights=weights).features.to(device).eval()
    except Exception as error:
        raise InputError(f"style: VGG-19 cannot be loaded ({brief(error)}); give --no-gram")
    preprocess = weights.transforms()
    style_layers = (1, 6, 11, 20, 29)  # relu1_1, 2_1, 3_1, 4_1, 5_1

    @torch.inference_mode()
    def statistics(images):
        x, grams = torch.stack([preprocess(image) for image in images]).to(device), []
        for i, layer in enumerate(layers):
            x = layer(x)
            if i in style_layers:
                features = x.flatten(2)                                                 # [N, c, h w]
                gram = features @ features.mT / features[0].numel()                     # [N, c, c]
                grams.append(gram.flatten(1).cpu())
        return torch.cat(grams, dim=1) / (4 * len(style_layers)) ** 0.5                 # [N, D]

    return statistics


def mean_squared_distance(x, y):
    """Mean of |a - b|^2 over all pairs of two sets of vectors, each given by its mean [D] and mean squared norm."""
    (mean_x, square_x), (mean_y, square_y) = x, y
    return (square_x + square_y - 2 * mean_x @ mean_y).item()


def diversity(x):
    """Mean cosine distance of two different images of [N, E]. It is 0 for a model that always draws the same image."""
    n = len(x)
    x = F.normalize(x.double(), dim=-1)
    total = x.sum(0).square().sum()  # the sum of all N^2 cosines; N of them are 1, an image with itself
    return (1 - (total - n) / (n * (n - 1))).item()
