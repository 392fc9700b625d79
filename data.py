"""Preference pairs as the training step wants them, out of images or out of a cache, and RPO's weights.

Pairs come from a parquet file or folder or a hub id in Pick-a-Pic's schema (caption, jpg_0, jpg_1, label_0),
or from a folder of your own with a .jsonl file of {"prompt": ..., "chosen": FILE, "rejected": FILE}. Ties,
label 0.5, are dropped by their label; rows without a label are skipped and counted; other labels are refused.
`python encode.py --out CACHE` encodes them once, for many runs; a cache gives the same stream of pairs.

A batch of B pairs; index 0 of every axis of two is the winner, index 1 the loser:

    prompt, caption   B strings: the prompt to train on, "" where prompt dropout struck; the same without dropout
    row               [B] int64, row numbers, counted over all files in the order of their names
    image_ids         [B, 2] int64, 64 bits of a digest of each image's stored bytes
    time_ids          [B, 2, 6] float32, SDXL's (height, width, crop top, left, target height, width)
    unreadable        the row numbers of pairs that could not be decoded and were replaced on the way here
    COLUMNS           [B] float32 each
    of a `Stream`     position [B] int64, record [B, 3] float64; t [B], noise [B, C, h, w],
                      vae_noise [B, 2, C, h, w]
    of images         pixels [B, 2, 3, H, W] float32 in [-1, 1], one crop and one flip for both images of a pair;
                      clip_pixels [B, 2, 3, h, w], the images as CLIP wants them, if it was asked for
    of a cache        mean, std [B, 2, C, h, w], prompt_embeds [B, L, E], pooled_prompt_embeds [B, P] (SDXL),
                      clip_embeds [B, 3, E'] of caption, winner, loser
"""

import concurrent.futures
import hashlib
import importlib
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open

from common import InputError, brief, digest, hub_id, keyed_generator

SCAN_LIMIT = 10_000  # pairs; up to here train.py decodes all once at the start, and data.json is complete at once
COLUMNS = ()  # further columns of the data, a number per pair, that a loss may name: add yours
HUB_IDS = {"pickapic": "liuhuohuo2/pick-a-pic-v2"}  # a mirror: the original left the hub in 2025-04


# Rows


def local_files(source):
    """The parquet files of a path, or its .jsonl files; of a folder those named train-* alone, if any."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.parquet")) or sorted(path.glob("*.jsonl"))
    return [file for file in files if file.name.startswith("train-")] or files


def find_source(source):
    """A path or hub id of what --data names; "tiny" is built where it is not there yet."""
    if source == "tiny":
        return str(importlib.import_module("extras.tiny").part("pairs"))
    return HUB_IDS.get(source, source)


def find_prompts(source):
    """The prompts of a txt file, one a line; of "tiny" those that no pair shows."""
    file = Path(find_source(source)) / "prompts.txt" if source == "tiny" else Path(source).expanduser()
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"--sample_prompts {source} cannot be read: {brief(error)}")


def read_rows(source):
    """A `datasets.Dataset` with caption, jpg_0, jpg_1, label_0 and COLUMNS from what `find_source` gives."""
    import datasets

    files = []
    try:
        if not Path(source).expanduser().exists():
            return datasets.load_dataset(hub_id(source), split="train")
        files = local_files(source)
        if files and files[0].suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=[*map(str, files)], split="train")
        return datasets.Dataset.from_dict(read_jsonl(files))
    except KeyError as error:
        raise InputError(f"a line of {source} lacks {error}; it takes prompt, chosen and rejected")
    except Exception as error:
        cause = error.__cause__ or error
        damaged = damaged_file(files) if not getattr(cause, "errno", None) else None  # a full disk has no file
        name, cause = damaged or (source, cause)
        raise InputError(f"--data {name} cannot be read: {brief(cause)}")


def read_jsonl(files):
    """The columns of .jsonl files, the images by their paths."""
    columns = {name: [] for name in ("caption", "jpg_0", "jpg_1", "label_0", *COLUMNS)}
    for file in files:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
        for line in filter(str.strip, lines):
            row = json.loads(line)
            columns["caption"].append(row["prompt"])
            columns["jpg_0"].append(str(file.parent / row["chosen"]))
            columns["jpg_1"].append(str(file.parent / row["rejected"]))
            columns["label_0"].append(1.0)
            for name in COLUMNS:
                columns[name].append(row[name])
    return columns


def damaged_file(files):
    """(file, error) of the first parquet file that cannot be read to its end, or None."""
    import pyarrow.parquet

    for file in files:
        try:
            for _ in pyarrow.parquet.ParquetFile(file).iter_batches():
                pass
        except Exception as error:
            return file, error


# Images


def stored_bytes(source):
    """The encoded bytes of a cell: bytes, a path, or the {"bytes", "path"} of a `datasets.Image`."""
    if isinstance(source, dict):
        source = source["bytes"] or source["path"]
    return Path(source).read_bytes() if isinstance(source, str) else source


def image_id(content):
    """64 bits of a digest of encoded bytes, as a signed integer: equal for the same file alone."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def read_image(content):
    """An upright RGB picture from encoded bytes.

    Transparency goes over white, as browsers show it. Raises what PIL raises on bytes that it cannot decode,
    and ValueError above PIL's limit of pixels (a decompression bomb).
    """
    image = Image.open(io.BytesIO(content))
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
    scale = size / min(image.size)
    height, width = round(image.height * scale), round(image.width * scale)
    top, left = round(y * (height - size)), round(x * (width - size))
    right, bottom = min((left + size) / scale, image.width), min((top + size) / scale, image.height)
    box = (min(left / scale, image.width), min(top / scale, image.height), right, bottom)
    pixels = np.array(image.resize((size, size), Image.LANCZOS, box=box))
    pixels = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.tensor([image.height, image.width, top, left, size, size], dtype=torch.float32)


