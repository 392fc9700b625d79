"""Compute once, train often: encoded pairs, by `python data.py --out CACHE`, and the errors of the reference.

    python data.py --model sd15 --data pickapic --out CACHE         then: train.py --model sd15 --data CACHE
    torchrun --nproc_per_node=8 data.py --model sdxl --data pickapic --store fp16 --out CACHE

VAE, text encoders and CLIP never change in training, and take a third of a step. The folder CACHE holds

    manifest.json               what it was made of and how, the counts of data.json, the bytes of every file
    prompts.json                the distinct prompts; the first is ""
    prompts-00000.safetensors   SHARD prompts a file: states [n, L, E]; of SDXL pooled [n, P]; clip [n, E']
    pairs-00000.safetensors     SHARD pairs a file, less the unreadable, which its header lists; winner first:
                                mean, std [n, 2, C, h, w] of the VAE's posterior, time_ids [n, 2, 6],
                                clip [n, 2, E'], row [n] and prompt [n], its numbers in the data and above

Parquet is read a row group at a time, from the hub, too: no copy of the data set is made. Every file is a
function of the arguments, since its encode batches are. So any number of processes writes the same files, bit
by bit on a CPU, and, killed, the same command goes on with those that are missing.
"""

import resume  # first, to know the launcher

import argparse
import collections
import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import sys
import time
import types
from pathlib import Path

import diffusers
import filelock
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import architectures
import data

SHARD, BATCH = 256, 8  # pairs or prompts of a file; of a forward of the encoders, for results depend on it
SETTINGS = ("resolution", "random_crop", "random_flip", "clip")  # what training takes from the manifest


def fail(message):
    sys.exit(f"data.py: {message}")


class Streamed:
    """The rows of parquet files in their order, as `PreferencePairs` reads them, one row group in memory.

    Images are read when a row is, all of its row group at once: go through the rows in order.

    files  paths; or a hub data set's, with the fsspec filesystem that they are on
    raises SystemExit, in one line that names the file, where a row group cannot be read
    """

    def __init__(self, files, filesystem=None):
        import pyarrow.dataset

        table = pyarrow.dataset.dataset([*map(str, files)], format="parquet", filesystem=filesystem)
        self.column_names = table.schema.names
        self.features = {field.name: types.SimpleNamespace(dtype=str(field.type)) for field in table.schema}
        known = {"caption", "label_0", "label_1", "has_label"} & self.features.keys()
        self.columns = table.to_table(columns=sorted(known)).to_pydict()
        self.groups = [group for file in table.get_fragments() for group in file.split_by_row_group()]
        self.ends = np.cumsum([group.row_groups[0].num_rows for group in self.groups])
        self.group = (None, None)  # (number, table) of the last that was read
        self.files = [(str(file), None if filesystem else Path(file).stat().st_size) for file in files]

    def __len__(self):
        return len(self.columns["label_0"])

    def __getitem__(self, key):
        """A column by its name, or the images of a row by its number."""
        if isinstance(key, str):
            return self.columns[key]
        number = int(np.searchsorted(self.ends, key, side="right"))
        if self.group[0] != number:
            self.group = (None, None)  # before the next: one at a time
            try:
                self.group = number, self.groups[number].to_table(columns=["jpg_0", "jpg_1"])
            except Exception as error:
                fail(f"row {key} is in {self.groups[number].path}, which cannot be read: {data.brief(error)}."
                     " What is encoded is kept; once it can be read the same command goes on")
        images = self.group[1]
        return images.slice(key - self.ends[number] + len(images), 1).to_pylist()[0]


