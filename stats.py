"""The numbers of the evaluation: win rates and intervals of scores, distances of sets of images."""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision

from common import InputError, brief

BANDWIDTH = 10  # of CMMD's kernel
GRAM_LAYERS = (1, 6, 11, 20, 29)  # relu1_1 to relu5_1 of torchvision's VGG-19
TAILS = (0.025, 0.975)  # quantiles of a 95% interval
FEW = 20  # prompts, of fewer of which a comparison has counts alone


class WinRate(NamedTuple):
    rate: float
    wins: int
    ties: int
    losses: int


def win_rate(ours, theirs):
    """The `WinRate` of two equally long lists of scores; a tie counts one half."""
    wins = int(np.sum(ours > theirs))
    ties = int(np.sum(ours == theirs))
    return WinRate((wins + ties / 2) / len(ours), wins, ties, len(ours) - wins - ties)


def rate_interval(outcomes, prompts):
    """(rate, low, high) of outcomes [N] in [0, 1] with a prompt each: the mean, and its 95% interval.

    Wilson's, of as many independent trials as the outcomes are worth: those of a prompt go together. That is
    N times p (1 - p) / N over the variance of the mean between prompts; where all agree, the number of prompts.
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
    """Wilson's 95% interval (J. Am. Stat. Assoc. 22, 1927) of a rate of n independent trials; nan of none."""
    if n == 0:
        return math.nan, math.nan
    z = scipy.stats.norm.ppf(TAILS[1])
    middle = (rate + z ** 2 / (2 * n)) / (1 + z ** 2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z ** 2 / (4 * n ** 2)) / (1 + z ** 2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def by_prompt(values, prompts):
    """The means [P] of values [N] over the images of each prompt, prompts in the order in which they first come."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    of_prompt = [places[prompt] for prompt in prompts]
    return np.bincount(of_prompt, values) / np.bincount(of_prompt)


def hold_against(ours, theirs):
    """{name: number} of scores [P] of P prompts held against another model's scores of the same.

    win_rate, a tie one half, with Wilson's interval; the paired difference of the means with its t interval; p of
    the exact sign test, ties left out. Of fewer than FEW prompts intervals and p are None.
    """
    result, n = win_rate(ours, theirs), len(ours)
    numbers = {"n": n, "mean": ours.mean(), "median": np.median(ours), "difference": (ours - theirs).mean(),
               "difference_95": None, "win_rate": result.rate, "win_rate_95": None, "wins": result.wins,
               "ties": result.ties, "losses": result.losses, "p": None}
    if n < FEW:
        return numbers
    _, low, high, _ = paired_difference(ours, theirs)
    numbers |= {"difference_95": (low, high), "win_rate_95": wilson(result.rate, n), "p": 1.0}
    if result.wins + result.losses:
        numbers["p"] = scipy.stats.binomtest(result.wins, result.wins + result.losses).pvalue
    return numbers


def paired_difference(ours, theirs):
    """Mean of ours - theirs [n], its 95% t interval, and the p of a two-sided paired t test: (mean, low, high, p).

    raises  ValueError of fewer than two pairs, which have no interval
    """
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if len(difference) < 2:
        raise ValueError(f"a paired interval needs at least 2 pairs, not {len(difference)}")
    mean = float(difference.mean())
    if not np.ptp(difference):  # no spread: the test has no answer, the interval is a point
        return mean, mean, mean, 0.0 if mean else 1.0
    test = scipy.stats.ttest_1samp(difference, 0)
    low, high = test.confidence_interval(0.95)
    return mean, float(low), float(high), float(test.pvalue)


def holm(p_values):
    """Holm's adjusted p values (Scand. J. Statist. 6, 1979), in the order given: below .05, that test is rejected
    at a chance of 5% that any true hypothesis of the family is."""
    n, largest = len(p_values), 0.0
    adjusted = [0.0] * n
    for rank, i in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (n - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def compare_scores(names, scores, prompts, pairs):
    """Dicts of numbers: per scorer each folder's own, then those of folder i `against` folder j for (i, j) of pairs.

    The unit is the prompt: scores of its images are averaged first.

    scores   {scorer: [F, N]} of F folders
    """
    results = []
    for scorer, values in scores.items():
        means = [by_prompt(of_folder, prompts) for of_folder in values]                 # F of [P]
        for name, ours in zip(names, means):
            results.append({"images": name, "scorer": scorer, "against": None, "n": len(ours), "mean": ours.mean(),
                            "median": np.median(ours)})
        for i, j in pairs:
            numbers = hold_against(means[i], means[j])
            results.append({"images": names[i], "scorer": scorer, "against": names[j]} | numbers)
    return results


def adjust(results):
    """Adds p_holm, Holm's adjusted p over all comparisons of a table; how many these are."""
    compared = [result for result in results if result.get("p") is not None]
    for result, p in zip(compared, holm([result["p"] for result in compared])):
        result["p_holm"] = p
    return len(compared)


def cmmd(x, y, draws=0, seed=0):
    """Unbiased CMMD of x to y, and the 95% interval over `draws` bootstrap samples of both.

    1000 times the squared MMD of unit vectors under a Gaussian kernel of width 10: arXiv:2401.09603, with the
    U-statistic (lemma 6 of Gretton et al., 2012) for the paper's biased one. At this width it is close to 10
    times the squared distance of the two means: it does not see a collapse that keeps the mean. An image that
    is drawn twice in a bootstrap sample is not paired with itself; a sample of one image alone is left out.

    x, y     [N, E], [M, E] embeddings; normalised here, in float64
    returns  value, (low, high); the value may be negative where the two are alike. No interval, None, without
             draws or of fewer than four images
    """
    x = F.normalize(x.double(), dim=-1)
    y = F.normalize(y.double(), dim=-1)
    rng = np.random.default_rng(seed)
    u = draw_counts(len(x), draws, rng)                                                 # [1 + draws, N]
    v = draw_counts(len(y), draws, rng)                                                 # [1 + draws, M]
    pairs = u.sum(1) * v.sum(1)
    between = (u @ gaussian_kernel(x, y) * v).sum(1) / pairs
    values = 1000 * (mean_within(u, x) + mean_within(v, y) - 2 * between)               # [1 + draws]
    if draws == 0 or min(len(x), len(y)) < 4:
        return values[0].item(), None
    low, high = np.nanquantile(values[1:], TAILS)
    return values[0].item(), (float(low), float(high))


def published_cmmd(x, y):
    """CMMD by the V-statistic, as arXiv:2401.09603 and its code have it: an image is paired with itself, too.

    It is biased upward, the more the fewer images: near 0.2 at 30, 0.005 at 1,000. For tables beside published ones.
    """
    x = F.normalize(x.double(), dim=-1)
    y = F.normalize(y.double(), dim=-1)
    within = gaussian_kernel(x, x).mean() + gaussian_kernel(y, y).mean()
    return (1000 * (within - 2 * gaussian_kernel(x, y).mean())).item()


def draw_counts(n, draws, rng):
    """[1 + draws, n]: how often each of n images stands in the sample itself, once, and in bootstrap samples."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    return torch.from_numpy(np.concatenate([np.ones((1, n)), drawn])).double()


def gaussian_kernel(x, y):
    """[N, M] of unit vectors [N, E], [M, E]: |x - y|^2 = 2 - 2 cos."""
    return torch.exp((x @ y.T - 1) / BANDWIDTH ** 2)


def mean_within(counts, x):
    """The kernel's mean over pairs of different images, in samples that hold image i of x counts[:, i] times."""
    same = (counts * counts).sum(1)  # pairs of an image with itself, at which the kernel is 1
    total = (counts @ gaussian_kernel(x, x) * counts).sum(1)
    return (total - same) / (counts.sum(1) ** 2 - same)


def frechet(x, y):
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features [N, E], [M, E], in float64.

    arXiv:1706.08500. Strongly biased at small N: hold it against values of the same N alone.
    """
    x, y = x.double(), y.double()
    c_x, c_y = x.T.cov(), y.T.cov()                                                     # [E, E]
    # tr (C_x C_y)^(1/2) by a symmetric matrix with the same eigenvalues
    eigenvalues, vectors = torch.linalg.eigh(c_x)
    root = vectors * eigenvalues.clamp_min(0).sqrt() @ vectors.T                        # C_x^(1/2)
    cross = torch.linalg.eigvalsh(root @ c_y @ root).clamp_min(0).sqrt().sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return (means + c_x.trace() + c_y.trace() - 2 * cross).item()


def inception(device):
    """A function from PIL pictures to [N, 2048] features of FID, by torch-fidelity; None if not installed."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except Exception as error:
        raise InputError(f"style: the network of FID cannot be loaded ({brief(error)}); give --no-fid")

    def features(images):  # one by one, because a reference may hold any sizes
        rows = []
        for image in images:
            pixels = torch.tensor(np.array(image)).permute(2, 0, 1)                     # [3, H, W]
            rows.append(network(pixels[None].to(device))[0].cpu())
        return torch.cat(rows)

    return features


def style_statistics(device):
    """A function from PIL pictures to [N, D], whose squared distances are the style loss of arXiv:1508.06576.

    The Gram matrices G = F F^T / (c h w) of VGG-19's features F [c, h w] after relu1_1, 2_1, 3_1, 4_1, 5_1, side
    by side: sum over layers of 1/5 * 1/4 * |G - A|^2. The weights are torchvision's, the pictures what they see.
    """
    try:
        weights = torchvision.models.VGG19_Weights.DEFAULT
        layers = torchvision.models.vgg19(weights=weights).features.to(device).eval()
    except Exception as error:
        raise InputError(f"style: VGG-19 cannot be loaded ({brief(error)}); give --no-gram")
    preprocess = weights.transforms()

    @torch.inference_mode()
    def statistics(images):
        x, grams = torch.stack([preprocess(image) for image in images]).to(device), []
        for i, layer in enumerate(layers):
            x = layer(x)
            if i in GRAM_LAYERS:
                features = x.flatten(2)                                                 # [N, c, h w]
                gram = features @ features.mT / features[0].numel()                     # [N, c, c]
                grams.append(gram.flatten(1).cpu())
        return torch.cat(grams, dim=1) / (4 * len(GRAM_LAYERS)) ** 0.5                  # [N, D]

    return statistics


def mean_squared_distance(x, y):
    """Mean of |a - b|^2 over all pairs of two sets, each (mean vector [D], mean of the squared norms)."""
    (mean_x, square_x), (mean_y, square_y) = x, y
    return (square_x + square_y - 2 * mean_x @ mean_y).item()


def diversity(x):
    """Mean cosine distance of two different images of [N, E]: 0 where a model always draws the same."""
    n = len(x)
    x = F.normalize(x.double(), dim=-1)
    total = x.sum(0).square().sum()  # of the cosines of all N^2 pairs; N of them are of an image with itself
    return (1 - (total - n) / (n * (n - 1))).item()
