"""Align a text-to-image diffusion model with preference pairs, by RPO, Diffusion-DPO or SFT.

    python train.py                                             the embedded task: RPO on a laptop, in minutes
    python train.py --model tiny-flow                           the same on a small SD3, a flow-matching model
    python train.py --model sd15                                Stable Diffusion 1.5 on Pick-a-Pic v2
    torchrun --nproc_per_node=8 train.py --model sdxl           SDXL on eight GPUs
    python train.py --model sdxl --data my_pairs --steps 500 --batch_size 64 --lr 6.4e-7 --warmup 50     your own pairs
    python train.py --model sdxl --data CACHE --lora_rank 16    an adapter, on pairs that encode.py has encoded
    python train.py ... --validate 0.02 --out out/second        with held-out pairs: is it learning?

Options and presets are in options.py. Each run has its own --out [out/MODEL-LOSS] with config.json, data.json, log.jsonl
(a line per step), samples/*.png, checkpoint-STEP.pt, model/ (a pipeline or LoRA weights), validation.png (held-out pairs).

A run is a function of its arguments: the number of processes and --micro_batch change float rounding, nothing else. If
it is killed or stopped, the same command resumes from the last checkpoint and ends in the same weights (the same bits
in fp32 on a CPU).
"""

import distributed  # first: it notes the launcher, before the imports that take seconds

import json
import math
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

import reference
import run
from common import DTYPES, one_line_errors, run_folder
from data import COLUMNS, Clip, ImagePairs, Stream, collate, crop_summary, cross_pair_weights
from distributed import print0, to_device
from encode import EncodedPairs
from loading import add_lora, compile_blocks, disabled_adapter, model_digests, place_encoders, release_encoders
from loss import LOSSES, denoising_error, wants
from models import cast_for_autocast, frozen_reference
from options import hyperparameters, needs_groups, train_args

ADVICE = ("The same command resumes with --micro_batch 1, --gradient_checkpointing, --reference_errors FILE (no second "
          "network) or fewer --workers. In another --out, --lora_rank 16, --optimizer adafactor or a smaller "
          "--resolution help")


def train(args, out, state):
    """Runs the resolved `args` in the folder `out`, from the checkpoint `state` on; {} is the start."""
    started = time.time()
    start = state.get("step", 0)
    trainer = Trainer(args, out, state)
    trainer.set_up(out, state)
    params = [*trainer.params.values()]
    optimizer = run.make_optimizer(args, params)
    scaler = torch.amp.GradScaler(trainer.device.type, enabled=args.precision == "fp16")
    output = run.Output(out, args, trainer.model, trainer.params, optimizer, scaler)
    stop = distributed.StopSignal()

    # The policy is still the starting model, which is the reference. So everything that needs the starting model comes
    # before the checkpoint is loaded: the first row of the samples, and the errors that are computed once.
    if trainer.draws_samples:
        output.draw_base_grid(trainer.pairs)
    steps = range(start, args.steps)
    held_out = None
    if trainer.held_out:
        held_out = reference.HeldOut(
            args, out, trainer.held_out, trainer.model.process, trainer.latent_shape, trainer.model_digests)
        held_out.begin(trainer.load, trainer.encode, trainer.policy_error)
        print0(held_out.summary(trainer.pairs))
    output.begin(start, trainer.pairs, trainer.held_out, trainer.seconds_at_peak)
    if trainer.reference_errors:  # last, because it can take hours
        trainer.reference_errors.complete(
            trainer.stream, steps, trainer.load, trainer.prepare, trainer.compute_reference_error, stop)
        trainer.reference = None
    if trainer.is_encoded:
        release_encoders(trainer.model, keeps_vae=trainer.draws_samples)
    output.restore(state)
    batches = trainer.load(trainer.stream, steps)
    progress = tqdm(steps, args.loss, args.steps, initial=start, disable=trainer.rank > 0)

    for step in progress:
        metrics = []
        for chunk in range(args.batch_size // trainer.chunk):
            # The policy's and the reference's errors, by one function on the same batch. Only the last micro-batch
            # keeps its autograd graph. The earlier ones run without a graph now and once more in the second pass.
            micro_batches, errors, inputs = [], [], []
            for k in range(trainer.micro_batches_per_chunk):
                batch = trainer.prepare(next(batches), trainer.images_per_pair)
                with torch.set_grad_enabled(k == trainer.micro_batches_per_chunk - 1):
                    err = trainer.policy_error(batch.inputs)                            # [S*B]
                ref_err = trainer.reference_error(batch) if trainer.wants_reference else None
                micro_batches.append(batch)
                errors.append(err)
                inputs.append(trainer.loss_inputs(batch, err.detach(), ref_err))        # {name: [B, ...]}

            # The loss over whole groups, across micro-batches and ranks, and its gradient with respect to the errors.
            # With a second pass this is gradient caching (arXiv:2101.06983): it gives the gradient of one giant batch
            # in the memory of one micro-batch.
            dloss_derr, group_metrics = trainer.loss_gradient(trainer.gather_chunk(inputs))
            metrics += group_metrics

            # Backpropagate the last micro-batch first: that frees its graph before the others are recomputed. By the
            # chain rule, the gradient of err @ dloss_derr is that of the loss.
            for k in reversed(range(trainer.micro_batches_per_chunk)):
                err = errors.pop()
                if not err.requires_grad:
                    err = trainer.policy_error(micro_batches[k].inputs)
                scaler.scale(err @ dloss_derr[k]).backward()                            # dloss_derr[k]: [S*B]

        # Each rank has backpropagated its own pairs' part of the loss, so the gradient is the sum over the ranks.
        distributed.sum_gradients(params)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)

        # `scalars` goes into the log. Add one of your own after this line: scalars["name"] = a Python number.
        flags = {"stop": stop.requested, "save": output.is_save_due()}
        scalars, flags = distributed.mean_scalars(metrics, grad_norm, flags)    # the CPU's only wait for the GPU
        lr = scalars["lr"] = learning_rate(step, args)
        run.check_finite(output, step, scalars, trainer.loss_inputs_of)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)  # in fp16 it skips a step whose gradient overflowed
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        output.after_step(step, scalars, flags, progress, held_out, trainer.identity)

    next(batches, None)  # ends the loader's processes
    output.checkpoints.wait()
    output.save_model()
    print0(f"{time.time() - started:.0f} s; the result is {out}/model")
    distributed.leave_processes()


