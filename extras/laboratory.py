"""The laboratory: SFT, Diffusion-DPO and RPO on the embedded task, in regimes that can tell them apart.

    python -m extras.laboratory        all runs, tables and the figure; killed, the same command goes on

Every run is `train.py --model tiny` with the values PINNED below, on 1,500 clean pairs, on 256 or 64 of them
or on 1,500 of which 20% have their labels swapped. The pairs picked and swapped follow from the run's
seed. Each method is tuned in each regime by the same small sweep, one seed, on one half of the held-out
prompts; its best setting is trained anew with three other seeds and reported on the other half. The ablations
of RPO look at the tuning half alone: what they decide is not decided on what is reported.

Of 256 samples per run: sketches, share in the preferred style; shape, share that shows the prompt's shape;
both, share with both, by which settings are chosen; CMMD, the distance to drawn sketches of the same prompts;
diversity, mean cosine distance of two samples. Shares are the judge's, the others the embedded CLIP's.
What it found is in laboratory.md.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import common
import evaluate
import models
import stats
import train
from common import InputError
from data import Clip
from extras import tiny

REGIMES = {"clean": (1500, 0.0), "256 pairs": (256, 0.0), "64 pairs": (64, 0.0), "20% swapped": (1500, 0.2)}
PINNED = dict(steps=120, batch_size=16, lr=2e-5, warmup=10, tau=0.5, group_size=8, similarity="both",
              weight_position="inside", group_noise="own")  # else a new default would be another experiment
STRENGTHS = [{"beta": beta} for beta in (30, 125, 500, 2000, 8000, 32000)]
RATES = [{"lr": lr} for lr in (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 4e-4)]
SWEEP = {"sft": RATES, "dpo": STRENGTHS, "rpo": STRENGTHS}
SEEDS, TUNING_SEED = (0, 1, 2), 3
PROMPTS = {"tuning": tiny.HELD_OUT[:18], "report": tiny.HELD_OUT[18:]}
ABLATED = "20% swapped"  # the regime that leaves most to choose; labels of people are noisy, too
ABLATIONS = [  # of RPO at its best beta there; "times" multiplies that beta
    {}, {"tau": 0.05}, {"tau": 0.15}, {"tau": 2.0}, {"group_size": 2, "times": 0.25}, {"group_size": 2},
    {"group_size": 16}, {"group_size": 16, "times": 4}, {"weight_position": "outside", "times": 1 / 16},
    {"weight_position": "outside", "times": 1 / 4}, {"weight_position": "outside"}, {"similarity": "text"},
    {"similarity": "image"}, {"group_noise": "timestep"}, {"group_noise": "both"},
]
N = 256  # samples per run
SHARES = ("sketches", "shape", "both")
COLUMNS = (*SHARES, "cmmd", "diversity")
LOOKS = {"sft": ("#777777", "s"), "dpo": ("#0072b2", "o"), "rpo": ("#d55e00", "^")}  # color, marker of the figure


class Spec(NamedTuple):
    """What is trained, on what, and measured on which half of the held-out prompts."""

    loss: str  # or base, the model before training, or floor, drawn sketches instead of samples
    regime: str
    seed: int
    half: str
    options: dict  # of train.py, beside PINNED

    def name(self):
        words = [f"{key}={value}" for key, value in self.options.items()]
        return "_".join([self.loss, self.regime.replace(" ", "-"), *words, f"seed{self.seed}", self.half])


# A run


def pairs(regime, seed, out):
    """The parquet file of a regime's pairs for one seed."""
    import datasets

    name = f"{regime}-{seed}".replace(" ", "-")
    file = out / "pairs" / f"{name}.parquet"
    if file.exists():
        return file
    n, swapped = REGIMES[regime]
    rng = random.Random(seed)
    clean = tiny.pair_rows()
    rows = [clean[i] for i in rng.sample(range(len(clean)), n)]
    for k in rng.sample(range(n), round(swapped * n)):
        row = rows[k]
        row["label_0"], row["label_1"] = row["label_1"], row["label_0"]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")  # runs side by side may need the same file
    datasets.Dataset.from_list(rows).to_parquet(part)
    part.replace(file)
    return file


def in_turn(scenes):
    """N scenes: all of them in turn."""
    return [scenes[i % len(scenes)] for i in range(N)]


def sketches(scenes, seed):
    """N drawn sketches of the scenes in turn, [N, 3, 32, 32] in [0, 1]."""
    rng = random.Random(seed)
    return torch.stack([pil_to_tensor(tiny.draw(scene, True, rng)) / 255 for scene in in_turn(scenes)])


