"""The embedded task: a small model and preference pairs for two CPU cores.

    python -m extras.tiny                        judge the base model and, where it exists, out/MODEL-rpo/model
    python -m extras.tiny out/tiny-dpo/model     judge other diffusers folders or LoRA weights
    python -m extras.tiny --build                train the networks of extras/embedded/ anew, see tiny_build.py

The pictures are 32x32 drawings with captions such as "a red circle on a blue background". One drawing in six is a
sketch: a dark outline on pale paper. The captions never name the style. In every preference pair the sketch wins.

The trained networks come with the repository, in extras/embedded/. On first use they and the pairs become files in the
usual formats, in $XDG_CACHE_HOME (else ~/.cache), under diffusion-rpo/:

    pipeline  a StableDiffusionPipeline: AutoencoderKL (32x32x3 to 8x8x4), UNet2DConditionModel, CLIPTextModel
    pairs     train.parquet, 1,500 pairs in Pick-a-Pic's schema, and prompts.txt, 36 prompts that no pair shows
    held_out  held_out.parquet, 512 pairs of those 36 prompts
    clip      a small open_clip model for the cross-pair weights; it takes any text and any image

The judge is a small convolutional network that recognises the style and the shape of a picture.
"""

import hashlib
import importlib
import inspect
import io
import json
import math
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from common import InputError, Parser, cache_folder, clip_tokenizer, digest, locked, one_line_errors
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
CLIP = dict(embed_dim=64, vision_cfg=dict(image_size=SIZE, patch_size=8, width=96, layers=3, head_width=32),
            text_cfg=dict(context_length=16, vocab_size=49408, width=64, heads=4, layers=2))
TRAINED = ("unet", "text_encoder")  # what tiny.safetensors has
FILES = Path(__file__).parent / "embedded"  # the trained networks in float16; see tiny_build.py
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


# The networks


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        mid_block_add_attention=False)


