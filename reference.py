"""Errors that are computed once: the reference's (--reference_errors), and those of held-out pairs (--validate).

Both are plain files of [.., 2] float32, winner then loser. With every pair lies its draw_id (see data.Stream). If the
code has changed and draws other timesteps or noise now, the file is refused.
"""

import hashlib
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils._pytree import tree_map
from tqdm import tqdm

import distributed
from common import InputError, atomic_write, brief, is_cache, words_of
from data import ImagePairs, Stream
from encode import EncodedPairs
from loss import preference_metrics
from options import cache_settings, held_out_share
from sources import TO_VALIDATE, find_source, read_rows
from stats import rate_interval


def write_errors(name, file, errors, draw_ids, identity):
    """Writes errors, the draw_ids of their pairs and what identifies them, whole or not at all."""
    content = save({"errors": errors, "draw_ids": draw_ids}, {"identity": json.dumps(identity)})
    try:
        atomic_write(file, content, suffix=os.getpid())  # the runs of a sweep may write at once
    except OSError as error:
        raise InputError(f"{name} cannot be written ({brief(error)})")


def read_errors(name, file, identity, advice="Pass another file"):
    """(errors, draw_ids) of a file. InputError if it cannot be read, or by name for what differs in its identity."""
    try:
        with safe_open(file, "pt") as shard:
            found = json.loads(shard.metadata()["identity"])
            errors, draw_ids = shard.get_tensor("errors"), shard.get_tensor("draw_ids")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be read ({brief(error)}). {advice}")
    for key in identity | found:
        if found.get(key) != identity.get(key):
            raise InputError(f"{name} belongs to a run with {key} {found.get(key)}, not {identity.get(key)}. {advice}")
    return errors, draw_ids


def check_draws(what, before, now, step, first=0):
    """InputError, by step and position, if pairs, timesteps or noise were drawn differently before.

    before, now  draw_ids [n, 3] of neighbouring positions, from `first` on. Differences of rounding are allowed
    """
    differs = ~((before - now).abs() <= torch.tensor([0, 1e-6, 1e-2]))                  # [n, 3]
    differing = differs.any(dim=1).nonzero().flatten().tolist()
    if differing:
        index = differing[0]
        old, new = before[index].tolist(), now[index].tolist()
        names = ("row {:.0f}", "timestep {:g}", "noise {:.3f}")
        drawn = [f"{name.format(a)}, not {name.format(b)}"
                 for name, a, b, other in zip(names, old, new, differs[index]) if other]
        raise InputError(f"{what} by other code or on other data: at step {step}, position {first + index}, it drew "
                         f"{'; '.join(drawn)}. Use the code and the data that it was begun with, or remove it and "
                         "begin anew")