def samples(name, half, seed):
    """N samples of a model, [N, 3, 32, 32] in [0, 1], for one half of the held-out prompts in turn."""
    model = models.load_model(name)
    prompts = [tiny.caption(scene) for scene in in_turn(PROMPTS[half])]
    noise = [common.keyed_generator(seed, half, i) for i in range(N)]
    latents = []
    for start in range(0, N, 64):
        batch = slice(start, start + 64)
        latents.append(model.sample(prompts[batch], noise[batch], steps=10, guidance=3.0))
    return model.decode(torch.cat(latents))


def embed(pictures):
    """[n, E] embeddings of pictures [n, 3, 32, 32] in [0, 1], by the embedded CLIP."""
    clip = Clip("tiny")
    return clip.embed_images(torch.stack([clip.transform(image) for image in evaluate.to_pil(pictures)]))


def judge(pictures, scenes, seed):
    """The COLUMNS of N pictures of the scenes in turn, held against drawings of the same scenes."""
    is_sketch, shape = tiny.judge(pictures * 2 - 1)
    wanted = torch.tensor([tiny.SHAPES.index(scene[0]) for scene in in_turn(scenes)])
    is_right = shape == wanted
    embeddings = embed(pictures)
    reference = embed(sketches(scenes, seed=1000 + seed))
    distance, _ = stats.cmmd(embeddings, reference)
    return {"sketches": is_sketch.float().mean().item(),
            "shape": is_right.float().mean().item(),
            "both": (is_sketch & is_right).float().mean().item(),
            "cmmd": distance,
            "diversity": stats.diversity(embeddings)}


def train_and_sample(out, spec, folder):
    """The N pictures of a run; `folder` is for training."""
    if spec.loss == "base":
        return samples("tiny", spec.half, spec.seed)
    if spec.loss == "floor":
        return sketches(PROMPTS[spec.half], seed=2000 + spec.seed)
    data = pairs(spec.regime, spec.seed, out)
    argv = ["--loss", spec.loss, "--data", str(data), "--seed", str(spec.seed), "--out", str(folder)]
    argv += ["--sample_every", "0", "--save_every", "0"]
    for key, value in (PINNED | spec.options).items():
        argv += [f"--{key}", str(value)]
    train.main(argv)
    return samples(str(folder / "model"), spec.half, spec.seed)


def run(out, spec):
    """Trains and measures once; its row is kept in a file, and a run that has one is not made again."""
    name = spec.name()
    folder, file = out / "runs" / name, out / "runs" / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    with open(out / "runs" / f"{name}.txt", "w") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            pictures = train_and_sample(out, spec, folder)
            columns = judge(pictures, PROMPTS[spec.half], spec.seed)
    shutil.rmtree(folder)
    row = spec._asdict() | {"seconds": time.time() - began} | columns
    common.atomic_write(file, json.dumps(row, indent=1))
    return row


def run_all(out, pool, title, specs):
    """The rows of all specs, made side by side, in their order."""
    jobs = [pool.submit(run, out, spec) for spec in specs]
    try:
        for job in tqdm(concurrent.futures.as_completed(jobs), title, len(jobs)):
            job.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)  # else a failure would wait for all that is queued
        raise
    return [job.result() for job in jobs]


# The experiment


def grouped(rows, *keys):
    """{values of the keys: rows that share them}, in the rows' order."""
    groups = {}
    for row in rows:
        values = tuple(str(row[key]) for key in keys)
        groups.setdefault(values, []).append(row)
    return groups


def choose(tuned):
    """{(regime, loss): the best row of the sweep}: the most of both, then the nearest to the sketches."""
    return {key: max(rows, key=lambda row: (row["both"], -row["cmmd"]))
            for key, rows in grouped(tuned, "regime", "loss").items()}


def tuning_specs():
    return [Spec(loss, regime, TUNING_SEED, "tuning", options)
            for regime in REGIMES for loss in SWEEP for options in SWEEP[loss]]


def ablation_specs(beta):
    """RPO at its best beta, times what an ablation says, and what else it changes."""
    specs = []
    for ablation in ABLATIONS:
        options = {key: value for key, value in ablation.items() if key != "times"}
        options["beta"] = beta * ablation.get("times", 1)
        specs += [Spec("rpo", ABLATED, seed, "tuning", options) for seed in SEEDS]
    return specs


# Tables and the figure


def cells(rows):
    """Mean and standard deviation over seeds, as the tables show them."""
    words = []
    for column in COLUMNS:
        values = torch.tensor([row[column] for row in rows], dtype=torch.float64)
        mean, std = values.mean(), values.std()
        if column in SHARES:
            words.append(f"{100 * mean:.1f} ± {100 * std:.1f}%")
        else:
            words.append(f"{mean:.3f} ± {std:.3f}")
    return words


