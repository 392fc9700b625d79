"""The statistics of the evaluation against closed forms and simulated data whose truth is known."""

import numpy as np
import pytest
import scipy.stats
import torch

from extras.style import cmmd, diversity, frechet, published_cmmd
from stats import adjust, by_prompt, hold_against, win_rate


def test_a_win_rate_is_antisymmetric_and_ties_count_half():
    """Whoever is named first must not matter."""
    ours, theirs = np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 3, 2, 1, 5])
    assert win_rate(ours, theirs) == (0.6, 2, 2, 1)
    assert win_rate(theirs, ours) == (pytest.approx(1 - 0.6), 1, 2, 2)
    assert win_rate(ours, ours) == (0.5, 0, 5, 0)


@pytest.mark.parametrize("images_per_prompt", [1, 4])
def test_scores_of_a_prompt_count_once(images_per_prompt):
    """Copies of an image change no number."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 30))
    prompts = np.arange(30).repeat(images_per_prompt)
    means = [by_prompt(values.repeat(images_per_prompt), prompts) for values in (ours, theirs)]
    result, expected = hold_against(*means), hold_against(ours, theirs)
    for name in expected:
        assert result[name] == pytest.approx(expected[name])


def coverage(rate, n, ties, images, seeds, rng):
    """How often the 95% intervals of a win rate and of a paired difference hold the truth.

    A model wins `rate` of the prompts but for a share of ties, which count one half; with several images a prompt
    the prompt has a gain of its own, and the images scatter round it.
    """
    hits = np.zeros(2)
    spread = 0.5 if images > 1 else 0.0
    shift = scipy.stats.norm.ppf(rate) * (1 + spread**2 / images) ** 0.5
    prompts = np.arange(n).repeat(images)
    for _ in range(seeds):
        gain = rng.normal(shift, 1, size=n).repeat(images) + spread * rng.normal(size=n * images)
        gain *= (rng.random(n) >= ties).repeat(images)
        result = hold_against(by_prompt(gain, prompts), np.zeros(n))
        truths = (rate * (1 - ties) + ties / 2, shift * (1 - ties))
        for k, (name, truth) in enumerate(zip(("win_rate_95", "difference_95"), truths)):
            low, high = result[name]
            hits[k] += low <= truth <= high
    return hits / seeds


CASES = [(0.97, 30, 0, 1), (0.8, 30, 0, 4), pytest.param(0.6, 30, 0, 1, marks=pytest.mark.slow), pytest.param(0.9, 200, 0.3, 1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("rate, n, ties, images", CASES)
def test_intervals_cover_the_truth(rate, n, ties, images):
    """Nominally 95%; the whole grid is a slow test."""
    hits = coverage(rate, n, ties, images, 300, np.random.default_rng(0))
    assert all(0.9 <= hit <= (0.99 if not ties else 1) for hit in hits), hits


@pytest.mark.slow
def test_intervals_cover_the_truth_on_a_grid():
    """Never under 92%; at most 98.1% without ties, which Wilson's interval counts as whole trials."""
    rng, table = np.random.default_rng(1), {}
    for n in (30, 200):
        for rate in (0.5, 0.8, 0.97):
            for ties, images in ((0, 1), (0.3, 1), (0, 4), (0.3, 4)):
                table[n, rate, ties, images] = coverage(rate, n, ties, images, 2000, rng)
    for key, hits in table.items():
        print(key, *hits)
    for (n, rate, ties, images), hits in table.items():
        assert min(hits) >= 0.92 and (ties or max(hits) <= 0.981), (n, rate, ties, images, hits)


def test_holm_counts_all_comparisons_of_a_table():
    results = [{"p": 0.01}, {"p": None}, {"p": 0.04}, {}]
    assert adjust(results) == 2
    assert [result.get("p_holm") for result in results] == [0.02, None, 0.04, None]


def directions(n, mean, rng, width=8):
    return torch.from_numpy(rng.normal(size=(n, width)) + mean)


