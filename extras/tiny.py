"""The embedded task: a model and preference pairs, made from nothing in a few minutes on two CPU cores.

    python -m extras.tiny                        judge the base model and, where it exists, out/MODEL-rpo/model
    python -m extras.tiny out/tiny-dpo/model     judge other diffusers folders or LoRA weights

The pictures are 32x32 drawings with captions such as "a red circle on a blue background". One drawing in six is a
sketch: a dark outline on pale paper. The captions never name the style. In every preference pair the sketch wins.

The parts are built on first use and kept in $XDG_CACHE_HOME (else ~/.cache), under diffusion-rpo/:

    pipeline  a StableDiffusionPipeline: AutoencoderKL (32x32x3 to 8x8x4), UNet2DConditionModel, CLIPTextModel
    pairs     train.parquet, 1,500 pairs in Pick-a-Pic's schema, and prompts.txt, 36 prompts that no pair shows
    held_out  held_out.parquet, 512 pairs of those 36 prompts
    clip      a small open_clip model for the cross-pair weights; it takes any text and any image
    judge     a small convolutional network that recognises the style and the shape of a picture
"""

import inspect
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.functional import normalize, pil_to_tensor
from tqdm import tqdm

from common import InputError, Parser, clip_tokenizer, digest, one_line_errors
from loading import EMBEDDED, fuse_lora, load_model

SIZE = 32  # pixels
COLORS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (35, 80, 210), "yellow": (245, 205, 50),
          "purple": (135, 60, 170), "white": (248, 248, 248)}
