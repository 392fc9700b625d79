"""Drawings: the embedded task made losable, for the laboratory. Here a preference can be won at a price.

The scenes and captions are those of tiny.py; the drawings are larger and smaller, further from the middle and more
tilted, and the wished style keeps the colors: an outline in the shape's color on the background's. So the judge tells
style, shape, color and background, and all three that the caption names can be lost. The denoiser has a fourth of
the parameters of tiny's. A run is that of train.py on 600 pairs that encode.py has encoded.
Of 180 samples per run:

    style, content, right   the share of outlines, of the right shape, color and background, and of both
    distance                Frechet, to outlines of the same prompts, of the judge's features: lost diversity
                            is punished, too
"""

import contextlib
import functools
import io
import random
import tempfile
from pathlib import Path

import datasets
import filelock
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

import common
import encode
import models
import stats
import train
from extras import tiny

REGIMES = ("clean", "30% swapped")
TUNING_SEEDS, REPORT_SEEDS = range(20, 21), range(8)
CHOSEN_BY = ("right",)
RATES = (3e-5, 9e-5)
BETAS = (250.0, 1000.0, 4000.0)
SFT_RATES = tuple(3e-5 * 2 ** k for k in range(len(RATES) * len(BETAS)))  # as many settings as the others
SIDE_BY_SIDE = 1  # runs in one call of run()
FURTHER = 1  # value beyond an edge at which the best one lies
STEPS, BATCH, GROUP, WARMUP = 100, 16, 8, 10
PAIRS = 600
SAMPLES, SAMPLE_STEPS, GUIDANCE = 180, 10, 3.0
HALVES = {"tuning": tiny.HELD_OUT[:18], "report": tiny.HELD_OUT[18:]}
ASKED = [tiny.SHAPES, tuple(tiny.COLORS), tuple(tiny.COLORS)]  # shape, color and background: what a caption names


# Drawings


def draw(scene, is_outline, rng):
    """A PIL picture, 32x32, of (shape, color, background); its place, size and tilt come from `rng`."""
    shape, color, back = scene
    color, back = tiny.COLORS[color], tiny.COLORS[back]
    side = tiny.SIZE * 4  # drawn four times as large, for smooth edges
    radius = rng.uniform(0.24, 0.4) * side
    tilt = rng.uniform(-0.2, 0.2)
    x = side / 2 + rng.uniform(-0.1, 0.1) * side
    y = side / 2 + rng.uniform(-0.1, 0.1) * side
    image = Image.new("RGB", (side, side), back)
    canvas = ImageDraw.Draw(image)
    pen = (color, 12) if is_outline else None
    tiny.draw_shape(canvas, shape, x, y, radius, tilt, color, back, pen)
    return image.resize((tiny.SIZE, tiny.SIZE), Image.LANCZOS)


def drawings(scenes, outlines, seed):
    """Pixels [n, 3, 32, 32] in [-1, 1] of n scenes, and is_outline [n] int64, a share of them."""
    rng = random.Random(seed)
    is_outline = [rng.random() < outlines for _ in scenes]
    pictures = [draw(scene, outline, rng) for scene, outline in zip(scenes, is_outline)]
    pixels = torch.stack([pil_to_tensor(picture) for picture in pictures]) / 127.5 - 1
    return pixels.contiguous(memory_format=tiny.LAST), torch.tensor(is_outline).long()


def random_scenes(n, seed):
    """n scenes (shape, color, background)."""
    rng = random.Random(seed)
    return [rng.choice(tiny.SCENES) for _ in range(n)]


def answers(scenes):
    """[n, 3] int64: the indices of shape, color and background."""
    return torch.tensor([[names.index(word) for names, word in zip(ASKED, scene)] for scene in scenes])


def in_turn(scenes):
    """180 scenes: all of them equally often."""
    return [scenes[i % len(scenes)] for i in range(SAMPLES)]


# The parts, kept like those of the embedded task


def build_pipeline(folder):
    scenes = random_scenes(8192, seed=11)
    pixels, _ = drawings(scenes, 1 / 3, seed=12)
    prompts = [tiny.caption(scene) for scene in scenes]
    tiny.train_pipeline(pixels, prompts, (32, 64), 2 * tiny.STEPS["unet"]).save_pretrained(folder)


def judge_network():
    return tiny.judge_network(2 + sum(map(len, ASKED)))


def build_judge(folder):
    scenes = random_scenes(8192, seed=13)
    pixels, is_outline = drawings(scenes, 0.5, seed=14)
    targets = torch.cat([is_outline[:, None], answers(scenes)], dim=1)                  # [N, 4]
    network = judge_network()

    def batch_loss():  # some pixel noise: it will judge decoded samples
        rows = torch.randint(len(pixels), (64,))
        noise = torch.randn(64, 3, tiny.SIZE, tiny.SIZE) * 0.15 * torch.rand(64, 1, 1, 1)
        heads = split_heads(network(pixels[rows] + noise))
        return sum(F.cross_entropy(head, targets[rows, i]) for i, head in enumerate(heads))

    tiny.fit("judge", 3 * tiny.STEPS["judge"], network.parameters(), 2e-3, batch_loss)
    save_file(network.state_dict(), folder / "judge.safetensors")


def split_heads(logits):
    """[N, 20] -> the logits of style, shape, color and background."""
    return logits.split([2, *map(len, ASKED)], dim=1)