def test_cmmd_is_the_u_statistic_by_hand():
    """All pairs written out, without the diagonal."""
    rng = np.random.default_rng(0)
    x, y = directions(5, 0, rng), directions(7, 1, rng)
    u, v = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)

    def mean(a, b, same):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return np.mean([np.exp(-(a[i] - b[j]).square().sum().item() / (2 * 10**2)) for i, j in pairs])

    by_hand = 1000 * (mean(u, u, True) + mean(v, v, True) - 2 * mean(u, v, False))
    assert cmmd(x, y)[0] == pytest.approx(by_hand, abs=1e-9)


def test_the_published_cmmd_is_ours_and_its_bias():
    """By hand from the U-statistic: the diagonal's 1 in place of the mean of the others, once in n."""
    rng = np.random.default_rng(2)
    x, y = directions(9, 0, rng), directions(7, 0.4, rng)
    bias = 0
    for points in (x, y):
        points = torch.nn.functional.normalize(points.double(), dim=-1)
        n, kernel = len(points), torch.exp((points @ points.T - 1) / 100)
        mean_of_others = (kernel.sum() - n) / (n * n - n)
        bias += 1000 * (1 - mean_of_others.item()) / n
    assert published_cmmd(x, y) == pytest.approx(cmmd(x, y)[0] + bias, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_no_interval_of_three_images_and_none_that_is_nan(n):
    rng = np.random.default_rng(3)
    value, interval = cmmd(directions(n, 0, rng), directions(n, 0.5, rng), draws=500)
    assert np.isfinite(value) and (interval is None) == (n < 4)
    assert interval is None or np.isfinite(interval).all()


def test_cmmd_is_zero_on_average_where_the_distributions_are_equal():
    """The biased statistic would be positive: about 10 times 2 / n here."""
    rng = np.random.default_rng(0)
    values = [cmmd(directions(20, 0.5, rng), directions(20, 0.5, rng))[0] for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300) < 0.1
    assert min(values) < 0


@pytest.mark.slow
def test_cmmds_interval_covers_the_truth_between_different_distributions():
    """The truth is that of two very large samples."""
    rng, covered = np.random.default_rng(0), 0
    truth = cmmd(directions(4000, 0, rng), directions(4000, 0.7, rng))[0]
    for seed in range(100):
        low, high = cmmd(directions(80, 0, rng), directions(80, 0.7, rng), draws=200, seed=seed)[1]
        covered += low < truth < high
    assert 88 <= covered <= 99


def test_frechet_agrees_with_closed_forms():
    """Of one dimension, of commuting covariances, and of a set with itself."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(500, 3)))
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + 2) == pytest.approx(12, abs=1e-9)  # |m_x - m_y|^2 alone
    one, other = x[:, :1], 3 * x[:, 1:2] - 1
    by_hand = (one.mean() - other.mean()) ** 2 + (one.std() - other.std()) ** 2
    flat = torch.zeros_like(one)  # a second feature that never varies
    assert frechet(torch.cat([one, flat], 1), torch.cat([other, flat], 1)) == pytest.approx(
        by_hand.item(), rel=1e-9
    )
    by_hand = (x.mean(0) * 3).square().sum() + 9 * x.T.cov().trace()  # of x and 4 x: (4 - 1)^2 of each
    assert frechet(x, 4 * x) == pytest.approx(by_hand.item(), rel=1e-9)


def test_frechet_is_finite_for_fewer_images_than_features():
    """Rank-deficient covariances, as of 1,000 images and 2,048 features."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 64)))
    assert np.isfinite(frechet(x[:20], x[20:])) and frechet(x[:20], x[20:]) > 0


def test_diversity_sees_the_collapse_that_cmmd_does_not():
    """One image over and over has none; unrelated directions have about 1."""
    x = directions(200, 0, np.random.default_rng(0), width=512)
    assert diversity(x) == pytest.approx(1, abs=0.01)
    assert diversity(x[:1].repeat(50, 1)) == pytest.approx(0, abs=1e-12)
