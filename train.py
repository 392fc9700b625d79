"""Align a text-to-image diffusion model with preference pairs, by RPO, Diffusion-DPO or SFT.

    python train.py                                             the embedded task: RPO on a laptop, in minutes
    python train.py --loss dpo                                  the same with Diffusion-DPO; or --loss sft
    python train.py --model sd15                                Stable Diffusion 1.5 on Pick-a-Pic v2
    python train.py --model sdxl --data my_pairs --batch_size 64 --lr 6.4e-7 --warmup 50        your own pairs
    python train.py --model sd15 --dry_run                      print the resolved run and stop

Values come from the defaults, then the preset of --model, then the command line. A run writes to --out:
config.json, data.json, log.jsonl (a line per step), samples/*.png and model/, a diffusers pipeline.
"""

import argparse
import functools
import inspect
import json
import math
import os
import sys
import time
from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image
from tqdm import tqdm

import data
import tiny
from loss import LOSSES, denoising_error, frozen_reference

PRESETS = {  # by model, then by model and loss; sd15, sdxl: the launchers of Diffusion-DPO, whose 1e-8 is
    # multiplied by the batch to 2.048e-5 (its paper says 2.048e-8 * 2000 / beta)
    "tiny": dict(steps=120, batch_size=16, lr=2e-5, warmup=10, beta=8000, prompt_dropout=0.1, sample_every=40,
                 sample_steps=20, guidance=3.0),
    "tiny dpo": dict(beta=500),
    "tiny sft": dict(lr=1e-4),
    "sd15": dict(steps=2000, batch_size=2048, lr=2.048e-5, warmup=500, random_flip=True, resolution=512,
                 optimizer="adamw"),
    "sdxl": dict(steps=2000, batch_size=2048, lr=2.048e-5, warmup=500, random_flip=True, resolution=1024,
                 optimizer="adafactor", gradient_checkpointing=True, guidance=5.0),
}


