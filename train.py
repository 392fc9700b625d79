"""Align a text-to-image diffusion model with preference pairs, by RPO, Diffusion-DPO or SFT.

    python train.py                                             the embedded task: RPO on a laptop, in minutes
    python train.py --loss dpo                                  the same with Diffusion-DPO; or --loss sft
    python train.py --model sd15                                Stable Diffusion 1.5 on Pick-a-Pic v2
    torchrun --nproc_per_node=8 train.py --model sdxl           SDXL on eight GPUs
    python train.py --model sdxl --data my_pairs --batch_size 64 --lr 6.4e-7 --warmup 50        your own pairs
    python train.py --model sdxl --data CACHE --lora_rank 16    an adapter, on pairs that data.py has encoded
    python train.py --model sd15 --dry_run                      print the resolved run and stop

Values come from the defaults, then the preset of --model, then the command line. A run writes to --out:
config.json, data.json, log.jsonl (a line per step), samples/*.png, checkpoint-STEP.pt and model/, a diffusers
pipeline or LoRA weights. It is a function of its arguments: processes and --micro_batch change rounding,
nothing else. Killed or stopped, the same command goes on from the last checkpoint, to the same weights (the
same bits in fp32 on a CPU).
"""

import resume  # first, to know the launcher

import argparse
import contextlib
import functools
import inspect
import json
import math
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import diffusers
import filelock
import peft
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torchvision.utils import save_image
from tqdm import tqdm

import architectures
import cache
import data
import tiny
from loss import LOSSES, adapter_off, cast_for_autocast, denoising_error, frozen_reference

PRESETS = {  # by model, then by model and loss; sd15, sdxl: the launchers of Diffusion-DPO, whose 1e-8 is
    # multiplied by the batch to 2.048e-5 (its paper says 2.048e-8 * 2000 / beta)
    "tiny": dict(steps=120, batch_size=16, lr=2e-5, warmup=10, beta=8000, prompt_dropout=0.1, sample_every=40,
                 sample_steps=20, guidance=3.0, save_every=40, resolution=32),
    "tiny dpo": dict(beta=500),
    "tiny sft": dict(lr=1e-4),
    "sd15": dict(steps=2000, batch_size=2048, lr=2.048e-5, warmup=500, random_flip=True, resolution=512,
                 optimizer="adamw", save_every=50),
    "sdxl": dict(steps=2000, batch_size=2048, lr=2.048e-5, warmup=500, random_flip=True, resolution=1024,
                 optimizer="adafactor", gradient_checkpointing=True, guidance=5.0, save_every=20),
}