def stream(source):
    """The rows of a source, images unread: `Streamed` parquet files; else what `data.read_rows` gives."""
    import datasets
    import fsspec

    source = data.DATA.get(source, source)
    try:
        if source != "tiny" and not Path(source).expanduser().exists():
            files = datasets.load_dataset_builder(data.hub_id(source)).config.data_files["train"]
            if not files[0].endswith(".parquet"):
                fail(f"{source} is not kept as parquet and cannot be streamed; download it, give its folder")
            filesystem = fsspec.core.url_to_fs(files[0])[0]
            return Streamed([filesystem._strip_protocol(file) for file in files], filesystem)
        files = data.local_files(source) if source != "tiny" else []
        if files and files[0].suffix == ".parquet":
            return Streamed(files)
    except Exception as error:
        fail(f"{source} cannot be read: {data.brief(error)}")
    return data.read_rows(source)


# Encode once


def digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def identity(network):
    """A digest of a network: its weights, and its configuration less where and by whom it was saved."""
    config = network.config if isinstance(network.config, dict) else network.config.to_dict()
    told = {key: str(value) for key, value in config.items() if key[0] != "_" and key not in (
        "transformers_version", "dtype", "torch_dtype", "architectures")}
    return digest([data.digest(network), told])


def encoders(pipe):
    """A digest of everything that a cache stands for, by its name in the pipeline."""
    digests = {"force_zeros_for_empty_prompt": bool(pipe.config.get("force_zeros_for_empty_prompt"))}
    names = {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    for name in names & pipe.components.keys():
        part = getattr(pipe, name)
        if isinstance(part, torch.nn.Module):
            digests[name] = identity(part)
        else:
            digests[name] = digest(sorted(vocabulary := part.get_vocab(), key=vocabulary.get))
    return dict(sorted(digests.items()))


def write(file, tensors, unreadable=()):
    """A safetensors file that is whole or not there; `about` reads its digest and the rows that it lacks.

    SystemExit, in one line, where a number is not finite or there is no room.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            fail(f"{file.name}: {name} is not finite" + "; --store fp32 holds larger numbers" * (
                tensor.dtype == torch.float16))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    note = {"sha256": hashlib.sha256(save(tensors)).hexdigest(), "unreadable": [*unreadable]}
    try:
        resume.write(file, save(tensors, {"about": json.dumps(note)}))  # one entry: their order is not kept
    except OSError as error:
        fail(f"{file} cannot be written ({data.brief(error)}). What is written is kept: with more room the "
             "same command goes on")


def about(file):
    """The note in the header of a file that is there with all its bytes, else None."""
    try:
        with safe_open(file, "pt") as shard:
            return json.loads(shard.metadata()["about"])
    except (OSError, SafetensorError):
        return None


def ahead(function, items, threads, depth=4 * BATCH):
    """`function` of each item's parts, in order, computed by threads a few items ahead."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, *item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_batches(items):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def stack(parts, store):
    """Dicts of tensors, one after the other, on the CPU; latents and states as they are stored."""
    return {name: torch.cat([part[name].cpu() for part in parts]).to(
        store if name in ("mean", "std", "states", "pooled") else parts[0][name].dtype) for name in parts[0]}


def build(args):
    """Writes this process's share of the cache; the process that finds all of it there, its manifest."""
    out, (rank, _, world) = Path(args.out), data.torchrun()
    device, dtype = data.own_device(args.device), data.DTYPES[args.precision]
    data.quiet()
    pairs = data.PreferencePairs(args.data, args.resolution, args.seed, args.random_crop, args.random_flip,
                                 scan=None, rows=stream(args.data))
    pipe = architectures.load(args)
    pairs.resolution = args.resolution = data.side(pipe, args.resolution)
    args.clip = args.clip or ("tiny" if data.is_toy(pipe) else data.H14)
    clip = data.Clip(args.clip, device, dtype)
    pairs.clip_transform = clip.transform

    prompts = [*dict.fromkeys(["", *(pairs.caption(row) for row in pairs.pairs)])]
    number = {prompt: k for k, prompt in enumerate(prompts)}
    manifest = {name: getattr(args, name) for name in (
        "model", "data", *SETTINGS, "vae_sample", "store", "precision", "seed")}
    manifest |= {"encoders": encoders(pipe), "pairs": pairs.digest(), "shard": SHARD, "batch": BATCH}
    begun = read_manifest(out) if is_cache(out) else manifest
    for name, value in manifest.items():
        if begun.get(name) != value and name not in ("model", "data"):  # of these the digests decide
            fail(f"{out} was begun with {name} {begun.get(name)}, not {value}; give another --out")
    if rank == 0:
        resume.write(out / "prompts.json", json.dumps(prompts))
        resume.write(out / "manifest.json", json.dumps(begun, indent=1))
    numbers = 2 * np.prod([pipe.vae.config.latent_channels, *[args.resolution // pipe.vae_scale_factor] * 2])
    numbers = len(pairs) * int(numbers) * (1 + (args.vae_sample == "sample"))
    numbers += len(prompts) * pipe.tokenizer.model_max_length * pipe.unet.config.cross_attention_dim
    need = numbers * (2 if args.store == "fp16" else 4) - sum(file.stat().st_size for file in out.glob("*"))
    if need > (free := shutil.disk_usage(out).free):
        fail(f"{out} needs {need / 1e9:.0f} GB more, {free / 1e9:.0f} are free; --store fp16 takes half of"
             " it, --vae_sample mean less")
    for name, network in pipe.components.items():
        if isinstance(network, torch.nn.Module):
            network.eval().requires_grad_(False).to("meta" if name == "unet" else device)  # it is not used

    def decode(row, record):
        images = pairs.decode(row, record)
        return row, images and pairs.content(row, images, 0, "")

    def encode_pairs(file, rows):
        parts, bad = [], []
        contents = ahead(decode, ((int(row), pairs.rows[int(row)]) for row in rows), args.workers)
        readable = ((row, item) for row, item in contents if item or bad.append(row))
        for batch in in_batches(readable):
            rows, items = zip(*batch)
            bar.update(len(rows))
            mean, std = data.encode_images(pipe.vae, torch.stack([item["pixels"] for item in items]))
            pictures = torch.cat([item["clip_pixels"] for item in items])           # [2 B, 3, h, w]
            embeddings = data.in_parts(clip.embed_images, pictures, device, len(pictures), torch.get_num_threads())
            part = {"mean": mean, "std": std, "clip": torch.cat(embeddings).unflatten(0, (-1, 2))}
            if args.vae_sample == "mean":
                del part["std"]
            parts.append(part | {
                "time_ids": torch.stack([item["time_ids"] for item in items]), "row": torch.tensor(rows),
                "prompt": torch.tensor([number[pairs.caption(row)] for row in rows])})
        none = dict.fromkeys(("row", "prompt"), torch.zeros(0, dtype=torch.int64))
        write(file, stack(parts, data.DTYPES[args.store]) if parts else none, bad)

    def encode_prompts(file, some):
        parts = []
        for batch in in_batches(some):
            bar.update(len(batch))
            states, pooled = data.encode_prompts(pipe, batch, dtype)
            texts = torch.cat(data.in_parts(clip.embed_texts, batch, device, len(batch)))
            part = {"states": states, "pooled": pooled, "clip": texts}
            parts.append({name: value for name, value in part.items() if value is not None})
        write(file, stack(parts, data.DTYPES[args.store]))

    kinds = ("prompts", encode_prompts, prompts), ("pairs", encode_pairs, pairs.pairs)
    work = [(out / f"{kind}-{k // SHARD:05d}.safetensors", encode, items[k:k + SHARD])
            for kind, encode, items in kinds for k in range(0, len(items), SHARD)]
    mine = work[rank * len(work) // world:(rank + 1) * len(work) // world]  # neighbours share row groups
    bar = tqdm(total=sum(len(items) for *_, items in mine), desc="encode", disable=rank > 0)
    for file, encode, items in mine:
        if about(file):
            bar.update(len(items))
        else:
            encode(file, items)
    bar.close()

    notes = {file.name: about(file) for file, *_ in work}
    if not all(notes.values()):
        return  # another process completes the manifest; without its "files" a cache is not finished
    pairs.unreadable.update(row for note in notes.values() for row in note["unreadable"])
    if len(pairs.unreadable) == len(pairs):
        fail(f"{args.data} holds no pair that can be read")
    sizes = {name: (out / name).stat().st_size for name in [*notes, "prompts.json"]}
    manifest |= pairs.report() | {"files": sizes}
    manifest |= {"sha256": {name: note["sha256"] for name, note in notes.items()}}
    resume.write(out / "manifest.json", json.dumps(manifest, indent=1), own=rank)  # two may finish at once
    print("{out}: {rows} rows, {used} pairs encoded, {ties} ties dropped, {unlabelled} without a label, "
          "{bad} that cannot be read; {size:.3f} GB".format(
              out=out, bad=len(pairs.unreadable), size=sum(sizes.values()) / 1e9, **pairs.report()))


def get_args(argv=None):
    p = argparse.ArgumentParser(
        prog="data.py", usage="python data.py --out CACHE [options]", allow_abbrev=False,
        description="Encode preference pairs once; train with --data CACHE.")
    p.error = lambda message: fail(message) if data.torchrun()[1] == 0 else sys.exit(1)
    flag, add = argparse.BooleanOptionalAction, p.add_argument
    add("--out", required=True, metavar="CACHE", help="the cache's folder; started again, it goes on")
    add("--model", default="tiny", help="tiny, sd15, sdxl, or a diffusers folder or hub id (SD1.x, SDXL)")
    add("--random_init", action="store_true", help="sd15, sdxl: random weights, nothing downloaded")
    add("--data", help="tiny, pickapic, a parquet file, a folder, a hub id [the preset's]")
    add("--resolution", type=int, help="side of the training images, pixels [the model's own]")
    add("--random_flip", action=flag, default=False, help="mirror half of the pairs, once for all epochs")
    add("--random_crop", action=flag, default=False, help="crop a pair anywhere, once for all epochs")
    add("--seed", type=int, default=0, help="of flips and crops")
    add("--vae_sample", default="sample", choices=["mean", "sample"], help="mean: its std is not kept")
    add("--store", default="fp32", choices=["fp32", "fp16"], help="latents, text states; fp16: half as large")
    add("--clip", metavar="ARCH:WEIGHTS", help="of open_clip, a tag or a file; or tiny [the preset's]")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="of text and CLIP [bf16 on cuda, else fp32]")
    add("--device", help="cuda, mps or cpu [the best there is]")
    add("--workers", type=int, help="threads that decode images [all cores]")
    args = p.parse_args(argv)
    args.workers = args.workers or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    for name in ("workers", "resolution"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    known = data.MODELS.get(args.model, {})
    args.data = args.data or known.get("data") or p.error(f"--model {args.model} is no preset, give --data")
    args.clip = args.clip or ("ViT-H-14:random" if args.random_init else known.get("clip"))
    if args.random_init and args.model not in architectures.CONFIGS:
        p.error(f"--random_init knows {', '.join(architectures.CONFIGS)}, not {args.model}")
    args.device = data.find_device(args.device, p.error)
    args.precision = args.precision or ("bf16" if args.device.startswith("cuda") else "fp32")
    return args


def main(argv=None):
    args = get_args(argv)
    out = Path(args.out)
    resume.end_with_launcher()
    lock, new = filelock.FileLock(out / "lock", timeout=2), not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if data.torchrun()[0] == 0:
            lock.acquire()
        ours = re.compile(r"lock|(prompts|pairs|manifest)\b.*")
        if strange := [file.name for file in out.glob("*") if not ours.fullmatch(file.name)]:
            fail(f"{out} holds something else ({min(strange)}); give another --out")
        build(args)
    except filelock.Timeout:
        fail(f"another live run is writing to {out}")
    except KeyboardInterrupt:
        fail("stopped; the same command goes on")
    except FileExistsError:
        fail(f"{out} is no folder; give another --out")
    except Exception as error:
        if short := resume.out_of_memory(error):
            fail(f"out of memory ({short}). What is encoded is kept; fewer --workers or processes, or"
                 " --device cpu, may go on with it; in another --out, a smaller --resolution helps")
        raise
    finally:
        if lock.is_locked and new and [file.name for file in out.glob("*")] == ["lock"]:  # leave nothing
            (out / "lock").unlink()
            out.rmdir()
        lock.release()


# Train from it


def is_cache(source):
    file = Path(source).expanduser() / "manifest.json"
    return file.is_file() and b'"encoders"' in file.read_bytes()


def read_manifest(source):
    """The manifest of a cache, finished or not. SystemExit where it is damaged."""
    try:
        return json.loads((Path(source).expanduser() / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"data: {source}/manifest.json cannot be read ({error!r:.200}); remove it, and the command "
                 "of data.py that made the cache writes it anew")


def settings(source, fail):
    """What a cache decides of a run, {} for other data; `fail` is called where it is not finished."""
    if not is_cache(source):
        return {}
    manifest = read_manifest(source)
    if "files" not in manifest:
        fail(f"--data {source} is not finished; the command of data.py that began it goes on")
    means = {"vae_sample": "mean"} if manifest["vae_sample"] == "mean" else {}
    return {name: manifest[name] for name in SETTINGS} | means


def check(source, own, model):
    """SystemExit where a cache was made by other encoders than those of `own`, the `encoders` of a model."""
    manifest = read_manifest(source)
    for name in own | manifest["encoders"]:
        if manifest["encoders"].get(name) != own.get(name):
            sys.exit(f"train.py: the pairs of {source} were encoded by {manifest['model']}, whose {name} is "
                     f"not that of {model}; give that model, or encode the pairs once more")


class CachedPairs(data.PreferencePairs):
    """`PreferencePairs` out of a cache: the same stream, but what `data.encode` makes instead of pixels.

    Files are memory-mapped, each item is read when it is asked for: the shuffle is that of all pairs.

    raises  SystemExit, in one line, where a file is missing or has not the bytes that it was written with
    """

    def __init__(self, source, seed=0, prompt_dropout=0.0):
        self.folder, self.seed, self.prompt_dropout = Path(source).expanduser(), seed, prompt_dropout
        self.order, self.draw, self.handles, manifest = (-1, None), None, {}, read_manifest(source)
        for name, size in manifest["files"].items():
            there = self.folder / name
            if not there.exists() or there.stat().st_size != size:
                how = f"has {there.stat().st_size} bytes, not {size}" if there.exists() else "is missing"
                sys.exit(f"data: {there} {how}; the command of data.py that made the cache writes it anew")
        self.ties, self.unlabelled, self.shard = (manifest[key] for key in ("ties", "unlabelled", "shard"))
        self.rows, self.unreadable = range(manifest["rows"]), set(manifest["unreadable"])
        self.prompts = json.loads((self.folder / "prompts.json").read_text())
        shards = [self.open(name) for name in sorted(manifest["files"]) if name.startswith("pairs-")]
        rows = [shard.get_tensor("row").numpy() for shard in shards]
        self.found, self.starts = np.concatenate(rows), np.cumsum([0, *map(len, rows)])
        self.prompt = np.concatenate([shard.get_tensor("prompt").numpy() for shard in shards])
        self.pairs = np.sort(np.concatenate([self.found, np.array(manifest["unreadable"], dtype=int)]))

    def __getstate__(self):  # for a process that starts anew
        return self.__dict__ | {"handles": {}}

    def open(self, name):
        if name not in self.handles:
            self.handles[name] = safe_open(self.folder / name, "pt")
        return self.handles[name]

    def read(self, kind, file, index):
        shard = self.open(f"{kind}-{file:05d}.safetensors")
        return {name: shard.get_slice(name)[int(index)] for name in shard.keys()}

    def digest(self):
        return hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()[:16]

    def images(self, row):
        """(its place,) of a row that could be read, else None."""
        place = int(np.searchsorted(self.found, row))
        return (place,) if place < len(self.found) and self.found[place] == row else None

    def caption(self, row):
        place = self.images(row)
        return self.prompts[self.prompt[place[0]]] if place else ""

    def content(self, row, images, epoch, prompt):
        place, = images
        file = int(np.searchsorted(self.starts, place, side="right")) - 1
        pair = self.read("pairs", file, place - self.starts[file])
        full = self.read("prompts", *divmod(int(self.prompt[place]), self.shard))
        used = full if prompt else self.read("prompts", 0, 0)
        item = {name: pair[name] for name in ("mean", "std", "time_ids") if name in pair}
        item |= {name: used[name] for name in ("states", "pooled") if name in used}
        return item | {"embeddings": torch.cat([full["clip"][None], pair["clip"]])}     # [3, E']


# The reference's errors


class ReferenceErrors:
    """err_ref of a run's pairs, [steps, batch, 2] (winner, loser) float32, in a safetensors file; or NaN.

    A run's timestep and noise are functions of (seed, step, position), so these are, too: exact, to the bit,
    at the micro-batch they were computed at, else to rounding. Runs that differ in what the reference does
    not see (loss, beta, tau, group, learning rate, LoRA rank) share one file.

    own     the `encoders` of the pipeline
    raises  SystemExit, in one line, where the file is of another run, by what differs
    """

    SEEN = ("seed", "batch_size", "resolution", "random_flip", "random_crop", "prompt_dropout", "vae_sample",
            "group_noise", "precision")

    def __init__(self, args, pairs, pipe, own):
        self.file, self.saved, self.new = Path(args.reference_errors).expanduser(), time.time(), False
        scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
        schedule = [scheduler.config.prediction_type, scheduler.alphas_cumprod.tolist()]
        self.identity = {name: getattr(args, name) for name in self.SEEN} | {
            "group_size": args.group_size if args.group_noise != "own" else None, "data": pairs.digest(),
            "schedule": digest(schedule), "unet": identity(pipe.unet)} | own
        self.errors = torch.full((args.steps, args.batch_size, 2), torch.nan)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            return
        try:
            with safe_open(self.file, "pt") as shard:
                theirs, kept = json.loads(shard.metadata()["identity"]), shard.get_tensor("errors")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            sys.exit(f"train.py: --reference_errors {self.file} cannot be read ({data.brief(error)})")
        for name, value in self.identity.items():
            if theirs.get(name) != value:
                sys.exit(f"train.py: --reference_errors {self.file} is of a run with {name} "
                         f"{theirs.get(name)}, not {value}; give another file")
        self.errors = torch.cat([kept, self.errors[len(kept):]])

    def missing(self, steps):
        return [step for step in steps if self.errors[step].isnan().any()]

    def put(self, step, errors, rank):
        """Takes the errors of a step, [batch, 2]; the first process saves them, now and then."""
        if not errors.isfinite().all():
            sys.exit(f"train.py: the reference's errors of step {step} are not finite; try --precision fp32")
        self.errors[step], self.new = errors.cpu(), True
        if rank == 0 and time.time() - self.saved > 60:
            self.save()

    def save(self):
        content = save({"errors": self.errors}, {"identity": json.dumps(self.identity)})
        try:
            resume.write(self.file, content, own=os.getpid())  # the runs of a sweep may do so at once
        except OSError as error:
            sys.exit(f"train.py: --reference_errors {self.file} cannot be written ({data.brief(error)})")
        self.saved = time.time()

    def done(self, device, rank):
        """All errors, on `device`; saved, if some are new."""
        if rank == 0 and self.new:
            self.save()
        return self.errors.to(device)
