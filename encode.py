"""Compute once, train often: encoded pairs, a cache for many runs, and the errors of the reference.

    python encode.py --model sd15 --out CACHE                       then: train.py --model sd15 --data CACHE
    torchrun --nproc_per_node=8 encode.py --model sdxl --data pickapic --store fp16 --out CACHE

VAE, text encoders and CLIP never change in training, and take a quarter of a step or more. The folder CACHE holds

    manifest.json               what it was made of and how, the counts of data.json, the bytes of every file
    prompts.json                the distinct prompts; the first is ""
    prompts-00000.safetensors   SHARD prompts a file: prompt_embeds [n, L, E]; of SDXL pooled_prompt_embeds
                                [n, P]; clip_embeds [n, E']
    pairs-00000.safetensors     SHARD pairs a file, less the unreadable, which its header lists; winner first:
                                mean, std [n, 2, C, h, w] of the VAE's posterior, time_ids [n, 2, 6],
                                image_ids [n, 2], clip_embeds [n, 2, E'], row [n] and prompt [n], its numbers
                                in the data and above

Parquet is read a row group at a time, from the hub, too: no copy of the data set is made. Every file is a
function of the arguments, since its encode batches are. So any number of processes writes the same files, bit
by bit on a CPU, and, killed, the same command goes on with those that are missing.
"""

import common  # first: it notes the launcher, before the imports that take seconds

import collections
import concurrent.futures
import hashlib
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils._pytree import tree_map
from tqdm import tqdm

from common import InputError, atomic_write, brief
from data import (Clip, HeldOutStream, ImagePairs, Rows, Unreadable, by_reason, crop_summary, find_source, is_cache,
                  is_list, open_parquet, read_columns, read_manifest, read_rows, source_files, words_of)
from loss import preference_metrics
from models import by_rows, fuse_lora, load_model
from options import H14, encode_args
from stats import rate_interval

SHARD, BATCH = 256, 8  # pairs or prompts of a file; of a forward of the encoders, for results depend on it
SETTINGS = ("model", "data", "resolution", "random_crop", "random_flip", "clip", "vae_sample", "store",
            "precision", "seed")  # of the command, kept in the manifest
HALVED = ("mean", "std", "prompt_embeds", "pooled_prompt_embeds")  # by --store fp16
ADVICE = ("What is encoded is kept; fewer --workers or processes, or --device cpu, may go on with it; in another "
          "--out, a smaller --resolution helps")


def encode_batch(model, clip, batch, images, dtype):
    """What training needs of a batch of B pairs of images, the first S of each pair; the prompts' ids are taken out.

    returns  {"mean", "std": [B, S, C, h, w], "prompt_embeds": [B, L, E], ...}; with a Clip also "clip_embeds"
             [B, 3, E'] of caption, winner, loser
    """
    mean, std = model.encode_images(batch["pixels"][:, :images])
    ids = {name: batch.pop(name) for name in model.tokenizers() if name in batch}
    encoded = {"mean": mean, "std": std} | model.encode_prompts(batch["prompt"], dtype, ids)
    if clip:
        encoded["clip_embeds"] = clip.embed(batch["caption"], batch.get("clip_pixels"))
    return encoded


def check_cache(source, model, name):
    """InputError where a cache was made by other encoders than those of a model."""
    manifest, digests = read_manifest(source), model.encoder_digests
    for part in digests | manifest["encoders"]:
        if manifest["encoders"].get(part) != digests.get(part):
            raise InputError(f"the pairs of {source} were encoded by {manifest['model']}, whose {part} is not "
                             f"that of {name}; give that model, or encode the pairs once more")


# Rows that are read once, in order