class ReferenceErrors:
    """Denoising errors of the frozen reference, computed once and kept in a file: [steps, batch_size, 2] float32.

    They can be kept because a pair's timestep and noise depend only on (seed, step, position). Read back at the same
    micro-batch size they are bit-identical; at another size they agree to float rounding. Runs share one file if they
    differ only in what the reference does not see: loss, beta, tau, group, learning rate, LoRA rank.

    digests  {name: digest} of the pairs and of all parts of the model
    raises   InputError if the file belongs to another run, by what differs
    """

    SETTINGS = ("seed", "batch_size", "resolution", "random_flip", "random_crop", "prompt_dropout", "vae_sample",
                "vae_precision", "group_noise", "precision")

    def __init__(self, args, digests):
        self.file, self.saved_at = Path(args.reference_errors), time.time()
        self.name = f"--reference_errors {self.file}"
        self.identity = {name: getattr(args, name) for name in self.SETTINGS} | digests
        self.identity["group_size"] = args.group_size if args.group_noise != "own" else None
        self.errors = torch.full((args.steps, args.batch_size, 2), torch.nan)
        self.draw_ids = torch.full((args.steps, args.batch_size, 3), torch.nan, dtype=torch.float64)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            errors, draw_ids = read_errors(self.name, self.file, self.identity)
            self.errors = torch.cat([errors, self.errors[len(errors):]])
            self.draw_ids = torch.cat([draw_ids, self.draw_ids[len(draw_ids):]])

    def check(self, stream, step):
        """InputError if the code draws a step differently than when its errors were computed."""
        before = self.draw_ids[step]
        if not before.isnan().any():
            now = stream.draw_ids(step)
            now[:, 0] = before[:len(now), 0]  # an unreadable pair was replaced, so the row may differ
            check_draws(f"{self.name} was computed", before[:len(now)], now, step)

    def complete(self, stream, steps, load, prepare, error, stop):
        """Computes what is missing of a range of steps, and ends the process if a signal came meanwhile.

        load     (stream, steps) -> this rank's batches
        prepare  (batch, 2) -> a MicroBatch with both images of each pair
        error    denoising_error's inputs -> the reference's errors [2*B]
        stop     a StopSignal
        """
        rank, _, world_size = distributed.torchrun_env()
        missing = [step for step in steps if self.errors[step].isnan().any()]
        distributed.check_alike({"number of missing reference errors": len(missing)})
        batches = load(stream, missing)
        for step in tqdm(missing, "reference", disable=rank > 0):
            errors, draw_ids, count = [], [], 0
            while count < self.errors.shape[1]:
                batch = prepare(next(batches), 2)
                err = error(batch.inputs)                                               # [2*B]
                errors.append(torch.stack(err.chunk(2), 1))                             # [B, 2]
                ids = batch.draw_id if world_size == 1 else batch.draw_id.to(err.device)
                draw_ids.append(ids)                                                    # [B, 3]; MPS has no float64
                count += len(ids) * world_size
            self.put(step, distributed.gather_micro_batches(errors), distributed.gather_micro_batches(draw_ids))
            if rank == 0 and time.time() - self.saved_at > 60:
                self.save()
            if any(distributed.all_gather_list([stop.requested])):
                break
        else:
            next(batches, None)  # ends the loader's processes
        if rank == 0 and missing:
            self.save()
        if self.errors[steps.start:steps.stop].isnan().any():
            distributed.end_early("saved the reference's errors so far; the same command resumes")

    def put(self, step, errors, draw_ids):
        """Takes the errors [batch_size, 2] and the draw_ids [batch_size, 3] of a step."""
        if not errors.isfinite().all():
            raise InputError(f"the reference's errors of step {step} are not finite. Try --precision fp32")
        self.errors[step], self.draw_ids[step] = errors.cpu(), draw_ids.cpu()

    def save(self):
        write_errors(self.name, self.file, self.errors, self.draw_ids, self.identity)
        self.saved_at = time.time()

    def forget(self, step):
        """Removes the errors of a step from the file, to which another run may have added steps."""
        self.errors, self.draw_ids = read_errors(self.name, self.file, self.identity)
        self.errors[step] = torch.nan
        self.save()

    def read(self, batch, images, device):
        """The errors [images*B] of a MicroBatch, winners first. InputError if it was drawn differently.

        A pair that could be read at one time and not at the other was replaced. Then the step's errors are removed.
        """
        batch_size = self.errors.shape[1]
        step, index = batch.position // batch_size, batch.position % batch_size         # [B]
        before, now = self.draw_ids[step, index], batch.draw_id                         # [B, 3] each
        first, position = int(step[0]), int(index[0])
        replaced = (before[:, 0] != now[:, 0]).nonzero().flatten().tolist()
        same_rows = torch.cat([now[:, :1], before[:, 1:]], 1)
        are_few = len(replaced) == 1 or 2 * len(replaced) <= len(now)
        check_draws(f"{self.name} was computed", same_rows if are_few else before, now, first, position)
        if replaced:
            self.forget(first)
            k = replaced[0]
            raise InputError(f"{self.name}: at step {first}, position {position + k}, it drew row {before[k, 0]:.0f}, not row "
                             f"{now[k, 0]:.0f}. A pair could be read only once, or the code has changed. The same command "
                             "computes this step's errors again and resumes")
        errors = self.errors[step, index][:, :images]                                   # [B, images]
        return distributed.to_device(errors.T.flatten(), device)


# Held-out pairs