def middle_square(image):
    """What CLIP's own crop keeps; cut before open_clip scales, or 3 x 4000 pixels would become millions."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


# Pairs


class Pairs(torch.utils.data.Dataset):
    """An endless stream of pairs: item p is pair p % n in the shuffle of epoch p // n; `len` is n.

    A pair that cannot be decoded is replaced by the next readable one of the epoch's order. So an item is a
    function of (seed, p), and a run can start at any position without decoding what lies before it.

    A subclass has rows [n], the row numbers of its pairs, num_rows, ties and unlabelled; load(row), the pair
    or None where it cannot be decoded; caption(row); and content(row, pair, epoch, prompt), the tensors.
    """

    def __init__(self, seed, prompt_dropout):
        self.seed = seed
        self.prompt_dropout = prompt_dropout
        self.unreadable = set()  # row numbers
        self.epoch, self.order = None, None  # of the last item: the number, the shuffle [n]

    def __len__(self):
        return len(self.rows)

    def report(self):
        """What data.json holds; `unreadable` lists the rows that were met so far."""
        return {"rows": self.num_rows, "used": len(self) - len(self.unreadable), "ties": self.ties,
                "unlabelled": self.unlabelled, "unreadable": sorted(self.unreadable)}

    def row_at(self, position):
        """The row of item `position`, were all pairs readable."""
        epoch, place = divmod(position, len(self))
        if self.epoch != epoch:
            generator = keyed_generator(self.seed, "order", epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator).numpy()
        return int(self.rows[self.order[place]])

    def __getitem__(self, position):
        epoch, start = divmod(position, len(self))
        unreadable = []
        for k in range(min(len(self), 1000)):
            row = self.row_at(epoch * len(self) + (start + k) % len(self))
            pair = self.load(row)
            if pair is not None:
                break
            unreadable.append(row)
        else:
            raise InputError(f"{k + 1} pairs in a row cannot be decoded any more: is the storage gone?")
        drop = augmentation(self.seed, epoch, row)[3]
        caption = self.caption(row)
        prompt = "" if drop < self.prompt_dropout else caption
        item = {"prompt": prompt, "caption": caption, "row": torch.tensor(row), "unreadable": unreadable}
        return item | self.content(row, pair, epoch, prompt)


def augmentation(seed, epoch, row):
    """Four uniform numbers of a pair in an epoch: crop y, crop x, flip, prompt dropout."""
    return torch.rand(4, generator=keyed_generator(seed, "augment", epoch, row)).tolist()


def collate(items):
    """A list of a `Pairs`' items -> the batch described at the head of this file."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch["unreadable"] = [row for rows in batch["unreadable"] for row in rows]
    return {key: torch.stack(value) if value and torch.is_tensor(value[0]) else value
            for key, value in batch.items()}


