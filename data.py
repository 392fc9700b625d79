"""Preference pairs, prompts and images as the training step wants them, and the cross-pair weights of RPO.

Pairs come from a parquet file or folder or a hub id in Pick-a-Pic's schema (caption, jpg_0, jpg_1, label_0),
or from a folder of your own with a .jsonl file of {"prompt": ..., "chosen": FILE, "rejected": FILE}. Ties,
label 0.5, are dropped by their label; rows without a label are skipped and counted; other labels are refused.

`python data.py --model M --data D --out CACHE` encodes them once, for many runs: see cache.py.

A batch of B pairs; index 0 of every axis of two is the winner, index 1 the loser:

    prompt       B strings, "" where prompt dropout struck; caption: the same without dropout
    pixels       [B, 2, 3, H, W] float32 in [-1, 1], one crop and one flip for the two images of a pair
    time_ids     [B, 2, 6] float32, SDXL's (height, width, crop top, left, target height, width) of each image
    clip_pixels  [B, 2, 3, h, w] float32, the images as CLIP wants them; absent where no CLIP was asked for
    row          B row numbers, counted over all files in the order of their names
    timestep, noise, vae_noise    [B], [B, C, h, w], [B, 2, C, h, w]: what train.py draws for these places
    unreadable   the row numbers of pairs that could not be decoded and were replaced on the way to this batch
"""

import concurrent.futures
import hashlib
import importlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import tiny

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by --precision
H14 = "ViT-H-14:laion2b_s32b_b79k"
MODELS = {  # what the name of a preset stands for
    "tiny": dict(id="tiny", data="tiny", clip="tiny"),
    "sd15": dict(id="stable-diffusion-v1-5/stable-diffusion-v1-5", data="pickapic", clip=H14),
    "sdxl": dict(id="stabilityai/stable-diffusion-xl-base-1.0", data="pickapic", clip=H14),
}
DATA = {"pickapic": "liuhuohuo2/pick-a-pic-v2"}  # a mirror: the original left the hub in 2025-04
SCAN_LIMIT = 10_000  # pairs; up to here all are decoded once at the start, and data.json is complete at once


def torchrun():
    """(rank, rank on this machine, number of processes) as torchrun sets them; without it (0, 0, 1)."""
    return tuple(int(os.environ.get(name, alone)) for name, alone in
                 [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)])


def find_device(wanted, fail):
    """The name of `wanted`, or of the best device there is: "cuda" for each rank's own GPU under torchrun.

    fail  called with one line where it is not there, or where torchrun starts more processes than GPUs
    """
    gpus, there, world = torch.cuda.device_count(), ["mps"] * torch.backends.mps.is_available(), torchrun()[2]
    if world > 1:  # a GPU for each process of this machine, by its local rank
        there = ["cuda"] * bool(gpus)
        if int(os.environ.get("LOCAL_WORLD_SIZE", world)) > gpus > 0 and wanted != "cpu":
            fail(f"more processes than GPUs: --nproc_per_node must be at most {gpus}, or --device cpu")
    there = [f"cuda:{i}" for i in range(gpus)] * (world == 1) + there + ["cpu"]
    name = wanted or there[0]
    if name not in there and (name.partition(":")[0], f"{name}:0") != ("cuda", there[0]):
        fail(f"--device {name} is not there; this machine has {', '.join(there)}")
    return name


def own_device(name):
    """The torch.device of this process by a name of `find_device`."""
    _, local_rank, world = torchrun()
    return torch.device(f"cuda:{local_rank}" if name == "cuda" and world > 1 else name)


def digest(network):
    """16 hex digits of the sha256 over name, type, shape and values of every tensor, in name order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
        sha.update(tensor.cpu().contiguous().numpy())
    return sha.hexdigest()[:16]


def keyed_generator(*key):
    """A CPU random generator that is a function of its key (integers and strings) alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def hub_id(source):
    """`source` where it may be a NAMESPACE/NAME; else it is a mistyped path, and the hub is not asked."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise FileNotFoundError("there is no such file or folder")
    return source


def brief(error):
    """The first line of an exception's text, for messages of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def local_files(source):
    """The parquet files of a path, or its .jsonl files; of a folder those named train-* alone, if any."""
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet")) or sorted(path.glob("*.jsonl"))
    return [file for file in files if file.name.startswith("train-")] or files