def open_held_out(args, pairs):
    """The pairs of --validate: a share of --data's prompts, which `pairs` loses, or pairs of their own.

    They are not mirrored and not cropped at random, except where a cache has done so.
    """
    share = held_out_share(args.validate)
    if share:
        is_encoded = is_cache(args.data)
        held_out = EncodedPairs(args.data) if is_encoded else ImagePairs(args.data, source_rows=pairs.source_rows)
        held_out.use(hold_out(pairs, share))
        return held_out
    source = find_source(args.validate, "held_out")
    if not Path(source).exists():
        raise InputError(f"--validate {source}: there is no such file or folder. A share is a number, such as 0.02")
    try:
        if not is_cache(source):
            return ImagePairs(source, source_rows=read_rows(source, (), TO_VALIDATE))
        cache_settings(source)  # raises InputError if it is not finished
        return EncodedPairs(source)
    except InputError as error:
        raise InputError(str(error).replace("--data", "--validate"))


def hold_out(pairs, share):
    """Takes a share of the prompts' pairs away from `pairs`; returns their rows. InputError if one side is empty."""
    is_held = np.array([is_held_out(pairs.caption(row), share) for row in pairs.rows])
    if is_held.all() or not is_held.any():
        raise InputError(f"--validate {share:g} would hold out {is_held.sum()} of {len(pairs)} pairs. Pass another "
                         "share, or a file of held-out pairs")
    held = pairs.rows[is_held]
    pairs.use(pairs.rows[~is_held])
    pairs.num_held_out = len(held)
    return held


def is_held_out(caption, share):
    """Whether a prompt is held out. A hash of its words decides, so all its pairs are, in every run."""
    number = hashlib.blake2b(words_of(caption).encode(), digest_size=8).digest()
    return int.from_bytes(number, "big") < share * 2 ** 64


def check_held_out(args):
    """InputError if --validate is a cache of other latents than those that are trained on."""
    if not is_cache(args.validate):
        return
    settings = cache_settings(args.validate)
    for name in ("resolution", "vae_sample"):
        value = settings.get(name, getattr(args, name))
        if value != getattr(args, name):
            raise InputError(f"--validate {args.validate} was encoded with --{name} {value}, not "
                             f"{getattr(args, name)}. Encode it as --data, or pass the pairs themselves")


class HeldOutStream(Stream):
    """The same `count` held-out pairs again and again: item p is pair p % count, with its own timestep and noise.

    The timestep of pair k lies in quarter k % 4 of the schedule. The run's seed plays no part, so all runs are measured
    on the same draws. Its one step has `count` pairs, filled up to a multiple of `at_once`.
    """

    def __init__(self, pairs, process, latent_shape, count, at_once=1, vae_sample="sample"):
        settings = dict(seed="held out", group_size=1, group_noise="own", vae_sample=vae_sample)
        settings["batch_size"] = math.ceil(count / at_once) * at_once
        super().__init__(pairs, process, latent_shape, SimpleNamespace(**settings))
        self.count = count

    def sample_t(self, generator, index):
        quarter = index % 4
        return self.process.sample_t(generator, low=quarter / 4, high=(quarter + 1) / 4)

    def __getitem__(self, position):
        return super().__getitem__(position % self.count)


