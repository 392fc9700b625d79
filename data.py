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
    unreadable        (row number, why) of pairs that could not be used and were replaced on the way here
    COLUMNS           [B] float32 each
    of a `Stream`     position [B] int64, record [B, 3] float64; t [B], noise [B, C, h, w],
                      vae_noise [B, 2, C, h, w], unless the VAE's mean is taken
    of images         pixels [B, 2, 3, H, W] uint8, one crop and one flip for both images of a pair;
                      clip_pixels [B, 2, 3, h, w], the images as CLIP wants them, if it was asked for;
                      ids, ids_2, ... [B, tokens] int64, the prompts as the model's tokenizers read them, likewise
    of a cache        mean, std [B, 2, C, h, w], prompt_embeds [B, L, E], pooled_prompt_embeds [B, P] (SDXL),
                      clip_embeds [B, 3, E'] of caption, winner, loser
"""

import concurrent.futures
import contextlib
import glob
import hashlib
import importlib
import io
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import safe_open

from common import InputError, brief, digest, fingerprint, hub_id, is_hidden, keyed_generator, to_device

SCAN_LIMIT = 10_000  # pairs; up to here train.py decodes all once at the start, and data.json is complete at once
COLUMNS = ()  # further columns of the data, a number per pair, that a loss may name: add yours, by no name above
SPLITS = {  # the words of datasets.data_files; of a name that has both kinds, the held-out ones count
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "dev", "val"),
    "train": ("train", "training"),
}
TO_TRAIN = ("train", None)  # splits, the first of which that a folder has is read; None: files of no split
TO_VALIDATE = ("validation", "test", None, "train")
CELL = "null|(large_)?(binary|string)"  # as pyarrow's types are written
IMAGES = ("bytes or paths", rf"{CELL}|struct<((, )?(bytes|path): ({CELL}))+>")
NUMBERS = ("numbers", "null|bool|u?int.*|halffloat|float|double|decimal.*")
KINDS = {"caption": ("strings", "null|.*string.*"), "jpg_0": IMAGES, "jpg_1": IMAGES}
HUB_IDS = {"pickapic": "liuhuohuo2/pick-a-pic-v2"}  # a mirror: the original left the hub in 2025-04


# Files and rows


class Rows(NamedTuple):
    """The rows of a source, files in the order of their names."""

    columns: object  # pyarrow.Table: caption as text, all others of `column_types` as float64, null where missing
    images: object   # images[row] is {"jpg_0", "jpg_1"}, each bytes, a path or {"bytes", "path"}
    files: dict      # {name in the source: path}; {} of the hub
    left_out: dict   # {name in the source: why}


def find_source(source):
    """A path or hub id of what --data names; "tiny" is built where it is not there yet."""
    if source == "tiny":
        return str(importlib.import_module("extras.tiny").part("pairs"))
    return HUB_IDS.get(source, source)


def find_held_out(source):
    """The path of what --validate names; "tiny" is built where it is not there yet."""
    if source == "tiny":
        return str(importlib.import_module("extras.tiny").part("held_out"))
    if not Path(source).expanduser().exists():
        raise InputError(f"--validate {source}: there is no such file or folder; or give a share, as 0.02")
    return source


def find_prompts(source):
    """The prompts of a txt file, one a line; of "tiny" those that no pair shows."""
    file = Path(find_source(source)) / "prompts.txt" if source == "tiny" else Path(source).expanduser()
    try:
        return file.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"--sample_prompts {source} cannot be read: {brief(error)}")


def split_of(name):
    """The split that a relative path names, by the innermost part of it that has such a word; or None."""
    for part in reversed(Path(name).parts):
        words = re.split("[-._ 0-9]+", part.lower())  # the separators of datasets.data_files
        for split, names in SPLITS.items():
            if any(word in names for word in words):
                return split


def source_files(source, wanted_splits=TO_TRAIN):
    """({name: path} of the files of a local source, {name: why} of those that are left out).

    A file is taken as it is. Of a folder, at any depth, the parquet files, else the .jsonl files: not what is
    hidden; those of one split, the first of `wanted_splits` that is there; and a file that has several names
    once. InputError where all that is there is of other splits, or a link leads nowhere.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return {path.name: path}, {}
    found = walk(path)
    left_out = {name: "hidden" for name in found if is_hidden(name, "._")}
    parquet, lists = ([name for name in found if name.endswith(suffix) and name not in left_out]
                      for suffix in (".parquet", ".jsonl"))
    if parquet:
        left_out |= {name: "beside parquet" for name in lists}
    splits = {name: split_of(name) for name in parquet or lists}
    wanted = next((split for split in wanted_splits if split in splits.values()), None)
    files, places = {}, set()
    for name, split in splits.items():
        place = found[name].resolve()
        if split != wanted:
            left_out[name] = f"{split} split" if split else f"not of the {wanted} split"
        elif not place.exists():
            raise InputError(f"--data {found[name]} is a link to a file that is not there")
        elif place in places:
            left_out[name] = "another name of a file that is read"
        else:
            files[name] = found[name]
            places.add(place)
    if splits and not files:
        raise InputError(f"--data {source} has no training split, but {', '.join(splits)}; to train on one of "
                         f"them name it: --data {path / min(splits)}")
    if not files:
        hidden = f", but for hidden ones: {', '.join(left_out)}" if left_out else ""
        raise InputError(f"--data {source} holds no parquet and no .jsonl file{hidden}")
    return files, left_out


def walk(folder):
    """{name: path} of the parquet and .jsonl files under a folder, in their order, through links, each folder once."""
    found, seen = {}, {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen]
        seen.update(os.path.realpath(os.path.join(root, name)) for name in folders)
        for name in names:
            file = Path(root, name)
            if file.suffix in (".parquet", ".jsonl"):
                found[file.relative_to(folder).as_posix()] = file
    return dict(sorted(found.items()))


def is_list(files):
    """Whether {name: path} of a source are .jsonl files."""
    return min(files).endswith(".jsonl")


def column_types():
    """{name: type} of what is read of a row beside its images; whether COLUMNS are there is asked later."""
    import pyarrow

    numbers = ("label_0", "label_1", "has_label", *COLUMNS)
    return {"caption": pyarrow.large_string()} | {name: pyarrow.float64() for name in numbers}


def check_schema(schema, file):
    """InputError where a file lacks a column of Pick-a-Pic's, or has one of a type that cannot be meant."""
    missing = sorted({"caption", "jpg_0", "jpg_1", "label_0"} - set(schema.names))
    if missing:
        raise InputError(f"--data {file} lacks {', '.join(missing)} of Pick-a-Pic's columns")
    for name in ("jpg_0", "jpg_1", *column_types()):
        if name not in schema.names:
            continue
        what, pattern = KINDS.get(name, NUMBERS)
        kind = str(schema.field(name).type)
        if not re.fullmatch(pattern, kind):
            raise InputError(f"the {name} of {file} are of type {kind}, not {what}")


def conform(table):
    """The columns of `column_types` of a pyarrow.Table, in these types, whatever its writer made of them."""
    import pyarrow

    arrays = {}
    for name, kind in column_types().items():
        if name not in table.column_names:
            arrays[name] = pyarrow.nulls(len(table), kind)
            continue
        column = table[name]
        if pyarrow.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        arrays[name] = column.cast(kind)
    try:
        arrays["caption"].validate(full=True)
    except pyarrow.ArrowInvalid:  # of bytes that are no UTF-8: no text
        cells = arrays["caption"].cast(pyarrow.large_binary()).to_pylist()
        arrays["caption"] = pyarrow.array([as_text(cell) for cell in cells], pyarrow.large_string())
    return pyarrow.table(arrays)


def read_columns(fragments):
    """`Rows.columns` of parquet files, pyarrow's fragments. InputError names the file that cannot be read."""
    import pyarrow

    def read(fragment):
        try:
            schema = fragment.physical_schema
            check_schema(schema, fragment.path)
            names = [name for name in column_types() if name in schema.names]
            return conform(fragment.to_table(columns=names))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"--data {fragment.path} cannot be read: {brief(error)}")

    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # they may be on the hub
        return pyarrow.concat_tables(pool.map(read, fragments))