def part(name):
    """The folder of "pipeline" or "judge", built when it is first asked for."""
    return tiny.part(name, {"pipeline": build_pipeline, "judge": build_judge}[name])


@torch.no_grad()
def judge(pixels):
    """pixels [N, 3, 32, 32] in [-1, 1] -> is_outline [N], (shape, color, background) [N, 3], features [N, 64]."""
    network = judge_network().eval()
    network.load_state_dict(load_file(part("judge") / "judge.safetensors"))
    features = network[:-2](pixels)                                                     # [N, 64, 4, 4]
    style, *content = split_heads(network[-2:](features))
    content = torch.stack([head.argmax(1) for head in content], dim=1)
    return style.argmax(1), content, features.mean(dim=(2, 3))


# A run


def encoded_pairs(regime, seed, out):
    """The folder of a regime's pairs for one seed, encoded when it is first asked for."""
    folder = out / f"{regime}-{seed}"
    with filelock.FileLock(out / f"{regime}-{seed}.lock"):  # of several runs one encodes, the others wait
        if not folder.exists():
            encode_pairs(regime, seed, folder)
    return folder


def encode_pairs(regime, seed, folder):
    """Draws and encodes pairs; the two drawings of one differ in style alone."""
    rng = random.Random(100 + seed)
    train_scenes = [scene for scene in tiny.SCENES if scene not in tiny.HELD_OUT]
    rows = []
    for _ in range(PAIRS):
        scene, geometry = rng.choice(train_scenes), rng.random()
        is_swapped = regime == "30% swapped" and rng.random() < 0.3
        row = {"caption": tiny.caption(scene), "label_0": float(not is_swapped), "label_1": float(is_swapped)}
        for name, is_outline in (("jpg_0", True), ("jpg_1", False)):
            png = io.BytesIO()
            draw(scene, is_outline, random.Random(geometry)).save(png, "PNG")
            row[name] = png.getvalue()
        rows.append(row)
    parquet, aside = folder.with_suffix(".parquet"), folder.with_suffix(".part")
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    encode.main(["--model", str(part("pipeline")), "--data", str(parquet), "--clip", "tiny", "--resolution",
                 str(tiny.SIZE), "--workers", "1", "--out", str(aside)])
    aside.rename(folder)


def train_argv(arm, regime, rate, beta, seed, out):
    """The command line of a run, less its --out."""
    data = encoded_pairs(regime, seed, out)
    values = {"model": part("pipeline"), "loss": arm.loss, "data": data, "seed": seed, "steps": STEPS,
              "batch_size": BATCH, "lr": rate, "warmup": WARMUP, "prompt_dropout": 0.1, "sample_every": 0,
              "save_every": 0, "workers": 0}
    if arm.loss != "sft":
        values |= {"beta": beta * arm.pull, "reference_errors": out / f"{regime}-{seed}.safetensors"}
    if arm.loss == "rpo":
        values |= {"group_size": GROUP} | arm.options
    argv = []
    for name, value in values.items():
        argv += [f"--{name}", str(value)]
    return argv


def samples(model, half, seed):
    """The samples of a model folder, [180, 3, 32, 32] in [-1, 1], for the prompts of a half in turn."""
    model = models.load_model(str(model))
    prompts = [tiny.caption(scene) for scene in in_turn(HALVES[half])]
    noise = [common.keyed_generator(seed, half, i) for i in range(SAMPLES)]
    pictures = []
    for i in range(0, SAMPLES, 60):
        latents = model.sample(prompts[i:i + 60], noise[i:i + 60], steps=SAMPLE_STEPS, guidance=GUIDANCE)
        pictures.append(model.decode(latents) * 2 - 1)
    return torch.cat(pictures)


@functools.cache
def wished_features(half):
    """The judge's features, [1800, 64], of outlines of the prompts of a half."""
    pixels, _ = drawings(HALVES[half] * 100, 1, seed=17)
    _, _, features = judge(pixels)
    return features


def measure(pixels, half):
    """{column: number} of samples [180, 3, 32, 32] for the prompts of a half in turn."""
    scenes = in_turn(HALVES[half])
    style, content, features = judge(pixels)
    is_right = (content == answers(scenes)).all(dim=1)
    return {"right": (is_right & (style == 1)).float().mean().item(), "style": style.float().mean().item(),
            "content": is_right.float().mean().item(), "distance": stats.frechet(features, wished_features(half))}


def prepare(out):
    """Builds the parts, before several processes ask for them, and makes the folder."""
    out.mkdir(parents=True, exist_ok=True)
    tiny.part("clip")
    part("judge")
    part("pipeline")


def run(arm, regime, settings, half, out):
    """[{column: number}] of one run, [(rate, beta, seed)], on the prompts of a half; its log stays in `out`."""
    ((rate, beta, seed),) = settings
    if arm.loss == "base":
        return [measure(samples(part("pipeline"), half, seed), half)]
    if arm.loss == "ideal":
        return [measure(drawings(in_turn(HALVES[half]), 1, seed=3000 + seed)[0], half)]
    words = [arm.loss, *arm.options.values(), regime, f"{rate:g}", f"{beta:g}", seed]
    log = out / f"{'-'.join(map(str, words))}.txt"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        with open(log, "w") as text, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            train.main([*train_argv(arm, regime, rate, beta, seed, out), "--out", folder])
            pictures = samples(Path(folder) / "model", half, seed)
    return [measure(pictures, half)]