class HeldOut:
    """What the policy prefers on held-out pairs. Each pair keeps one timestep and one noise (see HeldOutStream).

    The reference is the starting model, whatever the loss. When `begin` is called the policy must be that model. Its
    errors are kept in validation.safetensors, so no second network is needed, and a run that resumes has the same ones.
    The encoded pairs stay in the host's memory, a share in each process, so a measurement is one forward of each pair.
    The file's errors agree with another micro-batch size to float rounding.

    pairs          the held-out `Pairs`
    model_digests  {name: digest} of the starting model
    """

    def __init__(self, args, out, pairs, process, latent_shape, model_digests):
        self.pairs, self.file = pairs, out / "validation.safetensors"
        self.rank, _, self.world_size = distributed.torchrun_env()
        self.count = min(args.validate_pairs, len(pairs))
        self.stream = HeldOutStream(pairs, process, latent_shape, self.count,
                                    args.micro_batch * self.world_size, args.vae_sample)
        self.identity = {"held-out pairs": pairs.digest(), "number of pairs": self.count}
        for name in ("resolution", "vae_sample", "precision", "vae_precision"):
            self.identity[name] = getattr(args, name)
        self.identity |= model_digests

    def begin(self, load, encode, error):
        """Encodes this rank's share of the pairs, and reads or computes the starting model's errors.

        load    (stream, steps) -> this rank's batches
        encode  (batch, 2) -> a MicroBatch
        error   denoising_error's inputs -> the policy's errors [2*B]
        raises  InputError if the file is of other pairs or draws, or an error is not finite
        """
        self.error, pairs = error, self.pairs
        distributed.check_alike(self.identity)
        self.inputs, draw_ids, unreadable = [], [], []
        for batch in tqdm(load(self.stream, [0]), "held out", disable=self.rank > 0):
            unreadable += batch["unreadable"]
            micro_batch = encode(batch, 2)
            self.device = micro_batch.inputs["x"].device
            self.inputs.append(tree_map(self.to_host, micro_batch.inputs))
            draw_ids.append(micro_batch.draw_id)
        pairs.unreadable |= dict(distributed.all_gather_list(unreadable))

        # The last forwards are filled up, and an unreadable pair is replaced. So a pair may be there twice.
        self.draw_ids = self.gather(draw_ids)                                           # [N, 3]
        _, first = np.unique(self.draw_ids[:, 0], return_index=True)
        self.is_first = torch.zeros(self.count, dtype=torch.bool)
        self.is_first[first] = True
        self.quarter = torch.arange(self.count) % 4                                     # quarters of the schedule
        self.prompts = np.array([words_of(pairs.caption(int(row))) for row in self.draw_ids[:, 0]])

        self.reference = self.starting_errors()

    def starting_errors(self):
        """The starting model's errors [N, 2], read from the file or computed now."""
        if any(distributed.all_gather_list([self.file.exists()])):
            errors, before = read_errors(self.file, self.file, self.identity, "Remove it, and the curve begins anew")
            check_draws(f"{self.file} was computed", before, self.draw_ids, 0)
            return errors
        errors = self.errors()
        if not errors.isfinite().all():
            raise InputError("the starting model's errors on held-out pairs are not finite. Try --precision fp32")
        if self.rank == 0:
            write_errors(self.file, self.file, errors, self.draw_ids, self.identity)
        return errors

    def summary(self, trained_pairs):
        """One line on the held-out pairs."""
        prompts = {words_of(self.pairs.caption(row)) for row in self.pairs.rows}
        trained = prompts & {words_of(trained_pairs.caption(row)) for row in trained_pairs.rows}
        return (f"validate: {len(self.pairs)} pairs of {len(prompts)} prompts, {len(trained)} of which are trained on; "
                f"{self.is_first.sum()} are measured, {len(self.pairs.unreadable)} cannot be read")

    def to_host(self, tensor):
        """In pinned memory beside a GPU, so that it can be copied back while the GPU computes."""
        tensor = tensor.cpu()
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def gather(self, micro_batches):
        """This process's [B, ...] each -> [N, ...] of all processes, on the CPU."""
        if self.world_size > 1:
            micro_batches = [values.to(self.device) for values in micro_batches]
        return distributed.gather_micro_batches(micro_batches)[:self.count].cpu()

    @torch.no_grad()
    def errors(self):
        """The policy's errors [N, 2] float32 (winner, loser) as it is now."""
        errors = []
        for inputs in self.inputs:
            inputs = tree_map(lambda tensor: distributed.to_device(tensor, self.device), inputs)
            errors.append(torch.stack(self.error(inputs).chunk(2), 1))                  # [B, 2]
        return self.gather(errors)

    def measure(self, beta):
        """{"validate/...": a number}: `preference_metrics`, the accuracy's 95% interval, its value per quarter of t."""
        errors = self.errors()[self.is_first]                                           # [n, 2]
        reference = self.reference[self.is_first]
        metrics = preference_metrics(*errors.unbind(1), *reference.unbind(1), beta)
        scalars = {f"validate/{name.split('/')[1]}": value.item() for name, value in metrics.items()}

        difference = errors - reference                                                 # D_w, D_l
        outcomes = (torch.sign(difference[:, 1] - difference[:, 0]) + 1) / 2            # 1 right, 0 wrong, 1/2 equal
        _, low, high = rate_interval(outcomes, self.prompts[self.is_first])
        scalars |= {"validate/accuracy_low": low, "validate/accuracy_high": high}
        for quarter in range(4):
            in_quarter = self.quarter[self.is_first] == quarter
            scalars[f"validate/accuracy_t{quarter}"] = outcomes[in_quarter].mean().item()
        return {name: value if math.isfinite(value) else None for name, value in scalars.items()}
