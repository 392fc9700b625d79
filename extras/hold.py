"""Does --sft_weight hold the winner? The embedded flow model at a beta so small that a run unlearns.

    python -m extras.hold                     24 runs of train.py, half an hour on two cores
    python -m extras.hold --rows extras       the table alone, from the committed rows

The preset tiny-flow has beta 20. These runs of RPO have beta 10, and train all weights or an adapter, with four weights
of the term and three seeds. The command writes hold.csv, a row per run, to --out and prints the table. If it is killed,
the same command resumes with the missing runs.
"""

import concurrent.futures
import csv
import itertools
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import torch

import common
import train
from extras import tiny

TRAINS = {"all weights": ["--lora_rank", "0", "--lr", "3e-4"], "adapter": []}
WEIGHTS, SEEDS = (0.0, 0.1, 0.2, 0.5), (0, 1, 2)
KEYS = ("trains", "sft_weight", "seed")
COLUMNS = ("winner", "loser", "accuracy", "sketches", "shapes")


def settings():
    """All runs, as (trains, sft_weight, seed)."""
    return [*itertools.product(TRAINS, WEIGHTS, SEEDS)]


def measure_run(setting, out):
    """Trains a run and returns its row.

    winner, loser     mean error of the held-out winners and losers, divided by the reference's
    accuracy          held-out accuracy
    sketches, shapes  the judge's shares of 96 samples
    """
    trains, weight, seed = setting
    run = out / "-".join(map(str, setting)).replace(" ", "-")
    train.main(["--model", "tiny-flow", "--beta", "10", "--sft_weight", str(weight), "--seed", str(seed), *TRAINS[trains],
                "--validate", "tiny", "--validate_every", "120", "--validate_pairs", "256", "--sample_every", "0",
                "--out", str(run)])
    *_, last = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    last = {name.removeprefix("validate/"): value for name, value in json.loads(last).items()}
    judged = tiny.measure(tiny.load(run / "model"))
    shutil.rmtree(run)
    return dict(zip(KEYS, setting)) | {
        "winner": last["policy_w"] / last["ref_w"], "loser": last["policy_l"] / last["ref_l"],
        "accuracy": last["accuracy"], "sketches": judged["style"], "shapes": judged["shape"]}


def read_rows(file):
    """{setting: row} of hold.csv."""
    with open(file, newline="", encoding="utf-8") as stream:
        rows = [*csv.DictReader(stream)]
    for row in rows:
        row |= {name: float(row[name]) for name in ("sft_weight", *COLUMNS)} | {"seed": int(row["seed"])}
    return {tuple(row[key] for key in KEYS): row for row in rows}


def table(rows):
    """Markdown: a line per way of training and weight, with the values of the seeds."""
    text = "|trains|sft_weight|winners' error|losers' error|held-out accuracy|sketches|right shapes|\n"
    text += "|---" * 7 + "|\n"
    for trains, weight in itertools.product(TRAINS, WEIGHTS):
        of_seeds = [rows[trains, weight, seed] for seed in SEEDS]
        cells = ["/".join(f"{row[name]:.2f}" for row in of_seeds) for name in ("winner", "loser")]
        for name in ("accuracy", "sketches", "shapes"):
            cells.append("/".join(f"{100 * row[name]:.0f}" for row in of_seeds) + "%")
        text += f"|{trains}|{weight:g}|" + "|".join(cells) + "|\n"
    return text


def parse_args(argv=None):
    parser = common.Parser(prog="hold.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="out/hold", help="folder for the rows [%(default)s]")
    parser.add_argument("--rows", metavar="DIR", help="train nothing; print the table of DIR/hold.csv")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    return parser.parse_args(argv)


def main(argv=None):
    with common.one_line_errors("hold.py"):
        args = parse_args(argv)
        file = Path(args.rows or args.out) / "hold.csv"
        if args.rows and not file.exists():
            raise common.InputError(f"{file}: there is no such file of rows")
        rows = read_rows(file) if file.exists() else {}
        missing = [] if args.rows else [setting for setting in settings() if setting not in rows]
        file.parent.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ProcessPoolExecutor(
                args.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            runs = {pool.submit(measure_run, setting, file.parent): setting for setting in missing}
            for job in concurrent.futures.as_completed(runs):
                rows[runs[job]] = job.result()
                common.write_csv(file, (*KEYS, *COLUMNS), [rows[setting] for setting in settings() if setting in rows])
        lacking = [setting for setting in settings() if setting not in rows]
        if lacking:
            raise common.InputError(f"{file} lacks {len(lacking)} runs; the command without --rows resumes with them")
        print(table(rows))


if __name__ == "__main__":
    main()