def read_rows(source, wanted_splits=TO_TRAIN):
    """The `Rows` of what `find_source` gives, images at random, by a memory-mapped copy that `datasets` makes.

    encode.stream_rows reads the same without a copy, in order. InputError names what cannot be read.
    """
    import datasets

    if not Path(source).expanduser().exists():
        try:
            table = datasets.load_dataset(hub_id(source), split="train")
            names = [name for name in column_types() if name in table.column_names]
            columns = table.with_format("arrow").select_columns(names)[:]
        except Exception as error:
            raise InputError(f"--data {source} cannot be read: {brief(error.__cause__ or error)}")
        check_schema(table.features.arrow_schema, source)
        table = table.select_columns(["jpg_0", "jpg_1"])
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        return Rows(conform(columns), table, {}, {})

    files, left_out = source_files(source, wanted_splits)
    if is_list(files):
        columns, images = read_jsonl(files)
        return Rows(columns, images, files, left_out)
    fragments = open_parquet(files.values())
    columns = read_columns(fragments)
    image = datasets.Image(decode=False)  # of bytes, paths or both, whatever a file has
    with_rows = [glob.escape(fragment.path) for fragment in fragments if fragment.count_rows()]
    try:
        table = datasets.load_dataset(
            "parquet", data_files=with_rows, split="train", columns=["jpg_0", "jpg_1"],
            features=datasets.Features({"jpg_0": image, "jpg_1": image})) if with_rows else []
    except Exception as error:
        raise InputError(unreadable_file(files, error.__cause__ or error))
    if len(table) != len(columns):
        raise InputError(f"--data {source} was read in part: {len(table)} of {len(columns)} rows; has it changed?")
    return Rows(columns, table, files, left_out)


