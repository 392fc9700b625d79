"""Drawings, the second task of the laboratory: the embedded task, made so that a preference can be won at a price.

The scenes and captions are those of tiny.py. The shapes vary more in size, place and tilt. The wished style is an
outline in the shape's color on the same background, so a run can lose all that the caption names: shape, color and
background. The denoiser has a quarter of the parameters of tiny's. A run is one of train.py, on 600 pairs that
encode.py has encoded. It draws 180 samples, which a judge rates:

    style     the share of outlines
    content   the share with the right shape, color and background
    right     the share with both
    distance  Frechet distance of the judge's features to outlines of the same prompts; lost diversity costs, too
"""

import contextlib
import functools
import random
import tempfile
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file

import common
import encode
import train
from extras import tiny, tiny_build
from extras.style import frechet
from extras.tiny import share
from loading import load_model

REGIMES = ("clean", "30% swapped")
TUNING_SEEDS, REPORT_SEEDS = range(20, 21), range(8)
CHOSEN_BY = ("right",)
RATES = (3e-5, 9e-5)
BETAS = (250.0, 1000.0, 4000.0)
SFT_RATES = tuple(3e-5 * 2 ** k for k in range(len(RATES) * len(BETAS)))  # as many settings as the other arms have
SIDE_BY_SIDE = 1  # settings in one call of run()
FURTHER = 1  # values by which the grid grows at an edge
TRAINING = {"vae": 800, "unet": 1600, "judge": 900}  # steps of each network that every run begins with
STEPS, BATCH, GROUP, WARMUP = 100, 16, 8, 10
PAIRS = 600
SAMPLES, SAMPLE_STEPS, GUIDANCE = 180, 10, 3.0
HALVES = {"tuning": tiny.HELD_OUT[:18], "report": tiny.HELD_OUT[18:]}
NAMED = [tiny.SHAPES, tuple(tiny.COLORS), tuple(tiny.COLORS)]  # what a caption names: shape, color, background
HEADS = (2, *map(len, NAMED))  # the judge's classes: filled or outline, then what a caption names


# Drawings


def draw(scene, is_outline, rng):
    """A PIL picture of a scene (shape, color, background), 32x32. `rng` gives the shape its place, size and tilt."""
    _, color, back = scene
    pen = (tiny.COLORS[color], 12) if is_outline else None
    return tiny.draw_scene(scene, tiny.COLORS[back], pen, rng, radii=(0.24, 0.4), tilt=0.2, shift=0.1)


def drawings(scenes, outlines, seed):
    """Pixels [n, 3, 32, 32] in [-1, 1] of n scenes, and the judge's answers to them, [n, 4] int64.

    outlines  the share of outlines
    """
    rng = random.Random(seed)
    is_outline = [rng.random() < outlines for _ in scenes]
    pixels = tiny.to_pixels([draw(scene, outline, rng) for scene, outline in zip(scenes, is_outline)])
    return pixels, torch.cat([torch.tensor(is_outline).long()[:, None], contents(scenes)], dim=1)


def contents(scenes):
    """[n, 3] int64: the indices of each scene's shape, color and background."""
    return torch.tensor([[names.index(word) for names, word in zip(NAMED, scene)] for scene in scenes])


def random_scenes(n, seed):
    """n scenes (shape, color, background)."""
    rng = random.Random(seed)
    return [rng.choice(tiny.SCENES) for _ in range(n)]


def scenes_of_samples(half):
    """The scenes of the 180 samples: those of a half, one after the other, again and again."""
    scenes = HALVES[half]
    return [scenes[i % len(scenes)] for i in range(SAMPLES)]


# The parts, kept like those of the embedded task


def build_pipeline(folder):
    scenes = random_scenes(min(8192, 128 * TRAINING["unet"]), seed=11)  # a test's few steps need fewer drawings
    pixels, _ = drawings(scenes, 1 / 3, seed=12)
    vae = tiny.make_vae()
    tiny_build.train_vae(vae, pixels, TRAINING["vae"])
    latents = tiny_build.encode(vae, pixels)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    pipe = tiny.make_pipeline(vae, channels=(32, 64))
    tiny_build.train_unet(pipe, latents, [tiny.caption(scene) for scene in scenes], TRAINING["unet"])
    pipe.save_pretrained(folder)


def build_judge(folder):
    scenes = random_scenes(min(8192, 128 * TRAINING["judge"]), seed=13)
    pixels, targets = drawings(scenes, 0.5, seed=14)
    network = tiny.judge_network(HEADS)
    tiny_build.train_judge(network, HEADS, pixels, targets, TRAINING["judge"])
    save_file(network.state_dict(), folder / "judge.safetensors")


def part(name):
    """The folder of "pipeline" or "judge", built when it is first asked for."""
    return tiny.part(name, {"pipeline": build_pipeline, "judge": build_judge}[name])