def get_args(argv=None):
    """The resolved arguments. Exits in one line on an unknown option, a value out of range, a batch that does
    not divide."""
    p = argparse.ArgumentParser(
        prog="train.py", usage="python train.py [options]", allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110))
    p.error = lambda message: sys.exit(f"train.py: {message}")
    flag, add = argparse.BooleanOptionalAction, p.add_argument
    add("--model", default="tiny", help="tiny, sd15, sdxl, or a diffusers folder or hub id (SD1.x, SDXL)")
    add("--data", metavar="PAIRS", help="tiny, pickapic, a parquet file, a folder, a hub id [the preset's]")
    add("--out", metavar="DIR", help="a new folder for the run [out/MODEL-LOSS]")
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
    # optimisation
    add("--steps", type=int, default=1000)
    add("--batch_size", type=int, default=32, help="pairs per step")
    add("--micro_batch", type=int, help="pairs per forward; for memory alone [at most 16; 8 over 512 px]")
    add("--optimizer", choices=["adamw", "adafactor", "sgd"], help="[adafactor for SDXL, else adamw]")
    add("--lr", type=float, default=1e-5)
    add("--warmup", type=int, default=0, help="steps of linear warm-up to a constant rate")
    add("--weight_decay", type=float, default=0.01)
    add("--max_grad_norm", type=float, default=1.0)
    add("--seed", type=int, default=0)
    # machine
    add("--device", help="cuda, mps or cpu [the best there is]")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="of the forward pass [bf16 on cuda, else fp32]")
    add("--gradient_checkpointing", action=flag, default=False, help="less memory for a third more time")
    # samples
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

    args.data = args.data or known.get("data") or p.error(f"--model {model} is no preset, so it needs --data")
    args.clip = args.clip or known.get("clip")
    args.out = args.out or f"out/{Path(model).name}-{args.loss}"
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    there = ["mps"] * torch.backends.mps.is_available() + there
    args.device = args.device or there[0]
    kind = args.device.partition(":")[0]
    if args.device not in there and (kind, f"{args.device}:0") != ("cuda", there[0]):
        p.error(f"--device {args.device} is not there; this machine has {', '.join(there)}")
    args.precision = args.precision or ("bf16" if kind == "cuda" else "fp32")
    if args.precision == "fp16" and kind == "cpu":
        p.error("--precision fp16 needs CUDA or MPS; on the CPU take bf16 or fp32")
    args.workers = (8 if kind == "cuda" else 0) if args.workers is None else args.workers

    for name in ("steps", "batch_size", "group_size", "micro_batch", "resolution", "sample_steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            p.error(f"--{name} must be at least 1, not {value}")
    for name in ("beta", "tau", "lr", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            p.error(f"--{name} must be a positive number, not {getattr(args, name)}")
    for name in ("warmup", "workers", "sample_every", "weight_decay", "seed", "guidance", "prompt_dropout"):
        if not 0 <= getattr(args, name) < math.inf or name == "prompt_dropout" and args.prompt_dropout > 1:
            p.error(f"--{name} {getattr(args, name)} is out of range")
    group = args.group_size if needs(args.loss, "weights") else 1
    if args.batch_size % group:
        p.error(f"--batch_size {args.batch_size} is not a multiple of --group_size {group}")
    most = 8 if (args.resolution or 0) > 512 else 16
    fitting = [size for size in range(group, most + 1, group) if args.batch_size % size == 0]
    args.micro_batch = args.micro_batch or max(fitting, default=group)
    if args.batch_size % args.micro_batch or args.micro_batch % group:
        p.error(f"--micro_batch {args.micro_batch} must divide --batch_size {args.batch_size} and be a "
                f"multiple of --group_size {group}")
    return args


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


def sample(args, pipe, prompts, dtype):
    """A row of pictures for the prompts, from the same noise at every call; small ones are enlarged."""
    size = max(1, 128 // args.resolution) * args.resolution
    row = Image.new("RGB", (len(prompts) * size, size))
    for i in range(0, len(prompts), 4):  # at most four at once, for memory
        noise = [data.keyed_generator(args.seed, "sample", k) for k in range(i, min(i + 4, len(prompts)))]
        with torch.autocast(pipe.device.type, dtype, enabled=dtype != torch.float32):
            latents = pipe(prompts[i:i + 4], num_inference_steps=args.sample_steps, height=args.resolution,
                           width=args.resolution, guidance_scale=args.guidance, generator=noise,
                           output_type="latent").images
        with torch.no_grad():  # outside of autocast: SDXL's VAE overflows in fp16
            images = pipe.vae.decode(latents.float() / pipe.vae.config.scaling_factor).sample
        for k, image in enumerate(pipe.image_processor.postprocess(images), i):
            row.paste(image.resize((size, size), Image.NEAREST), (k * size, 0))
    return row


def save_grid(file, top, bottom):
    grid = Image.new("RGB", (top.width, 2 * top.height))
    grid.paste(top, (0, 0))
    grid.paste(bottom, (0, top.height))
    grid.save(file)


def model_card(args, weighted):
    settings = f"{args.steps} steps of {args.batch_size} pairs, {args.optimizer}, learning rate {args.lr:g}"
    settings += f", beta {args.beta:g}" * needs(args.loss, "beta")
    settings += f", groups of {args.group_size}, tau {args.tau:g}, {args.similarity} similarity" * weighted
    base = data.MODELS.get(args.model, {"id": args.model})["id"]
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [preference-optimization, {args.loss}]
---
`{base}` aligned with the preference pairs `{args.data}` by {args.loss} (diffusion-rpo):
{settings}, seed {args.seed}.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("this folder")
"""


def main(argv=None):
    args = get_args(argv)
    if args.dry_run:
        return print(json.dumps(vars(args), indent=1))
    out, device = Path(args.out), torch.device(args.device)
    nearest = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        sys.exit(f"train.py: {out} cannot be made: {nearest} is no folder that can be written to")
    if nearest == out and any(out.iterdir()):
        sys.exit(f"train.py: {out} holds another run; give another --out, or remove it")
    started = time.time()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    for library in (transformers, diffusers):  # diffusers would report every prompt that is cut to 77 tokens
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    # Data and models, the quickest to fail first.
    if args.model != "tiny":  # which is built below, after the data were found good
        data.find_pipeline(args.model)
    pairs = data.PreferencePairs(args.data, args.resolution, args.seed, args.random_crop, args.random_flip,
                                 args.prompt_dropout)
    print("data: {rows} rows, {used} pairs used, {ties} ties dropped, {unlabelled} without a label, {bad} "
          "that cannot be read".format(bad=len(pairs.unreadable), **pairs.report()))
    pipe = data.load_pipeline(args.model).to(device)
    unet, vae = pipe.unet, pipe.vae
    own_size = torch.tensor(unet.config.sample_size).min().item() * pipe.vae_scale_factor
    args.resolution = pairs.resolution = args.resolution or own_size
    args.optimizer = args.optimizer or ("adafactor" if "text_encoder_2" in pipe.components else "adamw")
    if args.resolution % (least := pipe.vae_scale_factor * 2 ** (len(unet.config.block_out_channels) - 1)):
        sys.exit(f"train.py: --resolution {args.resolution} is no multiple of {least}, as this model needs")
    size = sum(parameter.numel() for parameter in unet.parameters())
    args.clip = args.clip or ("tiny" if size < 1e8 else data.H14)  # a toy model takes the toy CLIP
    weighted = needs(args.loss, "weights") and args.group_size > 1
    clip = data.Clip(args.clip, device, dtype) if weighted else None
    pairs.clip_transform = clip.transform if clip and args.similarity != "text" else None
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        sys.exit(f"train.py: {args.model} predicts {scheduler.config.prediction_type}; that is not supported")
    alphas_cumprod = scheduler.alphas_cumprod.to(device)

    # The policy is `unet`, float32 in every precision; eval(): dropout would part it from the reference.
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(name == "unet")
    if device.type != "mps":  # the faster layout for convolutions
        unet.to(memory_format=torch.channels_last)
    sides = 2 if needs(args.loss, "err_l") else 1  # sft: winners alone, and no reference
    reference = frozen_reference(unet, dtype) if sides == 2 else None
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = get_optimizer(args, unet.parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    loss_of_group = LOSSES[args.loss]
    group = args.group_size if needs(args.loss, "weights") else args.micro_batch
    if "position" in inspect.signature(loss_of_group).parameters:
        loss_of_group = functools.partial(loss_of_group, position=args.weight_position)
    batches = iter(torch.utils.data.DataLoader(
        pairs, args.micro_batch, sampler=range(args.steps * args.batch_size), collate_fn=data.collate,
        num_workers=args.workers, pin_memory=device.type == "cuda"))

    embedded = args.model == args.data == "tiny"
    if embedded:
        result = {"judge": tiny.judge_accuracy(), "base": tiny.measure(pipe)}
        print("the judge is right on {style:.1%} (style) and {shape:.1%} (shape) of 1,000 drawings that it "
              "has not seen".format(**result["judge"]))
        prompts = [tiny.caption(scene) for scene in tiny.HELD_OUT[:8]]
    else:
        first = (pairs.rows[int(row)]["caption"] for row in pairs.pairs[:100])
        prompts = list(dict.fromkeys(caption for caption in first if caption))[:8] or [""]
    top = sample(args, pipe, prompts, dtype) if args.sample_every else None

    (out / "samples").mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(vars(args), indent=1))
    (out / "data.json").write_text(json.dumps(pairs.report(), indent=1))
    log = open(out / "log.jsonl", "w")
    try:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(out / "tensorboard")
    except ImportError:
        board = None
    print(f"{args.loss} on {args.model}: {size / 1e6:.1f} M parameters, {args.resolution} px, {args.device}, "
          f"{args.precision}, {args.batch_size} pairs a step, {args.micro_batch} a forward"
          + (f", groups of {group}, clip {args.clip}" if clip else ""))

    for step in (bar := tqdm(range(args.steps), args.loss)):
        began, totals = time.time(), {}
        for first in range(0, args.batch_size, args.micro_batch):
            batch = next(batches)
            pairs.unreadable.update(batch["unreadable"])

            # One timestep and one noise per pair; winners first on the batch axis, then losers.
            pixels = batch["pixels"][:, :sides].transpose(0, 1).flatten(0, 1)       # [sides B, 3, H, W]
            shape = vae.config.latent_channels, *(n // pipe.vae_scale_factor for n in pixels.shape[2:])
            positions = range(first, first + args.micro_batch)
            t, noise, vae_noise = draw(args, step, positions, shape, len(alphas_cumprod))
            vae_noise = vae_noise[:, :sides].transpose(0, 1).flatten(0, 1)          # [sides B, C, h, w]
            latents = data.encode_images(vae, pixels, vae_noise if args.vae_sample == "sample" else None)
            conditioning = data.encode_prompts(pipe, batch["prompt"], batch["time_ids"][:, :sides], dtype)
            inputs = (latents, noise.repeat(sides, 1, 1, 1).to(device), t.repeat(sides).to(device),
                      conditioning, alphas_cumprod, scheduler.config.prediction_type, dtype)

            # Policy and reference through the same function on the same batch.
            errors = [*denoising_error(unet, *inputs).chunk(sides)]                 # err_w [B], err_l [B]
            with torch.no_grad():
                errors += denoising_error(reference, *inputs).chunk(2) if reference else []
            embeddings = clip.embed(batch["caption"], batch.get("clip_pixels")) if clip else None

            # The loss over each group; the mean over all groups of the global batch.
            loss = 0
            for i in range(0, args.micro_batch, group):
                weights = torch.ones(1, 1, device=device)                           # [group, group]
                if clip:
                    some = (e if e is None else e[i:i + group] for e in embeddings)
                    weights = data.cross_pair_weights(*some, args.tau, args.similarity)
                some = (err[i:i + group] for err in errors)
                group_loss, metrics = loss_of_group(*some, beta=args.beta, weights=weights)
                loss = loss + group_loss * group / args.batch_size
                for name, value in {"loss": group_loss.detach(), **metrics}.items():
                    totals[name] = totals.get(name, 0) + value * group / args.batch_size
            scaler.scale(loss).backward()

        scaler.unscale_(optimizer)
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
        values = torch.stack([*totals.values()]).tolist()                           # sync point
        record = {"step": step} | dict(zip(totals, values))
        loss, norm = record["loss"], record["grad_norm"]
        skipped = scaler.is_enabled() and not math.isfinite(norm)  # fp16: the scaler lowers its scale instead
        if not math.isfinite(loss) or not math.isfinite(norm) and (not skipped or scaler.get_scale() < 1):
            sys.exit(f"train.py: step {step}: loss {loss}, grad_norm {norm}; the last rows were "
                     f"{batch['row']}. No model was saved; try a smaller --lr or --precision fp32")
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        record |= {"grad_norm": None if skipped else norm, "lr": lr,
                   "pairs_per_second": args.batch_size / (time.time() - began)}
        print(json.dumps(record), file=log, flush=True)
        bar.set_postfix({name.split("/")[-1]: f"{record[name]:.3f}" for name in (
            "loss", "reward/margin", "reward/accuracy") if name in record})
        for name in record if board else ():
            board.add_scalar(name, record[name] or 0, step)
        if top and ((step + 1) % args.sample_every == 0 or step + 1 == args.steps):
            save_grid(out / "samples" / f"{step + 1:06d}.png", top, sample(args, pipe, prompts, dtype))

    (out / "data.json").write_text(json.dumps(pairs.report(), indent=1))
    pipe.save_pretrained(out / "model.part")  # aside, then renamed: model/ is whole or not there
    (out / "model.part" / "README.md").write_text(model_card(args, weighted))
    (out / "model.part").rename(out / "model")
    if embedded:
        result |= {"final": tiny.measure(pipe), "seconds": time.time() - started}
        (out / "result.json").write_text(json.dumps(result, indent=1))
        for name in ("base", "final"):
            print(name, "{style:.0%} sketches, {shape:.0%} of the right shape".format(**result[name]))
    print(f"{time.time() - started:.0f} s; {out}/model is a diffusers pipeline, {out}/samples shows it")


if __name__ == "__main__":
    main()
