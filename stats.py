"""The statistics of evaluate.py and of held-out pairs: win rates with intervals, paired tests, votes."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import scipy.stats

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
    if n > 1 and not np.allclose(sums, 0):
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


def count_votes(file, names, paths, page_rows):
    """Count the votes of a csv that this page exported: a dict of numbers for each two folders that met.

    paths  the folders' paths, by which the csv names them; names may be those of other folders, too
    """
    name_of = dict(zip(paths, names)) | {"": ""}
    outcomes = {}
    try:
        for vote in csv.DictReader(io.StringIO(Path(file).read_text(encoding="utf-8"), newline="")):
            first, other, winner = (name_of.get(vote[key]) for key in ("first", "other", "winner"))
            if not first or not other or winner not in (first, other, ""):
                raise ValueError(f"a vote is on {vote['first']} and {vote['other']}, not on {', '.join(paths)}")
            outcome = 0.5 if winner == "" else float(winner == other)
            outcomes.setdefault((other, first), []).append((outcome, page_rows[int(vote["index"])]["prompt"]))
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"--votes {file} cannot be read, or is of another page: {brief(error)}")
    counted = []
    for (other, first), of_pair in outcomes.items():
        values, prompts = zip(*of_pair)
        rate, low, high = rate_interval(values, prompts)
        counted.append({"images": other, "against": first, "n": len(values), "win_rate": rate,
                        "win_rate_95": (low, high), "wins": values.count(1), "ties": values.count(0.5),
                        "losses": values.count(0)})
    return counted


def categories_of(folders, column):
    """N texts: the value of a column beside each prompt, "" if it has none. InputError if the folders differ."""
    categories = []
    for i, of_folders in enumerate(zip(*(folder.columns for folder in folders))):
        values = {columns.get(column) for columns in of_folders} - {None, ""}
        if len(values) > 1:
            raise InputError(f"the {column} of image {i} is {' and '.join(sorted(values))} in different folders")
        categories.append(min(values, default=""))
    return categories
