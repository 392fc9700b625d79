"""What a training step costs, side by side in one run: ours, and the step as the peers' scripts take it.

    python bench.py                                                            the embedded model, here
    python bench.py --model sd15 --random_init --resolution 64 --lora_rank 16  full size, nothing downloaded
    python bench.py --model sdxl --random_init --data my_pairs                 train.py's options, all rows

Every row is a process of its own, on the same pairs, model, batch, precision and adapter:

    Diffusion-DPO's way   images are decoded and encoded by the VAE in every step, prompts by text encoders;
                          one pair a forward; the reference after the policy; each loss is read as it comes
    diffusers' way        the same with --micro_batch pairs a forward, as train_diffusion_dpo.py takes it
    ours                  train.py by DPO: from the pairs, from a cache, with the reference's errors cached as
                          well; by RPO from the cache: groups that one forward holds, one of the whole batch

Share of peak: the UNet's useful arithmetic (forward and backward of the policy, forward of the reference if
it runs; counted by torch, nothing twice) over what a large matmul reaches here in the same precision.
"""

import concurrent.futures
import contextlib
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import architectures
import cache
import data
import train
from loss import adapter_off, denoising_error, dpo_loss, frozen_reference

STEPS = 30 if torch.cuda.is_available() else 6  # of a row, the first two of which do not count
PAIRS = 64  # of the data, that are used