class ImagePairs(Pairs):
    """Pairs out of images, decoded, cropped and flipped when an item is asked for.

    source          see the head of this file
    resolution      side of the training square, pixels
    clip_transform  a function from a picture to a tensor for `clip_pixels`, or None; may be set later
    table           what `read_rows` gives, if it was read already; or encode.StreamedRows
    raises          InputError where the source cannot be read or holds a wrong label or no pair
    """

    def __init__(self, source, resolution=None, seed=0, random_crop=False, random_flip=False, prompt_dropout=0.0,
                 clip_transform=None, table=None):
        super().__init__(seed, prompt_dropout)
        self.resolution, self.clip_transform = resolution, clip_transform
        self.random_crop, self.random_flip = random_crop, random_flip
        self.source = find_source(source)
        self.table = read_rows(self.source) if table is None else table
        self.num_rows = len(self.table)
        self.check_columns()
        self.read_labels()
        if len(self) == 0:
            raise InputError(f"--data {source} holds no usable pair: {self.report()}")

    def check_columns(self):
        import datasets
        import pyarrow

        columns, features = self.table.column_names, self.table.features
        missing = sorted({"caption", "jpg_0", "jpg_1", "label_0"} - set(columns))
        if missing:
            raise InputError(f"--data {self.source} lacks {', '.join(missing)} of Pick-a-Pic's columns")
        kind = features["caption"].dtype
        if kind not in ("string", "large_string", "null"):
            raise InputError(f"the captions of {self.source} are of type {kind}, not strings")
        for name in ("jpg_0", "jpg_1"):  # a column of the image type gives bytes or a path; decoded here
            if isinstance(features[name], datasets.Image):
                self.table = self.table.cast_column(name, datasets.Image(decode=False))
        self.captions = pyarrow.array(self.table["caption"][:])  # in one piece: processes share it
        self.columns = {name: self.numbers(name).astype(np.float32) for name in COLUMNS if name in columns}

    def numbers(self, name):
        """A column as float64 [num_rows], nan where it is empty. InputError where it holds anything else."""
        try:
            return np.array(self.table[name][:], dtype=float)
        except (TypeError, ValueError) as error:
            raise InputError(f"the {name} of {self.source} are not numbers: {brief(error)}")

    def read_labels(self):
        """Sets rows, winner_side, ties, unlabelled. A missing label is nan here."""
        columns = self.table.column_names
        label = self.numbers("label_0")                                                 # [num_rows]
        other = self.numbers("label_1") if "label_1" in columns else 1 - label
        labelled = ~np.isnan(label)
        if "has_label" in columns:
            has_label = [flag in (None, True, 1) for flag in self.table["has_label"][:]]
            labelled &= np.array(has_label, dtype=bool)
        contradicted = ~np.isnan(other) & (label + other != 1)
        wrong = np.flatnonzero(labelled & (~np.isin(label, (0, 0.5, 1)) | contradicted))
        if len(wrong):
            first = ", ".join(f"row {row} ({label[row]:g}, {other[row]:g})" for row in wrong[:5])
            raise InputError(f"{len(wrong)} rows of {self.source} have a label_0 other than 0, 0.5 or 1, "
                             f"or a label_1 that is not its complement: {first}")
        tied = labelled & (label == 0.5)
        self.rows = np.flatnonzero(labelled & ~tied)
        self.winner_side = (label == 0).astype(int)                                     # [num_rows], 0 or 1
        self.ties, self.unlabelled = int(tied.sum()), int((~labelled).sum())

    def scan(self):
        """Decodes every pair once, so that `report` is complete. InputError where none can be decoded."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            loaded = pool.map(lambda row: self.load(row) is not None, self.rows)
            self.unreadable = {int(row) for row, is_readable in zip(self.rows, loaded) if not is_readable}
        if len(self.unreadable) == len(self):
            raise InputError(f"--data {self.source} holds no usable pair: {self.report()}")

    def digest(self):
        """16 hex digits over the pairs: rows, winners, captions, and sizes of their files; not where they lie."""
        files = getattr(self.table, "files", None)
        if files is None and Path(self.source).expanduser().exists():
            files = local_files(self.source)
        sizes = [(Path(file).name, os.path.getsize(file)) for file in files or [] if os.path.exists(file)]
        if self.table.features["jpg_0"].dtype == "string":  # of a .jsonl
            paths = self.table["jpg_0"][:] + self.table["jpg_1"][:]
            sizes += [(Path(path).name, os.path.exists(path) and os.path.getsize(path)) for path in paths]
        captions = [self.caption(row) for row in self.rows]
        return digest([self.rows.tolist(), self.winner_side[self.rows].tolist(), captions, sizes])

    def caption(self, row):
        return self.captions[int(row)].as_py() or ""

    def load(self, row):
        """[(picture, image_id)] of a row's winner and loser, or None where one cannot be decoded."""
        return self.decode(row, self.table[int(row)])

    def decode(self, row, record):
        """The same of a row that was read already."""
        winner = self.winner_side[row]
        try:  # bad bytes raise any error
            stored = [stored_bytes(record[f"jpg_{side}"]) for side in (winner, 1 - winner)]
            return [(read_image(content), image_id(content)) for content in stored]
        except Exception:
            return None

    def content(self, row, pair, epoch, prompt):
        """Pixels, time_ids and clip_pixels of a row's two images, cropped and flipped as in an epoch."""
        y, x, flip, _ = augmentation(self.seed, epoch, row)
        if not self.random_crop:
            y = x = 0.5
        flip = self.random_flip and flip < 0.5
        cropped = [crop_and_resize(image, self.resolution, y, x, flip) for image, _ in pair]
        item = {"pixels": torch.stack([pixels for pixels, _ in cropped]),
                "time_ids": torch.stack([time_ids for _, time_ids in cropped]),
                "image_ids": torch.tensor([number for _, number in pair])}
        item |= {name: torch.tensor(column[row]) for name, column in self.columns.items()}
        if self.clip_transform:
            squares = [self.clip_transform(middle_square(image)) for image, _ in pair]
            item["clip_pixels"] = torch.stack(squares)
        return item


