"""Align a text-to-image diffusion model with preference pairs, by RPO, Diffusion-DPO or SFT.

    python train.py                                             the embedded task: RPO on a laptop, in minutes
    python train.py --loss dpo                                  the same with Diffusion-DPO; or --loss sft
    python train.py --model tiny-flow                           the same on a small SD3, a model of flow matching
    python train.py --model sd15                                Stable Diffusion 1.5 on Pick-a-Pic v2
    torchrun --nproc_per_node=8 train.py --model sdxl           SDXL on eight GPUs
    python train.py --model sdxl --data my_pairs --batch_size 64 --lr 6.4e-7 --warmup 50        your own pairs
    python train.py --model sdxl --data CACHE --lora_rank 16    an adapter, on pairs that encode.py has encoded
    python train.py --model sd15 --data my_pairs --validate 0.02        is it learning: held-out pairs on the way
    python train.py --model sd15 --dry_run                      print the resolved run and stop

Options and presets are in options.py. A run writes to --out: config.json, data.json, log.jsonl (a line per
step), samples/*.png, checkpoint-STEP.pt and model/, a diffusers pipeline or LoRA weights; of held-out pairs
validation.png, and validation.safetensors, the reference's errors on them. It is a function of
its arguments: processes and --micro_batch change rounding, nothing else. Killed or stopped, the same command
goes on from the last checkpoint, to the same weights (the same bits in fp32 on a CPU).
"""

import common  # first: it notes the launcher, before the imports that take seconds

import contextlib
import functools
import json
import math
import shutil
import statistics
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torchvision.utils import save_image
from tqdm import tqdm
import transformers

from common import InputError, atomic_write, print0
from data import (COLUMNS, SCAN_LIMIT, TO_VALIDATE, Clip, EncodedPairs, ImagePairs, Stream, collate, crop_summary,
                  cross_pair_weights, find_held_out, find_prompts, is_cache, read_rows)
from encode import ReferenceErrors, Validation, check_cache, check_records, encode_batch, plot_validation
from loss import LOSSES, denoising_error, wants
from models import (EMBEDDED, cast_for_autocast, compile_blocks, disabled_adapter, find_model, frozen_reference,
                    fuse_lora, load_model, tokenize)
from options import H14, cache_settings, check_same_run, fits, held_out_share, hyperparameters, train_args

ADVICE = ("The same command goes on with --micro_batch 1, --gradient_checkpointing, --reference_errors FILE (no "
          "second network) or fewer --workers; in another --out, --lora_rank 16, --optimizer adafactor or a "
          "smaller --resolution help")
SHOWN = {"loss": "loss", "reward/margin": "margin", "reward/accuracy": "accuracy", "validate/accuracy": "held out",
         "skipped": "skipped"}
MICRO_BATCHES = (1, 2, 4, 8, 16)  # that --micro_batch auto tries
WEIGHED_BY = ("clip_embeds", "image_ids")  # of a batch, what the cross-pair weights are made of
OF_IMAGES = ("mean", "std", "vae_noise", "time_ids")  # of a batch, by pair and image
STAY_ON_CPU = ("pixels", "clip_pixels", "row", "position", "record")  # of a batch
TERMS = {  # of a step, in the order of their computation
    "latents": "the VAE's latents", "clip_embeds": "the CLIP embeddings", "ref_err_w": "the reference's errors",
    "ref_err_l": "the reference's errors", "err": "the policy's errors"}


class MicroBatch(NamedTuple):
    """B pairs on the device; S images of each: winners first, then losers, if the loss wants them."""

    inputs: dict            # what denoising_error takes: x, eps [S B, C, h, w], t [S B], cond
    values: dict            # {name: [B, ...]} that a loss may name; clip_embeds [B, 3, E], image_ids [B, 2]
    row: torch.Tensor       # [B] int64 on the CPU
    position: torch.Tensor  # [B] int64 on the CPU, in the stream
    record: torch.Tensor    # [B, 3] float64 on the CPU, see data.Stream