def setting(options):
    words = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in options.items()]
    return ", ".join(words)


def markdown(head, lines):
    text = ""
    for line in (head, ["---"] * len(head), *lines):
        text += "| " + " | ".join(map(str, line)) + " |\n"
    return text


def report_table(frame, reported):
    """Base and floor, then the chosen setting of each method in each regime."""
    lines = [["", kind, "", *cells(rows)] for (kind,), rows in grouped(frame, "loss").items()]
    for (regime, loss), rows in grouped(reported, "regime", "loss").items():
        lines.append([regime, loss.upper(), setting(rows[0]["options"]), *cells(rows)])
    return markdown(["regime", "", "setting", *COLUMNS], lines)


def ablation_table(ablated):
    groups = grouped(ablated, "options").values()
    return markdown(["setting", *COLUMNS], [[setting(rows[0]["options"]), *cells(rows)] for rows in groups])


def sweep_table(tuned):
    lines = []
    for row in tuned:
        values = [f"{row[column]:.3f}" for column in COLUMNS]
        lines.append([row["regime"], row["loss"].upper(), setting(row["options"]), *values])
    return markdown(["regime", "", "setting", *COLUMNS], lines)


def figure(file, base, rows):
    """Sketches against right shapes: the settings of the sweep small, the chosen ones' seeds large."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot

    def scatter(axis, rows, size, color, **look):
        x, y = ([100 * row[column] for row in rows] for column in ("sketches", "shape"))
        axis.scatter(x, y, size, color, **look)

    panels, axes = pyplot.subplots(1, len(REGIMES), figsize=(13, 3.6), sharex=True, sharey=True)
    groups = grouped(rows, "loss", "regime", "half")
    for regime, axis in zip(REGIMES, axes):
        for loss, (color, marker) in LOOKS.items():
            swept, chosen = (groups.get((loss, regime, half), []) for half in ("tuning", "report"))
            scatter(axis, swept, 20, color, marker=marker, alpha=0.4)
            scatter(axis, chosen, 60, color, marker=marker, alpha=0.9, label=loss.upper())
        scatter(axis, base, 60, "k", marker="x", label="base")
        axis.set(title=regime, xlabel="sketches, %")
    axes[0].set_ylabel("right shape, %")
    axes[-1].legend(loc="lower right")
    panels.tight_layout()
    panels.savefig(file, dpi=100)


def experiment(out, pool):
    """All rows: of base and floor, of the sweep, of the chosen settings, of the ablations."""
    specs = [Spec(kind, "none", seed, "report", {}) for kind in ("base", "floor") for seed in SEEDS]
    frame = run_all(out, pool, "base and floor", specs)
    tuned = run_all(out, pool, "tuning", tuning_specs())
    best = choose(tuned)
    specs = [Spec(loss, regime, seed, "report", row["options"])
             for (regime, loss), row in best.items() for seed in SEEDS]
    reported = run_all(out, pool, "reported", specs)
    beta = best[ABLATED, "rpo"]["options"]["beta"]
    ablated = run_all(out, pool, "ablations of RPO", ablation_specs(beta))
    return {"frame": frame, "tuned": tuned, "reported": reported, "ablated": ablated}


def parse_args(argv=None):
    def refuse(message):
        raise InputError(message)

    parser = argparse.ArgumentParser(prog="laboratory.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="out/laboratory", help="folder of the runs, the tables and the figure")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs side by side, a thread each")
    parser.error = refuse
    return parser.parse_args(argv)


def main(argv=None):
    with common.one_line_errors("laboratory.py"):
        args = parse_args(argv)
        out = Path(args.out)
        for name in ("pipeline", "clip", "judge"):  # before several processes ask for them
            tiny.part(name)
        with concurrent.futures.ProcessPoolExecutor(
                args.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            rows = experiment(out, pool)

        text = report_table(rows["frame"], rows["reported"])
        text += f"\nAblations of RPO, {ABLATED}, tuning prompts\n\n{ablation_table(rows['ablated'])}"
        text += f"\nThe sweep, tuning prompts, one seed\n\n{sweep_table(rows['tuned'])}"
        seconds = [row["seconds"] for kind in rows.values() for row in kind]
        text += f"\n{len(seconds)} runs of {sum(seconds) / 60:.0f} minutes in all, {args.processes} at a time\n"
        common.atomic_write(out / "tables.md", text)
        figure(out / "frontier.png", rows["frame"][:len(SEEDS)], rows["tuned"] + rows["reported"])
        print(text)


if __name__ == "__main__":
    main()