def open_parquet(paths, filesystem=None):
    """pyarrow's fragments of parquet files, one a file. InputError names one that is none."""
    import pyarrow.dataset

    def fragment(path):
        try:
            (only,) = pyarrow.dataset.dataset(str(path), format="parquet", filesystem=filesystem).get_fragments()
            return only
        except Exception as error:
            raise InputError(f"--data {path} cannot be read: {brief(error)}")

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(fragment, paths))


def read_jsonl(files):
    """(`Rows.columns`, [{"jpg_0", "jpg_1"}, ...] by their paths) of .jsonl files {name: path}."""
    import pyarrow

    values, images = {name: [] for name in column_types()}, []
    for name, file in files.items():
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise InputError(f"--data {file} cannot be read: {brief(error)}")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                chosen, rejected = (str(file.parent / row[side]) for side in ("chosen", "rejected"))
                record = {"caption": as_text(row["prompt"]), "label_0": 1.0}
                record |= {column: float(row[column]) for column in COLUMNS}
            except KeyError as error:
                raise InputError(f"line {number} of {file} lacks {error}; it takes prompt, chosen and rejected")
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(f"line {number} of {file} cannot be read: {brief(error)}")
            images.append({"jpg_0": chosen, "jpg_1": rejected})
            for column, of_rows in values.items():
                of_rows.append(record.get(column))
    arrays = {name: pyarrow.array(of_rows, column_types()[name]) for name, of_rows in values.items()}
    return pyarrow.table(arrays), images


def as_text(value):
    """A string that can be written as UTF-8, or such bytes; None of anything else, half a surrogate pair too."""
    try:
        return value.decode() if isinstance(value, bytes) else value.encode().decode()
    except (AttributeError, UnicodeError):
        return None


def unreadable_file(files, error):
    """One line that names the first parquet file that cannot be read to its end."""
    import pyarrow.parquet

    for file in files.values():
        try:
            for _ in pyarrow.parquet.ParquetFile(file).iter_batches():
                pass
        except Exception as cause:
            return f"--data {file} cannot be read: {brief(cause)}"
    return f"--data {next(iter(files.values())).parent} cannot be read: {brief(error)}"


# Images

# PIL gives up a picture for a text beside it, of a workflow say, of over 1 MB; up to 64 it is let be.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def stored_bytes(source):
    """The encoded bytes of a cell: bytes, a path, or the {"bytes", "path"} of a `datasets.Image`."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        source = Path(source).read_bytes()
    if not source:
        raise Unreadable("no image")
    return source


def image_id(content):
    """64 bits of a digest of encoded bytes, as a signed integer: equal for the same file alone."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


class Unreadable(Exception):
    """Why a pair cannot be used, in a few words that are the same for the same fault."""