def get_args(argv=None):
    """The resolved arguments. Exits in one line on an unknown option, a value out of range, a batch that does
    not divide."""
    p = argparse.ArgumentParser(
        prog="train.py", usage="python train.py [options]", allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110))
    _, local_rank, world = data.torchrun()
    p.error = lambda message: sys.exit(f"train.py: {message}" if local_rank == 0 else 1)
    flag, add = argparse.BooleanOptionalAction, p.add_argument
    add("--model", default="tiny", help="tiny, sd15, sdxl, or a diffusers folder or hub id (SD1.x, SDXL)")
    add("--random_init", action="store_true", help="sd15, sdxl: random weights, nothing is downloaded")
    add("--data", metavar="PAIRS", help="tiny, pickapic, a parquet file, a folder, a hub id [the preset's]; "
        "or what data.py has encoded")
    add("--out", metavar="DIR", help="the run's folder; started again, it goes on [out/MODEL-LOSS]")
    # the method
    add("--loss", default="rpo", choices=LOSSES)
    add("--beta", type=float, default=5000, help="strength of the pull to the reference")
    add("--group_size", type=int, default=8, help="rpo: pairs contrasted with each other")
    add("--tau", type=float, default=0.5, help="rpo: temperature of the cross-pair weights")
    add("--similarity", default="both", choices=["text", "image", "both"], help="rpo: what weights compare")
    add("--weight_position", default="inside", choices=["inside", "outside"], help="rpo: of the log-sigmoid")
    add("--group_noise", default="own", choices=["own", "timestep", "both"], help="what a group shares")
    add("--clip", metavar="ARCH:WEIGHTS", help="rpo: of open_clip, a tag or a file; or tiny [the preset's]")
    # data
    add("--resolution", type=int, help="side of the training images, pixels [the model's own]")
    add("--random_flip", action=flag, default=False, help="mirror half of the pairs")
    add("--random_crop", action=flag, default=False, help="crop a pair anywhere instead of in the middle")
    add("--prompt_dropout", type=float, default=0.2, help="share of pairs trained without their prompt")
    add("--vae_sample", default="sample", choices=["mean", "sample"], help="what the VAE's posterior gives")
    add("--workers", type=int, help="processes that decode images [8 beside a GPU, else 0]")
    add("--data_timeout", type=int, default=600, help="seconds without a batch that end the run")
    # optimisation
    add("--steps", type=int, default=1000)
    add("--batch_size", type=int, default=32, help="pairs per step")
    add("--micro_batch", type=int, help="pairs per forward; for memory alone [8; 16 up to 512 px]")
    add("--optimizer", choices=["adamw", "adafactor", "sgd"], help="[adafactor for SDXL, else adamw]")
    add("--lr", type=float, default=1e-5)
    add("--warmup", type=int, default=0, help="steps of linear warm-up to a constant rate")
    add("--weight_decay", type=float, default=0.01)
    add("--max_grad_norm", type=float, default=1.0)
    add("--lora_rank", type=int, default=0, help="of an adapter of the attention; 0 = train the whole UNet")
    add("--seed", type=int, default=0)
    # machine
    add("--device", help="cuda, mps or cpu [the best there is]")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="of the forward pass [bf16 on cuda, else fp32]")
    add("--gradient_checkpointing", action=flag, default=False, help="less memory for a third more time")
    add("--compile", action=flag, default=False, help="torch.compile the UNet: minutes at first, then faster")
    add("--reference_errors", metavar="FILE", help="compute the reference's errors before the first step, "
        "for all runs that differ in loss, beta, tau, lr alone; no second UNet in memory")
    # what it leaves
    add("--save_every", type=int, default=100, help="steps between checkpoints; 0 = one, at the end")
    add("--sample_every", type=int, default=100, help="steps between grids of samples; 0 = never")
    add("--sample_steps", type=int, default=30, help="denoising steps of a sample")
    add("--guidance", type=float, default=7.5, help="classifier-free guidance of a sample")
    add("--dry_run", action="store_true", help="print the resolved run and stop")

    chosen = p.parse_known_args(argv)[0]
    model, known = chosen.model, data.MODELS.get(chosen.model, {})
    preset = PRESETS.get(model, {}) | PRESETS.get(f"{model} {chosen.loss}", {})
    assert preset.keys() <= {action.dest for action in p._actions}
    p.set_defaults(**preset)
    args = p.parse_args(argv)
    given = p.parse_args(argv, argparse.Namespace(**{action.dest: None for action in p._actions}))

    args.data = args.data or known.get("data") or p.error(f"--model {model} is no preset, so it needs --data")
    args.clip = args.clip or known.get("clip")
    if args.random_init:
        if model not in architectures.CONFIGS:
            p.error(f"--random_init knows {', '.join(architectures.CONFIGS)}, not {model}")
        args.clip = given.clip or args.clip.partition(":")[0] + ":random"
    for name, built in cache.settings(args.data, p.error).items():
        if getattr(given, name) not in (None, built):
            p.error(f"--{name} {getattr(given, name)}: {args.data} was encoded with {built}; leave the "
                    "option out, or encode the pairs once more, by data.py")
        setattr(args, name, built)
    args.out = args.out or f"out/{Path(model).name}-{args.loss}"
    args.device = data.find_device(args.device, p.error)
    kind = args.device.partition(":")[0]
    args.precision = args.precision or ("bf16" if kind == "cuda" else "fp32")
    if args.precision == "fp16" and kind == "cpu":
        p.error("--precision fp16 needs CUDA or MPS; on the CPU take bf16 or fp32")
    args.workers = (8 if kind == "cuda" else 0) if args.workers is None else args.workers

    for name in ("steps", "batch_size", "group_size", "micro_batch", "resolution", "sample_steps",
                 "data_timeout"):
        if (value := getattr(args, name)) is not None and value < 1:
            p.error(f"--{name} must be at least 1, not {value}")
    for name in ("beta", "tau", "lr", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            p.error(f"--{name} must be a positive number, not {getattr(args, name)}")
    for name in ("warmup", "workers", "sample_every", "save_every", "weight_decay", "seed", "guidance",
                 "prompt_dropout", "lora_rank"):
        if not 0 <= getattr(args, name) < math.inf or name == "prompt_dropout" and args.prompt_dropout > 1:
            p.error(f"--{name} {getattr(args, name)} is out of range")
    if args.reference_errors and not needs(args.loss, "err_l"):
        p.error(f"--reference_errors: {args.loss} has no reference")
    group = args.group_size if needs(args.loss, "weights") else 1
    if args.batch_size % group:
        p.error(f"--batch_size {args.batch_size} is not a multiple of --group_size {group}")
    share, rest = divmod(args.batch_size, world)  # pairs per step and process
    if rest or args.micro_batch and share % args.micro_batch:
        p.error(f"--batch_size {args.batch_size} is not a multiple of {world} processes * --micro_batch "
                f"{args.micro_batch or 1}")
    sizes = [n for n in range(1, 17 if (args.resolution or 1024) <= 512 else 9) if share % n == 0]
    args.micro_batch = args.micro_batch or max(sizes, key=lambda n: (n * world % group == 0, n))
    return args


def say(words):
    """One of all processes prints."""
    if data.torchrun()[0] == 0:
        print(words)


def needs(loss, name):
    """Whether a loss must be given `name`: it has no default in the loss's signature."""
    return inspect.signature(LOSSES[loss]).parameters[name].default is inspect.Parameter.empty


def get_optimizer(args, parameters):
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, args.lr, weight_decay=args.weight_decay)
    return transformers.Adafactor(parameters, args.lr, weight_decay=args.weight_decay, scale_parameter=False,
                                  relative_step=False)  # torch's cannot be told to take lr as it is