class Trainer:
    """What the loop is made of: the networks, the loss and the pairs of a run, and their errors.

    model      the family object of models.py; the policy is its denoiser
    params     {name: parameter} of what trains, always float32: the denoiser's, or its adapter's
    reference  the frozen network that the policy is held against; None where the loss wants none
    held_out   the pairs of --validate, or None
    chunk      pairs whose errors are gathered for one evaluation of the loss: whole groups, and whole
               micro-batches of all processes
    """

    def __init__(self, args, pairs, held_out, model, device):
        self.args, self.device = args, device
        self.pairs, self.held_out, self.model = pairs, held_out, model
        self.dtype = common.DTYPES[args.precision]
        self.rank, _, self.world_size = common.torchrun_env()
        self.process = model.process.to(device)
        latent_shape = model.latent_shape(args.resolution)
        self.stream = Stream(pairs, model.process, latent_shape, args.seed,
                             args.batch_size, args.group_size, args.group_noise, args.vae_sample)

        # What no parameter of the loss names is not computed.
        self.loss_fn = LOSSES[args.loss]
        self.wants = wants(self.loss_fn).keys()
        self.hyperparameters = hyperparameters(args)
        self.images_per_pair = 2 if {"err_l", "ref_err_l"} & self.wants else 1
        self.wants_reference = bool({"ref_err_w", "ref_err_l"} & self.wants)
        self.wants_weights = "weights" in self.wants
        for name in self.wants & set(COLUMNS):
            if name not in pairs.columns:
                raise InputError(f"{args.loss} wants {name}, which --data {args.data} lacks")

        if args.micro_batch != "auto":  # of which `set_up` makes a number
            self.take_micro_batch(args.micro_batch)

        # Encoded pairs bring CLIP's embeddings with them; equal weights and a group of one pair need none.
        self.tau = args.tau if args.group_size > 1 else math.inf
        self.clip, is_encoded = None, isinstance(pairs, EncodedPairs)
        self.encodes_pairs, self.is_drawing = not is_encoded, self.rank == 0 and args.sample_every > 0
        if self.wants_weights and self.tau < math.inf and not is_encoded:
            self.clip = Clip(args.clip, device, self.dtype)
            pairs.clip_transform = self.clip.transform if args.similarity != "text" else None
        if self.encodes_pairs:  # by the loader's processes; the tokenizers alone, which travel light
            pairs.tokenize = functools.partial(tokenize, model.tokenizers())
        self.digests = model.digests | {"data": pairs.digest()}  # of what the run is a function of
        self.first_time_ids = []  # of some micro-batches, [B, S, 6] each: to say what the crop takes away
        self.reference_errors = None
        if args.reference_errors:
            self.reference_errors = ReferenceErrors(args, self.digests)
        if self.clip:
            self.digests = self.digests | {"CLIP": self.clip.digest()}

    def take_micro_batch(self, micro_batch):
        """Sets what follows from the number of pairs of a forward."""
        args = self.args
        args.micro_batch = micro_batch

        # The pairs of a group share one loss. Where the forwards of all processes together hold whole groups, a
        # chunk is one forward of each, and one pass does.
        self.group_size = args.group_size if self.wants_weights else micro_batch
        pairs_per_forward = micro_batch * self.world_size
        self.chunk = math.lcm(self.group_size, pairs_per_forward)
        self.micro_batches_per_chunk = self.chunk // pairs_per_forward
        self.gathers = self.world_size > 1 and micro_batch % self.group_size > 0

    def largest_micro_batch(self):
        """The most pairs of MICRO_BATCHES whose forward and backward every process has the memory for.

        InputError where one pair is too many.
        """
        args, largest = self.args, 0
        for micro_batch in MICRO_BATCHES:
            if args.batch_size % (micro_batch * self.world_size):
                break
            has_room = self.has_room_for(micro_batch)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if not all(common.all_gather_list([has_room])):
                break
            largest = micro_batch
        self.first_time_ids.clear()  # of pairs that will come again
        if not largest:
            raise InputError("out of memory with one pair a forward; --gradient_checkpointing, --lora_rank 16, "
                             "--optimizer adafactor or a smaller --resolution help")
        return largest

    def has_room_for(self, micro_batch):
        """Whether a forward and a backward of the first pairs fit beside all that a step holds, and a twentieth more."""
        params = [*self.params.values()]
        copies = {"adamw": 2}.get(self.args.optimizer, 0) + bool(self.args.ema)
        try:
            held = [torch.empty_like(param) for param in params for _ in range(copies)]
            if self.device.type == "cuda":
                _, total = torch.cuda.mem_get_info(self.device)
                held.append(torch.empty(total // 20, dtype=torch.uint8, device=self.device))
            for param in params:
                param.grad = torch.zeros_like(param)
            batch = self.prepare(next(self.load_places(self.stream, [range(micro_batch)])))
            err = self.policy_error(batch)
            if self.wants_reference and not self.reference_errors:
                self.reference_error(batch)
            err.sum().backward()
            return True
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
                raise
            return False
        finally:
            for param in params:
                param.grad = None

    def place_models(self):
        """Puts the networks on the device and says what trains. Frozen weights are held as autocast casts them."""
        args, model, denoiser = self.args, self.model, self.model.denoiser
        if args.lora_rank:
            model.add_lora(args.lora_rank, args.seed)
            cast_for_autocast(denoiser, self.dtype, self.device)
        else:
            denoiser.requires_grad_(True)
        self.params = {}
        for name, param in denoiser.named_parameters():
            if param.requires_grad:
                self.params[name] = param
        denoiser.to(self.device)
        if self.encodes_pairs:
            self.place_encoders()
        is_cpu, is_cuda = self.device.type == "cpu", self.device.type == "cuda"
        if is_cuda or is_cpu and not args.lora_rank:
            denoiser.to(memory_format=torch.channels_last)  # the faster layout; on a CPU not for frozen weights

        if args.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        self.policy, self.reference = denoiser, None
        if self.wants_reference and (args.lora_rank or args.reference_errors):
            self.reference = self.policy  # its adapter is disabled then; or it is asked before it moves
        elif self.wants_reference:
            self.reference = frozen_reference(denoiser, self.dtype)
        if args.compile:
            for network in {self.policy, self.reference} - {None}:
                compile_blocks(network, model.blocks)

    def place_encoders(self):
        for name, network in self.model.networks().items():
            if self.args.lora_rank and name in self.model.text_encoders:
                cast_for_autocast(network, self.dtype, self.device)
            elif network is not self.model.denoiser:
                network.to(self.device)

    def release_encoders(self):
        """Takes off the device what nothing needs once samples' prompts and held-out pairs are encoded."""
        if self.encodes_pairs:
            return
        vars(self.model).pop("encoding_vae", None)
        for name, network in self.model.networks().items():
            is_needed = network is self.model.denoiser or name == "vae" and self.is_drawing
            if not is_needed:
                network.to("cpu")

    def places(self, first, count):
        """This process's micro-batches, ranges of positions, of some; the k-th of all processes are one stretch."""
        micro_batch = self.args.micro_batch
        for start in range(first, first + count, micro_batch * self.world_size):
            start += self.rank * micro_batch
            yield range(start, start + micro_batch)

    def load(self, steps):
        """This process's micro-batches of some steps."""
        batch_size = self.args.batch_size
        return self.load_places(self.stream, (
            places for step in steps for places in self.places(step * batch_size, batch_size)))

    def load_places(self, stream, places):
        args = self.args
        return iter(torch.utils.data.DataLoader(
            stream, batch_sampler=places, collate_fn=collate, num_workers=args.workers,
            worker_init_fn=common.ignore_signals, timeout=args.data_timeout if args.workers else 0,
            pin_memory=self.device.type == "cuda"))

    def prepare(self, batch):
        """A batch of the loader -> a MicroBatch of what the loss wants."""
        self.pairs.unreadable |= dict(batch["unreadable"])
        if len(self.first_time_ids) < 64:
            self.first_time_ids.append(batch["time_ids"][:, :self.images_per_pair])
        return self.encoded(batch, self.images_per_pair, self.clip)

    def encoded(self, batch, images, clip=None):
        """The first images of each pair as a MicroBatch: encoded, on the device, noised by nothing yet."""
        if "pixels" in batch:
            batch |= encode_batch(self.model, clip, batch, images, self.dtype)
        for name, value in batch.items():
            if name in OF_IMAGES:
                value = value[:, :images]                                               # [B, S, ...]
            if torch.is_tensor(value) and name not in STAY_ON_CPU:
                batch[name] = common.to_device(value, self.device)

        latents = batch["mean"].float()                                                 # [B, S, C, h, w]
        if self.args.vae_sample == "sample":
            latents = latents + batch["std"].float() * batch["vae_noise"]
        latents = latents.transpose(0, 1).flatten(0, 1)                                 # [S B, C, h, w]
        t = batch["t"]                                                                  # [B]
        inputs = {
            "x": self.model.scale_latents(latents),
            "eps": batch["noise"].repeat(images, 1, 1, 1),
            "t": t.repeat(images),
            "cond": self.model.conditioning(batch, batch["time_ids"]),
        }
        values = {"t": t, "snr": self.process.snr(t)}
        for name in (*WEIGHED_BY, *COLUMNS):
            if name in batch:
                values[name] = batch[name]
        return MicroBatch(inputs, values, batch["row"], batch["position"], batch["record"])

    def error(self, network, inputs):
        return denoising_error(self.model.predict, network, self.process, dtype=self.dtype, **inputs)

    def policy_error(self, batch):                                                      # [S B]
        return self.error(self.policy, batch.inputs)

    @torch.no_grad()
    def reference_error(self, batch):                                                   # [S B]
        if not self.args.lora_rank:
            return self.error(self.reference, batch.inputs)
        with disabled_adapter(self.model.lora_layers):
            return self.error(self.reference, batch.inputs)

    def loss_values(self, batch, err):
        """{name: [B, ...]} of what the loss names: the errors of policy and reference, and the batch's own."""
        values = dict(batch.values)
        values |= zip(("err_w", "err_l"), err.chunk(self.images_per_pair))
        if self.wants_reference:
            if self.reference_errors:
                ref_err = self.reference_errors.read(batch)                             # [S B]
            else:
                ref_err = self.reference_error(batch)
            values |= zip(("ref_err_w", "ref_err_l"), ref_err.chunk(self.images_per_pair))
        wanted = self.wants | set(WEIGHED_BY if self.wants_weights else ())
        return {name: value for name, value in values.items() if name in wanted}

    def gather_chunk(self, columns):
        """The values of this process's micro-batches -> of the chunk, in the order of its positions."""
        chunk = {}
        for name in columns[0]:
            values = [column[name] for column in columns]                               # [[B, ...]]
            chunk[name] = common.gather_micro_batches(values, self.gathers)             # [chunk, ...]
        return chunk

    def loss_and_slopes(self, values):
        """The loss over the groups of a chunk, and its slopes along the policy's errors of this process.

        returns  slopes of each micro-batch, [micro-batches, S B]; [metrics of each group]
        """
        args = self.args
        errors = [values[name].requires_grad_() for name in ("err_w", "err_l") if name in values]
        loss, metrics = 0, []
        for i in range(0, len(errors[0]), self.group_size):
            group = {name: value[i:i + self.group_size] for name, value in values.items()}
            if self.wants_weights:
                group["weights"] = self.group_weights(group.pop("clip_embeds", None), group.pop("image_ids"))
            group_loss, group_metrics = self.loss_fn(**group, **self.hyperparameters)
            loss = loss + group_loss * self.group_size / args.batch_size
            metrics.append({"loss": group_loss.detach(), **group_metrics})
        slopes = torch.stack(torch.autograd.grad(loss, errors))                         # [S, chunk]
        if self.gathers:
            slopes = slopes.unflatten(1, (-1, self.world_size, args.micro_batch))
            slopes = slopes[:, :, self.rank]                                            # [S, micro-batches, B]
        else:
            slopes = slopes.unflatten(1, (-1, args.micro_batch))
        return slopes.transpose(0, 1).flatten(1), metrics

    def group_weights(self, clip_embeds, image_ids):
        """[group, group] of clip_embeds [group, 3, E] and image_ids [group, 2], see `cross_pair_weights`."""
        text = image_w = image_l = None
        if clip_embeds is not None:
            text, image_w, image_l = clip_embeds.unbind(1)
        return cross_pair_weights(text, image_w, image_l, self.tau, self.args.similarity, image_ids)

    def is_sound(self, record, scaler):
        """Whether a step's numbers are finite. A gradient that overflows fp16 is left out by the scaler."""
        if scaler.is_enabled() and scaler.get_scale() >= 1:
            return math.isfinite(record["loss"])
        return math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])