class StreamedImages:
    """The images of parquet files, one row group in memory: go through the rows in order.

    fragments  pyarrow's, of files in their order
    raises     InputError that names the file, where a row group cannot be read
    """

    def __init__(self, fragments):
        self.groups = [group for file in fragments for group in file.split_by_row_group()]
        self.ends = np.cumsum([group.row_groups[0].num_rows for group in self.groups])
        self.number, self.table = None, None  # of the row group that was read last

    def __getitem__(self, row):
        number = int(np.searchsorted(self.ends, row, side="right"))
        if self.number != number:
            self.number, self.table = None, None  # before the next: one at a time
            group = self.groups[number]
            try:
                self.table = group.to_table(columns=["jpg_0", "jpg_1"])
            except Exception as error:
                raise InputError(f"row {row} is in {group.path}, which cannot be read: {brief(error)}. What is "
                                 "encoded is kept; once it can be read the same command goes on")
            self.number = number
        first = self.ends[number] - len(self.table)
        return self.table.slice(row - first, 1).to_pylist()[0]


def stream_rows(source):
    """What `data.read_rows` gives of a source, without a copy of it: its images are to be read in order."""
    if Path(source).expanduser().exists():
        files, left_out = source_files(source)
        if is_list(files):
            return read_rows(source)
        fragments = open_parquet(files.values())
        return Rows(read_columns(fragments), StreamedImages(fragments), files, left_out)

    import datasets
    import fsspec

    try:
        paths = datasets.load_dataset_builder(common.hub_id(source)).config.data_files["train"]
        if not paths[0].endswith(".parquet"):
            raise ValueError("it is not kept as parquet and cannot be streamed; download it, give its folder")
        filesystem, _ = fsspec.core.url_to_fs(paths[0])
    except Exception as error:
        raise InputError(f"--data {source} cannot be read: {brief(error)}")
    fragments = open_parquet([filesystem._strip_protocol(path) for path in paths], filesystem)
    return Rows(read_columns(fragments), StreamedImages(fragments), {}, {})


# Encode once