INK, PAPER = (50, 50, 60), (240, 234, 220)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
CORNERS = {  # (radius, angle / pi) of each corner of a polygon
    "square": [(0.95, k / 2 + 0.25) for k in range(4)],
    "triangle": [(1.1, k * 2 / 3 - 0.5) for k in range(3)],
    "star": [((1.1, 0.45)[k % 2], k / 5 - 0.5) for k in range(10)],
    "cross": [((1.06, 0.48, 1.06)[k % 3], k // 3 / 2 + (0.1, 0.25, 0.4)[k % 3]) for k in range(12)],
}
SCENES = [(shape, color, back) for shape in SHAPES for color in COLORS for back in COLORS if back != color]
HELD_OUT = random.Random(0).sample(SCENES, 36)  # no training pair shows these; measure() asks for them
STEPS = {"vae": 800, "unet": 800, "flow": 2000, "clip": 250, "judge": 300}  # training steps of each network
HEADS = (2, len(SHAPES))  # the judge's classes: plain or sketch, and the shape
LAST = torch.channels_last  # convolutions are faster in this layout, also on CPUs


# Drawings


def caption(scene):
    shape, color, back = scene
    return f"a {color} {shape} on a {back} background"


def draw(scene, sketch, rng):
    """A PIL picture of a scene (shape, color, background), 32x32. `rng` gives the shape its place, size and tilt."""
    background = PAPER if sketch else COLORS[scene[2]]
    pen = (INK, 10) if sketch else None
    return draw_scene(scene, background, pen, rng, radii=(0.32, 0.38), tilt=0.1, shift=0.06)


def draw_scene(scene, background, pen, rng, radii, tilt, shift):
    """A PIL picture of a scene, 32x32: the filled shape or, with a pen (color, width in pixels), its outline.

    radii  smallest and largest radius of the shape, in sides of the picture
    tilt   largest tilt to either side, in radians
    shift  largest distance from the middle along x and y, in sides of the picture
    """
    shape, color, back = scene
    side = SIZE * 4  # drawn four times as large, for smooth edges
    radius = rng.uniform(*radii) * side
    tilt = rng.uniform(-tilt, tilt)
    x = side / 2 + rng.uniform(-shift, shift) * side
    y = side / 2 + rng.uniform(-shift, shift) * side
    image = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(image)
    if shape in CORNERS:
        draw_polygon(canvas, place_corners(CORNERS[shape], x, y, radius, tilt), COLORS[color], pen)
    else:
        draw_disc(canvas, x, y, radius, COLORS[color], pen)
    if shape == "ring":
        draw_disc(canvas, x, y, radius / 2, COLORS[back], pen)
    return image.resize((SIZE, SIZE), Image.LANCZOS)


def draw_disc(canvas, x, y, radius, color, pen):
    box = (x - radius, y - radius, x + radius, y + radius)
    if pen:
        ink, width = pen
        canvas.ellipse(box, outline=ink, width=width)
    else:
        canvas.ellipse(box, fill=color)


def draw_polygon(canvas, corners, color, pen):
    if pen:
        ink, width = pen
        canvas.line(corners + corners[:2], fill=ink, width=width, joint="curve")
    else:
        canvas.polygon(corners, fill=color)


def place_corners(corners, x, y, radius, tilt):
    """[(x, y), ...] in pixels; the corners are given in polar coordinates around (x, y)."""
    placed = []
    for distance, angle in corners:
        turn = math.pi * angle + tilt
        placed.append((x + radius * distance * math.cos(turn), y + radius * distance * math.sin(turn)))
    return placed


def to_pixels(pictures):
    """PIL pictures -> [n, 3, 32, 32] float32 in [-1, 1]."""
    pixels = torch.stack([pil_to_tensor(picture) for picture in pictures]) / 127.5 - 1
    return pixels.contiguous(memory_format=LAST)


def drawings(n, seed, sketches):
    """Pixels [n, 3, 32, 32] in [-1, 1] of n drawings, their scenes, and [n, 2] int64: is it a sketch, which shape.

    sketches  the share of sketches
    """
    rng = random.Random(seed)
    scenes = [rng.choice(SCENES) for _ in range(n)]
    is_sketch = [rng.random() < sketches for _ in range(n)]
    pixels = to_pixels([draw(scene, sketch, rng) for scene, sketch in zip(scenes, is_sketch)])
    return pixels, scenes, torch.stack([torch.tensor(is_sketch).long(), shapes_of(scenes)], dim=1)


def shapes_of(scenes):
    """[n] int64: the index of each scene's shape."""
    return torch.tensor([SHAPES.index(shape) for shape, _, _ in scenes])


def pair_rows(n=1500, held_out=False):
    """n pairs of two drawings that differ in style alone; the sketch is preferred. See `pair_row`.

    held_out  whether to draw the held-out scenes, which no other pair shows
    """
    rng = random.Random(6 if held_out else 4)
    scenes = [scene for scene in SCENES if (scene in HELD_OUT) == held_out]
    rows = []
    for _ in range(n):
        scene = rng.choice(scenes)
        geometry = rng.random()
        sketch_first = rng.random() < 0.5
        pictures = [draw(scene, sketch, random.Random(geometry)) for sketch in (sketch_first, not sketch_first)]
        rows.append(pair_row(scene, pictures, first_wins=sketch_first))
    return rows


def pair_row(scene, pictures, first_wins):
    """A dict in Pick-a-Pic's schema: caption, two PIL pictures as PNG, labels."""
    row = {"caption": caption(scene), "label_0": float(first_wins), "label_1": float(not first_wins)}
    for name, picture in zip(("jpg_0", "jpg_1"), pictures):
        png = io.BytesIO()
        picture.save(png, "PNG")
        row[name] = png.getvalue()
    return row


# The parts


def enough(n, steps):
    """The number of drawings to train on: n, or fewer for the few steps of a test's quick build."""
    return min(n, 128 * steps)


def fit(name, steps, parameters, lr, batch_loss):
    """Trains by AdamW with short memory: 50 steps of warm-up, linear decay over the last 40% of the steps."""
    params = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    for step in tqdm(range(steps), f"building the embedded task, once: {name:5}", mininterval=1):
        warmup, decay = (step + 1) / 50, (steps - step) / (0.4 * steps)
        optimizer.param_groups[0]["lr"] = lr * min(1, warmup, decay)
        loss = batch_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1)
        optimizer.step()


def build_pipeline(folder):
    pixels, scenes, _ = drawings(enough(8192, STEPS["unet"]), seed=1, sketches=1 / 6)
    prompts = [caption(scene) for scene in scenes]
    train_pipeline(pixels, prompts, (64, 128), STEPS["unet"]).save_pretrained(folder)


def train_pipeline(pixels, prompts, channels, steps):
    """A StableDiffusionPipeline for pixels [N, 3, 32, 32] in [-1, 1] and their N prompts; see train_denoiser."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    vae, latents = train_vae(pixels)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    tokenizer = clip_tokenizer(16)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)  # Stable Diffusion's
    latents = latents * vae.config.scaling_factor
    text_encoder, unet = train_denoiser(latents, prompts, tokenizer, scheduler, channels, steps)
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)


def train_vae(pixels):
    """An AutoencoderKL for pixels [N, 3, 32, 32] in [-1, 1], and their unscaled latents [N, 4, 8, 8]."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        mid_block_add_attention=False)
    vae.to(memory_format=LAST)

    def batch_loss():  # fixed noise and a pull to 0 replace the KL term, which starts slowly
        x = pixels[torch.randint(len(pixels), (8,))]
        posterior = vae.encode(x).latent_dist
        z = posterior.mean
        decoded = vae.decode(z + 0.1 * torch.randn_like(z)).sample
        pull = z.square() + (posterior.logvar - math.log(0.1 ** 2)).square()
        return F.mse_loss(decoded, x) + 1e-4 * pull.mean()

    fit("vae", STEPS["vae"], vae.parameters(), 2e-3, batch_loss)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(256)])
    return vae, latents


