"""Preference pairs out of scored images: the work behind `python evaluate.py pairs`.

    python evaluate.py pairs images/base images/rpo --by pickscore --min_gap 0.5 --out PAIRS
"""

import collections
import itertools
import math
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from tqdm import tqdm

from common import InputError, keyed_generator
from report import comparable_scores, open_folders, refuse_twice, writable_file


def add_options(add):
    add("--by", required=True, metavar="A[+B...]", help="scorers; with several the majority decides")
    add("--min_gap", default="0", metavar="G[+H...]", help="drop near-ties, whose scores differ by less [%(default)s]")
    add("--all", action="store_true", help="pair every two images of a prompt, not only the best and the worst")
    add("--out", required=True, metavar="PAIRS", help="a .parquet file, or a new folder for one")


def make_pairs(args):
    """Make preference pairs, in Pick-a-Pic's schema, of the best and the worst image of each prompt."""
    scorers = args.by.split("+")
    min_gaps = parse_gaps(args.min_gap, scorers)
    out = new_pairs_file(args.out)
    folders = open_folders(args.folders)
    refuse_twice(folders)
    _, scores = comparable_scores(folders, scorers)
    scores = np.stack([np.concatenate([*scores[name].values()]) for name in scorers], 1)    # [all images, S]
    files = [file for folder in folders for file in folder.files]
    images_of_prompt = collections.defaultdict(list)
    for i, prompt in enumerate(prompt for folder in folders for prompt in folder.prompts):
        images_of_prompt[prompt].append(i)

    chosen, faults = [], collections.Counter()
    for prompt, images in images_of_prompt.items():
        if len(images) < 2:
            faults["prompts with one image"] += 1
        for better, worse, fault in ranked_pairs(scores[images], min_gaps, args.all):
            if fault:
                faults[fault] += 1
            else:
                chosen.append((prompt, images[better], images[worse]))
    dropped = "".join(f", {count} {fault}" for fault, count in faults.items())
    if not chosen:
        raise InputError(f"pairs: none is left of {len(images_of_prompt)} prompts{dropped}")
    write_pairs(out, chosen, files, scores, scorers)
    used = len({prompt for prompt, _, _ in chosen})
    print(f"{out}: {len(chosen)} pairs of {used} of {len(images_of_prompt)} prompts{dropped}")


def new_pairs_file(out):
    """The path of the parquet file to write. InputError if it exists, or the folder --out holds anything."""
    is_file = str(out).endswith(".parquet")
    file = writable_file(out if is_file else Path(out) / "train.parquet")
    found = [file] if is_file else sorted({*file.parent.glob("[!.]*")} - {file.with_suffix(".part")})
    if any(path.exists() for path in found):
        raise InputError(f"pairs: --out {out} holds {found[0].name} already; remove it, or give another --out")
    return file


def parse_gaps(text, scorers):
    """The minimum gaps of S scorers, [S] or [1], from G1+G2+... or one number for all."""
    try:
        gaps = np.array(text.split("+"), dtype=float)
    except ValueError:
        gaps = np.array([math.nan])
    if len(gaps) not in (1, len(scorers)) or not np.all((gaps >= 0) & (gaps < math.inf)):
        raise InputError(f"pairs: --min_gap {text} must be a number, or one for each of {'+'.join(scorers)}")
    return gaps


def write_pairs(file, chosen, files, scores, scorers):
    """Write [(prompt, number of the better image, of the worse)] as a parquet file, whole or not at all.

    Beside Pick-a-Pic's columns it has the images' files, their scores, and the winner's lead by each scorer.
    """
    import pyarrow
    import pyarrow.parquet

    part, writer = file.with_suffix(".part"), None
    for start in tqdm(range(0, len(chosen), 64), "pairs", unit="64 pairs"):  # 64 pairs are in memory
        rows = []
        for number, (prompt, better, worse) in enumerate(chosen[start:start + 64], start):
            # The winner's side is random, so that training cannot learn it.
            winner_side = int(torch.randint(2, (), generator=keyed_generator("side", number)))
            sides = (worse, better) if winner_side else (better, worse)
            row = {"caption": prompt, "label_0": 1.0 - winner_side, "label_1": float(winner_side), "has_label": True}
            for side, image in enumerate(sides):
                row |= {f"jpg_{side}": files[image].read_bytes(), f"file_{side}": str(files[image])}
                row |= {f"{name}_{side}": score for name, score in zip(scorers, scores[image])}
            row |= {f"{name}_gap": gap for name, gap in zip(scorers, scores[better] - scores[worse])}
            rows.append(row)
        stored = pyarrow.Table.from_pylist(rows)
        writer = writer or pyarrow.parquet.ParquetWriter(part, stored.schema)
        writer.write_table(stored)
    writer.close()
    part.replace(file)


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
