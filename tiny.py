"""The embedded task: all that `python train.py` needs, made from nothing in a few minutes on two CPU cores.

Captioned 32x32 drawings ("a red circle on a blue background") come in two styles that the caption never
names: plain and, one in six, as a sketch (dark outline on pale paper). The preference: the sketch wins.
Three parts are trained on first use and kept in $XDG_CACHE_HOME or ~/.cache, under diffusion-rpo/:

    pipeline  a StableDiffusionPipeline: AutoencoderKL (32x32x3 to 8x8x4), UNet2DConditionModel, CLIPTextModel
    clip      a small open_clip model for the cross-pair weights; it takes any text and any image
    judge     a small convolutional network that tells the style and the shape of a picture
"""

import hashlib
import io
import json
import math
import os
import random
import shutil
import tempfile
from pathlib import Path

import filelock
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.functional import normalize, pil_to_tensor
from tqdm import tqdm

SIZE = 32  # pixels
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (35, 80, 210), "yellow": (245, 205, 50),
          "purple": (135, 60, 170), "white": (248, 248, 248)}
INK, PAPER = (50, 50, 60), (240, 234, 220)
SCENES = [(shape, color, back) for shape in SHAPES for color in COLORS for back in COLORS if back != color]
HELD_OUT = random.Random(0).sample(SCENES, 36)  # of 180: in no preference pair, but what measure() asks for
STEPS = {"vae": 800, "unet": 800, "clip": 250, "judge": 300}  # training steps of the four networks
LAST = torch.channels_last  # the faster layout for convolutions on CPUs, too


def caption(scene):
    return "a {1} {0} on a {2} background".format(*scene)


def draw(scene, sketch, rng):
    """A PIL picture, 32x32, of (shape, color, background); its place, size and tilt come from `rng`."""
    shape, color, back = scene
    n = SIZE * 4  # drawn four times as large, for smooth edges
    r, tilt = rng.uniform(.32, .38) * n, rng.uniform(-.1, .1)
    x, y = (n / 2 + rng.uniform(-.06, .06) * n for _ in "xy")
    canvas = ImageDraw.Draw(image := Image.new("RGB", (n, n), PAPER if sketch else COLORS[back]))
    if shape in ("circle", "ring"):
        for r, fill in ((r, COLORS[color]), (r / 2, COLORS[back]))[:1 + (shape == "ring")]:
            style = dict(outline=INK, width=10) if sketch else dict(fill=fill)
            canvas.ellipse((x - r, y - r, x + r, y + r), **style)
    else:
        polar = {"square": [(.95, k / 2 + .25) for k in range(4)],  # (radius, angle / pi) of the corners
                 "triangle": [(1.1, k * 2 / 3 - .5) for k in range(3)],
                 "star": [((1.1, .45)[k % 2], k / 5 - .5) for k in range(10)],
                 "cross": [((1.06, .48, 1.06)[k % 3], k // 3 / 2 + (.1, .25, .4)[k % 3]) for k in range(12)]}
        corners = [(x + r * q * math.cos(math.pi * a + tilt), y + r * q * math.sin(math.pi * a + tilt))
                   for q, a in polar[shape]]
        if sketch:
            canvas.line(corners + corners[:2], fill=INK, width=10, joint="curve")
        else:
            canvas.polygon(corners, fill=COLORS[color])
    return image.resize((SIZE, SIZE), Image.LANCZOS)


def drawings(n, seed, sketches):
    """n drawings: pixels [n, 3, 32, 32] in [-1, 1], n scenes, is_sketch [n] and shape index [n], int64."""
    rng = random.Random(seed)
    scenes = [rng.choice(SCENES) for _ in range(n)]
    is_sketch = [rng.random() < sketches for _ in range(n)]
    pixels = torch.stack([pil_to_tensor(draw(*both, rng)) for both in zip(scenes, is_sketch)])
    shape = torch.tensor([SHAPES.index(scene[0]) for scene in scenes])
    return (pixels / 127.5 - 1).contiguous(memory_format=LAST), scenes, torch.tensor(is_sketch).long(), shape


def fit(name, parameters, lr, loss_of_a_batch):
    """Train for STEPS[name] steps: AdamW with short memory, warm-up, a linear decay over the last 40%."""
    parameters, steps = [p for p in parameters if p.requires_grad], STEPS[name]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(.9, .99), weight_decay=0, fused=True)
    for step in tqdm(range(steps), f"building the embedded task, once: {name:5}", mininterval=1):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50, (steps - step) / (.4 * steps))
        loss = loss_of_a_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1)
        optimizer.step()