def train_denoiser(latents, prompts, tokenizer, scheduler, channels, steps):
    """(text encoder, UNet), trained on scaled latents [N, 4, 8, 8] and their N prompts.

    channels  the widths of the UNet's two levels
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    text_encoder = make_text_encoder(CLIPTextModel, 64, heads=4)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=channels, layers_per_block=1, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=16, attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    unet.to(memory_format=LAST)
    ids = tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids    # [N + 1, 16]

    def batch_loss():  # one prompt in ten is empty, for classifier-free guidance
        rows = torch.randint(len(prompts), (64,))
        t = torch.randint(1000, (64,))
        noise = torch.randn(64, 4, 8, 8)
        x_t = scheduler.add_noise(latents[rows], noise, t).contiguous(memory_format=LAST)
        is_empty = torch.rand(64) < 0.1
        prompt_embeds = text_encoder(ids[torch.where(is_empty, len(prompts), rows)])[0]     # [64, 16, 64]
        return F.mse_loss(unet(x_t, t, prompt_embeds).sample, noise)

    fit("unet", steps, [*unet.parameters(), *text_encoder.parameters()], 1e-3, batch_loss)
    return text_encoder, unet


def make_text_encoder(kind, width, heads):
    """A text encoder of the transformers class `kind`: two layers, 16 tokens."""
    from transformers import CLIPTextConfig

    encoder = kind(CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=heads,
        projection_dim=width, max_position_embeddings=16))
    words = encoder.get_input_embeddings().requires_grad_(False)  # random vectors tell words well apart
    nn.init.normal_(words.weight, std=0.5)
    return encoder


def build_pairs(folder):
    import datasets

    datasets.Dataset.from_list(pair_rows()).to_parquet(folder / "train.parquet")
    prompts = [caption(scene) + "\n" for scene in HELD_OUT]
    (folder / "prompts.txt").write_text("".join(prompts))


def build_held_out(folder):
    import datasets

    datasets.Dataset.from_list(pair_rows(512, held_out=True)).to_parquet(folder / "held_out.parquet")


def build_clip(folder):
    import open_clip

    config = dict(embed_dim=64,
                  vision_cfg=dict(image_size=SIZE, patch_size=8, width=96, layers=3, head_width=32),
                  text_cfg=dict(context_length=16, vocab_size=49408, width=64, heads=4, layers=2))
    model = open_clip.CLIP(**config)
    words = model.token_embedding.requires_grad_(False)
    nn.init.normal_(words.weight, std=0.5)
    pixels, scenes, _ = drawings(enough(8192, STEPS["clip"]), seed=2, sketches=0.5)
    pixels = normalize((pixels + 1) / 2, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    ids = open_clip.SimpleTokenizer(context_length=16)([caption(scene) for scene in scenes])
    scene_of = torch.tensor([SCENES.index(scene) for scene in scenes])

    def batch_loss():  # a batch may hold a caption twice; then both of its pictures are equally right
        rows = torch.randint(len(scenes), (128,))
        image, text, scale = model(pixels[rows], ids[rows])                                 # [128, 64] each
        target = (scene_of[rows][:, None] == scene_of[rows][None, :]).float()
        target /= target.sum(1, keepdim=True)
        logits = scale * image @ text.T                                                     # [128, 128]
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("clip", STEPS["clip"], model.parameters(), 1e-3, batch_loss)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def build_judge(folder):
    pixels, _, targets = drawings(enough(6000, STEPS["judge"]), seed=3, sketches=0.5)
    train_judge(folder, pixels, targets, HEADS, STEPS["judge"])


def train_judge(folder, pixels, targets, heads, steps):
    """Trains a classifier of pixels [N, 3, 32, 32] with several heads; targets [N, heads] int64."""
    network = judge_network(heads)

    def batch_loss():  # with some pixel noise, because it will judge decoded samples
        rows = torch.randint(len(pixels), (64,))
        noise = torch.randn(64, 3, SIZE, SIZE) * 0.15 * torch.rand(64, 1, 1, 1)
        logits = network(pixels[rows] + noise).split(heads, dim=1)
        return sum(F.cross_entropy(head, targets[rows, i]) for i, head in enumerate(logits))

    fit("judge", steps, network.parameters(), 2e-3, batch_loss)
    save_file(network.state_dict(), folder / "judge.safetensors")


def judge_network(heads):
    """Four convolutions, then one linear layer for the logits of all heads."""
    layers = []
    for channels, width, stride in ((3, 24, 1), (24, 48, 2), (48, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, sum(heads)))


BUILDERS = {"pipeline": build_pipeline, "pairs": build_pairs, "held_out": build_held_out, "clip": build_clip,
            "judge": build_judge}


def part(name, build_part=None):
    """The folder of a part. The part is built first if it is missing, damaged or outdated.

    The path holds a digest of the recipe: this file, the file of `build_part`, and STEPS. So every recipe has its
    own folder. A part is built in a temporary folder and renamed, so that nobody sees half of one. It holds a list of
    its files' digests.

    build_part  what builds a part of another module; without it, the builder in BUILDERS
    """
    build_part = build_part or BUILDERS[name]
    sources = sorted({__file__, inspect.getfile(build_part)})
    recipe = digest(b"".join(Path(source).read_bytes() for source in sources) + repr(STEPS).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "diffusion-rpo" / f"tiny-{recipe}" / name
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / f"{name}.lock"):  # one process builds, the others wait
        if not is_whole(folder):
            build(build_part, folder)
    return folder


def build(build_part, folder):
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        built = Path(aside) / folder.name
        built.mkdir()
        # The seed makes the weights the same wherever a part is first asked for. The caller's random state stays.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            build_part(built)
        (built / "digests.json").write_text(json.dumps(file_digests(built)))
        shutil.rmtree(folder, ignore_errors=True)
        built.rename(folder)


def file_digests(folder):
    """{relative path: digest} of all files but the list of digests itself."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "digests.json")
    return {str(file.relative_to(folder)): digest(file.read_bytes()) for file in files}


