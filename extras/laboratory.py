"""The laboratory: where is RPO better than Diffusion-DPO, and is it the weights? Findings are in laboratory.md.

    python -m extras.laboratory                 all runs, the tables and the figure; killed, the same command resumes
    python -m extras.laboratory --rows extras   tables and figure of the committed rows
    python -m extras.laboratory --again 3       repeat three random lots of each study: are the rows the same?

Two studies, vectors.py and drawings.py, train every one of ARMS in several regimes:

1. Every arm is tuned anew in every regime. All grids have the same size. Tuning has seeds and prompts of its own.
2. If the best setting lies at an edge of its grid, the grid grows there, once.
3. The setting that is best by a criterion is trained with the report's seeds and measured on the report's prompts. The
   criterion is the share of samples that are right, or a Frechet distance to what is wished.
4. A seed fixes the pairs, their order and the noise for all arms alike, so differences are paired by seed. The tables
   have t intervals, and Holm's correction over all differences of a table.
"""

import concurrent.futures
import csv
import itertools
import json
import math
import multiprocessing
import os
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import stats
from common import InputError, Parser, atomic_write, digest, one_line_errors, write_csv
from extras import drawings, vectors
from loss import LOSSES, dpo_loss

# Two losses beside the project's, written as a fork would add them


def shuffled_loss(err_w, err_l, ref_err_w, ref_err_l, beta):
    """DPO in which a winner meets the loser of another pair. It needs a whole batch, as vectors.py gives it."""
    return dpo_loss(err_w, err_l.roll(1), ref_err_w, ref_err_l.roll(1), beta)


def pointwise_loss(err_w, err_l, ref_err_w, ref_err_l, beta):
    """No contrast: L = mean_i -log sigmoid( -beta/2 D_i^w ) - log sigmoid( beta/2 D_i^l )."""
    chosen = -beta / 2 * (err_w - ref_err_w)
    rejected = -beta / 2 * (err_l - ref_err_l)
    return -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean(), {}


FURTHER_LOSSES = {"shuffled": shuffled_loss, "pointwise": pointwise_loss}


def begin_process():
    """Prepares a process. One thread, because the number of threads changes the bits; and the further losses."""
    torch.set_num_threads(1)
    LOSSES.update(FURTHER_LOSSES)


class Arm(NamedTuple):
    """A way of training.

    loss       a name in LOSSES, or "base" (the model before training), or "ideal" (the wished samples themselves)
    options    tau, similarity, weight_position, sft_weight
    pull       a factor for every beta of the grid: weights inside divide beta by the group size, about 8
    after_sft  whether a stage of SFT comes first
    """

    loss: str
    options: dict = {}
    pull: float = 1.0
    after_sft: bool = False


ARMS = {
    "base": Arm("base"),
    "ideal": Arm("ideal"),
    "SFT": Arm("sft"),
    "DPO": Arm("dpo"),
    "RPO tau .01": Arm("rpo", {"tau": 0.01}),
    "RPO tau .1": Arm("rpo", {"tau": 0.1}),
    "RPO tau .5": Arm("rpo", {"tau": 0.5}),
    "RPO uniform": Arm("rpo", {"tau": math.inf}),
    "RPO tau .5, text alone": Arm("rpo", {"tau": 0.5, "similarity": "text"}),
    "RPO tau .5, inside": Arm("rpo", {"tau": 0.5, "weight_position": "inside"}, pull=8.0),
    "one shuffled loser": Arm("shuffled"),
    "DPO + SFT .2": Arm("dpo", {"sft_weight": 0.2}),
    "pointwise": Arm("pointwise"),
    "SFT, then DPO": Arm("dpo", after_sft=True),
    "SFT, then RPO tau .5": Arm("rpo", {"tau": 0.5}, after_sft=True),
    "SFT, then RPO uniform": Arm("rpo", {"tau": math.inf}, after_sft=True),
    "SFT, then pointwise": Arm("pointwise", after_sft=True),
}
HELD = []  # pairs of arms for the table of sft_weight: each with and without the term, then RPO and DPO with it
for name, weight in itertools.product(("DPO", "RPO uniform", "RPO tau .5"), (0.1, 0.2, 0.5)):
    held = f"{name} + SFT {weight:.1f}".replace(" 0.", " .")
    ARMS.setdefault(held, Arm(ARMS[name].loss, ARMS[name].options | {"sft_weight": weight}))
    HELD.append((held, name))
