"""The files of a source of pairs: which ones belong to it, and their rows.

A source is a parquet file, a folder of parquet files, a hub id in Pick-a-Pic's schema (caption, jpg_0, jpg_1,
label_0), or a .jsonl file of {"prompt": ..., "chosen": FILE, "rejected": FILE}, alone or in a folder. A cache, which
encode.py writes, is recognised by its manifest.
"""

import collections
import concurrent.futures
import errno
import glob
import importlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import InputError, as_text, brief, cannot_read, digest, hub_id, is_hidden, read_text

HUB_IDS = {"pickapic": "liuhuohuo2/pick-a-pic-v2"}  # a mirror: the original left the hub in 2025-04
SPLITS = {  # the words of datasets.data_files and "...set", held-out splits first: "test_of_training" is a test split
    "test": ("test", "testing", "testset", "eval", "evaluation"),
    "validation": ("validation", "valid", "dev", "devset", "val", "valset"),
    "train": ("train", "training", "trainset"),
}
OTHER_LISTS = (".json", ".csv", ".tsv", ".arrow", ".gz", ".tar", ".zip")  # may be meant as pairs, but are not read
STRINGS = "null|(large_)?string(_view)?|dictionary<values=(large_)?string.*"  # as pyarrow prints their types
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
TO_TRAIN = ("train", None)  # preferred splits in order; None means files that name no split
TO_VALIDATE = ("validation", "test", None, "train")


class Rows(NamedTuple):
    """The rows of a source; its files are read in the order of their names."""

    columns: object  # pyarrow.Table of the `column_types`, null where missing
    images: object   # images[row] is {"jpg_0", "jpg_1"}, each bytes, a path or {"bytes", "path"}
    files: dict      # {name in the source: path}; empty for the hub
    left_out: dict   # {name in the source: why}


# The files of a source


def find_source(source, part="pairs"):
    """The path or hub id that --data means. "tiny" is a part of the embedded task, built on first use."""
    if source == "tiny":
        return str(importlib.import_module("extras.tiny").part(part))
    return HUB_IDS.get(source, source)


def split_of(name):
    """The split that a relative path names, or None. The innermost part with a split's word decides."""
    for part in reversed(Path(name).parts):
        words = re.split("[-._= 0-9]+", part.lower())  # the separators of datasets.data_files, and Spark's split=test
        for split, names in SPLITS.items():
            if any(word in names for word in words):
                return split


def source_files(source, wanted_splits=TO_TRAIN):
    """({name: path} of a local source's files, {name: why} of the files that are left out).

    A file is taken as it is. In a folder we take the parquet files at any depth, or the .jsonl files if there are no
    parquet files. Hidden files are left out. Only one split is read, the first of `wanted_splits` that is there. A
    file with several names is read once. InputError if only other splits are there, or if a link leads nowhere.
    """
    path = Path(source)
    if path.is_file():
        return {path.name: path}, {}
    found, left_out = walk(path)
    left_out |= {name: "hidden" for name in found if is_hidden(name, "._")}
    parquet, lists = ([name for name in found if name.lower().endswith(suffix) and name not in left_out]
                      for suffix in (".parquet", ".jsonl"))
    if parquet:
        left_out |= {name: "beside parquet" for name in lists}
    splits = {name: split_of(name) for name in parquet or lists}
    wanted = next((split for split in wanted_splits if split in splits.values()), None)
    files, real_paths = {}, set()
    for name, split in splits.items():
        real_path = found[name].resolve()
        if split != wanted:
            left_out[name] = f"{split} split" if split else f"not in the {wanted} split"
        elif not real_path.exists():
            raise InputError(f"--data {found[name]} is a link to a file that is not there")
        elif real_path in real_paths:
            left_out[name] = "another name of a file that is read"
        else:
            files[name] = found[name]
            real_paths.add(real_path)
    if splits and not files:
        raise InputError(f"--data {source} has no training split, only {', '.join(splits)}. To train on one of these, "
                         f"name the file: --data {path / min(splits)}")
    if not files:
        others = "".join(f"; {name}: {why}" for name, why in left_out.items())
        raise InputError(f"--data {source} holds no parquet file and no .jsonl file{others}")
    return files, left_out


def walk(folder):
    """({name: path} of a folder's parquet and .jsonl files, {other lists: why left out}), through links."""
    found, left_out, others, seen = {}, {}, collections.Counter(), {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        if {"config.json", "data.json", "log.jsonl"} <= {*names}:
            left_out[Path(root).relative_to(folder).as_posix()] = "a run of train.py"
            folders[:], names = [], []
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen]
        seen.update(os.path.realpath(os.path.join(root, name)) for name in folders)
        for name in names:
            file = Path(root, name)
            inside, suffix = file.relative_to(folder).as_posix(), file.suffix.lower()
            if suffix in (".parquet", ".jsonl"):
                found[inside] = file
            elif suffix in OTHER_LISTS and not is_hidden(inside, "._"):
                others[suffix] += 1
    left_out |= {f"{n} {suffix} files": "neither parquet nor .jsonl" for suffix, n in sorted(others.items())}
    return dict(sorted(found.items())), left_out