class Encoder:
    """Writes this process's share of a cache: the models, the pairs, and what becomes of a shard of either."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        device, self.dtype = common.get_device(args.device), common.DTYPES[args.precision]
        source = find_source(args.data)
        self.pairs = ImagePairs(args.data, None, args.seed, args.random_crop, args.random_flip,
                                source_rows=stream_rows(source))
        self.model = load_model(args.model, args.random_init, args.config)
        if args.init_lora:
            fuse_lora(self.model, args.init_lora)  # which may change the text encoders, too
        self.pairs.resolution = args.resolution = self.model.resolution(args.resolution)
        self.model.vae_dtype = common.DTYPES[args.vae_precision]
        args.clip = args.clip or ("tiny" if self.model.is_toy else H14)
        self.clip = Clip(args.clip, device, self.dtype)
        self.pairs.clip_transform = self.clip.transform
        captions = (self.pairs.caption(row) for row in self.pairs.rows)
        self.prompts = list(dict.fromkeys(["", *captions]))
        self.prompt_numbers = {prompt: number for number, prompt in enumerate(self.prompts)}
        for name, network in self.model.networks().items():
            network.to("meta" if network is self.model.denoiser else device)  # which is not used

    def decode(self, row, record):
        """(row, what `ImagePairs.content` gives of it, or the reason why it cannot be used)."""
        try:
            images = self.pairs.decode(row, record)
        except Unreadable as error:
            return row, str(error)
        return row, self.pairs.content(row, images, 0, "")

    def encode_pairs(self, rows, progress):
        """({name: [n, ...]}, {row: why} of those that cannot be used) of some rows."""
        unreadable, items, parts = {}, [], []
        records = ((int(row), self.pairs.images[int(row)]) for row in rows)
        for row, item in ahead(self.decode, records, self.args.workers):
            progress.update()
            if isinstance(item, str):
                unreadable[row] = item
            else:
                items.append((row, item))
        for i in range(0, len(items), BATCH):
            parts.append(self.encode_items(items[i:i + BATCH]))
        if not parts:
            parts = [{"row": torch.zeros(0, dtype=torch.int64), "prompt": torch.zeros(0, dtype=torch.int64)}]
        return self.stack(parts), unreadable

    def encode_items(self, items):
        rows = [row for row, _ in items]
        batch = {name: torch.stack([item[name] for _, item in items]) for name in items[0][1]}
        mean, std = self.model.encode_images(batch.pop("pixels"))
        pictures = batch.pop("clip_pixels").flatten(0, 1)                                # [2 B, 3, h, w]
        embeds = by_rows(self.clip.embed_images, pictures, self.clip.device, len(pictures),
                         torch.get_num_threads())
        part = batch | {"mean": mean, "clip_embeds": torch.cat(embeds).unflatten(0, (-1, 2))}
        if self.args.vae_sample == "sample":
            part["std"] = std
        numbers = [self.prompt_numbers[self.pairs.caption(row)] for row in rows]
        return part | {"row": torch.tensor(rows), "prompt": torch.tensor(numbers)}

    def encode_prompts(self, prompts, progress):
        """({name: [n, ...]}, {}) of some prompts."""
        parts = []
        for i in range(0, len(prompts), BATCH):
            batch = prompts[i:i + BATCH]
            embeds = by_rows(self.clip.embed_texts, batch, self.clip.device, len(batch))
            parts.append(self.model.encode_prompts(batch, self.dtype) | {"clip_embeds": torch.cat(embeds)})
            progress.update(len(batch))
        return self.stack(parts), {}

    def stack(self, parts):
        """Dicts of tensors, one after the other, on the CPU, as they are stored."""
        store, tensors = common.DTYPES[self.args.store], {}
        for name in parts[0]:
            tensor = torch.cat([part[name].cpu() for part in parts])
            tensors[name] = tensor.to(store) if name in HALVED else tensor
        return tensors

    def missing_bytes(self):
        """The size of what is not written yet."""
        latent = np.prod(self.model.latent_shape(self.args.resolution))
        numbers = len(self.pairs) * 2 * latent * (2 if self.args.vae_sample == "sample" else 1)
        numbers += len(self.prompts) * np.prod(self.model.prompt_shape())
        written = sum(file.stat().st_size for file in self.out.glob("*.safetensors"))  # whole ones, which stay
        return int(numbers) * (2 if self.args.store == "fp16" else 4) - written

    def manifest(self):
        settings = {name: getattr(self.args, name) for name in SETTINGS}
        if self.args.vae_precision != "fp32":  # which goes without saying
            settings["vae_precision"] = self.args.vae_precision
        return settings | {"edition": 2, "encoders": self.model.encoder_digests, "clip_digest": self.clip.digest(),
                           "columns": [*self.pairs.columns], "pairs": self.pairs.digest(), "shard": SHARD,
                           "batch": BATCH}


def write_shard(file, tensors, unreadable):
    """A safetensors file that is whole or not there; `shard_note` reads its digest and the rows that it lacks.

    InputError where a number is not finite or there is no room.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            advice = "; --store fp32 holds larger numbers" if tensor.dtype == torch.float16 else ""
            raise InputError(f"{file.name}: {name} is not finite{advice}")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    note = {"sha256": hashlib.sha256(save(tensors)).hexdigest(), "unreadable": by_reason(unreadable)}
    try:
        atomic_write(file, save(tensors, {"about": json.dumps(note)}))  # one entry: their order is not kept
    except OSError as error:
        raise InputError(f"{file} cannot be written ({brief(error)}). What is written is kept: with more room the "
                         "same command goes on")


def shard_note(file):
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


def begin_cache(encoder):
    """Checks the folder against what was begun in it, writes its manifest, and makes sure that it has room."""
    out, manifest = encoder.out, encoder.manifest()
    begun = read_manifest(out) if is_cache(out) else manifest
    for name, value in manifest.items():
        if begun.get(name) != value and name not in ("model", "data", "clip"):  # of these the digests decide
            raise InputError(f"{out} was begun with {name} {begun.get(name)}, not {value}; give another --out")
    if common.torchrun_env()[0] == 0:
        atomic_write(out / "prompts.json", json.dumps(encoder.prompts))
        atomic_write(out / "manifest.json", json.dumps(begun, indent=1))
    need, free = encoder.missing_bytes(), shutil.disk_usage(out).free
    if need > free:
        raise InputError(f"{out} needs {need / 1e9:.0f} GB more, {free / 1e9:.0f} are free; --store fp16 takes "
                         "half of it, --vae_sample mean less")
    return manifest