def train(args, out, state):
    """The run of the resolved `args` in the folder `out`, from the checkpoint's `state` on; {}: from the start."""
    t_start = time.time()
    trainer = set_up(args, out, state)
    optimizer = make_optimizer(args, trainer.params.values())
    scaler = torch.amp.GradScaler(trainer.device.type, enabled=args.precision == "fp16")
    params = [*trainer.params.values()]
    start = state.get("step", 0)
    output = Output(out, trainer, optimizer, scaler)
    stop = common.StopSignal()
    if args.reference_errors:
        if not trainer.reference_errors.complete(trainer, range(start, args.steps), stop):
            end_early("saved the reference's errors so far; the same command goes on")
        trainer.reference = None
    if trainer.held_out:  # before a checkpoint is restored: the policy is the starting model
        output.validation = Validation(trainer, out / "validation.safetensors")
    trainer.release_encoders()
    if state:
        output.restore(state)
    for param in params:
        common.broadcast(param)
    batches = trainer.load(range(start, args.steps))
    gradient_sum, num_chunks = common.GradientSum(params), args.batch_size // trainer.chunk
    output.begin(start)
    progress = tqdm(range(start, args.steps), args.loss, args.steps,
                    initial=start, disable=trainer.rank > 0)

    for step in progress:
        metrics = []
        for chunk in range(num_chunks):
            # The policy's and the reference's errors of the chunk, by one function on the same batch. There is
            # memory for the graph of one micro-batch, which is the last one's: of those before it, this first
            # pass gives the errors alone.
            micro_batches, errors, columns = [], [], []
            for k in range(trainer.micro_batches_per_chunk):
                batch = trainer.prepare(next(batches))
                with torch.set_grad_enabled(k == trainer.micro_batches_per_chunk - 1):
                    err = trainer.policy_error(batch)                                   # [S B]
                micro_batches.append(batch)
                errors.append(err)
                columns.append(trainer.loss_values(batch, err.detach()))                # {name: [B, ...]}

            # The loss over whole groups, across micro-batches and processes, and its slopes along the errors.
            # With a second pass this is gradient caching, arXiv:2101.06983: the gradient of one giant batch in the
            # memory of one micro-batch. It goes backwards: the graph that is kept makes room for the others.
            slopes, group_metrics = trainer.loss_and_slopes(trainer.gather_chunk(columns))
            metrics += group_metrics
            for k in reversed(range(trainer.micro_batches_per_chunk)):
                err = errors.pop()
                if not err.requires_grad:
                    err = trainer.policy_error(micro_batches[k])
                gradient_sum.begins = chunk == num_chunks - 1 and k == 0
                scaler.scale(err @ slopes[k]).backward()                                # slopes[k]: [S B]

        # Data parallel: a process has back-propagated its own pairs' part of the loss; the sum is the gradient.
        gradient_sum.finish()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        more = {"grad_norm": grad_norm, "stop": stop.requested, "save": output.is_save_due()}
        record = read_metrics(metrics, more, trainer.device)                            # the step's one sync
        if not trainer.is_sound(record, scaler):
            output.checkpoints.wait()
            raise InputError(explain_not_finite(trainer, out, step, record))

        # A linear warm-up to a constant rate. fp16's scaler leaves out a step that overflowed, --skip_above one
        # whose gradient stands out.
        warmed_up = (step + 1) / max(1, args.warmup)
        optimizer.param_groups[0]["lr"] = args.lr * min(1, warmed_up)
        if not output.skips(step, record["grad_norm"]):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if output.ema:
            output.ema.step(params)
        record["lr"] = optimizer.param_groups[0]["lr"]
        output.after_step(step, record, progress)

    output.checkpoints.wait()
    output.save_model()
    shown = f", {out}/samples shows it" if args.sample_every else ""
    if trainer.held_out:
        shown += f"; {out}/validation.png: whether it has learnt"
    print0(f"{time.time() - t_start:.0f} s; {out}/model is the result{shown}")
    if dist.is_initialized():
        dist.barrier()  # the first may still be saving; where one leaves, torchrun and NCCL end all
        dist.destroy_process_group()