def read_rows(source):
    """A `datasets.Dataset` with caption, jpg_0, jpg_1, label_0 from a preset's name, a path, or a hub id."""
    import datasets
    import pyarrow.parquet

    files = []
    if source == "tiny":
        return tiny.pairs()
    source = DATA.get(source, source)
    try:
        if not Path(source).expanduser().exists():
            return datasets.load_dataset(hub_id(source), split="train")
        files = local_files(source)
        if files and files[0].suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=[*map(str, files)], split="train")
        rows = [(file.parent, json.loads(line)) for file in files
                for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        return datasets.Dataset.from_dict({
            "caption": [row["prompt"] for _, row in rows], "label_0": [1.0] * len(rows),
            "jpg_0": [str(folder / row["chosen"]) for folder, row in rows],
            "jpg_1": [str(folder / row["rejected"]) for folder, row in rows]})
    except KeyError as error:
        raise SystemExit(f"data: a line of {source} lacks {error}; it takes prompt, chosen and rejected")
    except Exception as error:
        fault = source, error.__cause__ or error
        damaged = not getattr(fault[1], "errno", None)  # else a full disk or the like: no file is to blame
        for file in (file for file in files if damaged and file.suffix == ".parquet"):
            try:
                for _ in pyarrow.parquet.ParquetFile(file).iter_batches():
                    pass
            except Exception as error:
                fault = file, error
                break
        raise SystemExit(f"data: {fault[0]} cannot be read: {brief(fault[1])}")


def read_image(source):
    """An upright RGB picture from encoded bytes, a path, or the {"bytes", "path"} of a `datasets.Image`.

    Transparency goes over white, as browsers show it. Raises what PIL raises on bytes that it cannot decode,
    and ValueError above PIL's limit of pixels (a decompression bomb).
    """
    if isinstance(source, dict):
        source = source["bytes"] or source["path"]
    image = Image.open(source if isinstance(source, str) else io.BytesIO(source))
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels: a decompression bomb?")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel; PIL would clip them to 8, not scale them
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def crop_and_resize(image, size, y, x, flip):
    """The square of side `size` pixels at place (y, x), in [0, 1], of the image scaled to that short side.

    It cuts before it scales, so that a 3 x 4000 picture costs nothing. Returns pixels [3, size, size] in
    [-1, 1] and SDXL's time_ids [6]; the crop is counted in the scaled, flipped image, as SDXL was trained.
    """
    image = ImageOps.mirror(image) if flip else image
    (width, height), scale = image.size, size / min(image.size)
    top, left = round(y * (round(height * scale) - size)), round(x * (round(width * scale) - size))
    edges = left, top, left + size, top + size
    box = [min(edge / scale, limit) for edge, limit in zip(edges, image.size * 2)]
    pixels = np.array(image.resize((size, size), Image.LANCZOS, box=box))
    pixels = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.tensor([height, width, top, left, size, size], dtype=torch.float32)


def middle_square(image):
    """What CLIP's own crop keeps; cut before open_clip scales, or 3 x 4000 pixels would become millions."""
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


class PreferencePairs(torch.utils.data.Dataset):
    """An endless stream of pairs: item p is pair p % n in the shuffle of epoch p // n; `len` is n.

    A pair that cannot be decoded is replaced by the next readable one of the epoch's order. So an item is a
    function of (seed, p), and a run can start at any position without decoding what lies before it.

    source          see the head of this file
    resolution      side of the training square, pixels
    clip_transform  a function from a picture to a tensor for `clip_pixels`, or None
    scan            takes the iterator that decodes up to SCAN_LIMIT pairs once, now, for a complete report,
                    and gives one; None: nothing is decoded yet
    rows            what `read_rows` gives, if it was read already; or cache.Streamed
    raises          SystemExit, in one line, where the source cannot be read or holds a wrong label or no pair
    """

    def __init__(self, source, resolution, seed=0, random_crop=False, random_flip=False, prompt_dropout=0.0,
                 clip_transform=None, scan=iter, rows=None):
        import datasets
        import pyarrow

        self.resolution, self.seed, self.clip_transform = resolution, seed, clip_transform
        self.random_crop, self.random_flip, self.prompt_dropout = random_crop, random_flip, prompt_dropout
        self.rows = read_rows(source) if rows is None else rows
        columns = set(self.rows.column_names)
        if missing := {"caption", "jpg_0", "jpg_1", "label_0"} - columns:
            raise SystemExit(f"data: {source} lacks {', '.join(sorted(missing))} of Pick-a-Pic's columns")
        if (kind := self.rows.features["caption"].dtype) not in ("string", "large_string", "null"):
            raise SystemExit(f"data: the captions of {source} are of type {kind}, not strings")
        for name in ("jpg_0", "jpg_1"):  # a column of the image type gives bytes or a path; decoded here
            if isinstance(self.rows.features[name], datasets.Image):
                self.rows = self.rows.cast_column(name, datasets.Image(decode=False))
        try:  # [rows]; a missing label becomes nan
            label = np.array(self.rows["label_0"][:], dtype=float)
            other = np.array(self.rows["label_1"][:], dtype=float) if "label_1" in columns else 1 - label
        except (TypeError, ValueError) as error:
            raise SystemExit(f"data: the labels of {source} are not numbers: {brief(error)}")
        labelled = ~np.isnan(label)
        if "has_label" in columns:
            labelled &= np.array([flag in (None, True, 1) for flag in self.rows["has_label"][:]], dtype=bool)
        wrong = labelled & (~np.isin(label, (0, 0.5, 1)) | (~np.isnan(other) & (label + other != 1)))
        if wrong.any():
            first = ", ".join(f"row {k} ({label[k]:g}, {other[k]:g})" for k in np.flatnonzero(wrong)[:5])
            raise SystemExit(f"data: {wrong.sum()} rows of {source} have a label_0 other than 0, 0.5 or 1, "
                             f"or a label_1 that is not its complement: {first}")
        self.captions = pyarrow.array(self.rows["caption"][:])  # in one piece: processes share it
        self.pairs = np.flatnonzero(labelled & (label != 0.5))  # row numbers
        self.winner = (label == 0).astype(int)  # [rows], 0 or 1: which of the two images won
        self.ties, self.unlabelled = int((labelled & (label == 0.5)).sum()), int((~labelled).sum())
        self.order, self.draw = (-1, None), None  # (epoch, its shuffle) of the last item; see __getitem__
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            scanned = self.pairs if scan and len(self.pairs) <= SCAN_LIMIT else []
            failed = pool.map(lambda row: self.images(row) is None, scanned)
            self.unreadable = {int(row) for row, bad in zip(scanned, scan(failed) if scan else []) if bad}
        if len(self.unreadable) == len(self.pairs):
            raise SystemExit(f"data: {source} holds no usable pair: {self.report()}")

    def __len__(self):
        return len(self.pairs)

    def report(self):
        """What data.json holds. Above SCAN_LIMIT pairs `unreadable` lists the rows that were met so far."""
        return {"rows": len(self.rows), "used": len(self.pairs) - len(self.unreadable), "ties": self.ties,
                "unlabelled": self.unlabelled, "unreadable": sorted(self.unreadable)}

    def digest(self):
        """16 hex digits over the pairs: rows, winners, captions, and names and sizes of their files."""
        files = getattr(self.rows, "files", None) or [file["filename"] for file in self.rows.cache_files]
        if not files and self.rows.features["jpg_0"].dtype == "string":  # of a .jsonl
            paths = self.rows["jpg_0"][:] + self.rows["jpg_1"][:]
            files = [(path, os.path.exists(path) and os.path.getsize(path)) for path in paths]
        captions = [self.caption(row) for row in self.pairs]
        content = json.dumps([self.pairs.tolist(), self.winner[self.pairs].tolist(), captions, files])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def caption(self, row):
        return self.captions[int(row)].as_py() or ""

    def images(self, row):
        """[winner, loser] of a row, or None where one cannot be decoded."""
        return self.decode(row, self.rows[int(row)])

    def decode(self, row, record):
        winner = self.winner[row]
        try:  # bad bytes raise any error
            return [read_image(record[f"jpg_{side}"]) for side in (winner, 1 - winner)]
        except Exception:
            return None

    def content(self, row, images, epoch, prompt):
        """Pixels, time_ids and clip_pixels of a row's two images, cropped and flipped as in an epoch."""
        y, x, flip, _ = torch.rand(4, generator=keyed_generator(self.seed, "augment", epoch, row)).tolist()
        y, x = (y, x) if self.random_crop else (0.5, 0.5)
        flip = self.random_flip and flip < 0.5
        pixels, time_ids = zip(*(crop_and_resize(image, self.resolution, y, x, flip) for image in images))
        item = {"pixels": torch.stack(pixels), "time_ids": torch.stack(time_ids)}
        if self.clip_transform:
            item["clip_pixels"] = torch.stack([self.clip_transform(middle_square(image)) for image in images])
        return item

    def __getitem__(self, position):
        """Item `position`, with what `self.draw`, a function of the position, adds to it."""
        epoch, start = divmod(position, len(self))
        if self.order[0] != epoch:
            generator = keyed_generator(self.seed, "order", epoch)
            self.order = epoch, torch.randperm(len(self), generator=generator).numpy()
        unreadable = []
        for k in range(min(len(self), 1000)):
            row = int(self.pairs[self.order[1][(start + k) % len(self)]])
            if images := self.images(row):
                break
            unreadable.append(row)
        else:
            raise RuntimeError(f"{k + 1} pairs in a row cannot be decoded any more: is the storage gone?")
        drop = torch.rand(4, generator=keyed_generator(self.seed, "augment", epoch, row))[3]
        caption = self.caption(row)
        prompt = "" if drop < self.prompt_dropout else caption
        item = {"prompt": prompt, "caption": caption, "row": row, "unreadable": unreadable}
        return item | self.content(row, images, epoch, prompt) | (self.draw(position) if self.draw else {})


def collate(items):
    """A list of PreferencePairs' items -> the batch described at the head of this file."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch["unreadable"] = sum(batch["unreadable"], [])
    return {key: torch.stack(value) if value and torch.is_tensor(value[0]) else value
            for key, value in batch.items()}


def quiet():
    """No progress bars of loading, and no report of every prompt that is cut to 77 tokens."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def find_pipeline(model):
    """(folder or hub id, model_index) of a preset's name, folder or hub id. SystemExit if it will not do."""
    from diffusers import DiffusionPipeline

    source = MODELS.get(model, {"id": model})["id"]
    try:
        index = DiffusionPipeline.load_config(source if Path(source).is_dir() else hub_id(source))
        kind = index["_class_name"]
    except Exception as error:
        raise SystemExit(f"model: {source} cannot be read as a diffusers pipeline: {brief(error)}")
    parts = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    if kind == "StableDiffusionXLPipeline":
        parts += ["text_encoder_2", "tokenizer_2"]
    elif kind != "StableDiffusionPipeline":
        raise SystemExit(f"model: {source} is a {kind}, not of the SD 1.x or the SDXL kind")
    for part in parts:
        if not (index.get(part) or [None])[0] or Path(source).is_dir() and not (Path(source) / part).is_dir():
            raise SystemExit(f"model: {source} lacks its {part}")
    return source, index


def load_pipeline(model):
    """The float32 diffusers pipeline of a preset's name, a folder, or a hub id, without a safety checker.

    SystemExit where a tensor or a vocabulary is missing, for which the libraries would take any other.
    """
    from diffusers import DiffusionPipeline

    source, index = find_pipeline(model if model != "tiny" else str(tiny.part("pipeline")))
    checker = dict(safety_checker=None, requires_safety_checker=False) if "safety_checker" in index else {}
    networks = {}
    try:
        for name in {"unet", "vae", "text_encoder", "text_encoder_2"} & index.keys():
            network = getattr(importlib.import_module(index[name][0]), index[name][1])
            networks[name], info = network.from_pretrained(source, subfolder=name, dtype=torch.float32,
                                                           output_loading_info=True)
            if info["missing_keys"]:
                raise ValueError(f"its {name} lacks {', '.join(sorted(info['missing_keys'])[:3])}")
        pipe = DiffusionPipeline.from_pretrained(source, **networks, **checker)
        for name in {"tokenizer", "tokenizer_2"} & index.keys():
            if getattr(pipe, name).vocab_size <= len(set(getattr(pipe, name).all_special_ids)):
                raise ValueError(f"its {name} has no vocabulary")
        if "beta_schedule" not in pipe.scheduler.config or pipe.vae.config.get("latents_mean") is not None:
            raise ValueError("its noise schedule or its latents are not those of Stable Diffusion or SDXL")
    except Exception as error:
        raise SystemExit(f"model: {source} cannot be loaded: {brief(error)}")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def side(pipe, wanted=None):
    """The side of the training images, pixels: `wanted`, or the model's own. SystemExit if it will not do."""
    least = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if wanted and wanted % least:
        raise SystemExit(f"model: --resolution {wanted} is no multiple of {least}, as this model needs")
    return wanted or own_side(pipe)


def own_side(pipe):
    """The side of the images that a pipeline was made for, pixels."""
    return int(np.min(pipe.unet.config.sample_size)) * pipe.vae_scale_factor


def is_toy(pipe):
    """Whether a model is so small, under 100 M parameters, that the embedded CLIP will do for it."""
    return sum(parameter.numel() for parameter in pipe.unet.parameters()) < 1e8


def in_parts(function, rows, device, at_once, threads=1):
    """[function of some rows, ...], without gradients, `at_once` rows at a time.

    On a CPU one row at a time, each on one thread, `threads` of them side by side, which is no slower: so a row
    gives the same bits in any batch, by any number of threads. (A difference of errors times beta shows bits.)
    """
    function = torch.no_grad()(function)  # of this thread alone, were it around the pool
    if device.type != "cpu":
        return [function(rows[i:i + at_once]) for i in range(0, len(rows), at_once)]
    with concurrent.futures.ThreadPoolExecutor(threads, "cpu", torch.set_num_threads, (1,)) as pool:
        return [*pool.map(function, (rows[i:i + 1] for i in range(len(rows))))]


def encode_prompts(pipe, prompts, dtype=torch.float32):
    """What the text encoders make of B prompts: states [B, L, E]; of SDXL also pooled [B, P], else None.

    An empty prompt becomes what the pipeline itself takes for unconditional: zeros where SDXL's
    force_zeros_for_empty_prompt says so (Diffusion-DPO trains on the encoded "" there), else the encoded "".
    Longer prompts than the encoder reads are cut.
    """
    device = pipe.text_encoder.device

    def encode(some):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return pipe.encode_prompt(some, device=device, num_images_per_prompt=1,
                                      do_classifier_free_guidance=False)

    parts = in_parts(encode, prompts, device, len(prompts))  # one thread: tokenizers are not made for more
    states, _, *pooled = (torch.cat(some).float() if some[0] is not None else None for some in zip(*parts))
    zeros = pipe.config.get("force_zeros_for_empty_prompt", False)
    keep = torch.tensor([bool(prompt) or not zeros for prompt in prompts])[:, None].to(device)
    return states * keep[:, None], pooled[0] * keep if pooled else None


def condition(states, pooled, time_ids):
    """The UNet's conditioning for B prompts with S images each: rows of the first images, then of the second.

    time_ids  [B, S, 6] float32, used by SDXL alone; bf16 would round 1023 to 1024
    returns   {"encoder_hidden_states": [S B, L, E]}; for SDXL also added_cond_kwargs: text_embeds, time_ids
    """
    sides = time_ids.shape[1]
    conditioning = {"encoder_hidden_states": states.repeat(sides, 1, 1)}
    if pooled is not None:
        conditioning["added_cond_kwargs"] = {"text_embeds": pooled.repeat(sides, 1),
                                             "time_ids": time_ids.transpose(0, 1).flatten(0, 1)}
    return conditioning


def encode_images(vae, pixels):
    """Mean and std [B, S, C, h, w] of the VAE's posterior of pixels [B, S, 3, H, W], before the scaling.

    In float32 whatever the run's precision: SDXL's VAE overflows in fp16. A few pairs at a time: at 1024 px
    one activation of 16 pairs would have 2^32 elements.
    """
    def encode(some):
        posterior = vae.encode(some.flatten(0, 1).to(vae.device, non_blocking=True)).latent_dist
        return posterior.mean, posterior.std

    at_once = max(1, 2 ** 21 // pixels[0, 0, 0].numel())
    parts = in_parts(encode, pixels, vae.device, at_once, torch.get_num_threads())
    mean, std = (torch.cat(some).unflatten(0, pixels.shape[:2]) for some in zip(*parts))
    return mean, std


def encode(pipe, clip, batch, dtype=torch.float32):
    """What training needs, and a cache keeps, of a batch of B pairs with S images each.

    returns  {"mean", "std": [B, S, C, h, w], "states": [B, L, E], "embeddings": [B, 3, E]} and for SDXL
             "pooled": [B, P]; embeddings are CLIP's of text, winner, loser, absent without `clip`
    """
    mean, std = encode_images(pipe.vae, batch["pixels"])
    states, pooled = encode_prompts(pipe, batch["prompt"], dtype)
    embeddings = clip and clip.embed(batch["caption"], batch.get("clip_pixels"))
    made = {"mean": mean, "std": std, "states": states, "pooled": pooled, "embeddings": embeddings}
    return {name: value for name, value in made.items() if value is not None}


@torch.no_grad()
def decode_images(vae, latents):
    """Pictures [N, 3, H, W] float32 on the CPU, in [0, 1], of scaled latents [N, C, h, w]; in float32."""
    parts = (latents.float() / vae.config.scaling_factor).split(max(1, 2 ** 14 // latents[0, 0].numel()))
    return torch.cat([vae.decode(part).sample.cpu() for part in parts]).div(2).add(.5).clamp(0, 1)


@torch.no_grad()
def sample(pipe, prompts, generators, steps, guidance, dtype=torch.float32, **more):
    """Scaled latents [N, C, h, w] of N prompts, each from the noise of its own CPU generator.

    more  what else the pipeline takes: height and width in pixels; image and strength of image-to-image
    """
    with torch.autocast(pipe.device.type, dtype, enabled=dtype != torch.float32):
        return pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators,
                    output_type="latent", **more).images.float()


class Clip:
    """An open_clip model that embeds captions and images for `cross_pair_weights`.

    spec    ARCH:WEIGHTS, the weights a tag of open_clip or a local file; or "tiny", the embedded one
    raises  SystemExit, in one line, where it is not known or cannot be loaded
    """

    def __init__(self, spec, device="cpu", dtype=torch.float32):
        import open_clip

        arch, _, weights = spec.partition(":")
        if spec == "tiny":
            arch, weights = f"local-dir:{tiny.part('clip')}", None
        elif weights == "random" and arch in open_clip.list_models():  # --random_init
            weights = None
            torch.manual_seed(0)
        elif arch not in open_clip.list_models() or not weights:
            raise SystemExit(f"clip: {spec} is neither tiny nor ARCH:WEIGHTS, ARCH one of open_clip's")
        known = open_clip.pretrained.get_pretrained_cfg(arch, weights) if weights else {}
        try:  # OpenAI's weights want QuickGELU, and open_clip would only warn
            self.model, _, self.transform = open_clip.create_model_and_transforms(
                arch, weights, force_quick_gelu=known.get("quick_gelu", False), device=device)
            self.tokenizer = open_clip.get_tokenizer(arch)
        except Exception as error:
            raise SystemExit(f"clip: {spec} cannot be loaded ({brief(error)}); give --clip another ARCH:TAG, "
                             "ARCH:FILE, or tiny")
        self.model.eval().requires_grad_(False)
        self.device, self.dtype = torch.device(device), dtype

    @torch.no_grad()
    def embed_texts(self, captions):
        """[B, E] float32 of B captions."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.encode_text(self.tokenizer(captions).to(self.device)).float()

    @torch.no_grad()
    def embed_images(self, pixels):
        """[N, E] float32 of N pictures, stacked after `transform`."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.encode_image(pixels.to(self.device)).float()

    def embed(self, captions, clip_pixels=None):
        """[B, 3, E]: text, image_w, image_l of B captions and clip_pixels [B, 2, 3, h, w]; without, zeros."""
        text = self.embed_texts(captions)
        image = torch.zeros_like(text)[:, None].repeat(1, 2, 1)
        if clip_pixels is not None:
            image = self.embed_images(clip_pixels.flatten(0, 1)).unflatten(0, (-1, 2))      # [B, 2, E]
        return torch.cat([text[:, None], image], 1)


def cross_pair_weights(text, image_w, image_l, tau, similarity="both"):
    """How much winner i is held against loser j: w_ij = softmax over j of ( -d_ij / tau ), arXiv:2406.06382.

    d_ij is the cosine distance of the two captions ("text"), of winner i's image to loser j's ("image"), or
    the mean of these ("both"). Embeddings that are not used may be anything.

    text, image_w, image_l  [B, E] CLIP embeddings of captions, winners, losers; normalised here, in float32
    tau                     temperature > 0; toward 0 a winner meets the nearest losers alone, else all alike
    returns                 [B, B] float32, row i = winner i, column j = loser j, rows sum to 1
    """
    def cosine(a, b):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T  # [B, B]

    similarities = {"text": lambda: cosine(text, text), "image": lambda: cosine(image_w, image_l),
                    "both": lambda: (cosine(text, text) + cosine(image_w, image_l)) / 2}
    return torch.softmax((similarities[similarity]() - 1) / tau, dim=1)


if __name__ == "__main__":
    import cache

    cache.main()