def encode(args):
    """Writes this process's share of the cache; the process that finds all of it there, its manifest."""
    rank, _, world_size = common.torchrun_env()
    encoder = Encoder(args)
    out, pairs = encoder.out, encoder.pairs
    manifest = begin_cache(encoder)
    work = []
    for kind, function, items in (("prompts", encoder.encode_prompts, encoder.prompts),
                                  ("pairs", encoder.encode_pairs, pairs.rows)):
        for k in range(0, len(items), SHARD):
            work.append((out / f"{kind}-{k // SHARD:05d}.safetensors", function, items[k:k + SHARD]))

    # A stretch of neighbouring files each: they share row groups.
    share = work[rank * len(work) // world_size:(rank + 1) * len(work) // world_size]
    progress = tqdm(total=sum(len(items) for _, _, items in share), desc="encode", disable=rank > 0)
    for file, function, items in share:
        if shard_note(file):
            progress.update(len(items))
        else:
            tensors, unreadable = function(items, progress)
            write_shard(file, tensors, unreadable)
            if file.name == "pairs-00000.safetensors" and len(tensors["row"]):
                tqdm.write(crop_summary(tensors["time_ids"]))
    progress.close()

    notes = {file.name: shard_note(file) for file, _, _ in work}
    if not all(notes.values()):
        return  # another process completes the manifest; without its "files" a cache is not finished
    for note in notes.values():
        pairs.unreadable |= {row: reason for reason, rows in note["unreadable"].items() for row in rows}
    if len(pairs.unreadable) == len(pairs):
        raise InputError(f"{args.data} holds no pair that can be read")
    sizes = {name: (out / name).stat().st_size for name in [*notes, "prompts.json"]}
    manifest |= pairs.report() | {"files": sizes}
    manifest["unreadable_prompts"] = {row: encoder.prompt_numbers[pairs.caption(row)] for row in pairs.unreadable}
    manifest |= {"sha256": {name: note["sha256"] for name, note in notes.items()}}
    atomic_write(out / "manifest.json", json.dumps(manifest, indent=1), suffix=rank)  # two may finish at once
    print(f"{out}: {pairs.summary()}; {sum(sizes.values()) / 1e9:.3f} GB")


# The reference's errors


class ReferenceErrors:
    """The reference's errors of a run's pairs, [steps, batch_size, 2] float32 (winner, loser), in a file.

    A run's timestep and noise are functions of (seed, step, position), so these are, too: exact, to the bit,
    at the micro-batch they were computed at, else to rounding. Runs that differ in what the reference does
    not see (loss, beta, tau, group, learning rate, LoRA rank) share one file. With every position lies the
    record of its draw (see data.Stream): where the code draws otherwise by now, it is refused.

    digests  {name: digest} of the pairs and of what the model is made of
    raises   InputError where the file is of another run, by what differs
    """

    SETTINGS = ("seed", "batch_size", "resolution", "random_flip", "random_crop", "prompt_dropout", "vae_sample",
                "group_noise", "precision")

    def __init__(self, args, digests):
        self.file, self.saved, self.is_new = Path(args.reference_errors).expanduser(), time.time(), False
        self.identity = {name: getattr(args, name) for name in self.SETTINGS}
        self.identity |= {"group_size": args.group_size if args.group_noise != "own" else None,
                          "edition": 2} | digests
        if args.vae_precision != "fp32":  # which goes without saying
            self.identity["vae_precision"] = args.vae_precision
        self.errors = torch.full((args.steps, args.batch_size, 2), torch.nan)
        self.records = torch.full((args.steps, args.batch_size, 3), torch.nan, dtype=torch.float64)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self.load()

    def load(self):
        errors, records = read_errors(f"--reference_errors {self.file}", self.file, self.identity)
        self.errors = torch.cat([errors, self.errors[len(errors):]])
        self.records = torch.cat([records, self.records[len(records):]])

    def check(self, stream, step):
        """InputError where the code draws a step otherwise than when its errors were computed."""
        before = self.records[step]
        if not before.isnan().any():
            now = stream.records_of(step)
            now[:, 0] = before[:len(now), 0]  # the rows that were read, in the place of those that cannot be
            check_records(f"--reference_errors {self.file} was computed", before[:len(now)], now, step)

    def complete(self, trainer, steps, stop):
        """Computes what is missing of a range of steps, by the trainer's own reference; then all is on its device.

        returns  whether all is there: a signal may have come before
        """
        args = trainer.args
        missing = [step for step in steps if self.errors[step].isnan().any()]
        common.check_alike({"number of missing reference errors": len(missing)})
        batches = trainer.load(missing)
        for step in tqdm(missing, "reference", disable=trainer.rank > 0):
            errors, records = [], []
            for _ in range(args.batch_size // (args.micro_batch * trainer.world_size)):
                batch = trainer.prepare(next(batches))
                err = trainer.reference_error(batch)                                    # [2 B]
                errors.append(torch.stack(err.chunk(2), 1))                             # [B, 2]
                record = batch.record if trainer.world_size == 1 else batch.record.to(err.device)
                records.append(record)                                                  # [B, 3]; MPS has no float64
            self.put(step, common.gather_micro_batches(errors), common.gather_micro_batches(records))
            if trainer.rank == 0 and time.time() - self.saved > 60:
                self.save()
            if any(common.all_gather_list([stop.requested])):
                break
        if trainer.rank == 0 and self.is_new:
            self.save()
        self.errors = self.errors.to(trainer.device)
        return not self.errors[steps.start:].isnan().any()

    def put(self, step, errors, records):
        """Takes the errors [batch_size, 2] and the records [batch_size, 3] of a step."""
        if not errors.isfinite().all():
            raise InputError(f"the reference's errors of step {step} are not finite; try --precision fp32")
        self.errors[step], self.records[step], self.is_new = errors.cpu(), records.cpu(), True

    def save(self):
        write_errors(f"--reference_errors {self.file}", self.file, self.errors, self.records, self.identity)
        self.saved = time.time()

    def read(self, batch):
        """The errors [2 B] of a MicroBatch, winners first. InputError where it was drawn otherwise."""
        batch_size = self.errors.shape[1]
        step, place = batch.position // batch_size, batch.position % batch_size         # [B]
        check_records(f"--reference_errors {self.file} was computed", self.records[step, place], batch.record,
                      int(step[0]), int(place[0]))
        device = self.errors.device
        return self.errors[common.to_device(step, device), common.to_device(place, device)].T.flatten()


def write_errors(name, file, errors, records, identity):
    """A file of errors, whole or not there, with the records of their draws and what they are of."""
    content = save({"errors": errors, "records": records}, {"identity": json.dumps(identity)})
    try:
        atomic_write(file, content, suffix=os.getpid())  # the runs of a sweep may do so at once
    except OSError as error:
        raise InputError(f"{name} cannot be written ({brief(error)})")


def read_errors(name, file, identity, advice="give another file"):
    """(errors, records) of a file. InputError where it cannot be read or is of something else, by what differs."""
    try:
        with safe_open(file, "pt") as shard:
            found = json.loads(shard.metadata()["identity"])
            errors, records = shard.get_tensor("errors"), shard.get_tensor("records")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be read ({brief(error)}), or is of the first edition; {advice}")
    for key in identity | found:
        if found.get(key) != identity.get(key):
            raise InputError(f"{name} is of a run with {key} {found.get(key)}, not {identity.get(key)}; {advice}")
    return errors, records


def check_records(what, before, now, step, first=0):
    """InputError, by step and position, where pairs, timesteps or noise [n, 3] were other ones before."""
    differing = (before != now).any(dim=1).nonzero().flatten().tolist()
    if differing:
        place = differing[0]
        old, new = before[place].tolist(), now[place].tolist()
        names = ("row {:.0f}", "timestep {:g}", "noise {:.0f}")
        drawn = [f"{name.format(a)}, not {name.format(b)}" for name, a, b in zip(names, old, new) if a != b]
        raise InputError(f"{what} by other code or on other data: step {step}, position {first + place} was drawn "
                         f"with {'; '.join(drawn)}. Give another one, or remove it")


# Held-out pairs


class Validation:
    """What the policy prefers on held-out pairs, each with one timestep and one noise for ever: data.HeldOutStream.

    The reference is the starting model, whatever the loss. Before the first step the policy is that model; its
    errors are kept in a file, so that no second network is needed and a run that goes on has the same. The pairs
    are encoded at every start and lie in the memory of the host, a share in each process: to measure is one forward
    of each. With another micro-batch than the file was made at, margins are those of this one to rounding.

    trainer  a Trainer whose policy is still that of step 0
    file     of the reference's errors
    raises   InputError where the file is of other pairs or draws, or an error is not finite
    """

    def __init__(self, trainer, file):
        args, pairs, model = trainer.args, trainer.held_out, trainer.model
        self.trainer, self.count = trainer, min(args.validate_pairs, len(pairs))
        stream = HeldOutStream(pairs, model.process, model.latent_shape(args.resolution), self.count,
                               args.vae_sample)
        forwards = math.ceil(self.count / (args.micro_batch * trainer.world_size))
        places = trainer.places(0, forwards * args.micro_batch * trainer.world_size)
        self.batches, records = [], []
        unreadable = []
        for batch in tqdm(trainer.load_places(stream, places), "held out", forwards, disable=trainer.rank > 0):
            unreadable += batch["unreadable"]
            micro_batch = trainer.encoded(batch, images=2)
            self.batches.append(tree_map(self.to_host, micro_batch.inputs))
            records.append(micro_batch.record)

        # What fills the last forwards, and what stands for a pair that cannot be read, may be there twice.
        records = self.gather(records)                                                  # [N, 3]
        _, first_places = np.unique(records[:, 0], return_index=True)
        self.is_first = torch.zeros(self.count, dtype=torch.bool)
        self.is_first[first_places] = True
        self.quarter = torch.arange(self.count) % 4                                     # of the schedule
        self.prompts = np.array([words_of(pairs.caption(int(row))) for row in records[:, 0]])
        pairs.unreadable |= dict(common.all_gather_list(unreadable))

        identity = {"held-out pairs": pairs.digest(), "number of pairs": self.count, "resolution": args.resolution,
                    "vae_sample": args.vae_sample, "precision": args.precision,
                    "vae_precision": args.vae_precision} | model.digests
        if trainer.rank == 0:
            self.say_what_is_held_out()
        if any(common.all_gather_list([file.exists()])):
            self.reference, before = read_errors(file, file, identity, "remove it, and the curve begins anew")
            check_records(f"{file} was computed", before, records, 0)
            return
        self.reference = self.errors()
        if not self.reference.isfinite().all():
            raise InputError("the starting model's errors on the held-out pairs are not finite; try --precision fp32")
        if trainer.rank == 0:
            write_errors(file, file, self.reference, records, identity)

    def say_what_is_held_out(self):
        held_out, pairs = self.trainer.held_out, self.trainer.pairs
        prompts = {words_of(held_out.caption(row)) for row in held_out.rows}
        trained = prompts & {words_of(pairs.caption(row)) for row in pairs.rows}
        print(f"validate: {len(held_out)} pairs of {len(prompts)} prompts, {len(trained)} of which are trained on; "
              f"{self.is_first.sum()} are measured, {len(held_out.unreadable)} cannot be read")

    def to_host(self, tensor):
        """In pinned memory beside a GPU: from there it comes back while the one before is computed."""
        tensor = tensor.cpu()
        return tensor.pin_memory() if self.trainer.device.type == "cuda" else tensor

    def gather(self, micro_batches):
        """[[B, ...]] of this process -> [N, ...] of all, on the CPU."""
        if self.trainer.world_size > 1:
            micro_batches = [values.to(self.trainer.device) for values in micro_batches]
        return common.gather_micro_batches(micro_batches)[:self.count].cpu()

    @torch.no_grad()
    def errors(self):
        """The policy's errors [N, 2] float32 (winner, loser) as it is now."""
        errors = []
        for inputs in self.batches:
            inputs = tree_map(lambda tensor: common.to_device(tensor, self.trainer.device), inputs)
            err = self.trainer.error(self.trainer.policy, inputs)                       # [2 B]
            errors.append(torch.stack(err.chunk(2), 1))                                 # [B, 2]
        return self.gather(errors)

    def measure(self):
        """{"validate/...": a number}: `preference_metrics`, and the accuracy's 95% interval and in quarters of t."""
        errors = self.errors()[self.is_first]                                           # [n, 2]
        reference = self.reference[self.is_first]
        metrics = preference_metrics(*errors.unbind(1), *reference.unbind(1), self.trainer.args.beta)
        record = {f"validate/{name.split('/')[1]}": value.item() for name, value in metrics.items()}

        difference = errors - reference                                                 # D_w, D_l
        outcomes = (torch.sign(difference[:, 1] - difference[:, 0]) + 1) / 2            # 1 right, 0 wrong, 1/2 alike
        _, low, high = rate_interval(outcomes, self.prompts[self.is_first])
        record |= {"validate/accuracy_low": low, "validate/accuracy_high": high}
        for quarter in range(4):
            of_quarter = self.quarter[self.is_first] == quarter
            record[f"validate/accuracy_t{quarter}"] = outcomes[of_quarter].mean().item()
        return {name: value if math.isfinite(value) else None for name, value in record.items()}


def plot_validation(lines, file):
    """The curves of a run's held-out pairs as a picture.

    lines  the dicts of log.jsonl
    """
    from matplotlib.figure import Figure

    lines = [line for line in lines if line.get("validate/margin") is not None]
    steps = [line["step"] + 1 for line in lines]

    def curve(name, at_start):
        return [at_start, *(line[f"validate/{name}"] for line in lines)]

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    accuracy, margin, error = figure.subplots(1, 3)
    accuracy.fill_between([0, *steps], curve("accuracy_low", 0.5), curve("accuracy_high", 0.5), alpha=0.2)
    accuracy.plot([0, *steps], curve("accuracy", 0.5), linewidth=2, label="all, 95%")
    for quarter, noise in enumerate(("least noise", "", "", "most noise")):
        accuracy.plot([0, *steps], curve(f"accuracy_t{quarter}", 0.5), linewidth=0.8, label=f"t{quarter} {noise}")
    accuracy.set(xlabel="step", title="held-out accuracy")
    accuracy.legend(fontsize="small")
    margin.plot([0, *steps], curve("margin", 0), linewidth=2)
    margin.set(xlabel="step", title="held-out margin")
    for side, name in (("w", "winners"), ("l", "losers")):
        ratio = [line[f"validate/policy_{side}"] / line[f"validate/ref_{side}"] for line in lines]
        error.plot([0, *steps], [1, *ratio], linewidth=2, label=name)
    error.set(xlabel="step", title="held-out error / the reference's")
    error.legend(fontsize="small")
    for axis, at_start in ((accuracy, 0.5), (margin, 0), (error, 1)):
        axis.axhline(at_start, color="grey", linewidth=0.5)
    part = file.with_suffix(".part")
    figure.savefig(part, dpi=120, format="png")
    part.replace(file)


def main(argv=None):
    with common.one_line_errors("encode.py", ADVICE):
        args = encode_args(argv)
        print(f"encode.py: {json.dumps(vars(args))}")
        common.end_with_launcher()
        with common.run_folder(args.out) as out:
            visible = [file.name for file in out.glob("*") if not common.is_hidden(file.name)]
            strange = [name for name in visible if not re.fullmatch(r"lock|(prompts|pairs|manifest)\b.*", name)]
            if strange:
                raise InputError(f"{out} holds something else ({min(strange)}); give another --out")
            try:
                encode(args)
            except KeyboardInterrupt:
                raise InputError("stopped; the same command goes on")


if __name__ == "__main__":
    main()
