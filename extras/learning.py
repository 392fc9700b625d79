"""Is it learning? Curves of a healthy run and of four that are not, and a table of beta x learning rate.

    python -m extras.learning                   ten runs of train.py, about fifteen minutes on two cores
    python -m extras.learning --rows extras     the figure and the table alone, from the committed rows

Every run trains the embedded task by RPO, with the preset's values except those that its name says. Held-out pairs are
measured every ten steps. The command writes learning.csv (a row per measurement) and learning.png to --out and prints
the table. If it is killed, the same command resumes with the missing runs.
"""

import csv
import json
import shutil
from pathlib import Path

import common
import train
from common import InputError
from extras import tiny
from options import PRESETS

BETA, LR = PRESETS["tiny"]["beta"], PRESETS["tiny"]["lr"]
FACTORS = (0.1, 1, 10)  # the table multiplies beta and the learning rate by these
PAIRS = 256  # held-out pairs to measure
SHOWN = {  # the curves of the figure: (factor of beta, factor of the learning rate, are the labels swapped)
    "healthy": (1, 1, False),
    "beta / 10": (0.1, 1, False),
    "beta x 10": (10, 1, False),
    "learning rate x 10": (1, 10, False),
    "labels swapped": (1, 1, True),
}
MEASURED = ("accuracy", "accuracy_low", "accuracy_high", "margin", "policy_w", "policy_l", "ref_w", "ref_l")
PANELS = {"accuracy": "held-out accuracy", "margin": "held-out margin", "winner": "winners' error / the reference's"}


def settings():
    """All runs: those of the figure, then those of the table; each once."""
    table = [(beta, lr, False) for beta in FACTORS for lr in FACTORS]
    return list(dict.fromkeys([*SHOWN.values(), *table]))


def swap_labels(folder):
    """Writes the embedded pairs with swapped labels as a parquet file to a folder; returns the folder."""
    import datasets

    pairs = datasets.load_dataset("parquet", data_files=str(tiny.part("pairs") / "train.parquet"), split="train")
    folder.mkdir(parents=True, exist_ok=True)
    pairs.rename_columns({"label_0": "label_1", "label_1": "label_0"}).to_parquet(folder / "train.parquet")
    return str(folder)


def measure_run(setting, out):
    """Trains a run and returns a row per measurement. Each row also has the judge's verdict on the final model."""
    beta, lr, swapped = setting
    run = out / f"beta-{beta:g}-lr-{lr:g}{'-swapped' if swapped else ''}"
    data = swap_labels(out / "swapped") if swapped else "tiny"
    train.main(["--beta", f"{beta * BETA:g}", "--lr", f"{lr * LR:g}", "--data", data, "--out", str(run),
                "--validate", "tiny", "--validate_every", "10", "--validate_pairs", str(PAIRS), "--sample_every", "0"])
    judged = tiny.measure(tiny.load(run / "model"))
    rows = []
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "validate/accuracy" in record:
            row = {"beta": beta, "lr": lr, "swapped": float(swapped), "step": record["step"] + 1}
            row |= {name: record[f"validate/{name}"] for name in MEASURED}
            rows.append(row | {"sketches": judged["style"], "shapes": judged["shape"]})
    shutil.rmtree(run)
    return rows


def read_rows(folder):
    """The rows of a folder's learning.csv; all values are floats."""
    file = Path(folder) / "learning.csv"
    try:
        with open(file, newline="") as stream:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    except (OSError, ValueError) as error:
        raise InputError(f"--rows {file} cannot be read: {common.brief(error)}")


def rows_of(rows, setting):
    """The rows of one run, in the order of its steps."""
    return [row for row in rows if (row["beta"], row["lr"], row["swapped"]) == setting]


def table(rows):
    """Beta x learning rate as Markdown: held-out accuracy and margin after the last step; sketches and right shapes."""
    lines = ["| | " + " | ".join(f"learning rate {lr * LR:g}" for lr in FACTORS) + " |", "|---" * 4 + "|"]
    for beta in FACTORS:
        cells = []
        for lr in FACTORS:
            last = rows_of(rows, (beta, lr, False))[-1]
            cells.append(f"{last['accuracy']:.0%}, {last['margin']:.1f}; {last['sketches']:.0%}, {last['shapes']:.0%}")
        lines.append(f"| beta {beta * BETA:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows, file):
    """The curves of SHOWN: accuracy with its interval, margin, winners' error divided by the reference's."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 3.4), layout="constrained")
    axes = dict(zip(PANELS, picture.subplots(1, 3)))
    for name, setting in SHOWN.items():
        of_run = rows_of(rows, setting)
        steps = [0, *(row["step"] for row in of_run)]
        curves = {
            "accuracy": [0.5, *(row["accuracy"] for row in of_run)],
            "margin": [0, *(row["margin"] for row in of_run)],
            "winner": [1, *(row["policy_w"] / row["ref_w"] for row in of_run)],
        }
        for panel, values in curves.items():
            axes[panel].plot(steps, values, marker=".", label=name)
        low, high = ([row[f"accuracy_{end}"] for row in of_run] for end in ("low", "high"))
        axes["accuracy"].fill_between(steps[1:], low, high, alpha=0.15)
    for panel, title in PANELS.items():
        axes[panel].set(title=title, xlabel="step")
    axes["margin"].set_yscale("symlog", linthresh=1)
    axes["winner"].set_yscale("log")
    axes["accuracy"].legend(fontsize="small")
    picture.savefig(file, dpi=120)


def parse_args(argv=None):
    parser = common.Parser(prog="learning.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="out/learning", help="folder for the rows and the figure [%(default)s]")
    parser.add_argument("--rows", metavar="DIR", help="train nothing; use the rows of DIR/learning.csv")
    return parser.parse_args(argv)


def main(argv=None):
    with common.one_line_errors("learning.py"):
        args = parse_args(argv)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        if args.rows:
            rows = read_rows(args.rows)
        else:
            rows = read_rows(out) if (out / "learning.csv").exists() else []
            for setting in settings():
                if not rows_of(rows, setting):
                    rows += measure_run(setting, out)
                    common.write_csv(out / "learning.csv", rows[0], rows)
        lacking = [setting for setting in settings() if not rows_of(rows, setting)]
        if lacking:
            raise InputError(f"{args.rows}/learning.csv lacks {len(lacking)} runs; the command without --rows makes them")
        figure(rows, out / "learning.png")
        print(table(rows))


if __name__ == "__main__":
    main()