def read_image(content):
    """An upright RGB picture from encoded bytes.

    Transparency goes over white, as browsers show it. Raises what PIL raises on bytes that it cannot decode, and
    ValueError above PIL's limit of pixels (a decompression bomb) or where the scale of its numbers is unknown.
    """
    image = Image.open(io.BytesIO(content))
    kind = image.format
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError("a decompression bomb?")
    image.load()
    with contextlib.suppress(Exception):  # EXIF that is damaged: the picture is whole, and upright for all we know
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # PIL would clip to 8 bits what has more of them, or lies in [0, 1]
        grey = Image.fromarray(to_8_bits(np.asarray(image), image.mode, kind))
        if "transparency" in image.info:
            is_seen = np.asarray(image) != image.info["transparency"]
            grey.putalpha(Image.fromarray(np.where(is_seen, 255, 0).astype(np.uint8)))
        image = grey
    if image.mode in ("La", "RGBa"):  # premultiplied by their transparency
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_8_bits(values, mode, kind):
    """Grey values [H, W] of 16 or 32 bits or floating point as uint8; ValueError where their scale is unknown.

    mode, kind  PIL's mode and format. 16 bits are 16 bits, also in a PGM, whatever values they hold. Else the range
                tells: up to 1 (floating point), 255 or 65535, with a little room for what resampling overshoots
    """
    top = 65535
    if not (mode.startswith("I;16") or kind == "PPM"):
        tops = [1, 255, 65535] if mode == "F" else [255, 65535]
        top = next((top for top in tops if values.max() <= 1.05 * top), None)
        if top is None or values.min() < -0.05 * top or mode == "F" and 1.05 < values.max() < 16:
            raise ValueError("pixel values of unknown scale")
    return (values.clip(0, top) * (255 / top)).round().astype(np.uint8)


def reason_of(error):
    """Why an image cannot be read, without the numbers and addresses that differ from one to the next."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.DecompressionBombError):
        return "a decompression bomb?"
    text = getattr(error, "strerror", None) or brief(error)
    text = re.sub(r"\([^)]*\)|<[^>]*>", "", text)
    text = re.sub(r"\W*\d+", "", text)
    return " ".join(text.split()) or type(error).__name__


def crop_and_resize(image, size, y, x, flip):
    """The square of side `size` pixels at place (y, x), in [0, 1], of the image scaled to that short side.

    It cuts before it scales, so that a 3 x 4000 picture costs nothing. Returns pixels [3, size, size]
    uint8 and SDXL's time_ids [6]; the crop is counted in the scaled, flipped image, as SDXL was trained.
    """
    image = ImageOps.mirror(image) if flip else image
    scale = size / min(image.size)
    height, width = round(image.height * scale), round(image.width * scale)
    top, left = round(y * (height - size)), round(x * (width - size))
    right, bottom = min((left + size) / scale, image.width), min((top + size) / scale, image.height)
    box = (min(left / scale, image.width), min(top / scale, image.height), right, bottom)
    pixels = np.array(image.resize((size, size), Image.LANCZOS, box=box))
    pixels = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
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

    A subclass has rows [n], the row numbers of its pairs, num_rows, ties, unlabelled and left_out; load(row), the
    pair, or Unreadable; caption(row); and content(row, pair, epoch, prompt), the tensors.
    """

    def __init__(self, seed, prompt_dropout):
        self.seed = seed
        self.prompt_dropout = prompt_dropout
        self.unreadable = {}  # {row number: why}
        self.held_out = 0  # pairs that were taken away by `hold_out`
        self.epoch, self.order = None, None  # of the last item: the number, the shuffle [n]

    def __len__(self):
        return len(self.rows)

    def use(self, rows):
        """From now on these rows alone, some of those that are there."""
        self.rows, self.epoch = rows, None
        of_rows = set(rows.tolist())
        self.unreadable = {row: why for row, why in self.unreadable.items() if row in of_rows}

    def hold_out(self, share):
        """Takes the pairs of a share of the prompts away; their rows. InputError where one side would be empty."""
        is_held = np.array([is_held_out(self.caption(row), share) for row in self.rows])
        if is_held.all() or not is_held.any():
            raise InputError(f"--validate {share:g} of the prompts would hold out {is_held.sum()} of {len(self)} "
                             "pairs; give another share, or pairs of their own")
        held = self.rows[is_held]
        self.use(self.rows[~is_held])
        self.held_out = len(held)
        return held

    def report(self):
        """What data.json holds; `unreadable` lists, by the reason, the rows that were met so far."""
        report = {"rows": self.num_rows, "used": len(self) - len(self.unreadable), "ties": self.ties,
                  "unlabelled": self.unlabelled, "unreadable": by_reason(self.unreadable), "left_out": self.left_out}
        if self.held_out:
            report["held_out"] = self.held_out
        return report

    def summary(self):
        """The same in one line."""
        reasons = [f"{len(rows)} {reason}" for reason, rows in by_reason(self.unreadable).items()]
        line = ("{rows} rows, {used} pairs used, {ties} ties dropped, {unlabelled} without a label, {bad} that "
                "cannot be read".format(bad=len(self.unreadable), **self.report()))
        if reasons:
            line += f" ({', '.join(reasons)})"
        if self.held_out:
            line += f", {self.held_out} held out"
        for name, reason in [*self.left_out.items()][:8]:
            line += f"; {name} left out ({reason})"
        if len(self.left_out) > 8:
            line += f"; and {len(self.left_out) - 8} more files"
        return line

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
            try:
                pair = self.load(row)
                break
            except Unreadable as error:
                unreadable.append((row, str(error)))
        else:
            raise InputError(f"{k + 1} pairs in a row cannot be decoded any more ({unreadable[-1][1]}): is the "
                             "storage gone?")
        drop = augmentation(self.seed, epoch, row)[3]
        caption = self.caption(row)
        prompt = "" if drop < self.prompt_dropout else caption
        item = {"prompt": prompt, "caption": caption, "row": torch.tensor(row), "unreadable": unreadable}
        return item | self.content(row, pair, epoch, prompt)