# A cache: what encode.py leaves


def is_cache(source):
    file = Path(source).expanduser() / "manifest.json"
    return file.is_file() and b'"encoders"' in file.read_bytes()


def read_manifest(source):
    """The manifest of a cache, finished or not. InputError where it is damaged, or of the first edition."""
    file = Path(source).expanduser() / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error!r:.200}); remove it, and the command of encode.py "
                         "that made the cache writes it anew")
    if manifest.get("edition") != 2:
        raise InputError(f"{source} was encoded by the first edition; encode the pairs once more, by encode.py")
    return manifest


class EncodedPairs(Pairs):
    """Pairs out of a cache: the same stream as `ImagePairs`, encoded instead of in pixels.

    Files are memory-mapped, each item is read when it is asked for: the shuffle is that of all pairs.

    raises  InputError where a file is missing or has not the bytes that it was written with
    """

    def __init__(self, source, seed=0, prompt_dropout=0.0):
        super().__init__(seed, prompt_dropout)
        self.folder, self.shards = Path(source).expanduser(), {}
        manifest = read_manifest(source)
        for name, size in manifest["files"].items():
            file = self.folder / name
            found = f"has {file.stat().st_size} bytes, not {size}" if file.exists() else "is missing"
            if not file.exists() or file.stat().st_size != size:
                raise InputError(f"{file} {found}; the command of encode.py that made the cache writes it anew")
        self.num_rows, self.ties, self.unlabelled = (manifest[key] for key in ("rows", "ties", "unlabelled"))
        self.unreadable, self.shard_size = set(manifest["unreadable"]), manifest["shard"]
        self.prompts = json.loads((self.folder / "prompts.json").read_text())
        names = sorted(name for name in manifest["files"] if name.startswith("pairs-"))
        tables = [self.shard(name) for name in names]
        rows = [table.get_tensor("row").numpy() for table in tables]
        self.encoded_rows = np.concatenate(rows)                                        # ascending
        self.starts = np.cumsum([0, *map(len, rows)])                                   # of the files
        self.prompt_numbers = np.concatenate([table.get_tensor("prompt").numpy() for table in tables])
        self.rows = np.sort(np.concatenate([self.encoded_rows, np.array(manifest["unreadable"], dtype=int)]))
        self.columns = [name for name in COLUMNS if name in manifest["columns"]]

    def __getstate__(self):  # for a process that starts anew
        return self.__dict__ | {"shards": {}}

    def shard(self, name):
        if name not in self.shards:
            self.shards[name] = safe_open(self.folder / name, "pt")
        return self.shards[name]

    def read(self, kind, file, index):
        """{name: tensor} of a pair or a prompt."""
        shard = self.shard(f"{kind}-{file:05d}.safetensors")
        return {name: shard.get_slice(name)[int(index)] for name in shard.keys()}

    def digest(self):
        return digest((self.folder / "manifest.json").read_bytes())

    def load(self, row):
        """The place of a row among the encoded, or None where it could not be decoded."""
        place = int(np.searchsorted(self.encoded_rows, row))
        is_encoded = place < len(self.encoded_rows) and self.encoded_rows[place] == row
        return place if is_encoded else None

    def caption(self, row):
        place = self.load(row)
        return "" if place is None else self.prompts[self.prompt_numbers[place]]

    def content(self, row, pair, epoch, prompt):
        file = int(np.searchsorted(self.starts, pair, side="right")) - 1
        item = self.read("pairs", file, pair - self.starts[file])
        number = int(self.prompt_numbers[pair])
        text = self.read("prompts", *divmod(number, self.shard_size))
        clip_embeds = torch.cat([text.pop("clip_embeds")[None], item.pop("clip_embeds")])       # [3, E']
        if not prompt:
            text = self.read("prompts", 0, 0)  # of ""
            del text["clip_embeds"]
        del item["row"], item["prompt"]
        return item | text | {"clip_embeds": clip_embeds}