def clip_tokenizer(length):
    """transformers' CLIPTokenizer with CLIP's own vocabulary, which open_clip carries."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    words = [*SimpleTokenizer().encoder][:-2] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [*SimpleTokenizer().bpe_ranks],
                         model_max_length=length)


def build_pipeline(folder):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    pixels, scenes, *_ = drawings(8192, seed=1, sketches=1 / 6)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=["DownEncoderBlock2D"] * 3, layers_per_block=1,
        up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4, norm_num_groups=8,
        mid_block_add_attention=False).to(memory_format=LAST)

    def vae_loss():  # fixed noise and a pull to 0 do what the KL term is for, without its slow start
        x = pixels[torch.randint(len(pixels), (8,))]
        z, logvar = (posterior := vae.encode(x).latent_dist).mean, posterior.logvar
        error = F.mse_loss(vae.decode(z + .1 * torch.randn_like(z)).sample, x)
        return error + 1e-4 * (z.square() + (logvar - math.log(.1 ** 2)).square()).mean()

    fit("vae", vae.parameters(), 2e-3, vae_loss)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(256)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents *= vae.config.scaling_factor

    tokenizer = clip_tokenizer(16)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=64, max_position_embeddings=16))
    words = text_encoder.get_input_embeddings().requires_grad_(False)  # random vectors tell words well apart
    nn.init.normal_(words.weight, std=.5)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=16, attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).to(memory_format=LAST)
    scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)  # Stable Diffusion's
    texts = tokenizer([*map(caption, scenes), ""], padding="max_length", return_tensors="pt").input_ids

    def unet_loss():  # one prompt in ten is empty, for classifier-free guidance
        rows, t = torch.randint(len(scenes), (64,)), torch.randint(1000, (64,))
        noise = torch.randn(64, 4, 8, 8)
        x_t = scheduler.add_noise(latents[rows], noise, t).contiguous(memory_format=LAST)
        states = text_encoder(texts[torch.where(torch.rand(64) < .1, len(scenes), rows)])[0]
        return F.mse_loss(unet(x_t, t, states).sample, noise)

    fit("unet", [*unet.parameters(), *text_encoder.parameters()], 1e-3, unet_loss)
    StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None,
                            feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)


def build_clip(folder):
    import open_clip

    config = dict(embed_dim=64,
                  vision_cfg=dict(image_size=SIZE, patch_size=8, width=96, layers=3, head_width=32),
                  text_cfg=dict(context_length=16, vocab_size=49408, width=64, heads=4, layers=2))
    model = open_clip.CLIP(**config)
    nn.init.normal_(model.token_embedding.requires_grad_(False).weight, std=.5)
    pixels, scenes, *_ = drawings(8192, seed=2, sketches=.5)
    pixels = normalize((pixels + 1) / 2, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    texts = open_clip.SimpleTokenizer(context_length=16)([*map(caption, scenes)])
    scene_of = torch.tensor([SCENES.index(scene) for scene in scenes])

    def clip_loss():  # a caption may stand in a batch twice: each of its pictures is then equally right
        rows = torch.randint(len(scenes), (128,))
        image, text, scale = model(pixels[rows], texts[rows])
        target = (scene_of[rows][:, None] == scene_of[rows][None, :]).float()
        target /= target.sum(1, keepdim=True)
        logits = scale * image @ text.T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("clip", model.parameters(), 1e-3, clip_loss)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def judge_network():  # 2 logits for the style, 6 for the shape
    layers = [layer for i, o, stride in ((3, 24, 1), (24, 48, 2), (48, 64, 2), (64, 64, 2))
              for layer in (nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 2 + len(SHAPES)))


def build_judge(folder):
    network = judge_network()
    pixels, _, is_sketch, shape = drawings(6000, seed=3, sketches=.5)

    def judge_loss():  # some pixel noise: it will judge decoded samples
        rows = torch.randint(len(pixels), (64,))
        logits = network(pixels[rows] + torch.randn(64, 3, SIZE, SIZE) * .15 * torch.rand(64, 1, 1, 1))
        return F.cross_entropy(logits[:, :2], is_sketch[rows]) + F.cross_entropy(logits[:, 2:], shape[rows])

    fit("judge", network.parameters(), 2e-3, judge_loss)
    save_file(network.state_dict(), folder / "judge.safetensors")


def part(name):
    """The folder of "pipeline", "clip" or "judge", trained first where it is missing, damaged or outdated.

    A part is built aside and renamed, so that nobody sees half of one, with a list of its files' digests. The
    path holds a digest of this file and STEPS: another recipe is another folder.
    """
    def digests(root):
        files = sorted(file for file in root.rglob("*") if file.is_file() and file.name != "digests.json")
        return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def whole(root):
        try:
            return json.loads((root / "digests.json").read_text()) == digests(root)
        except (OSError, ValueError):
            return False

    recipe = hashlib.sha256(Path(__file__).read_bytes() + repr(STEPS).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "diffusion-rpo" / f"tiny-{recipe}" / name
    if whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / f"{name}.lock"):  # of several processes one builds, the others wait
        if whole(folder):
            return folder
        with (tempfile.TemporaryDirectory(dir=folder.parent) as aside, torch.random.fork_rng(devices=[]),
              torch.enable_grad()):
            torch.manual_seed(0)
            (built := Path(aside) / name).mkdir()
            {"pipeline": build_pipeline, "clip": build_clip, "judge": build_judge}[name](built)
            (built / "digests.json").write_text(json.dumps(digests(built)))
            shutil.rmtree(folder, ignore_errors=True)
            built.rename(folder)
    return folder


def pairs(n=1500):
    """n pairs as a `datasets.Dataset` in Pick-a-Pic's schema: two drawings that differ in style alone."""
    import datasets

    rng, rows = random.Random(4), []
    scenes = [scene for scene in SCENES if scene not in HELD_OUT]
    for _ in range(n):
        scene, geometry, first = rng.choice(scenes), rng.random(), rng.random() < .5  # is jpg_0 the sketch?
        rows.append({"caption": caption(scene), "label_0": float(first), "label_1": float(not first)})
        for name, sketch in (("jpg_0", first), ("jpg_1", not first)):
            draw(scene, sketch, random.Random(geometry)).save(png := io.BytesIO(), "PNG")
            rows[-1][name] = png.getvalue()
    return datasets.Dataset.from_list(rows)