def is_held_out(caption, share):
    """Whether a prompt is of the held-out share: by a hash of its words, so that all its pairs are, in every run."""
    number = hashlib.blake2b(words_of(caption).encode(), digest_size=8).digest()
    return int.from_bytes(number, "big") < share * 2 ** 64


def words_of(caption):
    """A prompt without what makes no other prompt of it: case and blanks."""
    return " ".join(caption.casefold().split())


def crop_summary(time_ids):
    """One line on what the square crop takes away of pictures, by their time_ids [n, S, 6]."""
    height, width = time_ids[..., 0], time_ids[..., 1]                                  # [n, S]
    kept = torch.minimum(height / width, width / height)
    bad = (kept < 2 / 3).any(dim=1).sum()
    return (f"the square crop keeps {kept.mean():.0%} of the first pictures; in {bad} of {len(kept)} pairs one loses "
            "more than a third")


def by_reason(unreadable):
    """{row: why} -> {why: [row, ...]}."""
    rows = {}
    for row, reason in sorted(unreadable.items()):
        rows.setdefault(reason, []).append(row)
    return rows


def augmentation(seed, epoch, row):
    """Four uniform numbers of a pair in an epoch: crop y, crop x, flip, prompt dropout."""
    return torch.rand(4, generator=keyed_generator(seed, "augment", epoch, row)).tolist()


