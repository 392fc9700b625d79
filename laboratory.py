"""The laboratory: SFT, Diffusion-DPO and RPO on the embedded task, in regimes that can tell them apart.

    python laboratory.py                    all runs, tables and the figure; killed, the same command goes on

Every run is `train.py --model tiny` with the values PINNED below, on 1,500 clean pairs, on 256 or 64 of them
or on 1,500 of which 20% have their labels swapped. The pairs picked and swapped follow from the run's
seed. Each method is tuned in each regime by the same small sweep, one seed, on one half of the held-out
prompts; its best setting is trained anew with three other seeds and reported on the other half. The ablations
of RPO look at the tuning half alone: what they decide is not decided on what is reported.

Of 256 samples per run: sketches, share in the preferred style; shape, share that shows the prompt's shape;
both, share with both, by which settings are chosen; CMMD, the distance to drawn sketches of the same prompts;
diversity, mean cosine distance of two samples. Shares are the judge's, the others the embedded CLIP's.
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

import torch
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import data
import evaluate
import resume
import stats
import tiny
import train

REGIMES = {"clean": (1500, 0.0), "256 pairs": (256, 0.0), "64 pairs": (64, 0.0), "20% swapped": (1500, 0.2)}
PINNED = dict(steps=120, batch_size=16, lr=2e-5, warmup=10, tau=0.5, group_size=8, similarity="both",
              weight_position="inside", group_noise="own")  # else a new default would be another experiment
STRENGTHS = [{"beta": beta} for beta in (30, 125, 500, 2000, 8000, 32000)]
SWEEP = {"sft": [{"lr": lr} for lr in (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 4e-4)], "dpo": STRENGTHS,
         "rpo": STRENGTHS}
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
COLUMNS = ("sketches", "shape", "both", "cmmd", "diversity")


def pairs(regime, seed, out):
    """The parquet file of a regime's pairs for one seed."""
    file = out / "pairs" / f"{regime}-{seed}.parquet".replace(" ", "-")
    if not file.exists():
        n, swapped = REGIMES[regime]
        rng, rows = random.Random(seed), tiny.pairs()
        rows = [rows[i] for i in rng.sample(range(len(rows)), n)]
        for k in rng.sample(range(n), round(swapped * n)):
            rows[k]["label_0"], rows[k]["label_1"] = rows[k]["label_1"], rows[k]["label_0"]
        import datasets

        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(part := file.with_suffix(f".{os.getpid()}"))
        part.replace(file)
    return file


def embed(pictures):
    """[n, E] embeddings of pictures [n, 3, 32, 32] in [0, 1], by the embedded CLIP."""
    clip = data.Clip("tiny")
    return clip.embed_images(torch.stack([clip.transform(image) for image in evaluate.to_pil(pictures)]))


def sketches(scenes, seed):
    """N drawn sketches of the scenes in turn, [N, 3, 32, 32] in [0, 1]."""
    rng = random.Random(seed)
    return torch.stack([pil_to_tensor(tiny.draw(scenes[i % len(scenes)], True, rng)) / 255 for i in range(N)])


def judged(pictures, scenes, seed):
    """The row of a table: what N pictures of the scenes in turn are, against drawings of the same scenes."""
    is_sketch, shape = tiny.judge(pictures * 2 - 1)
    right = shape == torch.tensor([tiny.SHAPES.index(scenes[i % len(scenes)][0]) for i in range(N)])
    x, y = embed(pictures), embed(sketches(scenes, seed=1000 + seed))
    shares = [values.float().mean().item() for values in (is_sketch, right, is_sketch & right)]
    return dict(zip(COLUMNS, [*shares, stats.cmmd(x, y)[0], stats.diversity(x)]))


def measure(model, half, seed):
    """The row of a pipeline: N samples of one half of the held-out prompts, at the preset's guidance."""
    scenes, pipe = PROMPTS[half], data.load_pipeline(str(model))
    noise = [data.keyed_generator(seed, half, i) for i in range(N)]
    prompts = [tiny.caption(scenes[i % len(scenes)]) for i in range(N)]
    latents = torch.cat([data.sample(pipe, prompts[i:i + 64], noise[i:i + 64], steps=10, guidance=3.0)
                         for i in range(0, N, 64)])
    return judged(data.decode_images(pipe.vae, latents), scenes, seed)


def run(out, loss, regime, seed, half, options):
    """Trains and measures once; its row is kept in a file, and a run that has one is not made again."""
    words = [f"{key}={value}" for key, value in options.items()]
    name = "_".join([loss, regime.replace(" ", "-"), *words, f"seed{seed}", half])
    folder, file = out / "runs" / name, out / "runs" / f"{name}.json"
    if not file.exists():
        began = time.time()
        folder.mkdir(parents=True, exist_ok=True)
        with open(out / "runs" / f"{name}.txt", "w") as log, contextlib.redirect_stdout(log), \
                contextlib.redirect_stderr(log):
            if loss in ("base", "floor"):
                row = (measure("tiny", half, seed) if loss == "base" else
                       judged(sketches(PROMPTS[half], seed=2000 + seed), PROMPTS[half], seed))
            else:
                train.main(["--loss", loss, "--data", str(pairs(regime, seed, out)), "--seed", str(seed),
                            "--sample_every", "0", "--save_every", "0", "--out", str(folder)]
                           + [word for key, value in (PINNED | options).items()
                              for word in (f"--{key}", str(value))])
                row = measure(folder / "model", half, seed)
        shutil.rmtree(folder)
        resume.write(file, json.dumps({"loss": loss, "regime": regime, "seed": seed, "half": half,
                                       "options": options, "seconds": time.time() - began} | row, indent=1))
    return json.loads(file.read_text())