def set_up(args, out, state):
    """The Trainer of a run; what is quickest to fail comes first."""
    device = common.get_device(args.device)
    common.init_processes(device)
    if out:
        common.check_shared(out)
    if not args.random_init and args.model not in EMBEDDED:  # which is built below, once the data are found good
        find_model(args.model, args.config)
    is_encoded = is_cache(args.data)
    if is_encoded:
        pairs = EncodedPairs(args.data, args.seed, args.prompt_dropout)
    else:
        pairs = ImagePairs(args.data, args.resolution, args.seed, args.random_crop,
                           args.random_flip, args.prompt_dropout)
    held_out = open_held_out(args, pairs) if args.validate else None
    if state and state["pairs"] != len(pairs):
        raise InputError(f"{out} was begun with {state['pairs']} pairs; {args.data} now holds {len(pairs)}")
    model = load_model(args.model, args.random_init, args.config)
    if args.init_lora:
        fuse_lora(model, args.init_lora)
    for source in filter(None, (args.data, args.validate)):
        if is_cache(source):
            check_cache(source, model, args.model)
    if args.sample_every:
        model.check_scheduler()
    args.resolution = pairs.resolution = model.resolution(args.resolution)
    if held_out:
        held_out.resolution = args.resolution
        check_held_out(args)
    model.vae_dtype = common.DTYPES[args.vae_precision]
    model.set_times(args)
    args.optimizer = args.optimizer or model.optimizer
    args.clip = args.clip or ("tiny" if model.is_toy else H14)
    trainer = Trainer(args, pairs, held_out, model, device)
    for name, value in state.get("digests", {}).items():
        if trainer.digests.get(name) != value:
            raise InputError(f"{out} was begun with another {name} ({value}, now {trainer.digests.get(name)}); "
                             "give back what it was begun with, or another --out")

    # A checkpoint knows how its last step was drawn: code that draws otherwise by now would be another run.
    pairs.unreadable |= state.get("unreadable", {})
    if state:
        step = state["step"] - 1
        check_records(f"{out} was trained", state["records"], trainer.stream.records_of(step), step)
    elif trainer.rank == 0 and not is_encoded and len(pairs) <= SCAN_LIMIT:
        pairs.scan()
    if args.reference_errors and state.get("step", 0) < args.steps:
        trainer.reference_errors.check(trainer.stream, state.get("step", 0))
    common.check_alike({"number of steps taken": state.get("step", 0)} | trainer.digests)
    trainer.place_models()
    if args.micro_batch == "auto":
        trainer.take_micro_batch(trainer.largest_micro_batch())
    if not trainer.encodes_pairs and (trainer.is_drawing or isinstance(held_out, ImagePairs)):
        trainer.place_encoders()  # not for the steps, so after what those have room for is known
    say_what_runs(trainer, state.get("step", 0))
    return trainer


