"""The numbers of the evaluation: win rates and intervals of scores, distances of sets of images."""

import numpy as np
import torch
import torch.nn.functional as F


def win_rate(ours, theirs):
    """Of two equally long lists of scores: (rate, wins, ties, losses); a tie counts one half."""
    wins, ties = int(np.sum(ours > theirs)), int(np.sum(ours == theirs))
    return (wins + ties / 2) / len(ours), wins, ties, len(ours) - wins - ties


def bootstrap(values, prompts, draws=10_000, seed=0):
    """The 95% percentile interval of a mean of `values` [N] over prompts, resampled with all their images."""
    _, prompt_of = np.unique(prompts, return_inverse=True)
    total, count = np.bincount(prompt_of, values), np.bincount(prompt_of)                   # [P]
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, draws, 100):  # a hundred at a time, for memory
        picked = rng.integers(len(total), size=(100, len(total)))
        means.append(total[picked].sum(1) / count[picked].sum(1))
    return tuple(np.quantile(np.concatenate(means), (0.025, 0.975)).tolist())


def cmmd(x, y, draws=0, seed=0):
    """Unbiased CMMD of x to y, and the 95% interval over `draws` bootstrap samples of both.

    1000 times the squared MMD of unit vectors under a Gaussian kernel of width 10: arXiv:2401.09603, with the
    U-statistic (lemma 6 of Gretton et al., 2012) for the paper's biased one. At this width it is close to 10
    times the squared distance of the two means: it does not see a collapse that keeps the mean. An image that
    is drawn twice in a bootstrap sample is not paired with itself.

    x, y     [N, E], [M, E] embeddings; normalised here, in float64
    returns  value, (low, high); the value may be negative where the two are alike
    """
    x, y = (F.normalize(z.double(), dim=-1) for z in (x, y))
    rng = np.random.default_rng(seed)

    def counts(n):  # the sample itself, then how often each image is drawn
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws)
        return torch.from_numpy(np.concatenate([np.ones((1, n)), drawn])).double()      # [1 + draws, n]

    def kernel(a, b):  # |a - b|^2 = 2 - 2 cos
        return torch.exp((a @ b.T - 1) / 10 ** 2)

    def within(u, z):  # the mean over pairs of different images; k(z, z) = 1
        return ((u @ kernel(z, z) * u).sum(1) - (u * u).sum(1)) / (u.sum(1) ** 2 - (u * u).sum(1))

    u, v = counts(len(x)), counts(len(y))
    between = (u @ kernel(x, y) * v).sum(1) / (u.sum(1) * v.sum(1))
    values = 1000 * (within(u, x) + within(v, y) - 2 * between)
    return values[0].item(), tuple(np.quantile(values[1:], (0.025, 0.975)).tolist()) if draws else None


def frechet(x, y):
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features [N, E], [M, E], in float64.

    arXiv:1706.08500. Strongly biased at small N: hold it against values of the same N alone.
    """
    x, y = x.double(), y.double()
    c_x, c_y = x.T.cov(), y.T.cov()                                                     # [E, E]
    values, vectors = torch.linalg.eigh(c_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_y @ root).clamp_min(0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + c_x.trace() + c_y.trace() - 2 * cross).item()


def diversity(x):
    """Mean cosine distance of two different images of [N, E]: 0 where a model always draws the same."""
    total = F.normalize(x.double(), dim=-1).sum(0).square().sum()
    return (1 - (total - len(x)) / (len(x) * (len(x) - 1))).item()