def is_list(files):
    """Whether {name: path} are .jsonl files."""
    return min(files).lower().endswith(".jsonl")


def file_identities(rows):
    """[[name, bytes, digest], ...] of a source's files: of a .jsonl its content, of parquet its footer and samples."""
    identities = []
    for name, file in rows.files.items():
        content = file.read_bytes() if is_list(rows.files) else parquet_content(file)
        identities.append([name, file.stat().st_size, digest(content)])
    if rows.files and is_list(rows.files):
        paths = [image[side] for image in rows.images for side in ("jpg_0", "jpg_1")]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:  # on shared storage each answer takes a while
            sizes = pool.map(sizes_of, (paths[k:k + 1000] for k in range(0, len(paths), 1000)))
        identities.append([*itertools.chain(*sizes)])
    return identities


def sizes_of(paths):
    """The sizes of files, False for one that is not there."""
    return [os.path.exists(path) and os.path.getsize(path) for path in paths]


def parquet_content(file):
    """Bytes that tell a parquet file from others: its footer (schema, sizes, extremes) and 16 samples of 1 kB."""
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(size - 8)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(size - 8 - length)
        content = stream.read(length)
        for k in range(16):
            stream.seek(size * k // 16)
            content += stream.read(1024)
        return content


# Rows


def column_types(extra):
    """{name: type} of what is read from a row beside its images; `extra` names columns of numbers."""
    import pyarrow

    numbers = ("label_0", "label_1", "has_label", *extra)
    return dict.fromkeys(("caption", "split"), pyarrow.large_string()) | dict.fromkeys(numbers, pyarrow.float64())


def check_schema(schema, file, extra):
    """InputError if a file lacks one of Pick-a-Pic's columns, or if a column has an impossible type."""
    missing = sorted({"caption", "jpg_0", "jpg_1", "label_0"} - set(schema.names))
    if missing:
        raise InputError(f"--data {file} lacks Pick-a-Pic's columns {', '.join(missing)}")
    cell = "null|(large_)?(binary|string)"  # as pyarrow prints its types
    images = ("bytes or paths", rf"{cell}|struct<((, )?(bytes|path): ({cell}))+>")
    numbers = ("numbers", "null|bool|u?int.*|halffloat|float|double|decimal.*")
    kinds = dict.fromkeys(column_types(extra), numbers)
    kinds |= {"caption": ("strings", STRINGS), "jpg_0": images, "jpg_1": images}
    del kinds["split"]  # of another type it names no split, and `conform` leaves it out
    for name, (what, pattern) in kinds.items():
        if name in schema.names and not re.fullmatch(pattern, str(schema.field(name).type)):
            raise InputError(f"{name} in {file} has the type {schema.field(name).type}; {what} are needed")


def conform(table, extra):
    """The columns of `column_types` out of a pyarrow.Table, in these types, whatever its writer chose."""
    import pyarrow

    arrays = {}
    for name, kind in column_types(extra).items():
        if name not in table.column_names or name == "split" and not re.fullmatch(STRINGS, str(table[name].type)):
            arrays[name] = pyarrow.nulls(len(table), kind)
            continue
        column = table[name]
        if pyarrow.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        arrays[name] = column.cast(kind)
    try:
        arrays["caption"].validate(full=True)
    except pyarrow.ArrowInvalid:  # some bytes are not UTF-8
        cells = arrays["caption"].cast(pyarrow.large_binary()).to_pylist()
        arrays["caption"] = pyarrow.array([as_text(cell) for cell in cells], pyarrow.large_string())
    return pyarrow.table(arrays)


def read_columns(fragments, extra):
    """`Rows.columns` of parquet files, given as pyarrow's fragments. InputError names an unreadable file."""
    import pyarrow

    def read(fragment):
        try:
            schema = fragment.physical_schema
            check_schema(schema, fragment.path, extra)
            names = [name for name in column_types(extra) if name in schema.names]
            return conform(fragment.to_table(columns=names), extra)
        except InputError:
            raise
        except Exception as error:
            raise cannot_read(fragment.path, error)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # the files may be on the hub
        return pyarrow.concat_tables(pool.map(read, fragments))


def open_parquet(paths, filesystem=None):
    """pyarrow's fragments of parquet files, one per file. InputError names a file that is not parquet."""
    import pyarrow.dataset

    def fragment(path):
        try:
            (only,) = pyarrow.dataset.dataset(str(path), format="parquet", filesystem=filesystem).get_fragments()
            return only
        except Exception as error:
            raise cannot_read(path, error)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(fragment, paths))


def read_rows(source, extra=(), wanted_splits=TO_TRAIN, open_images=None, read_hub=None):
    """The `Rows` of a source.

    source       what `find_source` returns
    extra        names of further columns of numbers
    open_images  pyarrow's fragments -> their images; `copy_images` if None
    read_hub     (hub id, extra) -> columns and images; `read_hub_rows` if None
    raises       InputError that names what cannot be read
    """
    files, left_out = {}, {}
    if not Path(source).exists():
        columns, images = (read_hub or read_hub_rows)(source, extra)
    else:
        files, left_out = source_files(source, wanted_splits)
        if is_list(files):
            columns, images = read_jsonl(files, extra)
        else:
            fragments = open_parquet(files.values())
            columns = read_columns(fragments, extra)
            images = ImagesBeside((open_images or copy_images)(fragments), fragments)
    check_one_split(columns, source, wanted_splits)
    return Rows(columns, images, files, left_out)