def collate(items):
    """A list of a `Pairs`' items -> the batch described at the head of this file."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch["unreadable"] = [entry for entries in batch["unreadable"] for entry in entries]
    return {key: torch.stack(value) if value and torch.is_tensor(value[0]) else value
            for key, value in batch.items()}


def numbers(columns, name):
    """A column of `Rows.columns` as float64 [num_rows], nan where it is empty."""
    return columns[name].to_numpy()


class ImagePairs(Pairs):
    """Pairs out of images, decoded, cropped and flipped when an item is asked for.

    source          see the head of this file
    resolution      side of the training square, pixels
    clip_transform  a function from a picture to a tensor for `clip_pixels`, or None; may be set later
    tokenize        a function from prompts to {name: ids [B, tokens]}, or None; set later
    source_rows     the `Rows` of the source, if they were read already
    raises          InputError where the source cannot be read or holds a wrong label or no pair
    """

    def __init__(self, source, resolution=None, seed=0, random_crop=False, random_flip=False, prompt_dropout=0.0,
                 clip_transform=None, source_rows=None):
        super().__init__(seed, prompt_dropout)
        self.resolution, self.clip_transform, self.tokenize = resolution, clip_transform, None
        self.random_crop, self.random_flip = random_crop, random_flip
        self.source = find_source(source)
        self.source_rows = source_rows or read_rows(self.source)
        self.images, self.left_out = self.source_rows.images, self.source_rows.left_out
        columns = self.source_rows.columns.combine_chunks()
        self.num_rows = len(columns)
        self.captions = columns["caption"].combine_chunks()  # in one piece: processes share it
        self.read_labels(columns)
        if len(self) == 0:
            raise InputError(f"--data {source} holds no usable pair: {self.report()}")
        self.columns = {}
        for name in COLUMNS:
            values = numbers(columns, name)[self.rows]
            if np.isnan(values).all():  # no file has it, which a loss that wants it is told
                continue
            if np.isnan(values).any():
                raise InputError(f"row {self.rows[np.isnan(values).argmax()]} of {source} has no {name}")
            self.columns[name] = numbers(columns, name).astype(np.float32)

    def read_labels(self, columns):
        """Sets rows, winner_side, ties, unlabelled. A missing label is nan here."""
        label = numbers(columns, "label_0")                                             # [num_rows]
        other = numbers(columns, "label_1")
        labelled = ~np.isnan(label) & (numbers(columns, "has_label") != 0)
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
        def fault(row):
            try:
                self.load(row)
            except Unreadable as error:
                return str(error)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = zip(self.rows, pool.map(fault, self.rows))
            self.unreadable = {int(row): reason for row, reason in faults if reason}
        if len(self.unreadable) == len(self):
            raise InputError(f"--data {self.source} holds no usable pair: {self.report()}")

    def digest(self):
        """16 hex digits over the pairs: rows, winners, captions, COLUMNS; names, sizes and footers of the files.

        Not over where they lie, nor over the bytes of the images: a picture that was replaced by another one of
        the same size is not noticed, nor one that a parquet file names by its path.
        """
        files = self.source_rows.files
        content = [self.rows.tolist(), self.winner_side[self.rows].tolist(), [self.caption(row) for row in self.rows],
                   {name: values[self.rows].tolist() for name, values in self.columns.items()}]
        for name, file in files.items():
            identity = file.read_bytes() if is_list(files) else parquet_footer(file)
            content.append([name, file.stat().st_size, digest(identity)])
        if files and is_list(files):
            paths = [image[side] for image in self.images for side in ("jpg_0", "jpg_1")]
            content.append([os.path.exists(path) and os.path.getsize(path) for path in paths])
        return digest(content)

    def caption(self, row):
        return self.captions[int(row)].as_py() or ""

    def load(self, row):
        """[(picture, image_id)] of a row's winner and loser. Unreadable where one cannot be decoded."""
        return self.decode(row, self.images[int(row)])

    def decode(self, row, record):
        """The same of a row whose images were read already."""
        winner = self.winner_side[row]
        if not self.captions[int(row)].is_valid:
            raise Unreadable("its prompt is no text")
        try:  # bad bytes raise any error
            stored = [stored_bytes(record[f"jpg_{side}"]) for side in (winner, 1 - winner)]
            return [(read_image(content), image_id(content)) for content in stored]
        except Unreadable:
            raise
        except Exception as error:
            raise Unreadable(reason_of(error))

    def content(self, row, pair, epoch, prompt):
        """A row's two images, cropped and flipped as in an epoch, and the ids of its prompt: see the head of this file."""
        y, x, flip, _ = augmentation(self.seed, epoch, row)
        if not self.random_crop:
            y = x = 0.5
        flip = self.random_flip and flip < 0.5
        cropped = [crop_and_resize(image, self.resolution, y, x, flip) for image, _ in pair]
        item = {"pixels": torch.stack([pixels for pixels, _ in cropped]),
                "time_ids": torch.stack([time_ids for _, time_ids in cropped]),
                "image_ids": torch.tensor([number for _, number in pair])}
        item |= {name: torch.tensor(column[row]) for name, column in self.columns.items()}
        if self.tokenize:
            item |= {name: ids[0] for name, ids in self.tokenize([prompt]).items()}
        if self.clip_transform:
            squares = [self.clip_transform(middle_square(image)) for image, _ in pair]
            item["clip_pixels"] = torch.stack(squares)
        return item


# A cache: what encode.py leaves