@torch.no_grad()
def judge(pixels):
    """pixels [N, 3, 32, 32] in [-1, 1] -> is it an outline [N], (shape, color, background) [N, 3], features [N, 64]."""
    network = tiny.judge_network(HEADS).eval()
    network.load_state_dict(load_file(part("judge") / "judge.safetensors"))
    features = network[:-2](pixels)                                                     # [N, 64, 4, 4]
    logits = network[-2:](features).split(HEADS, dim=1)
    is_outline, *content = [head.argmax(1) for head in logits]
    return is_outline, torch.stack(content, dim=1), features.mean(dim=(2, 3))


# A run


def encoded_pairs(regime, seed, out):
    """The folder of a regime's pairs for one seed, encoded when it is first asked for."""
    folder = out / f"{regime}-{seed}"
    with common.locked(out / f"{regime}-{seed}.lock"):  # one run encodes, the others wait
        if not folder.exists():
            encode_pairs(regime, seed, folder)
    return folder


def encode_pairs(regime, seed, folder):
    """Draws and encodes pairs of two drawings that differ in style alone."""
    rng = random.Random(100 + seed)
    train_scenes = [scene for scene in tiny.SCENES if scene not in tiny.HELD_OUT]
    rows = []
    for _ in range(PAIRS):
        scene, geometry = rng.choice(train_scenes), rng.random()
        is_swapped = regime == "30% swapped" and rng.random() < 0.3
        pictures = [draw(scene, is_outline, random.Random(geometry)) for is_outline in (True, False)]
        rows.append(tiny.pair_row(scene, pictures, first_wins=not is_swapped))
    parquet, aside = folder.with_suffix(".parquet"), folder.with_suffix(".part")
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    encode.main(["--model", str(part("pipeline")), "--data", str(parquet), "--clip", "tiny", "--resolution",
                 str(tiny.SIZE), "--workers", "1", "--out", str(aside)])
    aside.rename(folder)


def train_argv(arm, regime, rate, beta, seed, out):
    """The command line of a run without its --out."""
    data = encoded_pairs(regime, seed, out)
    values = {"model": part("pipeline"), "loss": arm.loss, "data": data, "seed": seed, "steps": STEPS,
              "batch_size": BATCH, "lr": rate, "warmup": WARMUP, "prompt_dropout": 0.1, "sample_every": 0,
              "save_every": 0, "workers": 0}
    if arm.loss != "sft":
        values |= {"beta": beta * arm.pull, "reference_errors": out / f"{regime}-{seed}.safetensors"}
    if arm.loss == "rpo":
        values["group_size"] = GROUP
    values |= arm.options
    argv = []
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    return argv


def samples(model, half, seed):
    """The samples of a model folder, [180, 3, 32, 32] in [-1, 1], for `scenes_of_samples`."""
    model = load_model(str(model))
    prompts = [tiny.caption(scene) for scene in scenes_of_samples(half)]
    noise = [common.keyed_generator(seed, half, i) for i in range(SAMPLES)]
    pictures = []
    for i in range(0, SAMPLES, 60):
        latents = model.sample(prompts[i:i + 60], noise[i:i + 60], steps=SAMPLE_STEPS, guidance=GUIDANCE)
        pictures.append(model.decode(latents) * 2 - 1)
    return torch.cat(pictures)


@functools.cache
def wished_features(half):
    """The judge's features, [1800, 64], of outlines for the prompts of a half."""
    pixels, _ = drawings(HALVES[half] * 100, 1, seed=17)
    _, _, features = judge(pixels)
    return features


def measure(pixels, half):
    """{column: number} of samples [180, 3, 32, 32] for `scenes_of_samples`."""
    is_outline, content, features = judge(pixels)
    has_content = (content == contents(scenes_of_samples(half))).all(dim=1)
    return {"right": share(has_content & (is_outline == 1)), "style": share(is_outline), "content": share(has_content),
            "distance": frechet(features, wished_features(half))}


def prepare(out):
    """Makes the folder and builds the parts before several processes ask for them."""
    out.mkdir(parents=True, exist_ok=True)
    tiny.part("clip")
    part("judge")
    part("pipeline")


def run(arm, regime, settings, half, out):
    """[{column: number}] of the run [(rate, beta, seed)] on the prompts of a half. Its log stays in `out`."""
    ((rate, beta, seed),) = settings
    if arm.loss == "base":
        return [measure(samples(part("pipeline"), half, seed), half)]
    if arm.loss == "ideal":
        pixels, _ = drawings(scenes_of_samples(half), 1, seed=3000 + seed)
        return [measure(pixels, half)]
    words = [arm.loss, *arm.options.values(), regime, f"{rate:g}", f"{beta:g}", seed]
    log = out / f"{'-'.join(map(str, words))}.txt"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        with open(log, "w", encoding="utf-8") as text, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            train.main([*train_argv(arm, regime, rate, beta, seed, out), "--out", folder])
            pictures = samples(Path(folder) / "model", half, seed)
    return [measure(pictures, half)]