def open_held_out(args, pairs):
    """The pairs of --validate, with their prompts: a share of --data's prompts, whose pairs `pairs` loses, or others.

    Nothing is mirrored or cropped by chance, but for what a cache has of that.
    """
    share = held_out_share(args.validate)
    if share and is_cache(args.data):
        held_out = EncodedPairs(args.data)
    elif share:
        held_out = ImagePairs(args.data, source_rows=pairs.source_rows)
    else:
        source = find_held_out(args.validate)
        try:
            if is_cache(source):
                cache_settings(source)  # it is finished
                return EncodedPairs(source)
            return ImagePairs(source, source_rows=read_rows(source, TO_VALIDATE))
        except InputError as error:
            raise InputError(str(error).replace("--data", "--validate"))
    held_out.use(pairs.hold_out(share))
    return held_out


def check_held_out(args):
    """InputError where --validate is a cache of other latents than those that are trained on."""
    if not is_cache(args.validate):
        return
    settings = cache_settings(args.validate)  # has vae_sample where there are means alone
    for name in ("resolution", "vae_sample"):
        value = settings.get(name, getattr(args, name))
        if value != getattr(args, name):
            raise InputError(f"--validate {args.validate} was encoded with --{name} {value}, not "
                             f"{getattr(args, name)}; encode it as --data is, or give the pairs themselves")


def say_what_runs(trainer, steps_taken):
    args = trainer.args
    print0(f"data: {trainer.pairs.summary()}")
    trained = sum(param.numel() for param in trainer.params.values())
    words = [f"{args.loss} on {args.model}: {trained / 1e6:.1f} of {trainer.model.num_parameters / 1e6:.1f} M "
             f"parameters, {args.resolution} px, {args.device}, {args.precision}, {args.batch_size} pairs a step, "
             f"{args.micro_batch} a forward, processes: {trainer.world_size}"]
    if trainer.wants_weights:
        clip = args.clip if trainer.clip else "not loaded"
        passes = "one pass" if trainer.micro_batches_per_chunk == 1 else "two passes"
        words.append(f"groups of {args.group_size} in {passes}, weights {args.weight_position}, tau {args.tau:g}, "
                     f"clip {clip}")
    if steps_taken:
        words.append(f"going on after {steps_taken} steps")
    print0("; ".join(words))