def is_whole(folder):
    try:
        return json.loads((folder / "digests.json").read_text()) == file_digests(folder)
    except (OSError, ValueError):
        return False


# The judge's verdict


@torch.no_grad()
def judge(pixels):
    """pixels [N, 3, 32, 32] in [-1, 1] -> [N, 2] int64: is it a sketch, which shape."""
    network = judge_network(HEADS).eval()
    network.load_state_dict(load_file(part("judge") / "judge.safetensors"))
    logits = network(pixels).split(HEADS, dim=1)
    return torch.stack([head.argmax(1) for head in logits], dim=1)


def share(flags):
    """The share of flags that are true."""
    return flags.float().mean().item()


def judge_accuracy(n=1000):
    """How often the judge is right on n drawings that it was not trained on: {"style": share, "shape": share}."""
    pixels, _, targets = drawings(n, seed=5, sketches=0.5)
    style, shape = (judge(pixels) == targets).T
    return {"style": share(style), "shape": share(shape)}


def measure(pipe, n=96, seed=0, steps=20, guidance=3.0):
    """n samples for the held-out prompts: {"style": share of sketches, "shape": share of the right shape}."""
    scenes = [HELD_OUT[i % len(HELD_OUT)] for i in range(n)]
    prompts = [caption(scene) for scene in scenes]
    generators = [torch.Generator().manual_seed(seed * n + i) for i in range(n)]
    images = pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators,
                  output_type="pt").images.float().cpu()                # [n, 3, 32, 32] in [0, 1]
    is_sketch, shape = judge(images * 2 - 1).T
    return {"style": share(is_sketch), "shape": share(shape == shapes_of(scenes))}


def load(name):
    """The pipeline of an embedded model or a diffusers folder, or the base model with a folder of LoRA weights."""
    if name not in EMBEDDED and not Path(name).is_dir():
        raise InputError(f"{name}: there is no such folder")
    lora = Path(name) / "pytorch_lora_weights.safetensors"
    if not lora.exists():
        return load_model(str(name)).pipe
    model = load_model(base_of(lora))
    fuse_lora(model, name)
    return model.pipe


def base_of(lora):
    """The model that a file of LoRA weights was trained on: the one in its run's config.json, else an embedded one."""
    config = lora.parents[1] / "config.json"
    if config.exists():
        return json.loads(config.read_text())["model"]
    with safe_open(lora, "pt") as weights:
        is_transformer = any(name.startswith("transformer.") for name in weights.keys())
    return "tiny-flow" if is_transformer else "tiny"


def parse_args(argv=None):
    parser = Parser(prog="tiny.py", description="Draw samples for held-out prompts and let the judge rate them.")
    parser.add_argument("models", nargs="*", metavar="MODEL",
                        help="tiny, tiny-flow, or folders as train.py leaves them [each of the two whose "
                        "out/MODEL-rpo exists, before and after; without any, tiny]")
    args = parser.parse_args(argv)
    if not args.models:
        for base in EMBEDDED:
            trained = f"out/{base}-rpo/model"
            if Path(trained).exists():
                args.models += [base, trained]
    args.models = args.models or ["tiny"]
    return args


def main(argv=None):
    with one_line_errors("tiny.py"):
        args = parse_args(argv)
        print("the judge is right on {style:.1%} (style) and {shape:.1%} (shape) of 1,000 drawings that it "
              "has not seen".format(**judge_accuracy()))
        for name in args.models:
            shares = measure(load(name))
            print(f"{name}  {shares['style']:.0%} sketches, {shares['shape']:.0%} of the right shape")


if __name__ == "__main__":
    main()