def set_up(args, pipe, device, dtype, encoders=True):
    """Freezes and moves the networks of `pipe`; gives the parameters that train, by name, always float32.

    They are the UNet's, or those of an adapter in it. With an adapter, which alone is saved, all that is
    frozen is held as autocast would cast it. eval(): dropout would part the policy from its reference.

    encoders  whether the VAE and the text encoders are needed on `device`
    """
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(name == "unet" and not args.lora_rank)
            if args.lora_rank and name in ("text_encoder", "text_encoder_2"):
                cast_for_autocast(module, dtype)
    if args.lora_rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            pipe.unet.add_adapter(peft.LoraConfig(
                r=args.lora_rank, lora_alpha=args.lora_rank, init_lora_weights="gaussian",
                target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        cast_for_autocast(pipe.unet, dtype)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and (name == "unet" or encoders):
            module.to(device)
    if device.type == "cuda" or device.type == "cpu" and not args.lora_rank:
        pipe.unet.to(memory_format=torch.channels_last)  # the faster layout; on a CPU not for frozen weights
    return {name: parameter for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}


def draw(args, step, positions, shape, num_timesteps):
    """The random numbers of the pairs at `positions` of the global batch, from (seed, step, position) alone.

    Drawn on the CPU, so that every device sees the same. B is len(positions); the VAE's are its posterior's.

    returns  timesteps [B] int64, noise [B, *shape], VAE noise [B, 2, *shape]
    """
    def generator(name, position, shared=False):  # what a group shares is drawn as for its first pair
        position -= position % args.group_size if shared else 0
        return data.keyed_generator(args.seed, name, step, position)

    one_t, one_noise = args.group_noise != "own", args.group_noise == "both"
    t = [torch.randint(num_timesteps, (), generator=generator("timestep", i, one_t)) for i in positions]
    noise = [torch.randn(shape, generator=generator("noise", i, one_noise)) for i in positions]
    vae_noise = [torch.randn((2, *shape), generator=generator("vae", i)) for i in positions]
    return torch.stack(t), torch.stack(noise), torch.stack(vae_noise)


def draw_item(args, shape, num_timesteps, place):
    """The same for item `place` of the endless stream of pairs, drawn where its images are read."""
    step, position = divmod(place, args.batch_size)
    t, noise, vae_noise = draw(args, step, [position], shape, num_timesteps)
    return {"timestep": t[0], "noise": noise[0], "vae_noise": vae_noise[0]}


def sample(args, pipe, prompts, dtype):
    """Pictures [N, 3, H, W] in [0, 1] of N prompts, from the same noise at every call; small ones grow."""
    images = []
    for i in range(0, len(prompts), 4):  # at most four at once, for memory
        noise = [data.keyed_generator(args.seed, "sample", k) for k in range(i, min(i + 4, len(prompts)))]
        latents = data.sample(pipe, prompts[i:i + 4], noise, args.sample_steps, args.guidance, dtype,
                              height=args.resolution, width=args.resolution)
        images.append(data.decode_images(pipe.vae, latents))
    return F.interpolate(torch.cat(images), scale_factor=max(1, 128 // args.resolution))


def model_card(args):
    base = data.MODELS.get(args.model, {"id": args.model})["id"]
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [preference-optimization, {args.loss}{", lora" * bool(args.lora_rank)}]
---
`{base}` aligned with the preference pairs `{args.data}` by {args.loss} (diffusion-rpo):

    {json.dumps(vars(args))}
"""


def gather(values):
    """[n, ...] of every process -> [world n, ...], in the order of their ranks."""
    everyone = values.new_empty(dist.get_world_size() * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(everyone, values.contiguous())
    return everyone


def together(some, world):
    """The lists of all processes as one list, in the order of their ranks; of plain objects."""
    lists = [some]
    if world > 1:
        dist.all_gather_object(lists := [None] * world, some)
    return sum(lists, [])


def blame(seen, world):
    """What went bad in a step: the first term that is not finite, and the rows of the pairs where it is not.

    seen  of every micro-batch its rows, B numbers, and its terms in the order of their computation, each [B]
    """
    bad = together([(k, name, row) for rows, terms in seen for k, (name, values) in enumerate(terms.items())
                    for row, finite in zip(rows, values.isfinite().tolist()) if not finite], world)
    if not bad:
        return "the loss or its gradient, at finite errors"
    first = min(bad)[:2]
    rows = [str(row) for *term, row in bad if tuple(term) == first]
    return f"{first[1]} of rows {', '.join(rows[:32])}{' ...' * (len(rows) > 32)}"


def train(args, state):
    """The run of the resolved `args`, from `state` on."""
    started, out = time.time(), Path(args.out)
    rank, _, world = data.torchrun()
    device = data.own_device(args.device)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Patient: others wait while the first one samples and saves. A process that ends is noticed anyway.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30),
                                device_id=device if device.type == "cuda" else None)
    dtype = data.DTYPES[args.precision]
    data.quiet()

    # Data and models, the quickest to fail first.
    watched = functools.partial(resume.within, args.data_timeout)
    if args.model != "tiny" and not args.random_init:  # tiny is built below, after the data were found good
        data.find_pipeline(args.model)
    if cached := cache.is_cache(args.data):
        pairs = cache.CachedPairs(args.data, args.seed, args.prompt_dropout)
    else:
        pairs = data.PreferencePairs(
            args.data, args.resolution, args.seed, args.random_crop, args.random_flip, args.prompt_dropout,
            scan=watched if rank == 0 and not state else None)
    pairs.unreadable.update(state.get("unreadable", []))
    say("data: {rows} rows, {used} pairs used, {ties} ties dropped, {unlabelled} without a label, {bad} "
        "that cannot be read".format(bad=len(pairs.unreadable), **pairs.report()))
    if state and state["pairs"] != len(pairs):
        sys.exit(f"train.py: {out} was begun with {state['pairs']} pairs; {args.data} now holds {len(pairs)}")
    pipe = architectures.load(args)
    unet, vae = pipe.unet, pipe.vae
    own = cache.encoders(pipe) if cached or args.reference_errors else None  # seconds, at full size
    if cached:
        cache.check(args.data, own, args.model)
    args.resolution = pairs.resolution = data.side(pipe, args.resolution)
    args.optimizer = args.optimizer or ("adafactor" if "text_encoder_2" in pipe.components else "adamw")
    size = sum(parameter.numel() for parameter in unet.parameters())
    args.clip = args.clip or ("tiny" if data.is_toy(pipe) else data.H14)
    weighted = needs(args.loss, "weights") and args.group_size > 1
    clip = data.Clip(args.clip, device, dtype) if weighted and not cached else None
    pairs.clip_transform = clip.transform if clip and args.similarity != "text" else None
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        sys.exit(f"train.py: {args.model} predicts {scheduler.config.prediction_type}; that is not supported")
    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    shape = vae.config.latent_channels, *[args.resolution // pipe.vae_scale_factor] * 2
    pairs.draw = functools.partial(draw_item, args, shape, len(alphas_cumprod))
    sides = 2 if needs(args.loss, "err_l") else 1  # sft: winners alone, and no reference
    if args.reference_errors:
        known = cache.ReferenceErrors(args, pairs, pipe, own)

    moving = set_up(args, pipe, device, dtype, encoders=not cached or args.sample_every > 0)
    policy = torch.compile(unet) if args.compile else unet  # no trace of it is left in `unet`, which is saved
    reference, off = None, contextlib.nullcontext
    if sides == 2 and args.lora_rank:
        reference, off = policy, functools.partial(adapter_off, unet)
    elif sides == 2 and args.reference_errors:
        reference = policy  # until it moves
    elif sides == 2:
        reference = frozen_reference(unet, dtype)
        reference = torch.compile(reference) if args.compile else reference
    embedded, top = args.model == args.data == "tiny", None
    if embedded:
        prompts = [tiny.caption(scene) for scene in tiny.HELD_OUT[:8]]
    else:
        first = (pairs.caption(row) for row in pairs.pairs[:100])
        prompts = list(dict.fromkeys(caption for caption in first if caption))[:8] or [""]
    if rank == 0 and embedded:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            result = {"judge": tiny.judge_accuracy(), "base": tiny.measure(pipe)}
        print("the judge is right on {style:.1%} (style) and {shape:.1%} (shape) of 1,000 drawings that it "
              "has not seen".format(**result["judge"]))
    if rank == 0 and args.sample_every:
        top = sample(args, pipe, prompts, dtype)

    # A window of the global batch is `span` pairs of each process, side by side: as few micro-batches of each
    # as make whole groups together.
    loss_of_group = LOSSES[args.loss]
    if "position" in inspect.signature(loss_of_group).parameters:
        loss_of_group = functools.partial(loss_of_group, position=args.weight_position)
    group = args.group_size if needs(args.loss, "weights") else args.micro_batch
    span = args.micro_batch * group // math.gcd(group, args.micro_batch * world)
    assert args.batch_size % (span * world) == 0
    windows = range(0, args.batch_size, span * world)
    one_pass, shared = span == args.micro_batch, world > 1 and args.micro_batch % group > 0

    def micro_batches(window):  # the first pairs of this process's
        return range(window + rank * span, window + (rank + 1) * span, args.micro_batch)

    def load(steps):
        """This process's micro-batches of some steps, ready for `prepare`."""
        return watched(iter(torch.utils.data.DataLoader(
            pairs, collate_fn=data.collate, num_workers=args.workers, worker_init_fn=resume.ignore_signals,
            pin_memory=device.type == "cuda", batch_sampler=(
                range(step * args.batch_size + first, step * args.batch_size + first + args.micro_batch)
                for step in steps for window in windows for first in micro_batches(window)))))

    def prepare(batch):
        """A micro-batch -> what `denoising_error` takes beside the network, CLIP's embeddings [B, 3, E]."""
        pairs.unreadable.update(batch["unreadable"])
        if not cached:
            batch |= data.encode(pipe, clip, batch | {"pixels": batch["pixels"][:, :sides]}, dtype)
        names = "mean std states pooled timestep noise vae_noise time_ids embeddings".split()
        mean, std, states, pooled, timesteps, noise, vae_noise, time_ids, embeddings = (
            batch[name].to(device, non_blocking=True) if name in batch else None for name in names)
        latents = mean.float()                                                      # [B, 2, C, h, w]
        if args.vae_sample == "sample":
            latents = latents + std.float() * vae_noise[:, :latents.shape[1]]
        # One timestep and one noise per pair; winners first on the batch axis, then losers.
        latents = latents[:, :sides].transpose(0, 1).flatten(0, 1) * vae.config.scaling_factor
        conditioning = data.condition(states.float(), None if pooled is None else pooled.float(),
                                      time_ids[:, :sides])
        if not weighted:
            embeddings = latents.new_zeros(args.micro_batch, 3, 0)
        return (latents, noise.repeat(sides, 1, 1, 1), timesteps.repeat(sides), conditioning, alphas_cumprod,
                scheduler.config.prediction_type, dtype), embeddings

    @torch.no_grad()
    def reference_error(inputs):                                                    # [B, 2]
        with off():
            return torch.stack(denoising_error(reference, *inputs).chunk(2), 1)

    # The reference's errors of all steps, by the starting model itself. Then nothing else needs a reference.
    start, skipped = state.get("step", 0), state.get("skipped", 0)
    missing = known.missing(range(start, args.steps)) if args.reference_errors else []
    if len(set(together([(start, len(missing))], world))) > 1:
        sys.exit(f"train.py: the processes see different files in {out}; it must lie on shared storage")
    stop = resume.catch_signals()
    if rank == 0:
        resume.write(out / "config.json", json.dumps(vars(args), indent=1))
    if args.reference_errors:
        batches = load(missing) if missing else None
        for step in tqdm(missing, "reference", disable=rank > 0):
            errors = [torch.cat([reference_error(prepare(next(batches))[0]) for _ in micro_batches(window)])
                      for window in windows]
            known.put(step, torch.cat([gather(some) if world > 1 else some for some in errors]), rank)
            if any(together(stop, world)):
                known.done(device, rank)
                sys.exit("train.py: saved the reference's errors so far; the same command goes on"
                         if rank == 0 else 1)
        known, reference = known.done(device, rank), None

    # What moves, from the last checkpoint on; the reference and the samples above are the starting model's.
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = get_optimizer(args, moving.values())
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if state:
        for name, parameter in moving.items():
            parameter.data.copy_(state["unet"][name])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        for parameter, kept in optimizer.state.items():  # in this device's layout, and no longer in the file
            kept.update({name: torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape
                         else value.clone() for name, value in kept.items() if torch.is_tensor(value)})
        state.clear()
    ddp = policy
    if world > 1:
        ddp = torch.nn.parallel.DistributedDataParallel(policy, gradient_as_bucket_view=True)

    def policy_error(first, inputs):                                                # [sides B]
        if world > 1:  # gradients are averaged over the processes on the last micro-batch of a step alone
            ddp.require_backward_grad_sync = first == micro_batches(windows[-1])[-1]
        return denoising_error(ddp if torch.is_grad_enabled() else policy, *inputs)

    if rank == 0:
        for half in out.glob("checkpoint-*.part"):  # of a save that was killed
            half.unlink()
        resume.write(out / "data.json", json.dumps(pairs.report(), indent=1))
        (out / "samples").mkdir(exist_ok=True)
        if start < args.steps and (out / "model").exists():  # of fewer --steps
            shutil.rmtree(before := out / f"model-{start:06d}", ignore_errors=True)
            (out / "model").rename(before)
        (log := out / "log.jsonl").touch()
        resume.write(log, "".join(log.read_text().splitlines(keepends=True)[:start]))
        log = open(log, "a")
        try:
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(out / "tensorboard", purge_step=start)
        except ImportError:
            board = None
    trained = sum(parameter.numel() for parameter in moving.values())
    say(f"{args.loss} on {args.model}: {trained / 1e6:.1f} of {size / 1e6:.1f} M parameters, "
        f"{args.resolution} px, {args.device}, "
        f"{args.precision}, {args.batch_size} pairs a step, {args.micro_batch} a forward, processes: {world}"
        + f", groups of {group} in {2 - one_pass} pass(es), clip {args.clip}" * weighted
        + f"; going on after {start} steps" * (start > 0))
    batches = load(range(start, args.steps))

    bar = tqdm(range(start, args.steps), args.loss, args.steps, initial=start, disable=rank > 0)
    for step in bar:
        began, values, seen = time.time(), [], []
        for window in windows:
            inputs, errs, errors, embeddings = [], [], [], []
            for first in micro_batches(window):
                batch = next(batches)
                some, embedding = prepare(batch)
                inputs.append(some)
                embeddings.append(embedding)                                        # [B, 3, E]

                # Policy and reference through the same function on the same batch. Where a window takes two
                # passes, the first is for the errors alone.
                ref_err = some[0].new_zeros(args.micro_batch, 0)                    # [B, 0 or 2]
                if args.reference_errors:
                    ref_err = known[step, first:first + args.micro_batch]
                elif reference is not None:
                    ref_err = reference_error(some)
                with torch.set_grad_enabled(one_pass):
                    errs.append(policy_error(first, some))                          # [sides B]
                errors.append(torch.cat([torch.stack(errs[-1].detach().chunk(sides), 1), ref_err], 1))
                seen.append((batch["row"], {                                        # errors: [B, 1 or 4]
                    "the VAE's latents": some[0].unflatten(0, (sides, -1)).sum((0, 2, 3, 4)),
                    "the CLIP embeddings": embedding.sum((1, 2)),
                    "the reference's errors": ref_err.sum(1),
                    "the policy's errors": errors[-1][:, :sides].sum(1)}))          # [B] each

            # The loss over whole groups, and its slope along the errors of this process.
            errors, embeddings = torch.cat(errors), torch.cat(embeddings)       # [span, 1 or 4], [span, 3, E]
            if shared:
                errors, embeddings = gather(errors), gather(embeddings)             # [world span, ...]
            errors.requires_grad_()
            loss, weights = 0, torch.ones(1, 1, device=device)                      # [group, group]
            for i in range(0, len(errors), group):
                if weighted:
                    some = embeddings[i:i + group].unbind(1)
                    weights = data.cross_pair_weights(*some, args.tau, args.similarity)
                some = errors[i:i + group].unbind(1)
                group_loss, metrics = loss_of_group(*some, beta=args.beta, weights=weights)
                loss = loss + group_loss * group / args.batch_size
                values.append(torch.stack([group_loss.detach(), *metrics.values()]))
            slope = torch.autograd.grad(loss, errors)[0].split(span)[rank if shared else 0][:, :sides]

            # Back-propagate the slopes; in two passes, through a second forward on the same inputs.
            for k, part in enumerate(slope.split(args.micro_batch)):                # [B, sides]
                err = errs[k] if one_pass else policy_error(micro_batches(window)[k], inputs[k])
                scaler.scale(err @ part.T.flatten() * world).backward()             # DDP averages, not adds

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(moving.values(), args.max_grad_norm)
        asked = torch.tensor(float(len(stop)), device=device)
        values = torch.stack([*torch.stack(values).mean(0), norm, asked]) / world
        if world > 1:
            dist.all_reduce(values)
        *values, norm, asked = values.tolist()                                      # sync point
        record = {"step": step} | dict(zip(["loss", *metrics], values))
        overflow = scaler.is_enabled() and not math.isfinite(norm)  # fp16: the scaler lowers its scale
        if not math.isfinite(record["loss"] + (0 if overflow and scaler.get_scale() >= 1 else norm)):
            what = blame(seen, world)
            kept = resume.newest(out) or "no checkpoint"
            sys.exit(f"train.py: step {step}: loss {record['loss']}, gradient norm {norm}. Not finite: "
                     f"{what}. Kept: {kept}. In another --out, try a smaller --lr or --precision fp32"
                     if rank == 0 else 1)
        skipped += overflow
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=world == 1)  # under DDP they live in its buckets, and stay there

        done = step + 1 == args.steps
        record |= {"grad_norm": None if overflow else norm, "lr": lr,
                   "pairs_per_second": args.batch_size / (time.time() - began)}
        record |= {"skipped": skipped} if scaler.is_enabled() else {}
        if rank == 0:
            print(json.dumps(record), file=log, flush=True)
            bar.set_postfix({name.split("/")[-1]: f"{record[name]:.3f}" for name in (
                "loss", "reward/margin", "reward/accuracy", "skipped") if name in record})
            for name in record if board else ():
                board.add_scalar(name, record[name] or 0, step)
            if args.sample_every and ((step + 1) % args.sample_every == 0 or done):
                grid = torch.cat([top, sample(args, pipe, prompts, dtype)])
                save_image(grid, out / "samples" / f"{step + 1:06d}.png", nrow=len(top), padding=0)
        if done or asked or args.save_every and (step + 1) % args.save_every == 0:
            pairs.unreadable.update(together([*pairs.unreadable], world))
            if rank == 0:
                os.fsync(log.fileno())
                resume.save(out, {
                    "step": step + 1, "args": vars(args), "pairs": len(pairs), "unet": moving,
                    "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "skipped": skipped,
                    "unreadable": sorted(pairs.unreadable)})
        if asked and not done:
            if world > 1:
                dist.barrier()  # torchrun would kill the first, still saving, soon after another's exit
            sys.exit(f"train.py: saved after {step + 1} steps; the same command goes on" if rank == 0 else 1)

    if rank == 0:
        resume.write(out / "data.json", json.dumps(pairs.report(), indent=1))
        shutil.rmtree(out / "model.part", ignore_errors=True)
        if args.lora_rank:  # aside, then renamed: model/ is whole or not there
            weights = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
            pipe.save_lora_weights(out / "model.part", weights)
        else:
            pipe.save_pretrained(out / "model.part")
        (out / "model.part" / "README.md").write_text(model_card(args))
        if embedded:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                result |= {"final": tiny.measure(pipe), "seconds": time.time() - started}
            resume.write(out / "result.json", json.dumps(result, indent=1))
            for name in ("base", "final"):
                print(name, "{style:.0%} sketches, {shape:.0%} of the right shape".format(**result[name]))
        (out / "model.part").rename(out / "model")
        kind = "holds LoRA weights" if args.lora_rank else "is a diffusers pipeline"
        print(f"{time.time() - started:.0f} s; {out}/model {kind}, {out}/samples shows it")
    if world > 1:
        dist.destroy_process_group()


def main(argv=None):
    args = get_args(argv)
    rank, out = data.torchrun()[0], Path(args.out)
    if args.dry_run:
        return say(json.dumps(vars(args), indent=1))
    nearest = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        sys.exit(f"train.py: {out} cannot be made: {nearest} is no folder that can be written to")
    resume.end_with_launcher()
    lock, new = filelock.FileLock(out / "lock", timeout=2), not out.exists()
    try:
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        state = resume.load(out, args)
        if state and state["step"] == args.steps and (out / "model").exists():
            return say(f"{out} holds all {args.steps} steps of this run; to train it again remove the folder "
                       "or give another --out, to go on give more --steps")
        train(args, state)
    except filelock.Timeout:
        sys.exit(f"train.py: another live run is writing to {out}")
    except Exception as error:
        resume.explain(error, args)
        raise
    finally:
        resume.release()
        if lock.is_locked and not (out / "config.json").exists():  # nothing was written: leave nothing
            (out / "lock").unlink(missing_ok=True)
            if new and not any(out.iterdir()):
                out.rmdir()
        lock.release()


if __name__ == "__main__":
    main()