def check_one_split(columns, source, wanted_splits):
    """InputError if a column `split` names a split that is not wanted, or several."""
    splits = {split_of(text) for text in columns["split"].unique().to_pylist() if text} - {None}
    if len(splits) > 1 or not splits <= {*wanted_splits}:
        raise InputError(f"--data {source} has a column split with {', '.join(sorted(splits))}. Write the rows of each "
                         "split into a file of its own, such as train.parquet and test.parquet")


def copy_images(fragments):
    """Images in any order, out of a memory-mapped copy that `datasets` makes of parquet files.

    It knows a file by its path and time. So each set of contents gets a folder of its own.
    """
    import datasets

    image = datasets.Image(decode=False)  # takes bytes, paths or both, whatever a file has
    paths = [fragment.path for fragment in fragments if fragment.count_rows()]
    if not paths:
        return []
    folder = Path(datasets.config.HF_DATASETS_CACHE, f"pairs-{digest(b''.join(map(parquet_content, paths)))}")
    if not [*folder.rglob("dataset_info.json")]:
        check_room(folder, sum(map(os.path.getsize, paths)))
    try:
        table = datasets.load_dataset(
            "parquet", data_files=[*map(glob.escape, paths)], split="train", columns=["jpg_0", "jpg_1"],
            features=datasets.Features({"jpg_0": image, "jpg_1": image}), cache_dir=str(folder))
    except Exception as error:
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) in NO_ROOM:
            raise cause
        raise first_unreadable(paths, cause)
    if len(table) != sum(fragment.count_rows() for fragment in fragments):
        raise InputError(f"--data {Path(paths[0]).parent} was read in part. If it has changed, run the command again")
    return table


def check_room(folder, need):
    """InputError if the disk of a folder that is still to be made has less than `need` bytes."""
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise InputError(f"a copy of the images takes {need / 1e9:.1f} GB, but {there} has {free / 1e9:.1f} GB free. Set "
                         "HF_HOME to a folder on a larger disk, or encode the pairs first (encode.py makes no copy)")


class ImagesBeside:
    """The images of parquet files. A path in a cell is looked for beside its file first, then as it is written."""

    def __init__(self, images, fragments):
        self.images = images
        self.folders = [Path(fragment.path).parent for fragment in fragments]
        self.ends = np.cumsum([fragment.count_rows() for fragment in fragments])

    def __getitem__(self, row):
        cells = self.images[row]
        folder = self.folders[np.searchsorted(self.ends, row, side="right")]
        for side, cell in cells.items():
            path = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else cell
            if isinstance(path, str) and os.path.exists(folder / path):
                cells[side] = str(folder / path)
        return cells


def read_hub_rows(source, extra):
    """(`Rows.columns`, images) of a hub data set's training split."""
    import datasets

    try:
        table = datasets.load_dataset(hub_id(source), split="train")
        names = [name for name in column_types(extra) if name in table.column_names]
        columns = table.with_format("arrow").select_columns(names)[:]
    except Exception as error:
        raise cannot_read(source, error.__cause__ or error)
    check_schema(table.features.arrow_schema, source, extra)
    table = table.select_columns(["jpg_0", "jpg_1"])
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return conform(columns, extra), table


def first_unreadable(files, error):
    """The InputError that names the first parquet file that cannot be read to its end."""
    import pyarrow.parquet

    for file in files:
        try:
            for _ in pyarrow.parquet.ParquetFile(file).iter_batches():
                pass
        except Exception as cause:
            return cannot_read(file, cause)
    return cannot_read(Path(files[0]).parent, error)


def read_jsonl(files, extra):
    """(`Rows.columns`, the images as [{"jpg_0": chosen path, "jpg_1": rejected path}, ...]) of .jsonl files."""
    import pyarrow

    values, images = {name: [] for name in column_types(extra)}, []
    for file in files.values():
        try:
            lines = read_text(file).split("\n")
        except (OSError, ValueError) as error:
            raise cannot_read(file, error)
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                chosen, rejected = (str(file.parent / row[side]) for side in ("chosen", "rejected"))
                cells = {"caption": as_text(row["prompt"]), "label_0": 1.0, "split": as_text(row.get("split"))}
                cells |= {name: float(row[name]) for name in extra if row.get(name) is not None}
            except KeyError as error:
                raise InputError(f"line {number} of {file} lacks {error}; a line needs prompt, chosen and rejected")
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(f"line {number} of {file} cannot be read: {brief(error)}. A line is a JSON object with "
                                 "prompt, chosen and rejected")
            images.append({"jpg_0": chosen, "jpg_1": rejected})
            for name, column in values.items():
                column.append(cells.get(name))
    arrays = {name: pyarrow.array(column, column_types(extra)[name]) for name, column in values.items()}
    return pyarrow.table(arrays), images
