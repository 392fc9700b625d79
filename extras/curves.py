"""The curves of held-out pairs: validation.png of one run or of several.

    python -m extras.curves out/sd15-rpo out/sd15-dpo       draws each run's validation.png anew

train.py draws a run's picture after every measurement.
"""

import json
import sys
from pathlib import Path

from common import InputError, one_line_errors


def plot_validation(out):
    """Draws validation.png, the curves of a run's held-out pairs, out of its log.jsonl."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line.get("validate/margin") is not None]
    steps = [line["step"] + 1 for line in lines]

    def curve(name, at_start):
        return [at_start, *(line[f"validate/{name}"] for line in lines)]

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    accuracy, margin, error = figure.subplots(1, 3)
    accuracy.fill_between([0, *steps], curve("accuracy_low", 0.5), curve("accuracy_high", 0.5), alpha=0.2)
    accuracy.plot([0, *steps], curve("accuracy", 0.5), linewidth=2, label="all, 95%")
    for quarter, noise in enumerate(("least noise", "", "", "most noise")):
        accuracy.plot([0, *steps], curve(f"accuracy_t{quarter}", 0.5), linewidth=0.8, label=f"t{quarter} {noise}")
    accuracy.set(xlabel="step", title="held-out accuracy")
    accuracy.legend(fontsize="small")
    margin.plot([0, *steps], curve("margin", 0), linewidth=2)
    margin.set(xlabel="step", title="held-out margin")
    for side, name in (("w", "winners"), ("l", "losers")):
        ratio = [line[f"validate/policy_{side}"] / line[f"validate/ref_{side}"] for line in lines]
        error.plot([0, *steps], [1, *ratio], linewidth=2, label=name)
    error.set(xlabel="step", title="held-out error / the reference's")
    error.legend(fontsize="small")
    for axis, at_start in ((accuracy, 0.5), (margin, 0), (error, 1)):
        axis.axhline(at_start, color="grey", linewidth=0.5)
    part = out / "validation.part"
    figure.savefig(part, dpi=120, format="png")
    part.replace(out / "validation.png")


def main():
    with one_line_errors("curves.py"):
        for out in map(Path, sys.argv[1:]):
            if not (out / "log.jsonl").exists():
                raise InputError(f"{out} holds no log.jsonl")
            plot_validation(out)
            print(out / "validation.png")


if __name__ == "__main__":
    main()