def make_optimizer(args, params):
    settings = dict(lr=args.lr, weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(params, **settings, fused=True)
    if args.optimizer == "sgd":
        return torch.optim.SGD(params, **settings)
    return Adafactor(params, **settings, scale_parameter=False, relative_step=False)


class Adafactor(transformers.Adafactor):
    """transformers' Adafactor, its rule and its state, with fewer passes over memory, for an lr taken as it is.

    The update is made in the place of the gradients, which are used up: nothing larger than a parameter is
    allocated. (torch's own Adafactor is another rule: it scales lr by the parameters and by the step.)

    raises  ValueError where scale_parameter, relative_step or beta1 asks for another lr, or for a momentum
    """

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        group = self.defaults
        if group["scale_parameter"] or group["relative_step"] or group["beta1"] is not None:
            raise ValueError("this Adafactor has no scale_parameter, no relative_step and no beta1")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            grads = [param.grad for param in params]
            for param in params:
                self.precondition(param, group)

            # A gradient whose root mean square is above the threshold is scaled down to it.
            rms = torch._foreach_norm(grads)
            torch._foreach_div_(rms, [grad.numel() ** 0.5 * group["clip_threshold"] for grad in grads])
            rates = group["lr"] / torch.stack(rms).clamp(min=1)                         # [parameters]
            torch._foreach_mul_(grads, [*rates.unbind()])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(params, grads)

    def precondition(self, param, group):
        """Divides a gradient by the root of its running mean square, factored where it has two axes or more."""
        grad, state, eps = param.grad, self.state[param], group["eps"][0]
        state["step"] = state.get("step", 0) + 1
        weight = state["step"] ** group["decay_rate"]  # of this step in the running mean; 1 in the first
        square = grad.square()
        if grad.dim() < 2:
            means = {"exp_avg_sq": square + eps}
        else:
            means = {"exp_avg_sq_row": square.mean(dim=-1) + eps,                       # [..., n]
                     "exp_avg_sq_col": square.mean(dim=-2) + eps}                       # [..., m]
        for name, mean in means.items():
            if name in state:
                mean = state[name].lerp_(mean, weight)
            state[name] = mean
        if grad.dim() < 2:
            grad.mul_(state["exp_avg_sq"].rsqrt())
        else:
            row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            grad.mul_((row / row.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1))
            grad.mul_(column.rsqrt().unsqueeze(-2))


def read_metrics(metrics, more, device):
    """The means over groups and processes, as floats.

    metrics  the dicts of this process's groups, all with the same keys
    more     {name: tensor [] or number} beside them, a number or a truth per process
    """
    values = {}
    for name in metrics[0]:
        of_groups = torch.stack([group[name] for group in metrics])
        values[name] = of_groups.mean()
    for name, value in more.items():
        values[name] = torch.as_tensor(value, dtype=torch.float32).to(device, non_blocking=True)
    means = common.mean_over_processes(torch.stack([*values.values()]))
    return dict(zip(values, means.tolist()))


def explain_not_finite(trainer, out, step, record):
    """One line on a step that went bad: the first term that is not finite, and the rows of the pairs where.

    A step is a function of its number and the weights, which have not moved: it is computed again.
    """
    faults = []
    for batch in map(trainer.prepare, trainer.load([step])):
        with torch.no_grad():
            err = trainer.policy_error(batch)
        values = trainer.loss_values(batch, err)
        values |= {"latents": batch.inputs["x"], "err": err}
        for order, (name, term) in enumerate(TERMS.items()):
            if name not in values:
                continue
            is_finite = values[name].isfinite().unflatten(0, (-1, len(batch.row)))      # [1 or S, B, ...]
            of_pairs = is_finite.transpose(0, 1).flatten(1).all(dim=1).cpu()            # [B]
            for row in batch.row[~of_pairs].tolist():
                faults.append((order, term, row))
    faults = common.all_gather_list(faults)
    where = "the loss or its gradient, at finite errors"
    if faults:
        first, term, _ = min(faults)
        rows = [str(row) for order, _, row in faults if order == first]
        where = f"{term} of rows {', '.join(rows[:32])}"
    kept = common.newest_checkpoint(out) or "no checkpoint"
    return (f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']}. Not finite: {where}. Kept: "
            f"{kept}. In another --out, try a smaller --lr or --precision fp32")


class Output:
    """What a run leaves in its folder; the first process writes it. Samples and model/ are the average, if any.

    ema  the average of the weights over the steps, diffusers' EMAModel on the first process, or None
    """

    def __init__(self, out, trainer, optimizer, scaler):
        self.out, self.trainer, self.args = out, trainer, trainer.args
        self.optimizer, self.scaler, self.skipped = optimizer, scaler, 0
        self.ema, self.is_one_hot = None, True
        self.validation, self.measured = None, {}  # what it measured last
        self.grad_norms, self.kept = [], None  # of the last steps; the checkpoint before the first spike
        self.checkpoints, self.saved_at = common.CheckpointWriter(out), time.time()
        self.is_writer = trainer.rank == 0
        if self.is_writer:
            self.write_json("config.json", vars(self.args))
            if self.args.ema:
                self.ema = EMAModel(trainer.params.values(), decay=self.args.ema, foreach=True)
            if self.args.sample_every:
                prompts = self.read_prompts()
                self.embeds = trainer.model.sampling_embeds(prompts, trainer.dtype)
                self.base_samples = self.draw()  # by the starting model: weights are restored later

    def write_json(self, name, content):
        atomic_write(self.out / name, json.dumps(content, indent=1))

    def write_report(self):
        report = self.trainer.pairs.report()
        if self.trainer.held_out:
            report["validate"] = self.trainer.held_out.report()
        self.write_json("data.json", report)

    def read_prompts(self):
        """Eight prompts for the grids: of --sample_prompts, else captions of the data."""
        pairs = self.trainer.pairs
        if self.args.sample_prompts:
            prompts = find_prompts(self.args.sample_prompts)
        else:
            prompts = [pairs.caption(row) for row in pairs.rows[:100]]
        different = list(dict.fromkeys(filter(None, prompts)))
        return different[:8] or [""]

    def draw(self):
        """Pictures [N, 3, H, W] in [0, 1] of the prompts, from the same noise at every call; small ones grow."""
        args, model, images = self.args, self.trainer.model, []
        size = {"height": args.resolution, "width": args.resolution}
        count = len(self.embeds["prompt_embeds"])
        for k in range(0, count, 4):  # at most four at once, for memory
            embeds = {name: value[k:k + 4] for name, value in self.embeds.items()}
            noise = [common.keyed_generator(args.seed, "sample", i) for i in range(k, min(k + 4, count))]
            with torch.compiler.set_stance("force_eager"):  # no graphs for sizes that no step has
                latents = model.sample(None, noise, args.sample_steps, args.guidance,
                                       self.trainer.dtype, **embeds, **size)
            images.append(model.decode(latents))
        enlarged = max(1, 128 // args.resolution)
        return F.interpolate(torch.cat(images), scale_factor=enlarged)

    @contextlib.contextmanager
    def averaged_weights(self):
        """The average in the place of the first process's weights, where there is one."""
        params = self.trainer.params.values()
        if self.ema:
            self.ema.store(params)
            self.ema.copy_to(params)
        yield
        if self.ema:
            self.ema.restore(params)

    def measure(self):
        """What `Validation.measure` gives: of the average where there is one, which the first process lends to all."""
        params = self.trainer.params.values()
        if not self.args.ema:
            return self.validation.measure()
        with self.averaged_weights():
            for param in params:
                common.broadcast(param)
            measured = self.validation.measure()
        for param in params:  # the weights, which were the same everywhere
            common.broadcast(param)
        return measured

    def skips(self, step, grad_norm):
        """Whether --skip_above leaves this step out, by the norms of the last 100 steps, once there are 20."""
        if not self.args.skip_above or not math.isfinite(grad_norm):  # what overflows fp16 is its scaler's
            return False
        norms = self.grad_norms
        self.grad_norms = [*norms, grad_norm][-100:]
        if len(norms) < 20 or grad_norm <= self.args.skip_above * statistics.median(norms):
            return False
        self.skipped += 1
        if self.is_writer:
            self.checkpoints.wait()
            self.kept = self.kept or common.newest_checkpoint(self.out)
            times = grad_norm / statistics.median(norms)
            tqdm.write(f"step {step} is skipped: its gradient norm, {grad_norm:.3g}, is {times:.1f} times the median; "
                       f"{self.kept or 'no checkpoint'} is kept")
        return True

    def restore(self, state):
        """Weights, optimizer, scaler and average of a checkpoint, which is then let go: its file is mapped."""
        params = self.trainer.params
        for name, param in params.items():
            param.data.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for param, of_param in self.optimizer.state.items():
            for name, value in of_param.items():
                if torch.is_tensor(value):
                    of_param[name] = copy_in_layout(value, param)
        if self.ema:
            averages = zip(state["ema"]["shadow_params"], params.values())
            copies = [copy_in_layout(value, param) for value, param in averages]
            self.ema.load_state_dict(state["ema"] | {"shadow_params": copies})
        self.skipped, self.grad_norms = state["skipped"], state.get("grad_norms", [])
        if state.get("kept"):
            self.kept = self.out / state["kept"]
        state.clear()

    def begin(self, start):
        """Makes the folder ready for step `start`, from which on time is taken."""
        self.first_step = start
        if self.is_writer:
            self.make_folder_ready(start)
        self.logged_at = time.time()

    def make_folder_ready(self, start):
        """What was half-written or belongs to later steps goes."""
        for part in self.out.glob("*.part"):
            if part.is_file():
                part.unlink()
        self.write_report()
        (self.out / "samples").mkdir(exist_ok=True)
        model = self.out / "model"
        if start < self.args.steps and model.exists():  # of fewer --steps
            earlier = self.out / f"model-{start:06d}"
            shutil.rmtree(earlier, ignore_errors=True)
            model.rename(earlier)
        self.log = common.Log(self.out, start)

    def after_step(self, step, record, progress):
        """Logs; draws, saves and stops when it is time."""
        args, done = self.args, step + 1
        is_last = done == args.steps
        is_stopping, is_saving = record.pop("stop") > 0, record.pop("save") > 0
        now = time.time()
        record["pairs_per_second"] = args.batch_size / (now - self.logged_at)  # with what was saved and drawn since
        self.logged_at = now
        self.checkpoints.check()
        if self.scaler.is_enabled():
            if not math.isfinite(record["grad_norm"]):
                self.skipped += 1
                record["grad_norm"] = None
        if self.scaler.is_enabled() or args.skip_above:
            record["skipped"] = self.skipped
        if self.validation and is_due(done, args.validate_every, is_last):
            self.measured = self.measure()
            record |= self.measured
        if self.is_writer:
            self.log.write(step, record)
            if "validate/margin" in record:
                lines = (self.out / "log.jsonl").read_text().splitlines()
                plot_validation([json.loads(line) for line in lines], self.out / "validation.png")
            if step == self.first_step:
                tqdm.write(crop_summary(torch.cat(self.trainer.first_time_ids)))
            if args.group_size > 1 and "weights/own" in record:
                self.say_what_weights(step, record["weights/own"])
            shown = self.measured | record
            progress.set_postfix({SHOWN[name]: shown[name] for name in SHOWN if name in shown})
            if is_due(done, args.sample_every, is_last and args.sample_every > 0):
                self.save_samples(done)
        if is_due(done, args.save_every, is_last or is_stopping or is_saving):
            self.save_checkpoint(done)
        if is_stopping and not is_last:
            self.checkpoints.wait()
            end_early(f"saved after {done} steps; the same command goes on")

    def say_what_weights(self, step, own_weight):
        """How the first step's groups are weighed; and one line where the first 20 steps are DPO's."""
        self.is_one_hot &= own_weight > 0.999
        if step == 0:
            tqdm.write(f"in the first groups a winner's own loser has {own_weight:.3f} of the weight")
        if step == 19 and self.is_one_hot:
            tqdm.write("over 20 steps it has had more than 0.999: these weights are one-hot, this run is "
                       "Diffusion-DPO; see --tau")

    def save_samples(self, done):
        with self.averaged_weights():
            grid = torch.cat([self.base_samples, self.draw()])
        file = self.out / "samples" / f"{done:06d}.png"
        save_image(grid, file, nrow=len(self.base_samples), padding=0)

    def is_save_due(self):
        """Whether --save_minutes have passed, by the clock of the first process."""
        minutes = self.args.save_minutes
        return self.is_writer and minutes > 0 and time.time() - self.saved_at > 60 * minutes

    def save_checkpoint(self, done):
        trainer, pairs = self.trainer, self.trainer.pairs
        pairs.unreadable = dict(common.all_gather_list([*pairs.unreadable.items()]))
        if self.is_writer:
            self.log.sync()
            self.saved_at = time.time()
            state = {
                "step": done,
                "args": vars(self.args),
                "pairs": len(pairs),
                "digests": trainer.digests,
                "unreadable": pairs.unreadable,
                "records": trainer.stream.records_of(done - 1),
                "weights": trainer.params,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "skipped": self.skipped,
                "grad_norms": self.grad_norms,
                "kept": self.kept and self.kept.name,
                "ema": self.ema.state_dict() if self.ema else None,
            }
            self.checkpoints.save(state, self.kept)

    def save_model(self):
        """model/, aside and then renamed: it is whole or not there."""
        if not self.is_writer:
            return
        part = self.out / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        with self.averaged_weights():
            self.trainer.model.save(part)
        (part / "README.md").write_text(model_card(self.args))
        self.write_report()
        part.rename(self.out / "model")


def is_due(done, every, at_once):
    return bool(at_once or every and done % every == 0)


def copy_in_layout(value, param):
    """A copy of a tensor of a checkpoint; where it has the shape of a parameter, on its device, in its layout."""
    if value.shape != param.shape:
        return value.clone()
    return torch.empty_like(param).copy_(value)


def model_card(args):
    tags = ["preference-optimization", args.loss]
    if args.lora_rank:
        tags.append("lora")
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [{", ".join(tags)}]
---
`{args.model}` aligned with the preference pairs `{args.data}` by {args.loss} (diffusion-rpo):

    {json.dumps(vars(args))}
"""


def end_early(message):
    """Ends all processes with exit code 1, together: torchrun would kill the first, still saving, soon after."""
    if dist.is_initialized():
        dist.barrier()
    sys.exit(f"train.py: {message}" if common.torchrun_env()[0] == 0 else 1)


def main(argv=None):
    with common.one_line_errors("train.py", ADVICE):
        args = train_args(argv)
        if args.dry_run:
            return print0(json.dumps(vars(args), indent=1))
        common.end_with_launcher()
        with common.run_folder(args.out) as out:
            state, arguments = common.load_checkpoint(out)
            check_same_run(args, arguments, out, "digests" in state)
            if args.micro_batch == "auto" and fits(arguments.get("micro_batch"), args):
                args.micro_batch = arguments["micro_batch"]  # as it was found at the start
            steps_taken = state.get("step", 0)
            if steps_taken > args.steps:
                raise InputError(f"{out} has taken {steps_taken} steps already; --steps {args.steps} is less")
            if steps_taken == args.steps and (out / "model").exists():
                return print0(f"{out} holds all {args.steps} steps of this run; to train it again remove the "
                              "folder or give another --out, to go on give more --steps")
            try:
                train(args, out, state)
            finally:
                common.release_signals()


if __name__ == "__main__":
    main()