class MicroBatch(NamedTuple):
    """B pairs on the device, with S images each: all winners, then all losers if the loss takes them."""

    inputs: dict            # denoising_error's x, eps [S*B, C, h, w], t [S*B] and cond
    values: dict            # {name: [B, ...]}: what a loss may name; for weights clip_embeds [B, 3, E], image_ids [B, 2]
    row: torch.Tensor       # [B] int64 on the CPU
    position: torch.Tensor  # [B] int64 on the CPU, in the stream
    draw_id: torch.Tensor   # [B, 3] float64 on the CPU, see data.Stream


class Trainer:
    """The networks, the loss and the pairs of a run, and the errors that its step is made of.

    policy     the network that trains, the denoiser of the family object `model`
    params     {name: parameter} of what trains, always float32: the policy's, or its adapter's
    reference  the frozen network. With LoRA it is the policy with its adapter off. None if the loss takes no
               reference errors, or if they are known
    chunk      how many pairs `loss_gradient` gets at once: the fewest that are whole groups and whole micro-batches
               of all ranks. With groups of 8 and 4 pairs per forward on one rank: 8 pairs, two forwards, two passes
    """

    def __init__(self, args, out, state):
        self.args, self.dtype = args, DTYPES[args.precision]
        self.device = distributed.get_device(args.device)
        self.rank, _, self.world_size = distributed.torchrun_env()
        pairs, held_out, model = run.open_parts(args, out, state, self.device)
        self.pairs, self.held_out, self.model = pairs, held_out, model
        self.process = model.process.to(self.device)
        self.latent_shape = model.latent_shape(args.resolution)
        self.stream = Stream(pairs, model.process, self.latent_shape, args)
        self.is_encoded = isinstance(pairs, EncodedPairs)
        self.draws_samples = self.rank == 0 and args.sample_every > 0
        self.prints_crop = self.rank == 0

        # The trainer computes only what the loss's arguments name.
        self.loss_fn = LOSSES[args.loss]
        self.wants = wants(self.loss_fn).keys()
        self.hyperparameters = hyperparameters(args)
        self.images_per_pair = 2 if {"err_l", "ref_err_l"} & self.wants else 1
        self.wants_reference = bool({"ref_err_w", "ref_err_l"} & self.wants)
        self.wants_weights = "weights" in self.wants
        for_weights = {"clip_embeds", "image_ids"} if self.wants_weights else set()
        self.input_names = {"err_w", "err_l"} | self.wants | for_weights

        # A cache has CLIP's embeddings. Uniform weights and groups of one pair need none.
        self.tau = args.tau if args.group_size > 1 else math.inf
        self.clip = None
        if self.wants_weights and self.tau < math.inf and not self.is_encoded:
            self.clip = Clip(args.clip, self.device, self.dtype)
            if args.similarity != "text":
                pairs.clip_transform = self.clip.transform

        # Hashes that identify the run: a checkpoint and a file of errors belong to one model and one data set.
        self.model_digests = model_digests(model)
        self.digests = self.model_digests | {"data": pairs.digest()}
        self.reference_errors = None
        if args.reference_errors:
            self.reference_errors = reference.ReferenceErrors(args, self.digests)
        if self.clip:
            self.digests = self.digests | {"CLIP": self.clip.digest()}

    def set_up(self, out, state):
        """Compares the run with its checkpoint, places the networks and sets how a step is divided."""
        args, pairs, steps_taken = self.args, self.pairs, state.get("step", 0)
        if state:
            pairs.unreadable |= state["unreadable"]
            run.check_same_content(out, state, self.identity(steps_taken))
        elif self.rank == 0 and not self.is_encoded and len(pairs) <= 10_000:
            pairs.scan()  # so that data.json is complete at once
        if self.reference_errors and steps_taken < args.steps:
            self.reference_errors.check(self.stream, steps_taken)
        distributed.check_alike({"number of steps taken": steps_taken} | self.digests)

        self.place_models()
        params = [*self.params.values()]
        if args.micro_batch == "auto":
            args.micro_batch = distributed.largest_micro_batch(args, self.device, params, self.forward_backward)
        if self.is_encoded and (self.draws_samples or isinstance(self.held_out, ImagePairs)):
            place_encoders(self.model, self.device, self.dtype, args.lora_rank > 0)  # after --micro_batch auto

        # If the forwards of all ranks hold whole groups, a chunk is one forward of each rank, and one pass is enough.
        self.pairs_per_loss = args.group_size if needs_groups(self.loss_fn) else args.micro_batch
        pairs_per_forward = args.micro_batch * self.world_size
        self.chunk = math.lcm(self.pairs_per_loss, pairs_per_forward)
        self.micro_batches_per_chunk = self.chunk // pairs_per_forward
        self.groups_span_ranks = self.world_size > 1 and args.micro_batch % self.pairs_per_loss > 0
        print0(f"data: {pairs.summary()}")
        print0(run.describe(args, self.model, params, self.clip, steps_taken))
        runs_reference = self.wants_reference and not self.reference_errors
        self.seconds_at_peak = run.seconds_at_peak(self.model, self.first_pairs, runs_reference, self.device)

    def identity(self, done):
        """What a checkpoint after `done` steps is known by, see `run.check_same_content`."""
        pairs = self.pairs
        unreadable = distributed.all_gather_list([*pairs.unreadable.items()])
        pairs.unreadable = dict(unreadable)
        return {
            "pairs": len(pairs),
            "digests": self.digests,
            "unreadable": pairs.unreadable,
            "draw_ids": self.stream.draw_ids(done - 1),
            "learning_rates": [learning_rate(step, self.args) for step in range(done)],
        }

    def place_models(self):
        """Puts the networks on the device and decides what trains."""
        args, denoiser = self.args, self.model.denoiser
        self.lora_layers = []
        if args.lora_rank:
            self.lora_layers = add_lora(self.model, args.lora_rank, args.seed)
            cast_for_autocast(denoiser, self.dtype, self.device)
        else:
            denoiser.requires_grad_(True)
        self.params = {name: param for name, param in denoiser.named_parameters() if param.requires_grad}
        denoiser.to(self.device)
        if not self.is_encoded:
            place_encoders(self.model, self.device, self.dtype, args.lora_rank > 0)
        faster_on = ("cuda",) if args.lora_rank else ("cuda", "cpu")
        if self.device.type in faster_on:  # before the reference is copied: another layout would round differently
            denoiser.to(memory_format=torch.channels_last)
        if args.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        self.policy, self.reference = denoiser, None
        if self.wants_reference and (args.lora_rank or args.reference_errors):
            self.reference = self.policy  # adapter off; or its errors are computed before it trains
        elif self.wants_reference:
            self.reference = frozen_reference(denoiser, self.dtype)
        if args.compile:
            for network in {self.policy, self.reference} - {None}:
                compile_blocks(network, self.model.blocks)

    # Batches

    def load(self, stream, steps):
        """This rank's micro-batches of some steps of a stream, as torch's loader gives them."""
        workers = self.args.workers
        loader = torch.utils.data.DataLoader(
            stream,
            batch_sampler=self.micro_batch_ranges(stream.batch_size, steps),
            collate_fn=collate,
            num_workers=workers,
            worker_init_fn=distributed.ignore_signals,
            timeout=self.args.data_timeout if workers else 0,
            pin_memory=self.device.type == "cuda")
        return distributed.guarded(iter(loader), has_workers=workers > 0)

    def micro_batch_ranges(self, batch_size, steps):
        """Yields this rank's ranges of positions; neighbouring ranks take neighbouring micro-batches."""
        micro_batch = self.args.micro_batch
        for step in steps:
            first = step * batch_size + self.rank * micro_batch
            for start in range(first, (step + 1) * batch_size, micro_batch * self.world_size):
                yield range(start, start + micro_batch)

    def prepare(self, batch, images_per_pair):
        """A training batch of the loader -> a MicroBatch with the first images of each pair."""
        self.pairs.unreadable |= dict(batch["unreadable"])
        if self.prints_crop:
            tqdm.write(crop_summary(batch["time_ids"][:, :images_per_pair]))
            self.prints_crop = False
        if self.clip:
            batch["clip_embeds"] = self.clip.embed(batch["caption"], batch.get("clip_pixels"))
        return self.encode(batch, images_per_pair)

    @torch.no_grad()
    def encode(self, batch, images_per_pair):
        """The first images of each pair -> a MicroBatch: encoded and on the device, but not noised yet."""
        if "pixels" in batch:
            pixels = batch.pop("pixels")[:, :images_per_pair]                                    # [B, S, 3, H, W]
            batch["mean"], batch["std"] = self.model.encode_images(pixels)
            batch |= self.model.encode_prompts(batch["prompt"], self.dtype)
        for name in ("mean", "std", "vae_noise", "time_ids"):  # these have an axis of images
            if name in batch:
                batch[name] = batch[name][:, :images_per_pair]                                   # [B, S, ...]
        on_cpu = {name: batch.pop(name) for name in ("row", "position", "draw_id")}
        batch.pop("clip_pixels", None)
        for name, value in batch.items():
            if torch.is_tensor(value) and name != "prompt_embeds_mask":  # its sums are lengths, for which we need not wait
                batch[name] = to_device(value, self.device)

        latents = batch["mean"].float()                                                 # [B, S, C, h, w]
        if self.args.vae_sample == "sample":
            latents = latents + batch["std"].float() * batch["vae_noise"]
        latents = latents.transpose(0, 1).flatten(0, 1)                                 # [S*B, C, h, w]
        t = batch["t"]                                                                  # [B]
        inputs = {
            "x": self.model.scale_latents(latents),
            "eps": batch["noise"].repeat(images_per_pair, 1, 1, 1),
            "t": t.repeat(images_per_pair),
            "cond": self.model.conditioning(batch, batch["time_ids"]),
        }
        values = {"t": t, "snr": self.process.snr(t)}
        for name in ("clip_embeds", "image_ids", *COLUMNS):
            if name in batch:
                values[name] = batch[name]
        return MicroBatch(inputs, values, **on_cpu)

    # Errors and the loss

    def error(self, network, inputs):                                                   # [S*B]
        predict = self.model.predict
        return denoising_error(predict, network, self.process, dtype=self.dtype, **inputs)

    def policy_error(self, inputs):
        return self.error(self.policy, inputs)

    @torch.no_grad()
    def compute_reference_error(self, inputs):
        with disabled_adapter(self.lora_layers):
            return self.error(self.reference, inputs)

    def reference_error(self, batch):
        """The reference's errors [S*B], computed now or read from --reference_errors."""
        if self.reference_errors:
            return self.reference_errors.read(batch, self.images_per_pair, self.device)
        return self.compute_reference_error(batch.inputs)

    def loss_inputs(self, batch, err, ref_err):
        """{name: [B, ...]} of what the loss takes, and of what its weights are made from."""
        values = batch.values | by_side("err", err, self.images_per_pair)
        if ref_err is not None:
            values |= by_side("ref_err", ref_err, self.images_per_pair)
        return {name: value for name, value in values.items() if name in self.input_names}

    def gather_chunk(self, inputs):
        """The loss's inputs of this rank's micro-batches -> those of the chunk, in the order of its positions."""
        chunk = {}
        for name in inputs[0]:
            parts = [of_micro_batch[name] for of_micro_batch in inputs]                 # [[B, ...]]
            chunk[name] = distributed.gather_micro_batches(parts, self.groups_span_ranks)   # [chunk, ...]
        return chunk

    def loss_gradient(self, values):
        """The loss of a chunk's groups, differentiated with respect to the policy's errors of this rank.

        returns  dloss_derr of each micro-batch, [micro-batches, S*B]; [metrics of each group]
        """
        batch_size, micro_batch = self.args.batch_size, self.args.micro_batch
        errors = [values[name].requires_grad_() for name in ("err_w", "err_l") if name in values]
        loss, metrics = 0, []
        for i in range(0, len(errors[0]), self.pairs_per_loss):
            group = {name: value[i:i + self.pairs_per_loss] for name, value in values.items()}
            if self.wants_weights:
                group["weights"] = self.group_weights(group.get("clip_embeds"), group["image_ids"])
            group = {name: group[name] for name in group if name in self.wants}
            group_loss, group_metrics = self.loss_fn(**group, **self.hyperparameters)
            loss = loss + group_loss * self.pairs_per_loss / batch_size
            metrics.append({"loss": group_loss.detach(), **group_metrics})
        gradients = torch.autograd.grad(loss, errors, allow_unused=True, materialize_grads=True)
        dloss_derr = torch.stack(gradients)                                             # [S, chunk]
        if self.groups_span_ranks:
            dloss_derr = dloss_derr.unflatten(1, (-1, self.world_size, micro_batch))
            dloss_derr = dloss_derr[:, :, self.rank]                                    # [S, micro-batches, B]
        else:
            dloss_derr = dloss_derr.unflatten(1, (-1, micro_batch))
        return dloss_derr.transpose(0, 1).flatten(1), metrics

    def group_weights(self, clip_embeds, image_ids):
        """[group, group] out of clip_embeds [group, 3, E], None if tau is inf, and image_ids [group, 2]."""
        embeds = (None, None, None) if clip_embeds is None else clip_embeds.unbind(1)
        return cross_pair_weights(*embeds, self.tau, self.args.similarity, image_ids)

    def forward_backward(self, micro_batch):
        """A forward and a backward of the first pairs, to see whether memory suffices."""
        batch = self.first_pairs(micro_batch)
        err = self.policy_error(batch.inputs)
        if self.wants_reference and not self.reference_errors:
            self.compute_reference_error(batch.inputs)
        err.sum().backward()

    def first_pairs(self, count):
        return self.encode(collate([self.stream[position] for position in range(count)]), self.images_per_pair)

    @torch.no_grad()
    def loss_inputs_of(self, step):
        """For each micro-batch of a step: its rows, and {name: value} of what its loss is computed from.

        A step depends only on its number and the weights, which have not moved, so it can be computed again.
        """
        for loaded in self.load(self.stream, [step]):
            batch = self.prepare(loaded, self.images_per_pair)
            err = self.policy_error(batch.inputs)
            ref_err = self.reference_error(batch) if self.wants_reference else None
            values = self.loss_inputs(batch, err, ref_err)
            yield batch.row, values | {"latents": batch.inputs["x"], "err": err}


def by_side(name, err, images_per_pair):
    """{name_w: [B], name_l: [B]} of errors [S*B]; without the loser if S is 1."""
    sides = ("w", "l")[:images_per_pair]
    return {f"{name}_{side}": part for side, part in zip(sides, err.chunk(len(sides)))}


def learning_rate(step, args):
    """The learning rate of a step: linear warm-up, then constant. Another schedule goes here."""
    if step < args.warmup:
        return args.lr * ((step + 1) / args.warmup)
    return args.lr


def main(argv=None):
    with one_line_errors("train.py", ADVICE):
        args = train_args(argv)
        if args.dry_run:
            return print0(json.dumps(vars(args), indent=1))
        distributed.end_with_launcher()
        with run_folder(args.out) as out:
            state = run.load_checkpoint(out, args.steps)
            if state.get("step") == args.steps and (out / "model").exists():
                return print0(f"{out} holds all {args.steps} steps of this run. To go on, pass more --steps. To train "
                              "again, remove the folder or pass another --out")
            try:
                train(args, out, state)
            finally:
                distributed.release_signals()


if __name__ == "__main__":
    main()