def parquet_footer(file):
    """The bytes of a parquet file's footer: its schema, and sizes, places and extremes of all that it holds."""
    with open(file, "rb") as stream:
        stream.seek(-8, os.SEEK_END)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, os.SEEK_END)
        return stream.read(length)


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
        self.left_out, self.shard_size = manifest["left_out"], manifest["shard"]
        self.unreadable = {row: reason for reason, rows in manifest["unreadable"].items() for row in rows}
        self.unreadable_prompts = manifest.get("unreadable_prompts", {})  # {row, a string: number of its prompt}
        self.prompts = json.loads((self.folder / "prompts.json").read_text())
        names = sorted(name for name in manifest["files"] if name.startswith("pairs-"))
        tables = [self.shard(name) for name in names]
        rows = [table.get_tensor("row").numpy() for table in tables]
        self.encoded_rows = np.concatenate(rows)                                        # ascending
        self.starts = np.cumsum([0, *map(len, rows)])                                   # of the files
        self.prompt_numbers = np.concatenate([table.get_tensor("prompt").numpy() for table in tables])
        self.rows = np.sort(np.concatenate([self.encoded_rows, np.array([*self.unreadable], dtype=int)]))
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
        """16 hex digits over what the cache holds, not over the paths that it was made from."""
        names = ("model", "data", "clip", "config", "init_lora", "left_out", "unreadable_prompts")
        content = {name: value for name, value in read_manifest(self.folder).items() if name not in names}
        if self.held_out:
            content["rows in use"] = self.rows.tolist()
        return digest(content)

    def load(self, row):
        """The place of a row among the encoded. Unreadable where it could not be decoded."""
        if row in self.unreadable:
            raise Unreadable(self.unreadable[row])
        return int(np.searchsorted(self.encoded_rows, row))

    def caption(self, row):
        if row in self.unreadable:
            return self.prompts[self.unreadable_prompts.get(str(row), 0)]
        return self.prompts[self.prompt_numbers[self.load(row)]]

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
    vae_sample    "mean" or "sample", which takes a noise of its own
    """

    def __init__(self, pairs, process, latent_shape, seed, batch_size, group_size, group_noise, vae_sample="sample"):
        self.pairs, self.process, self.latent_shape = pairs, process, latent_shape
        self.seed, self.batch_size = seed, batch_size
        self.group_size, self.group_noise = group_size, group_noise
        self.vae_sample = vae_sample

    def draw(self, position):
        """{"t": [], "noise": [C, h, w]} of a position, and "vae_noise": [2, C, h, w] where it is used."""
        step, place = divmod(position, self.batch_size)
        first = place - place % self.group_size  # what a group shares is drawn as for its first pair
        t_place = place if self.group_noise == "own" else first
        noise_place = first if self.group_noise == "both" else place
        t_generator = keyed_generator(self.seed, "timestep", step, t_place)
        noise_generator = keyed_generator(self.seed, "noise", step, noise_place)
        drawn = {"t": self.sample_t(t_generator, place),
                 "noise": torch.randn(self.latent_shape, generator=noise_generator)}
        if self.vae_sample == "sample":
            vae_generator = keyed_generator(self.seed, "vae", step, place)
            drawn["vae_noise"] = torch.randn((2, *self.latent_shape), generator=vae_generator)
        return drawn

    def sample_t(self, generator, place):
        return self.process.sample_t(generator)

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


class HeldOutStream(Stream):
    """The same `count` held-out pairs for ever: item p is pair p % count, with a timestep and a noise of its own.

    The timestep of pair k lies in quarter k % 4 of the schedule. Nothing follows from the run's seed: all runs are
    measured on the same draws.
    """

    def __init__(self, pairs, process, latent_shape, count, vae_sample="sample"):
        super().__init__(pairs, process, latent_shape, "held out", count, 1, "own", vae_sample)

    def sample_t(self, generator, place):
        return self.process.sample_t(generator, quarter=place % 4)

    def __getitem__(self, position):
        return super().__getitem__(position % self.batch_size)


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
            return self.model.encode_text(to_device(self.tokenizer(captions), self.device)).float()

    @torch.no_grad()
    def embed_images(self, pixels):
        """[N, E] float32 of N pictures, stacked after `transform`."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.encode_image(to_device(pixels, self.device)).float()

    def digest(self):
        """16 hex digits of what embeds: weights, architecture, preprocessing, tokenizer."""
        tokenizer = [type(self.tokenizer).__name__, getattr(self.tokenizer, "context_length", None)]
        preprocess = str(self.model.visual.preprocess_cfg)
        return digest([fingerprint(self.model), str(self.model), preprocess, tokenizer])

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