class Stream(torch.utils.data.Dataset):
    """Item p: the pair at position p of the endless stream of pairs, its timestep and its noise.

    Position p is place p % batch_size of step p // batch_size. What is drawn is a function of (seed, step,
    place) alone, not of the process or the micro-batch, and drawn on the CPU, so that every device sees the
    same. One timestep and one noise for both images of a pair; the VAE's noise is each image's own.

    pairs         a `Pairs`
    process       its sample_t draws a timestep
    latent_shape  (C, h, w)
    group_noise   what the pairs of a group share: "own", nothing; "timestep"; "both", the noise, too
    """

    def __init__(self, pairs, process, latent_shape, seed, batch_size, group_size, group_noise):
        self.pairs, self.process, self.latent_shape = pairs, process, latent_shape
        self.seed, self.batch_size = seed, batch_size
        self.group_size, self.group_noise = group_size, group_noise

    def draw(self, position):
        """{"t": [], "noise": [C, h, w], "vae_noise": [2, C, h, w]} of a position."""
        step, place = divmod(position, self.batch_size)
        first = place - place % self.group_size  # what a group shares is drawn as for its first pair
        t_place = place if self.group_noise == "own" else first
        noise_place = first if self.group_noise == "both" else place
        t_generator = keyed_generator(self.seed, "timestep", step, t_place)
        noise_generator = keyed_generator(self.seed, "noise", step, noise_place)
        vae_generator = keyed_generator(self.seed, "vae", step, place)
        return {"t": self.process.sample_t(t_generator),
                "noise": torch.randn(self.latent_shape, generator=noise_generator),
                "vae_noise": torch.randn((2, *self.latent_shape), generator=vae_generator)}

    def __getitem__(self, position):
        item = self.pairs[position] | self.draw(position)
        item["record"] = self.record(item["row"], item["t"], item["noise"])
        item["position"] = torch.tensor(position)
        return item

    def record(self, row, t, noise):
        """(row, t, 48 bits of a hash of the noise) [3] float64: by these a changed draw is noticed."""
        noise_hash = hashlib.blake2b(noise.numpy(), digest_size=6)
        return torch.tensor([row, t, int(noise_hash.hexdigest(), 16)], dtype=torch.float64)

    def records_of(self, step, count=32):
        """The records [n, 3] of the first places of a step, were all pairs readable; nothing is decoded."""
        records = []
        first = step * self.batch_size
        for position in range(first, first + min(count, self.batch_size)):
            drawn = self.draw(position)
            records.append(self.record(self.pairs.row_at(position), drawn["t"], drawn["noise"]))
        return torch.stack(records)


