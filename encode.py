"""Encode pairs once, train on them often: the cache of encoded pairs, written and read.

    python encode.py --model sd15 --out CACHE                       then: train.py --model sd15 --data CACHE
    torchrun --nproc_per_node=8 encode.py --model sdxl --data pickapic --store fp16 --out CACHE

VAE, text encoders and CLIP never change in training, and they take a quarter of a step or more. CACHE holds

    manifest.json               what it was made from and how, the counts of data.json, the bytes of every file
    prompts.json                the distinct prompts; the first one is ""
    prompts-00000.safetensors   SHARD prompts per file: what the family's encode_prompts gives, as prompt_embeds
                                [n, L, E], and clip_embeds [n, E']. Prompts of several lengths lie one behind the
                                other, [tokens, E], with prompt_length [n]
    pairs-00000.safetensors     SHARD pairs per file, without the unreadable ones, which its header lists. Winner
                                first: mean, std [n, 2, C, h, w] of the VAE's posterior, time_ids [n, 2, 6], image_ids
                                [n, 2], clip_embeds [n, 2, E'], and row [n] and prompt [n], numbers of the pair in the
                                data and of its prompt in prompts.json

Parquet is read one row group at a time, also from the hub, so no copy of the data is made. Every file is encoded in
fixed batches, so it is a function of the arguments alone. Any number of processes writes the same files, and a killed
command resumes with the files that are missing.
"""

import distributed  # first: it notes the launcher, before the imports that take seconds

import concurrent.futures
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import data
from common import (DTYPES, InputError, atomic_write, brief, cannot_read, digest, hub_id, is_cache, is_hidden,
                    one_line_errors, read_manifest, run_folder)
from data import Clip, ImagePairs, Pairs, by_reason, crop_summary
from loading import encoder_digests, fuse_lora, load_model
from options import H14, encode_args
from pictures import Unreadable
from sources import find_source, open_parquet, read_columns, read_rows

SHARD, BATCH = 256, 8  # pairs or prompts per file; per forward of the encoders, because results depend on it
SETTINGS = ("model", "data", "resolution", "random_crop", "random_flip", "clip", "vae_sample", "vae_precision", "store",
            "precision", "seed")  # options that the manifest keeps
NEVER_HALVED = ("row", "prompt", "prompt_length", "image_ids", "time_ids", "clip_embeds")  # by --store fp16
ADVICE = ("What is encoded is kept. The same command resumes with fewer --workers or fewer processes; in another --out, "
          "--device cpu or a smaller --resolution helps")


# Reading


