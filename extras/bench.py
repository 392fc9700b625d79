"""What a training step costs, side by side in one run: ours, and the step as the peers' scripts take it.

    python -m extras.bench                                              the embedded model, here
    python -m extras.bench --model sd15 --random_init --resolution 64 --lora_rank 16    full size, no download
    python -m extras.bench --model sdxl --random_init --data my_pairs   train.py's options, all rows

Every row is a process of its own, on the same pairs, model, batch, precision and adapter:

    Diffusion-DPO's way   images are decoded and encoded by the VAE in every step, prompts by text encoders;
                          one pair a forward; the reference after the policy; each loss is read as it comes
    diffusers' way        the same with --micro_batch pairs a forward, as train_diffusion_dpo.py takes it
    ours                  train.py by DPO: from the pairs, from a cache, with the reference's errors cached as
                          well; by RPO from the cache: groups that one forward holds, one of the whole batch

Share of peak: the denoiser's useful arithmetic (forward and backward of the policy, forward of the reference
if it runs; counted by torch, nothing twice) over what a large matmul reaches here in the same precision.
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
from typing import NamedTuple

import datasets
import torch
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import encode
import train
from loss import denoising_error, dpo_loss
from models import disabled_adapter, load_model
from options import train_args

STEPS = 30 if torch.cuda.is_available() else 6  # of a row, the first two of which do not count
PAIRS = 64  # of the data, that are used
DEFAULTS = ["--batch_size", "16", "--micro_batch", "8", "--group_size", "1", "--data", "tiny"]
ENCODE_OPTIONS = ("model", "config", "init_lora", "clip", "device", "precision", "resolution", "vae_sample",
                  "vae_precision", "seed")
ENCODE_FLAGS = ("random_init", "random_flip", "random_crop")


class Row(NamedTuple):
    pairs_per_second: float
    gib: float                            # at most, of the process
    reference_per_second: float = None    # pairs, while the reference's errors were made


class Arithmetic(NamedTuple):
    resolution: int           # pixels
    policy: int               # FLOPs of a pair: forward and backward of the policy
    reference: int            # FLOPs of a pair: forward of the reference
    matmul_per_second: float  # FLOP/s that a large matmul reaches


def peak_gib(device):
    """GiB that this process has held at most: of its GPU, else in all (Linux counts in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


# Our step


class TimedReferenceErrors(encode.ReferenceErrors):
    """Notes when the errors of each step came."""

    times = []

    def put(self, step, errors, records):
        super().put(step, errors, records)
        self.times.append(time.time())


def ours(argv):
    """The Row of a run of train.py."""
    train.ReferenceErrors = TimedReferenceErrors  # in a process of its own
    train.main([*argv, "--steps", str(STEPS), "--sample_every", "0", "--save_every", "0"])
    args = train_args(argv)
    lines = (Path(args.out) / "log.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["pairs_per_second"] for line in lines[2:]]
    row = Row(statistics.median(speeds), peak_gib(common.get_device(args.device)))
    times = TimedReferenceErrors.times
    if times:
        seconds = [after - before for before, after in zip(times[1:], times[2:])]
        row = row._replace(reference_per_second=args.batch_size / statistics.median(seconds))
    return row


# The peers' step


def peers(argv, micro_batch):
    """The Row of the peers' step, `micro_batch` pairs a forward."""
    args = train_args(argv)
    trainer = train.set_up(args, None, {})
    model, params = trainer.model, trainer.params.values()
    for name in ("vae", *model.text_encoders):
        getattr(model.pipe, name).to(trainer.dtype)  # as they do
    if args.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    optimizer = train.make_optimizer(args, params)
    micro_batches = args.batch_size // micro_batch
    positions = [range(k * micro_batch, (k + 1) * micro_batch) for k in range(STEPS * micro_batches)]
    batches = iter(torch.utils.data.DataLoader(
        trainer.pairs, batch_sampler=positions, collate_fn=data.collate, num_workers=args.workers,
        pin_memory=trainer.device.type == "cuda"))

    seconds = []
    for _ in range(STEPS):
        t0 = time.time()
        for _ in range(micro_batches):
            loss = peers_loss(trainer, next(batches))
            (loss / micro_batches).backward()
            loss.item()
        torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.time() - t0)
    return Row(args.batch_size / statistics.median(seconds[2:]), peak_gib(trainer.device))


def peers_loss(trainer, batch):
    """Diffusion-DPO's loss of a batch of B pairs of images, all of it computed in the step."""
    model, pipe, device, dtype = trainer.model, trainer.model.pipe, trainer.device, trainer.dtype
    pixels = batch["pixels"].transpose(0, 1).flatten(0, 1) / 127.5 - 1                  # [2 B, 3, H, W]
    pixels = pixels.to(device, dtype)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.sample()                          # [2 B, C, h, w]
        encoded = pipe.encode_prompt(batch["prompt"], device=device, num_images_per_prompt=1,
                                     do_classifier_free_guidance=False)
    embeds = {"prompt_embeds": encoded[0]}
    if len(encoded) > 2:  # of SDXL
        embeds["pooled_prompt_embeds"] = encoded[2]
    latents = model.scale_latents(latents).float()
    noise = torch.randn_like(latents[:len(latents) // 2])                               # [B, C, h, w]
    t = torch.randint(len(trainer.process.alphas_cumprod), (len(noise),), device=device)
    inputs = {"x": latents, "eps": noise.repeat(2, 1, 1, 1), "t": t.repeat(2), "dtype": dtype,
              "cond": model.conditioning(embeds, batch["time_ids"].to(device))}

    def error(network):
        return denoising_error(model.predict, network, trainer.process, **inputs)       # [2 B]

    err_w, err_l = error(trainer.policy).chunk(2)
    is_adapter = trainer.args.lora_rank > 0
    without_adapter = disabled_adapter(model.lora_layers) if is_adapter else contextlib.nullcontext()
    with torch.no_grad(), without_adapter:
        ref_err_w, ref_err_l = error(trainer.reference).chunk(2)
    loss, _ = dpo_loss(err_w, err_l, ref_err_w, ref_err_l, trainer.args.beta)
    return loss


# What is done once, and what is counted


def encoding(argv):
    """Pairs per second of encode.py, with the loading of its models."""
    t0 = time.time()
    encode.main(argv)
    manifest = data.read_manifest(argv[argv.index("--out") + 1])
    return manifest["used"] / (time.time() - t0)


def encode_options(args):
    """The words by which encode.py takes what a run's pairs are to be."""
    words = []
    for name in ENCODE_OPTIONS:
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    for name in ENCODE_FLAGS:
        words.append(f"--{name}" if getattr(args, name) else f"--no-{name}")
    return words


def arithmetic(argv):
    """The Arithmetic of a pair, and of this machine."""
    args = train_args(argv)
    model = load_model(args.model, args.random_init, args.config)
    resolution = model.resolution(args.resolution)
    if args.lora_rank:
        model.add_lora(args.lora_rank, args.seed)
    else:
        model.denoiser.requires_grad_(True)
    policy, reference = denoiser_flops(model, resolution)
    matmul_per_second = measure_matmul(common.get_device(args.device), common.DTYPES[args.precision])
    return Arithmetic(resolution, policy, reference, matmul_per_second)


def denoiser_flops(model, resolution):
    """FLOPs of a pair, counted on the meta device, which computes nothing: (forward and backward, forward)."""
    with torch.device("meta"):
        denoiser, pipe = model.denoiser.to("meta"), model.pipe
        length, width = pipe.tokenizer.model_max_length, denoiser.config.cross_attention_dim
        embeds = {"prompt_embeds": torch.empty(1, length, width)}
        if "text_encoder_2" in model.text_encoders:
            embeds["pooled_prompt_embeds"] = torch.empty(1, pipe.text_encoder_2.config.projection_dim)
        cond = model.conditioning(embeds, torch.empty(1, 2, 6))
        x_t, t = torch.empty(2, *model.latent_shape(resolution)), torch.ones(2)
        with FlopCounterMode(display=False) as both:
            model.predict(denoiser, x_t, t, cond).sum().backward()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model.predict(denoiser, x_t, t, cond)
    return both.get_total_flops(), forward.get_total_flops()


def measure_matmul(device, dtype):
    """FLOP/s of the fastest of six large matmuls."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        t0 = time.time()
        (a @ a)[0, 0].item()
        seconds.append(time.time() - t0)
    return 2 * n ** 3 / min(seconds)


# The table


def alone(function, *args):
    """What a function gives in a new process: its memory is its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def measure(argv, args, folder):
    """({name: Row} of all ways, pairs per second of encoding); what they write goes to `folder`."""
    pairs, cache, errors = str(folder / "pairs.parquet"), str(folder / "cache"), str(folder / "errors")
    rows = data.read_rows(data.find_source(args.data))
    columns = rows.columns.slice(0, PAIRS).to_pylist()
    records = [record | rows.images[row] for row, record in enumerate(columns)]
    datasets.Dataset.from_list(records).to_parquet(pairs)
    encoded_per_second = alone(encoding, [*encode_options(args), "--data", pairs, "--out", cache])

    table = {}

    def run(name, *more):
        out = folder / f"run-{len(table)}"
        table[name] = alone(ours, [*argv, *more, "--out", str(out)])

    dpo = ["--loss", "dpo", "--data"]
    table["Diffusion-DPO's way"] = alone(peers, [*argv, *dpo, pairs], 1)
    table["diffusers' way"] = alone(peers, [*argv, *dpo, pairs], args.micro_batch)
    run("ours, from the pairs", *dpo, pairs)
    run("ours, from the cache", *dpo, cache)
    run("ours, reference's errors cached, too", *dpo, cache, "--reference_errors", errors)
    for group_size in sorted({args.micro_batch, args.batch_size}):
        passes = "one pass" if group_size == args.micro_batch else "two passes"
        run(f"RPO from the cache, groups of {group_size}, {passes}", "--data", cache, "--loss", "rpo",
            "--group_size", str(group_size))
    return table, encoded_per_second


def format_table(table, counted):
    lines = ["| | pairs per second | times diffusers' | GiB at most | share of peak |", "|---|---|---|---|---|"]
    diffusers = table["diffusers' way"].pairs_per_second
    for name, row in table.items():
        flops = counted.policy
        if row.reference_per_second is None:  # else it does not run in the step
            flops += counted.reference
        speed = row.pairs_per_second
        share = speed * flops / counted.matmul_per_second
        lines.append(f"| {name} | {speed:.2f} | {speed / diffusers:.2f} | {row.gib:.1f} | {share:.0%} |")
    return "\n".join(lines)


def main(argv=None):
    with common.one_line_errors("bench.py", train.ADVICE):
        argv = DEFAULTS + (sys.argv[1:] if argv is None else argv)
        args = train_args(argv)
        counted = alone(arithmetic, argv)
        with tempfile.TemporaryDirectory() as folder:
            table, encoded_per_second = measure(argv, args, Path(folder))
        is_cuda = args.device.startswith("cuda")
        device = torch.cuda.get_device_name(args.device) if is_cuda else args.device
        flops = counted.policy + counted.reference
        print(f"\n{args.model}, {counted.resolution} px, {device}, {args.precision}, LoRA rank {args.lora_rank}, "
              f"{args.batch_size} pairs a step, {args.micro_batch} a forward; a matmul reaches "
              f"{counted.matmul_per_second / 1e12:.2f} TFLOP/s, a pair takes {flops / 1e12:.4f} TFLOP\n")
        print(format_table(table, counted))
        reference_per_second = table["ours, reference's errors cached, too"].reference_per_second
        print(f"\nOnce: encoding {encoded_per_second:.2f} pairs per second, the reference's errors "
              f"{reference_per_second:.2f}")


if __name__ == "__main__":
    main()