def memory(device):
    """GiB that this process has held at most: of its GPU, else in all (Linux counts in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(argv):
    """[pairs per second, GiB] of train.py; with --reference_errors also pairs per second of making them."""
    put, made, args = cache.ReferenceErrors.put, [], train.get_args(argv)
    cache.ReferenceErrors.put = lambda *some: (put(*some), made.append(time.time()))[0]
    train.main([*argv, "--steps", str(STEPS), "--sample_every", "0", "--save_every", "0"])
    log = [json.loads(line) for line in (Path(args.out) / "log.jsonl").read_text().splitlines()]
    speed = statistics.median(line["pairs_per_second"] for line in log[2:])
    row = [speed, memory(data.own_device(args.device))]
    if made:
        row.append(args.batch_size / statistics.median(b - a for a, b in zip(made[1:], made[2:])))
    return row


def peers(argv, micro_batch):
    """(pairs per second, GiB) of the peers' step."""
    args = train.get_args(argv)
    device, dtype = data.own_device(args.device), data.DTYPES[args.precision]
    n = args.batch_size // micro_batch
    data.quiet()
    pipe = architectures.load(args)
    pairs = data.PreferencePairs(args.data, data.side(pipe, args.resolution), args.seed, scan=None)
    moving = train.set_up(args, pipe, device, dtype)
    for name in {"vae", "text_encoder", "text_encoder_2"} & pipe.components.keys():
        getattr(pipe, name).to(dtype)  # as they do
    reference = pipe.unet if args.lora_rank else frozen_reference(pipe.unet, dtype)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    optimizer = train.get_optimizer(args, moving.values())
    alphas_cumprod, seconds = pipe.scheduler.alphas_cumprod.to(device), []
    batches = iter(torch.utils.data.DataLoader(
        pairs, collate_fn=data.collate, num_workers=args.workers, pin_memory=device.type == "cuda",
        batch_sampler=(range(k * micro_batch, (k + 1) * micro_batch) for k in range(STEPS * n))))
    for _ in range(STEPS):
        began = time.time()
        for _ in range(n):
            batch = next(batches)
            pixels = batch["pixels"].transpose(0, 1).flatten(0, 1).to(device, dtype)    # [2 B, 3, H, W]
            with torch.no_grad():
                latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
                states, _, *pooled = pipe.encode_prompt(batch["prompt"], device=device, num_images_per_prompt=1,
                                                        do_classifier_free_guidance=False)
            noise = torch.randn_like(latents[:micro_batch]).repeat(2, 1, 1, 1)
            t = torch.randint(len(alphas_cumprod), (micro_batch,), device=device).repeat(2)
            conditioning = data.condition(states, pooled[0] if pooled else None, batch["time_ids"].to(device))
            inputs = latents.float(), noise.float(), t, conditioning, alphas_cumprod, "epsilon", dtype
            err = denoising_error(pipe.unet, *inputs)
            with torch.no_grad(), adapter_off(reference) if args.lora_rank else contextlib.nullcontext():
                ref_err = denoising_error(reference, *inputs)
            loss, _ = dpo_loss(*err.chunk(2), *ref_err.chunk(2), args.beta)
            (loss / n).backward()
            loss.item()
        torch.nn.utils.clip_grad_norm_(moving.values(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.time() - began)
    return args.batch_size / statistics.median(seconds[2:]), memory(device)


def encode(argv):
    """Pairs per second of data.py, with the loading of its models."""
    began = time.time()
    cache.main(argv)
    return cache.read_manifest(argv[argv.index("--out") + 1])["used"] / (time.time() - began)


def arithmetic(argv):
    """(side, FLOPs of a pair: policy's forward and backward, reference's forward; FLOP/s of a matmul)."""
    args = train.get_args(argv)
    device, dtype = data.own_device(args.device), data.DTYPES[args.precision]
    pipe = architectures.load(args)
    pixels = data.side(pipe, args.resolution)
    train.set_up(args, pipe, torch.device("cpu"), torch.float32)
    with torch.device("meta"):  # counts without computing
        unet, side = pipe.unet.to("meta"), pixels // pipe.vae_scale_factor
        second = getattr(pipe, "text_encoder_2", None)
        pooled = torch.empty(1, second.config.projection_dim) if second else None
        states = torch.empty(1, 77, unet.config.cross_attention_dim)
        conditioning = data.condition(states, pooled, torch.empty(1, 2, 6))
        inputs = torch.empty(2, unet.config.in_channels, side, side), torch.ones(2)
        with FlopCounterMode(display=False) as both:
            unet(*inputs, **conditioning).sample.sum().backward()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            unet(*inputs, **conditioning)
    n, best = 8192 if device.type == "cuda" else 2048, 0
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(6):
        began = time.time()
        (a @ a)[0, 0].item()
        best = max(best, 2 * n**3 / (time.time() - began))
    return pixels, both.get_total_flops(), forward.get_total_flops(), best


def alone(function, *args):
    """What a function gives in a new process: its memory is its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def main(argv):
    argv = ["--batch_size", "16", "--micro_batch", "8", "--group_size", "1", "--data", "tiny", *argv]
    args = train.get_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        some, encoded, file = (str(Path(folder) / name) for name in ("pairs.parquet", "cache", "errors"))
        rows = data.read_rows(args.data)
        rows.select(range(min(PAIRS, len(rows)))).to_parquet(some)
        number, names = iter(range(99)), ["model", "clip", "device", "precision", "resolution"]
        own = [word for name in names if (value := getattr(args, name)) for word in (f"--{name}", str(value))]

        def run(*more):
            return alone(ours, [*argv, *more, "--out", str(Path(folder) / str(next(number)))])

        side, both, forward, peak = alone(arithmetic, argv)
        own += ["--random_init"] * args.random_init
        encoding = alone(encode, [*own, "--data", some, "--out", encoded])
        dpo, cached = ["--data", some, "--loss", "dpo"], ["--data", encoded]
        theirs, errors = "diffusers' way", "ours, reference's errors cached, too"
        table = {"Diffusion-DPO's way": alone(peers, [*argv, *dpo], 1),
                 theirs: alone(peers, [*argv, *dpo], args.micro_batch),
                 "ours, from the pairs": run(*dpo),
                 "ours, from the cache": run(*dpo, *cached),
                 errors: run(*dpo, *cached, "--reference_errors", file)}
        for group in sorted({args.micro_batch, args.batch_size}):
            passes = "one pass" if group == args.micro_batch else "two passes"
            table[f"RPO from the cache, groups of {group}, {passes}"] = run(
                *cached, "--loss", "rpo", "--group_size", str(group))
    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    print(f"\n{args.model}, {side} px, {name}, {args.precision}, LoRA rank {args.lora_rank}, "
          f"{args.batch_size} pairs a step, {args.micro_batch} a forward; a matmul reaches "
          f"{peak / 1e12:.2f} TFLOP/s, a pair takes {(both + forward) / 1e12:.4f} TFLOP\n")
    print("| | pairs per second | times diffusers' | GiB at most | share of peak |\n|---|---|---|---|---|")
    for row, (speed, most, *_) in table.items():
        share = speed * (both + forward * (len(table[row]) == 2)) / peak
        print(f"| {row} | {speed:.2f} | {speed / table[theirs][0]:.2f} | {most:.1f} | {share:.0%} |")
    print(f"\nOnce: encoding {encoding:.2f} pairs per second, the reference's errors {table[errors][2]:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