# CLIP


class Clip:
    """An open_clip model that embeds captions and images for `cross_pair_weights`.

    spec    ARCH:WEIGHTS, the weights a tag of open_clip, a local file or "random"; or "tiny", the embedded one
    raises  InputError where it is not known or cannot be loaded
    """

    def __init__(self, spec, device="cpu", dtype=torch.float32):
        import open_clip

        arch, _, weights = spec.partition(":")
        if spec == "tiny":
            folder = importlib.import_module("extras.tiny").part("clip")
            arch, weights = f"local-dir:{folder}", None
        elif arch not in open_clip.list_models() or not weights:
            raise InputError(f"--clip {spec} is neither tiny nor ARCH:WEIGHTS, ARCH one of open_clip's")
        elif weights == "random":  # --random_init
            weights = None
            torch.manual_seed(0)
        published = open_clip.pretrained.get_pretrained_cfg(arch, weights) if weights else {}
        try:  # OpenAI's weights want QuickGELU, and open_clip would only warn
            self.model, _, self.transform = open_clip.create_model_and_transforms(
                arch, weights, force_quick_gelu=published.get("quick_gelu", False), device=device)
            self.tokenizer = open_clip.get_tokenizer(arch)
        except Exception as error:
            raise InputError(f"--clip {spec} cannot be loaded ({brief(error)}); give another ARCH:TAG, ARCH:FILE, "
                             "or tiny")
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
        text = self.embed_texts(captions)                                               # [B, E]
        images = torch.zeros_like(text)[:, None].repeat(1, 2, 1)                        # [B, 2, E]
        if clip_pixels is not None:
            images = self.embed_images(clip_pixels.flatten(0, 1)).unflatten(0, (-1, 2))
        return torch.cat([text[:, None], images], 1)


def cross_pair_weights(text, image_w, image_l, tau, similarity="both", image_ids=None):
    """How much winner i is held against loser j: w_ij = softmax over j of ( -d_ij / tau ), arXiv:2406.06382.

    d_ij is the cosine distance of the two captions ("text"), of winner i's image to loser j's ("image"), or
    the mean of these ("both"). An image that wins pair i and loses pair j would be nearest to itself, a term
    that holds no preference: there w_ij is 0 and the row renormalised; a row with nothing left takes its own
    loser.

    text, image_w, image_l  [B, E] CLIP embeddings of captions, winners, losers; normalised here, in float32.
                            Those that are not used may be anything
    tau                     temperature > 0; toward 0 a winner meets the nearest losers alone; inf: all alike,
                            without embeddings
    image_ids               [B, 2] int64, equal for the same image, of winners and losers; None: all differ
    returns                 [B, B] float32, row i = winner i, column j = loser j, rows sum to 1
    """
    def cosine(a, b):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T        # [B, B]

    if math.isinf(tau):
        distance = torch.zeros(len(image_ids), len(image_ids), device=image_ids.device)
    elif similarity == "text":
        distance = 1 - cosine(text, text)
    elif similarity == "image":
        distance = 1 - cosine(image_w, image_l)
    else:
        distance = 1 - (cosine(text, text) + cosine(image_w, image_l)) / 2
    logits = -distance / tau                                                            # [B, B]
    if image_ids is None:
        return logits.softmax(dim=1)
    is_same = image_ids[:, 0, None] == image_ids[None, :, 1]                            # [B, B]
    weights = logits.masked_fill(is_same, -math.inf).softmax(dim=1)
    own_loser = torch.eye(len(weights), device=weights.device)
    return torch.where(is_same.all(dim=1, keepdim=True), own_loser, weights)