HELD += [(held, held.replace(name, "DPO")) for held, name in HELD if name != "DPO"]
FRAME = ("base", "ideal")  # they have no settings to choose
STUDIES = {"vectors": vectors, "drawings": drawings}
TRIED = {"vectors": [*ARMS],
         "drawings": [*FRAME, "SFT", "DPO", "RPO uniform", "RPO tau .5", *dict(HELD)]}
QUESTIONS = {  # the table shows the first arm minus the second
    "do the weights help?": ("RPO tau .5", "RPO uniform"),
    "does a smaller tau help?": ("RPO tau .1", "RPO tau .5"),
    "do the images help the text?": ("RPO tau .5", "RPO tau .5, text alone"),
    "weights outside or inside?": ("RPO tau .5", "RPO tau .5, inside"),
    "all losers or one other?": ("RPO uniform", "one shuffled loser"),
    "all pairs or each alone?": ("RPO uniform", "pointwise"),
    "all pairs or DPO + SFT?": ("RPO uniform", "DPO + SFT .2"),
    "winners alone?": ("SFT", "RPO uniform"),
    "all pairs or the diagonal, after SFT?": ("SFT, then RPO uniform", "SFT, then DPO"),
    "does an SFT stage help DPO?": ("SFT, then DPO", "DPO"),
    "does an SFT stage help RPO?": ("SFT, then RPO uniform", "RPO uniform"),
}
DIGITS = {"right": 1, "distance": 2}  # the criteria, and the digits that a table shows of each
KEYS = ("regime", "arm", "rate", "beta", "seed", "half")
COLUMNS = ("right", "style", "content", "distance")


# The runs


def folder_of(study_name, out):
    """The folder of a study's rows, base models and pairs. Every change of the code leads to another folder."""
    root = Path(vectors.__file__).parent.parent
    sources = sorted([*root.glob("*.py"), *root.glob("extras/*.py")])
    return out / study_name / digest(b"".join(source.read_bytes() for source in sources))


def measure(study_name, arm_name, regime, settings, half, out):
    """The rows of settings [(rate, beta, seed)]. They run in lots; a lot that has its file is read, not run again."""
    folder = folder_of(study_name, out)
    size = STUDIES[study_name].SIDE_BY_SIDE
    rows = []
    for i in range(0, len(settings), size):
        lot = settings[i:i + size]
        file = folder / "rows" / f"{digest(repr([arm_name, regime, half, lot]))}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, json.dumps(run_lot(study_name, arm_name, regime, lot, half, folder)))
        rows += json.loads(file.read_text(encoding="utf-8"))
    return rows


def run_lot(study_name, arm_name, regime, lot, half, folder):
    """The rows of the settings that a study runs at once."""
    columns = STUDIES[study_name].run(ARMS[arm_name], regime, lot, half, folder)
    rows = []
    for (rate, beta, seed), numbers in zip(lot, columns):
        keys = dict(zip(KEYS, (regime, arm_name, rate, beta, seed, half)))
        rows.append(keys | {name: as_written(number) for name, number in numbers.items()})
    return rows


def as_written(number):
    """A number as the csv shows it, so that the csv leads to the same choices as the run."""
    return float(f"{number:.4g}")


def grid(rates, betas, seeds):
    return [(rate, beta, seed) for rate in rates for beta in betas for seed in seeds]


def beyond(values, chosen, count):
    """`count` more values at each end of a grid where one of `chosen` lies, spaced as the last two values are."""
    if len(values) < 2:
        return []
    values, further = sorted(values), []
    for edge, inner in ((values[0], values[1]), (values[-1], values[-2])):
        if edge in chosen:
            further += [as_written(edge * (edge / inner) ** k) for k in range(1, count + 1)]
    return further


def choose(rows, criterion):
    """The (rate, beta) with the best mean over the tuning seeds. The distance decides a tie, then the order."""
    of_setting = {}
    for row in rows:
        if row["half"] == "tuning":
            of_setting.setdefault((row["rate"], row["beta"]), []).append(row)

    def badness(setting):
        rows = of_setting[setting]
        right, distance = (sum(row[name] for row in rows) / len(rows) for name in ("right", "distance"))
        return (-right if criterion == "right" else distance), distance

    return min(of_setting, key=badness)