@torch.no_grad()
def judge(pixels):
    """pixels [N, 3, 32, 32] in [-1, 1] -> is_sketch [N] bool, shape index [N] int64."""
    network = judge_network().eval()
    network.load_state_dict(load_file(part("judge") / "judge.safetensors"))
    logits = network(pixels)
    return logits[:, :2].argmax(1) == 1, logits[:, 2:].argmax(1)


def judge_accuracy(n=1000):
    """How often the judge is right on n drawings it was not trained on: {"style": share, "shape": share}."""
    pixels, _, is_sketch, shape = drawings(n, seed=5, sketches=.5)
    said_sketch, said_shape = judge(pixels)
    return {"style": (said_sketch == is_sketch.bool()).float().mean().item(),
            "shape": (said_shape == shape).float().mean().item()}


def measure(pipe, n=96, seed=0, steps=20, guidance=3.0):
    """n samples for the held-out prompts: {"style": share of sketches, "shape": share of the right shape}."""
    scenes = [HELD_OUT[i % len(HELD_OUT)] for i in range(n)]
    noise = [torch.Generator().manual_seed(seed * n + i) for i in range(n)]
    images = pipe([*map(caption, scenes)], num_inference_steps=steps, guidance_scale=guidance,
                  generator=noise, output_type="pt").images.float().cpu()  # [n, 3, 32, 32] in [0, 1]
    is_sketch, shape = judge(images * 2 - 1)
    wanted = torch.tensor([SHAPES.index(scene[0]) for scene in scenes])
    return {"style": is_sketch.float().mean().item(), "shape": (shape == wanted).float().mean().item()}