def make_pipeline(vae, channels=(64, 112)):
    """A StableDiffusionPipeline with an untrained UNet and text encoder. `channels`: the widths of the UNet's levels."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=channels, layers_per_block=1, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=16, attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)  # Stable Diffusion's
    return StableDiffusionPipeline(vae, make_text_encoder(CLIPTextModel, 64, heads=4), clip_tokenizer(16), unet,
                                   scheduler, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)


def make_text_encoder(kind, width, heads, words="words"):
    """A text encoder of the transformers class `kind`: two layers, 16 tokens, and frozen word vectors."""
    from transformers import CLIPTextConfig

    encoder = kind(CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=heads,
        projection_dim=width, max_position_embeddings=16))
    draw_words(encoder.get_input_embeddings(), words)
    return encoder


def make_clip():
    import open_clip

    model = open_clip.CLIP(**CLIP)
    draw_words(model.token_embedding, "words")
    return model


def judge_network(heads):
    """Four convolutions, then one linear layer for the logits of all heads."""
    layers = []
    for channels, width, stride in ((3, 24, 1), (24, 48, 2), (48, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, sum(heads)))


def draw_words(embedding, key):
    """Freezes word vectors at random values of deviation 0.5, which tell words well apart.

    They are a function of `key`, so no file holds them. The stream of SHAKE-256 is the same everywhere by its
    standard (FIPS 202). torch's random numbers may differ between versions and processors.
    """
    stream = hashlib.shake_256(key.encode()).digest(2 * embedding.weight.numel())
    uniform = np.frombuffer(stream, "<u2").astype(np.float32) / 65536 - 0.5
    words = torch.from_numpy(uniform * np.float32(math.sqrt(3)))
    with torch.no_grad():
        embedding.weight.copy_(words.view_as(embedding.weight))
    embedding.requires_grad_(False)


# The files of the repository


def pack(networks, file, numbers=None):
    """Writes {name: network} in float16, without the frozen word vectors. `numbers` are kept beside the tensors."""
    tensors = {}
    for name, value in contents(networks).items():
        if not is_frozen(value):
            tensors[name] = (value.detach().half() if value.is_floating_point() else value).contiguous()
    save_file(tensors, file, {"about": json.dumps(numbers or {})})  # one entry, because their order is not kept


@torch.no_grad()
def unpack(networks, file):
    """Loads what `pack` wrote into networks as they were made. Returns the numbers that are kept beside the tensors."""
    with safe_open(file, "pt") as stored:
        for name, value in contents(networks).items():
            if not is_frozen(value):
                value.copy_(stored.get_tensor(name))
        return json.loads(stored.metadata()["about"])


def contents(networks):
    """{name: tensor} of {name: network}. Names do not depend on the version of transformers, which renamed some."""
    tensors = {}
    for name, network in networks.items():
        for key, value in network.state_dict(keep_vars=True).items():
            tensors[f"{name}.{key.removeprefix('text_model.')}"] = value
    return tensors


def is_frozen(tensor):
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def networks_digest(networks):
    """A digest of all values of {name: network}."""
    values = contents(networks).items()
    return digest([[name, digest(value.detach().float().numpy().tobytes())] for name, value in sorted(values)])


def parts_of(pipe, names):
    """{name: network} of some parts of a pipeline."""
    return {name: getattr(pipe, name) for name in names}


def embedded_vae(folder, is_shifted=False):
    vae = make_vae()
    numbers = unpack({"vae": vae}, folder / "vae.safetensors")
    vae.register_to_config(scaling_factor=numbers["scaling_factor"],
                           shift_factor=numbers["shift_factor"] if is_shifted else None)
    return vae


def embedded_pipeline(folder):
    pipe = make_pipeline(embedded_vae(folder))
    unpack(parts_of(pipe, TRAINED), folder / "tiny.safetensors")
    return pipe


def embedded_clip(folder):
    model = make_clip()
    unpack({"clip": model}, folder / "clip.safetensors")
    return model


# The parts


def write_pipeline(folder):
    embedded_pipeline(FILES).save_pretrained(folder)


def write_pairs(folder):
    import datasets

    datasets.Dataset.from_list(pair_rows()).to_parquet(folder / "train.parquet")
    prompts = [caption(scene) + "\n" for scene in HELD_OUT]
    (folder / "prompts.txt").write_text("".join(prompts), encoding="utf-8")


def write_held_out(folder):
    import datasets

    datasets.Dataset.from_list(pair_rows(512, held_out=True)).to_parquet(folder / "held_out.parquet")


def write_clip(folder):
    model = embedded_clip(FILES)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


BUILDERS = {"pipeline": write_pipeline, "pairs": write_pairs, "held_out": write_held_out, "clip": write_clip}


def part(name, build_part=None):
    """The folder of a part. The part is written first if it is missing, damaged or outdated.

    The path holds a digest of this file, of the file of `build_part` and of the shipped networks. So every recipe has
    its own folder. A part is written in a temporary folder and renamed, so that nobody sees half of one. It holds a
    list of its files' digests.

    build_part  what writes a part of another module; without it, the function in BUILDERS
    """
    build_part = build_part or BUILDERS[name]
    sources = sorted({__file__, inspect.getfile(build_part), *map(str, FILES.glob("*.safetensors"))})
    recipe = digest(b"".join(Path(source).read_bytes() for source in sources))
    folder = cache_folder() / f"tiny-{recipe}" / name
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f"{name}.lock"):  # one process builds, the others wait
        if not is_whole(folder):
            build(build_part, folder)
    return folder


def build(build_part, folder):
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        built = Path(aside) / folder.name
        built.mkdir()
        # The seed makes a part the same wherever it is first asked for. The caller's random state stays.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            build_part(built)
        (built / ".digests.json").write_text(json.dumps(file_digests(built)), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        built.rename(folder)


def file_digests(folder):
    """{relative path: digest} of all files but the list of digests itself."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".digests.json")
    return {str(file.relative_to(folder)): digest(file.read_bytes()) for file in files}


def is_whole(folder):
    try:
        return json.loads((folder / ".digests.json").read_text(encoding="utf-8")) == file_digests(folder)
    except (OSError, ValueError):
        return False


# The judge's verdict


@torch.no_grad()
def judge(pixels):
    """pixels [N, 3, 32, 32] in [-1, 1] -> [N, 2] int64: is it a sketch, which shape."""
    network = judge_network(HEADS)
    unpack({"judge": network}, FILES / "judge.safetensors")
    logits = network.eval()(pixels).split(HEADS, dim=1)
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
        return json.loads(config.read_text(encoding="utf-8"))["model"]
    with safe_open(lora, "pt") as weights:
        is_transformer = any(name.startswith("transformer.") for name in weights.keys())
    return "tiny-flow" if is_transformer else "tiny"


def parse_args(argv=None):
    parser = Parser(prog="tiny.py", description="Draw samples for held-out prompts and let the judge rate them.")
    parser.add_argument("models", nargs="*", metavar="MODEL",
                        help="tiny, tiny-flow, or folders as train.py leaves them [each of the two whose "
                        "out/MODEL-rpo exists, before and after; without any, tiny]")
    parser.add_argument("--build", action="store_true",
                        help="train the networks of extras/embedded/ anew: about a quarter of an hour")
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
        if args.build:
            return importlib.import_module("extras.tiny_build").build()
        print("the judge is right on {style:.1%} (style) and {shape:.1%} (shape) of 1,000 drawings that it "
              "has not seen".format(**judge_accuracy()))
        for name in args.models:
            shares = measure(load(name))
            print(f"{name}  {shares['style']:.0%} sketches, {shares['shape']:.0%} of the right shape")


if __name__ == "__main__":
    main()