def run_cell(study_name, arm_name, regime, out):
    """The rows of an arm in a regime: the arm is tuned, its grid grows once, the chosen settings are reported."""
    study, arm = STUDIES[study_name], ARMS[arm_name]
    if arm_name in FRAME:
        return measure(study_name, arm_name, regime, grid([0.0], [0.0], study.REPORT_SEEDS), "report", out)
    rates, betas = (study.SFT_RATES, [0.0]) if arm.loss == "sft" else (study.RATES, study.BETAS)
    rates = [as_written(rate) for rate in rates]
    rows = measure(study_name, arm_name, regime, grid(rates, betas, study.TUNING_SEEDS), "tuning", out)

    chosen = [choose(rows, criterion) for criterion in study.CHOSEN_BY]
    more_rates = beyond(rates, [rate for rate, _ in chosen], study.FURTHER)
    more_betas = beyond(betas, [beta for _, beta in chosen], study.FURTHER)
    more = grid([*rates, *more_rates], [*betas, *more_betas], study.TUNING_SEEDS)
    more = [(rate, beta, seed) for rate, beta, seed in more if rate in more_rates or beta in more_betas]
    rows += measure(study_name, arm_name, regime, more, "tuning", out)

    chosen = dict.fromkeys(choose(rows, criterion) for criterion in study.CHOSEN_BY)
    settings = [(rate, beta, seed) for rate, beta in chosen for seed in study.REPORT_SEEDS]
    return rows + measure(study_name, arm_name, regime, settings, "report", out)


def run_study(name, out, pool):
    """All rows of a study. Its cells run side by side."""
    STUDIES[name].prepare(folder_of(name, out))
    cells = [(name, arm, regime, out) for arm in TRIED[name] for regime in STUDIES[name].REGIMES]
    jobs = [pool.submit(run_cell, *cell) for cell in reversed(cells)]  # short cells last: all processes end together
    try:
        for job in tqdm(concurrent.futures.as_completed(jobs), name, len(jobs)):
            job.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)  # a failure need not wait for the queue
        raise
    rows = []
    for job in reversed(jobs):
        rows += job.result()
    return rows


def check_again(out, count, names):
    """Repeats `count` random lots of each study from nothing. Their rows must be the same to the bit."""
    for name in names:
        files = sorted((folder_of(name, out) / "rows").glob("*.json"))
        if not files:
            raise InputError(f"{out} holds no rows of {name} that this code has measured")
        with tempfile.TemporaryDirectory(dir=out) as folder:
            STUDIES[name].prepare(Path(folder))
            for file in random.sample(files, min(count, len(files))):
                rows = json.loads(file.read_text(encoding="utf-8"))
                settings = [(row["rate"], row["beta"], row["seed"]) for row in rows]
                arm, regime, half = rows[0]["arm"], rows[0]["regime"], rows[0]["half"]
                repeated = run_lot(name, arm, regime, settings, half, Path(folder))
                verdict = "the same" if repeated == rows else "NOT the same"
                print(f"{name}, {regime}, {arm}, {half}: {len(rows)} rows, {verdict}", flush=True)


# Rows as csv


def write_rows(file, rows):
    rounded = [row | {name: f"{row[name]:.4g}" for name in ("rate", "beta", *COLUMNS)} for row in rows]
    write_csv(file, (*KEYS, *COLUMNS), rounded)


def read_rows(file):
    if not file.exists():
        raise InputError(f"{file}: there is no such file of rows")
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        row["seed"] = int(row["seed"])
        for name in ("rate", "beta", *COLUMNS):
            row[name] = float(row[name])
    return rows


# Tables