class EncodedPairs(Pairs):
    """Pairs out of a cache: the same stream as `ImagePairs`, encoded instead of in pixels.

    Files are memory-mapped, and an item is read when it is asked for, so all pairs are shuffled together.

    raises  InputError if a file is missing or has another size than when it was written
    """

    def __init__(self, source, seed=0, prompt_dropout=0.0):
        super().__init__(seed, prompt_dropout)
        self.folder, self.shards = Path(source), {}
        manifest = read_manifest(source)
        for name, size in manifest["files"].items():
            file = self.folder / name
            found = f"has {file.stat().st_size} bytes, not {size}" if file.exists() else "is missing"
            if not file.exists() or file.stat().st_size != size:
                raise InputError(f"{file} {found}. Run the encode.py command that made the cache once more: it writes "
                                 "the file anew")
        self.num_rows, self.ties, self.unlabelled = (manifest[key] for key in ("rows", "ties", "unlabelled"))
        self.left_out, self.shard_size = manifest["left_out"], manifest["shard"]
        self.unreadable = {row: reason for reason, rows in manifest["unreadable"].items() for row in rows}
        self.unreadable_prompts = manifest.get("unreadable_prompts", {})  # {str(row): number of its prompt}
        self.prompts = json.loads((self.folder / "prompts.json").read_text(encoding="utf-8"))
        names = sorted(name for name in manifest["files"] if name.startswith("pairs-"))
        tables = [self.shard(name) for name in names]
        rows = [table.get_tensor("row").numpy() for table in tables]
        self.encoded_rows = np.concatenate(rows)                                        # [encoded], ascending
        self.starts = np.cumsum([0, *map(len, rows)])           # index of the first pair of each shard
        self.prompt_numbers = np.concatenate([table.get_tensor("prompt").numpy() for table in tables])
        self.rows = np.sort(np.concatenate([self.encoded_rows, np.array([*self.unreadable], dtype=int)]))
        self.columns = {}
        for name in set(data.COLUMNS) & set(manifest["columns"]):
            self.columns[name] = np.full(self.num_rows, np.nan, np.float32)
            self.columns[name][self.encoded_rows] = np.concatenate(
                [table.get_tensor(name).numpy() for table, of_shard in zip(tables, rows) if len(of_shard)])

    def __getstate__(self):  # open files cannot go to another process
        return self.__dict__ | {"shards": {}}

    def shard(self, name):
        if name not in self.shards:
            self.shards[name] = safe_open(self.folder / name, "pt")
        return self.shards[name]

    def read(self, kind, number, index):
        """{name: tensor} of one pair or one prompt."""
        shard = self.shard(f"{kind}-{number:05d}.safetensors")
        names, embeds = {*shard.keys()}, {}
        if "prompt_length" in names:
            lengths = shard.get_tensor("prompt_length")
            begin, length = int(lengths[:index].sum()), int(lengths[index])
            embeds["prompt_embeds"] = shard.get_slice("prompt_embeds")[begin:begin + length]     # [L, E]
            embeds["prompt_embeds_mask"] = torch.ones(length)
            names -= {"prompt_embeds", "prompt_length"}
        return embeds | {name: shard.get_slice(name)[int(index)] for name in names}

    def digest(self):
        """16 hex digits of what the cache holds, not of the paths that it was made from."""
        names = ("model", "data", "clip", "config", "init_lora", "left_out", "unreadable_prompts")
        content = {name: value for name, value in read_manifest(self.folder).items() if name not in names}
        if self.num_held_out:
            content["rows in use"] = self.rows.tolist()
        return digest(content)

    def load(self, row):
        """The index of a row among the encoded ones. Unreadable if it could not be decoded."""
        if row in self.unreadable:
            raise Unreadable(self.unreadable[row])
        return int(np.searchsorted(self.encoded_rows, row))

    def caption(self, row):
        if row in self.unreadable:
            return self.prompts[self.unreadable_prompts.get(str(row), 0)]
        return self.prompts[self.prompt_numbers[self.load(row)]]

    def content(self, row, index, epoch, prompt):
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        item = self.read("pairs", number, index - self.starts[number])
        text = self.read("prompts", *divmod(int(self.prompt_numbers[index]), self.shard_size))
        clip_embeds = torch.cat([text.pop("clip_embeds")[None], item.pop("clip_embeds")])       # [3, E']
        if not prompt:
            text = self.read("prompts", 0, 0)  # the prompt ""
            del text["clip_embeds"]
        del item["row"], item["prompt"]
        return item | text | {"clip_embeds": clip_embeds}


def check_cache(source, model, name):
    """InputError if a cache was made with other encoders than the model's."""
    manifest, digests = read_manifest(source), encoder_digests(model)
    for part in digests | manifest["encoders"]:
        if manifest["encoders"].get(part) != digests.get(part):
            raise InputError(f"{source} was encoded with the {part} of {manifest['model']}, but --model is {name}, "
                             "which has another one. Pass the model that it was encoded with, or run encode.py again")


# Writing


class StreamedImages:
    """The images of parquet files with one row group in memory. Rows are asked for in ascending order.

    fragments  pyarrow's, of files in their order
    raises     InputError that names the file if a row group cannot be read
    """

    def __init__(self, fragments):
        self.groups = [group for file in fragments for group in file.split_by_row_group()]
        self.ends = np.cumsum([group.row_groups[0].num_rows for group in self.groups])
        self.number, self.table = None, None  # the row group that was read last

    def __getitem__(self, row):
        number = int(np.searchsorted(self.ends, row, side="right"))
        if self.number != number:
            self.number, self.table = None, None  # frees the old group before the next one is read
            group = self.groups[number]
            try:
                self.table = group.to_table(columns=["jpg_0", "jpg_1"])
            except Exception as error:
                raise InputError(f"row {row} is in {group.path}, which cannot be read: {brief(error)}. What is encoded "
                                 "is kept. Once the file can be read, the same command resumes")
            self.number = number
        first = self.ends[number] - len(self.table)
        return self.table.slice(row - first, 1).to_pylist()[0]