def grouped(rows, *keys):
    """{values of the keys: rows that share them}, in the rows' order."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    return groups


def runs(out, pool, title, specs):
    """The rows of all specs (loss, regime, seed, half, options), made side by side, in their order."""
    jobs = [pool.submit(run, out, *spec) for spec in specs]
    try:
        for job in tqdm(concurrent.futures.as_completed(jobs), title, len(jobs)):
            job.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)  # else a failure would wait for all that is queued
        raise
    return [job.result() for job in jobs]


def cells(rows):
    """Mean and standard deviation over seeds, as the tables show them."""
    words = []
    for column in COLUMNS:
        values = torch.tensor([row[column] for row in rows], dtype=torch.float64)
        scale, shown = (100, "{:.1f} ± {:.1f}%") if column in COLUMNS[:3] else (1, "{:.3f} ± {:.3f}")
        words.append(shown.format(scale * values.mean(), scale * values.std()))
    return words


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def setting(options):
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in options.items())


def figure(file, base, rows):
    """Sketches against right shapes: the settings of the sweep small, the chosen ones' seeds large."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot

    def points(rows):
        return ([100 * row[column] for row in rows] for column in ("sketches", "shape"))

    panels, axes = pyplot.subplots(1, len(REGIMES), figsize=(13, 3.6), sharex=True, sharey=True)
    for regime, axis in zip(REGIMES, axes):
        for loss, *look in (("sft", "#777777", "s"), ("dpo", "#0072b2", "o"), ("rpo", "#d55e00", "^")):
            for half, size, alpha in (("tuning", 20, 0.4), ("report", 60, 0.9)):
                some = grouped(rows, "loss", "regime", "half").get((loss, regime, half), [])
                axis.scatter(*points(some), size, look[0], marker=look[1], alpha=alpha,
                             label=loss.upper() if half == "report" else None)
        axis.scatter(*points(base), 60, "k", marker="x", label="base")
        axis.set(title=regime, xlabel="sketches, %")
    axes[0].set_ylabel("right shape, %")
    axes[-1].legend(loc="lower right")
    panels.tight_layout()
    panels.savefig(file, dpi=100)


def main(argv=None):
    p = argparse.ArgumentParser(prog="laboratory.py", description=__doc__.split("\n\n")[0])
    p.add_argument("--out", default="out/laboratory", help="folder of the runs, the tables and the figure")
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="runs side by side, a thread each")
    args = p.parse_args(argv)
    out = Path(args.out)
    for part in ("pipeline", "clip", "judge"):
        tiny.part(part)
    with concurrent.futures.ProcessPoolExecutor(
            args.processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        frame = runs(out, pool, "base and floor", [
            (kind, "none", seed, "report", {}) for kind in ("base", "floor") for seed in SEEDS])
        tuned = runs(out, pool, "tuning", [
            (loss, regime, TUNING_SEED, "tuning", options)
            for regime in REGIMES for loss in SWEEP for options in SWEEP[loss]])
        best = {key: max(rows, key=lambda row: (row["both"], -row["cmmd"])) for key, rows in grouped(
            tuned, "regime", "loss").items()}
        reported = runs(out, pool, "reported", [
            (loss, regime, seed, "report", row["options"])
            for (regime, loss), row in best.items() for seed in SEEDS])
        beta = best[ABLATED, "rpo"]["options"]["beta"]
        ablated = runs(out, pool, "ablations of RPO", [
            ("rpo", ABLATED, seed, "tuning", {key: value for key, value in options.items() if key != "times"}
             | {"beta": beta * options.get("times", 1)}) for options in ABLATIONS for seed in SEEDS])
    head = ["", "setting", *COLUMNS]
    text = markdown(["regime", *head], [
        ["", kind, "", *cells(rows)] for (kind,), rows in grouped(frame, "loss").items()] + [
        [regime, loss.upper(), setting(best[regime, loss]["options"]), *cells(rows)]
        for (regime, loss), rows in grouped(reported, "regime", "loss").items()])
    text += f"\nAblations of RPO, {ABLATED}, tuning prompts\n\n" + markdown(["setting", *COLUMNS], [
        [setting(rows[0]["options"]), *cells(rows)] for rows in grouped(ablated, "options").values()])
    text += "\nThe sweep, tuning prompts, one seed\n\n" + markdown(["regime", *head], [
        [row["regime"], row["loss"].upper(), setting(row["options"]),
         *(f"{row[column]:.3f}" for column in COLUMNS)] for row in tuned])
    everything = frame + tuned + reported + ablated
    minutes = sum(row["seconds"] for row in everything) / 60
    text += f"\n{len(everything)} runs of {minutes:.0f} minutes in all, {args.processes} at a time\n"
    resume.write(out / "tables.md", text)
    figure(out / "frontier.png", frame[:len(SEEDS)], tuned + reported)
    print(text)


if __name__ == "__main__":
    main()