class Cells:
    """The rows of a study, by arm and regime."""

    def __init__(self, study_name, rows):
        self.study_name = study_name
        self.criteria = STUDIES[study_name].CHOSEN_BY
        self.arms = list(dict.fromkeys(row["arm"] for row in rows))
        self.regimes = list(dict.fromkeys(row["regime"] for row in rows))
        self.rows = {}
        for row in rows:
            self.rows.setdefault((row["arm"], row["regime"]), []).append(row)

    def chosen_by(self, criterion):
        """The criterion that chose the settings for a table of `criterion`: drawings have one for both tables."""
        return criterion if criterion in self.criteria else self.criteria[0]

    def setting(self, arm, regime, criterion):
        """The (rate, beta) chosen for a table of `criterion`."""
        if arm in FRAME:
            return 0.0, 0.0
        return choose(self.rows[arm, regime], self.chosen_by(criterion))

    def report_rows(self, arm, regime, criterion):
        """The reported rows of that setting, in the order of the seeds."""
        setting = self.setting(arm, regime, criterion)
        rows = [row for row in self.rows[arm, regime] if row["half"] == "report"]
        rows = [row for row in rows if (row["rate"], row["beta"]) == setting]
        return sorted(rows, key=lambda row: row["seed"])

    def reported(self, arm, regime, criterion):
        """[seeds] float64: the reported values of a criterion; shares are in percent."""
        scale = 100 if criterion == "right" else 1
        values = [scale * row[criterion] for row in self.report_rows(arm, regime, criterion)]
        return torch.tensor(values, dtype=torch.float64)

    def edges(self, arm, regime, criterion):
        """["lr at the edge", "beta at the edge"], each where the chosen setting lies at an end of the grown grid."""
        words = []
        for key, name, chosen in zip(("rate", "beta"), ("lr", "beta"), self.setting(arm, regime, criterion)):
            tuned = {row[key] for row in self.rows[arm, regime] if row["half"] == "tuning"}
            if len(tuned) > 1 and chosen in (min(tuned), max(tuned)):
                words.append(f"{name} at the edge")
        return words


def markdown(head, lines):
    text = ""
    for line in (head, ["---"] * len(head), *lines):
        text += "| " + " | ".join(map(str, line)) + " |\n"
    return text


def differences(cells, criterion, pairs):
    """For each pair (a, b) of arms the table's texts, one per regime: a - b, its interval, seeds where a is better.

    Bold: Holm's p over all these differences is below .05. Dagger: a setting of a or b lies at an edge of its grid.
    """
    digits = DIGITS[criterion]
    numbers, texts = [], []
    for a, b in pairs:
        for regime in cells.regimes:
            ours, theirs = cells.reported(a, regime, criterion), cells.reported(b, regime, criterion)
            mean, low, high, p = stats.paired_difference(ours, theirs)
            ahead = (ours > theirs).sum() if criterion == "right" else (ours < theirs).sum()
            edge = "†" if cells.edges(a, regime, criterion) or cells.edges(b, regime, criterion) else ""
            numbers.append((f"{mean:+.{digits}f}{edge}", p))
            texts.append(f"[{low:+.{digits}f}, {high:+.{digits}f}] {ahead}/{len(ours)}")
    adjusted = stats.holm([p for _, p in numbers])
    cells_of_table = []
    for (number, _), p, text in zip(numbers, adjusted, texts):
        cells_of_table.append(f"**{number}** {text}" if p < 0.05 else f"{number} {text}")
    width = len(cells.regimes)
    return [cells_of_table[i:i + width] for i in range(0, len(cells_of_table), width)]


def against_dpo(cells, criterion):
    """A table: base, ideal and DPO as mean ± deviation over the seeds, then every other arm minus DPO."""
    digits, lines = DIGITS[criterion], []
    for arm in (*FRAME, "DPO"):
        line = [arm]
        for regime in cells.regimes:
            values = cells.reported(arm, regime, criterion)
            line.append(f"{values.mean():.{digits}f} ± {values.std():.{digits}f}")
        lines.append(line)
    others = [arm for arm in cells.arms if arm == "DPO + SFT .2" or arm not in (*FRAME, "DPO", *dict(HELD))]
    for arm, texts in zip(others, differences(cells, criterion, [(arm, "DPO") for arm in others])):
        lines.append([f"{arm} - DPO", *texts])
    return markdown(["", *cells.regimes], lines)


def questions(cells, criterion):
    """The table of QUESTIONS for which a study has both arms."""
    asked = {text: pair for text, pair in QUESTIONS.items() if {*pair} <= {*cells.arms}}
    lines = []
    for (text, (a, b)), texts in zip(asked.items(), differences(cells, criterion, asked.values())):
        lines.append([text, f"{a} - {b}", *texts])
    return markdown(["question", "difference", *cells.regimes], lines)


def with_sft_weight(cells, criterion):
    """The table of HELD: what the term that holds the winner changes, as far as a study has both arms."""
    pairs = [pair for pair in HELD if {*pair} <= {*cells.arms}]
    lines = []
    for (a, b), texts in zip(pairs, differences(cells, criterion, pairs)):
        lines.append([f"{a} - {b}", *texts])
    return markdown(["difference", *cells.regimes], lines)