def stream_hub_rows(source, extra):
    """(`Rows.columns`, images) of a hub data set's training split, without a copy of the data."""
    import datasets
    import fsspec

    try:
        paths = datasets.load_dataset_builder(hub_id(source)).config.data_files["train"]
        if not paths[0].endswith(".parquet"):
            raise ValueError("it is not stored as parquet, so it cannot be streamed; download it and give its folder")
        filesystem, _ = fsspec.core.url_to_fs(paths[0])
    except Exception as error:
        raise cannot_read(source, error)
    fragments = open_parquet([filesystem._strip_protocol(path) for path in paths], filesystem)
    return read_columns(fragments, extra), StreamedImages(fragments)


def stream_rows(source, extra=()):
    """What `read_rows` returns, for encode.py: without a copy of the data, images in ascending order only."""
    return read_rows(source, extra, open_images=StreamedImages, read_hub=stream_hub_rows)


class Encoder:
    """Writes this process's share of a cache. It holds the models and the pairs, and turns shards into tensors."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        device, self.dtype = distributed.get_device(args.device), DTYPES[args.precision]
        source = find_source(args.data)
        self.pairs = ImagePairs(args.data, None, args.seed, args.random_crop, args.random_flip,
                                source_rows=stream_rows(source, data.COLUMNS))
        self.model = load_model(args.model, args.random_init, args.config)
        if args.init_lora:
            fuse_lora(self.model, args.init_lora)  # it may change the text encoders, too
        self.pairs.resolution = args.resolution = self.model.resolution(args.resolution)
        self.model.vae_dtype = DTYPES[args.vae_precision]
        args.clip = args.clip or ("tiny" if self.model.is_toy else H14)
        self.clip = Clip(args.clip, device, self.dtype)
        self.pairs.clip_transform = self.clip.transform
        captions = (self.pairs.caption(row) for row in self.pairs.rows)
        self.prompts = list(dict.fromkeys(["", *captions]))
        self.prompt_numbers = {prompt: number for number, prompt in enumerate(self.prompts)}
        self.probe = None  # the row and the cells of a pair that could be read
        for network in self.model.networks().values():
            network.to("meta" if network is self.model.denoiser else device)  # the denoiser is not used

    def decode(self, row, cells):
        """What `ImagePairs.content` gives for a row, or the reason why it cannot be used."""
        try:
            return self.pairs.content(row, self.pairs.decode(row, cells), 0, "")
        except Unreadable as error:
            return str(error)

    def encode_pairs(self, rows, progress):
        """({name: [n, ...]}, {row: why} of those that cannot be used) of some rows."""
        cells = {int(row): self.pairs.images[int(row)] for row in rows}
        with concurrent.futures.ThreadPoolExecutor(self.args.workers) as pool:
            decoded = dict(zip(cells, pool.map(self.decode, cells, cells.values())))
        unreadable = {row: item for row, item in decoded.items() if isinstance(item, str)}
        readable = [row for row in cells if row not in unreadable]
        if readable:
            self.probe = readable[0], cells[readable[0]]
        if unreadable:
            self.check_storage()
        parts = []
        for i in range(0, len(readable), BATCH):
            parts.append(self.encode_items(readable[i:i + BATCH], decoded))
        progress.update(len(rows))
        if not parts:
            parts = [{"row": torch.zeros(0, dtype=torch.int64), "prompt": torch.zeros(0, dtype=torch.int64)}]
        return self.stack(parts), unreadable

    def check_storage(self):
        """InputError if files of the data, or the last pair that could be read, cannot be read any more.

        The pairs of a file that is written count as done, so without this those that are away would be lost.
        """
        files = self.pairs.source_rows.files.values()
        if not all(file.exists() for file in files) or self.probe and isinstance(self.decode(*self.probe), str):
            raise InputError("what could be read before cannot be read any more. Is the storage gone? Once it is back, "
                             "the same command resumes")

    def encode_items(self, rows, decoded):
        items = [decoded[row] for row in rows]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        mean, std = self.model.encode_images(batch.pop("pixels"))
        embeds = self.clip.embed_images(batch.pop("clip_pixels").flatten(0, 1))         # [2 * B, E']
        part = batch | {"mean": mean, "clip_embeds": embeds.unflatten(0, (-1, 2))}
        if self.args.vae_sample == "sample":
            part["std"] = std
        numbers = [self.prompt_numbers[self.pairs.caption(row)] for row in rows]
        return part | {"row": torch.tensor(rows), "prompt": torch.tensor(numbers)}

    def encode_prompts(self, prompts, progress):
        """({name: [n, ...]}, {}) of some prompts."""
        parts = []
        for i in range(0, len(prompts), BATCH):
            batch = prompts[i:i + BATCH]
            embeds = self.clip.embed_texts(batch)                                       # [B, E']
            parts.append(self.prompt_embeds(batch) | {"clip_embeds": embeds})
            progress.update(len(batch))
        return self.stack(parts), {}

    def prompt_embeds(self, prompts):
        """What the family's encode_prompts gives; prompts of several lengths without their padding."""
        embeds = self.model.encode_prompts(prompts, self.dtype)
        if "prompt_embeds_mask" in embeds:
            mask = embeds.pop("prompt_embeds_mask").bool()                              # [B, L]
            embeds |= {"prompt_embeds": embeds["prompt_embeds"][mask], "prompt_length": mask.sum(1)}
        return embeds

    def stack(self, parts):
        """Joins dicts of tensors, on the CPU, in the precision in which they are stored."""
        tensors = {}
        for name in parts[0]:
            tensor = torch.cat([part[name].cpu() for part in parts])
            is_halved = self.args.store == "fp16" and name not in NEVER_HALVED and name not in self.pairs.columns
            tensors[name] = tensor.half() if is_halved else tensor
        return tensors

    def missing_bytes(self):
        """The size of what is not written yet."""
        latent = np.prod(self.model.latent_shape(self.args.resolution))
        numbers = len(self.pairs) * 2 * latent * (2 if self.args.vae_sample == "sample" else 1)
        few = self.prompts[::-(-len(self.prompts) // BATCH)]  # they may differ in length, so this is about the size
        numbers += len(self.prompts) * sum(value.numel() for value in self.prompt_embeds(few).values()) // len(few)
        written = sum(file.stat().st_size for file in self.out.glob("*.safetensors"))  # these are whole and stay
        return numbers * (2 if self.args.store == "fp16" else 4) - written

    def manifest(self):
        settings = {name: getattr(self.args, name) for name in SETTINGS}
        return settings | {"encoders": encoder_digests(self.model), "clip_digest": self.clip.digest(),
                           "columns": [*self.pairs.columns], "pairs": self.pairs.digest(), "shard": SHARD,
                           "batch": BATCH}


def write_shard(file, tensors, unreadable, columns):
    """Writes a safetensors file, whole or not at all; `shard_note` reads its digest and its unreadable rows.

    columns  names whose numbers may be missing (nan)
    raises   InputError if another number is not finite, or the disk is full
    """
    for name, tensor in tensors.items():
        if name not in columns and not tensor.isfinite().all():
            advice = "; --store fp32 holds larger numbers" if tensor.dtype == torch.float16 else ""
            raise InputError(f"{file.name}: {name} is not finite{advice}")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    note = {"sha256": hashlib.sha256(save(tensors)).hexdigest(), "unreadable": by_reason(unreadable)}
    try:
        atomic_write(file, save(tensors, {"about": json.dumps(note)}))  # one entry, because their order is not kept
    except OSError as error:
        raise InputError(f"{file} cannot be written ({brief(error)}). What is written is kept. Free some space, then "
                         "the same command resumes")


def shard_note(file):
    """The note in a file's header, or None if the file is missing or incomplete."""
    try:
        with safe_open(file, "pt") as shard:
            return json.loads(shard.metadata()["about"])
    except (OSError, SafetensorError):
        return None


def begin_cache(encoder):
    """Compares the folder with what was begun in it, writes its manifest, and checks that the disk has room."""
    out, manifest = encoder.out, encoder.manifest()
    begun = read_manifest(out) if is_cache(out) else manifest
    for name, value in manifest.items():
        if begun.get(name) != value and name not in ("model", "data", "clip"):  # digests stand for these three
            raise InputError(f"{out} was begun with {name} {begun.get(name)}, not {value}. Pass another --out")
    if distributed.torchrun_env()[0] == 0:
        atomic_write(out / "prompts.json", json.dumps(encoder.prompts))
        atomic_write(out / "manifest.json", json.dumps(begun, indent=1))
    need, free = encoder.missing_bytes(), shutil.disk_usage(out).free
    if need > free:
        raise InputError(f"{out} needs {need / 1e9:.0f} GB more, but {free / 1e9:.0f} GB are free. --store fp16 halves "
                         "it, --vae_sample mean takes less, too")
    return manifest


def encode(args):
    """Writes this process's share of the cache. The process that finds all files there completes the manifest."""
    rank, _, world_size = distributed.torchrun_env()
    encoder = Encoder(args)
    out, pairs = encoder.out, encoder.pairs
    manifest = begin_cache(encoder)
    work = []
    for kind, function, items in (("prompts", encoder.encode_prompts, encoder.prompts),
                                  ("pairs", encoder.encode_pairs, pairs.rows)):
        for k in range(0, len(items), SHARD):
            work.append((out / f"{kind}-{k // SHARD:05d}.safetensors", function, items[k:k + SHARD]))

    # Each process takes neighbouring files, because these share row groups.
    share = work[rank * len(work) // world_size:(rank + 1) * len(work) // world_size]
    progress = tqdm(total=sum(len(items) for _, _, items in share), desc="encode", disable=rank > 0)
    for file, function, items in share:
        if shard_note(file):
            progress.update(len(items))
        else:
            tensors, unreadable = function(items, progress)
            write_shard(file, tensors, unreadable, pairs.columns)
            if file.name == "pairs-00000.safetensors" and len(tensors["row"]):
                tqdm.write(crop_summary(tensors["time_ids"]))
    progress.close()

    notes = {file.name: shard_note(file) for file, _, _ in work}
    if not all(notes.values()):
        return  # another process completes the manifest; a cache without "files" is not finished
    for note in notes.values():
        pairs.unreadable |= {row: reason for reason, rows in note["unreadable"].items() for row in rows}
    if len(pairs.unreadable) == len(pairs):
        for file in out.glob("pairs-*.safetensors"):  # the same command reads the pairs again
            file.unlink(missing_ok=True)
        raise InputError(f"{args.data} holds no pair that can be read")
    sizes = {name: (out / name).stat().st_size for name in [*notes, "prompts.json"]}
    manifest |= pairs.report() | {"files": sizes}
    manifest["unreadable_prompts"] = {row: encoder.prompt_numbers[pairs.caption(row)] for row in pairs.unreadable}
    manifest |= {"sha256": {name: note["sha256"] for name, note in notes.items()}}
    atomic_write(out / "manifest.json", json.dumps(manifest, indent=1), suffix=rank)  # two may finish at once
    print(f"{out}: {pairs.summary()}; {sum(sizes.values()) / 1e9:.3f} GB")


def main(argv=None):
    with one_line_errors("encode.py", ADVICE):
        args = encode_args(argv)
        print(f"encode.py: {json.dumps(vars(args))}")
        distributed.end_with_launcher()
        with run_folder(args.out) as out:
            visible = [file.name for file in out.glob("*") if not is_hidden(file.name)]
            strange = [name for name in visible if not re.fullmatch(r"lock|(prompts|pairs|manifest)\b.*", name)]
            if strange:
                raise InputError(f"{out} holds something else ({min(strange)}). Pass another --out")
            try:
                encode(args)
            except KeyboardInterrupt:
                raise InputError("stopped; the same command resumes")


if __name__ == "__main__":
    main()