def chosen_settings(cells, criterion):
    """The table of each cell's chosen rate and beta, with the means of all columns."""
    lines = []
    for regime in cells.regimes:
        for arm in cells.arms:
            rate, beta = cells.setting(arm, regime, criterion)
            rows = cells.report_rows(arm, regime, criterion)
            values = []
            for column in COLUMNS:
                mean = sum(row[column] for row in rows) / len(rows)
                values.append(f"{mean:.3f}" if column == "distance" else f"{100 * mean:.1f}%")
            edges = "; ".join(cells.edges(arm, regime, criterion))
            setting = ["", ""] if arm in FRAME else [f"{rate:.2g}", f"{beta * ARMS[arm].pull:g}"]
            lines.append([regime, arm, *setting, edges, *values])
    return markdown(["regime", "arm", "lr", "beta", "", *COLUMNS], lines)


def tables(of_study):
    """{title: table in Markdown} of the rows {study: rows}."""
    texts = {}
    studies = [Cells(name, rows) for name, rows in of_study.items()]
    for cells in studies:
        for criterion in DIGITS:
            title = f"{cells.study_name}, {criterion}, chosen by {cells.chosen_by(criterion)}"
            texts[f"{title}: against DPO"] = against_dpo(cells, criterion)
            texts[f"{title}: questions"] = questions(cells, criterion)
            texts[f"{title}: sft_weight"] = with_sft_weight(cells, criterion)
    for cells in studies:
        for criterion in cells.criteria:
            texts[f"{cells.study_name}, settings chosen by {criterion}"] = chosen_settings(cells, criterion)
    return texts


def figure(file, of_study):
    """Each arm's share of right samples minus DPO's, with its interval: a panel per study and regime."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [(Cells(name, rows), regime) for name, rows in of_study.items() for regime in STUDIES[name].REGIMES]
    shown = [arm for arm in ARMS if arm not in (*FRAME, "DPO")]
    picture, axes = pyplot.subplots(1, len(panels), figsize=(16, 6), sharey=True)
    for (cells, regime), axis in zip(panels, axes):
        for y, arm in enumerate(shown):
            if arm in cells.arms:
                ours, dpo = (cells.reported(name, regime, "right") for name in (arm, "DPO"))
                mean, low, high, _ = stats.paired_difference(ours, dpo)
                color = "#d55e00" if arm.startswith("RPO") else "#444444"
                axis.plot([low, high], [y, y], color=color)
                axis.plot(mean, y, "o", color=color)
        axis.axvline(0, color="#0072b2", linewidth=1)
        axis.set_title(f"{cells.study_name}\n{regime}", fontsize=9)
        axis.set_xlabel("right, points above DPO", fontsize=8)
    axes[0].set_yticks(range(len(shown)), shown, fontsize=8)
    axes[0].invert_yaxis()
    picture.tight_layout()
    picture.savefig(file, dpi=80)


def parse_args(argv=None):
    parser = Parser(prog="laboratory.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="out/laboratory", help="for runs, rows, tables and figure [%(default)s]")
    parser.add_argument("--studies", nargs="+", default=[*STUDIES], choices=[*STUDIES], help="[all]")
    parser.add_argument("--rows", metavar="DIR", help="train nothing; make tables and figure of DIR/STUDY.csv")
    parser.add_argument("--again", type=int, metavar="N", help="repeat N random lots of each study in --out")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    return parser.parse_args(argv)


def main(argv=None):
    with one_line_errors("laboratory.py"):
        args = parse_args(argv)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        if args.again:
            begin_process()
            return check_again(out, args.again, args.studies)
        if not args.rows:
            with concurrent.futures.ProcessPoolExecutor(
                    args.processes, multiprocessing.get_context("spawn"), begin_process) as pool:
                for name in args.studies:
                    write_rows(out / f"{name}.csv", run_study(name, out, pool))
        of_study = {name: read_rows(Path(args.rows or out) / f"{name}.csv") for name in args.studies}
        text = ""
        for title, table in tables(of_study).items():
            text += f"{title}\n\n{table}\n"
        atomic_write(out / "tables.md", text)
        figure(out / "laboratory.png", of_study)
        print(text)


if __name__ == "__main__":
    main()
