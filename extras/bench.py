"""What a training step costs: ours, and the step as the scripts of Diffusion-DPO and diffusers take it.

    python -m extras.bench                                              the embedded model, on this machine
    python -m extras.bench --model sd15 --random_init --resolution 64 --lora_rank 16    full size, no download
    python -m extras.bench --model sdxl --random_init --data my_pairs   any options of train.py, all rows
    python -m extras.bench --count                                      FLOPs and bytes of the full-size models
    python -m extras.bench --report card.jsonl                          what a GPU reaches, see card.py

Every row runs in a process of its own, on the same pairs, model, batch, precision and adapter:

    Diffusion-DPO's way   every step decodes the images and encodes them by the VAE, and the prompts by the text
                          encoders; one pair per forward; each loss is read as soon as it is there
    diffusers' way        the same with --micro_batch pairs per forward, as in train_diffusion_dpo.py
    ours                  train.py with DPO: from the pairs, from a cache, and with the reference's errors cached, too;
                          train.py with RPO, from the cache: groups that fit into one forward, and one group that is
                          the whole batch

The share of peak is the useful arithmetic of the denoiser over what a large matmul reaches here in the same precision.
Useful are forward and backward of the policy, and the forward of the reference if it runs. torch counts them, and
counts nothing twice.
"""

import concurrent.futures
import contextlib
import copy
import importlib
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import encode
import reference
import run
import sources
import train
from common import DTYPES, one_line_errors
from distributed import get_device
from extras.random_models import CONFIGS, build, random_model
from loading import add_lora, disabled_adapter, load_model
from loss import denoising_error, dpo_loss
from models import StableDiffusionXL
from options import train_args

STEPS = 30 if torch.cuda.is_available() else 6  # steps of a row; the first two do not count
PAIRS = 64  # how many pairs of the data are used
VAE_BATCH = 8  # how many images diffusers' scripts encode at once
DEFAULTS = ["--batch_size", "16", "--micro_batch", "8", "--group_size", "1", "--data", "tiny"]
ENCODE_OPTIONS = ("model", "config", "init_lora", "clip", "device", "precision", "resolution", "vae_sample",
                  "vae_precision", "seed")
ENCODE_FLAGS = ("random_init", "random_flip", "random_crop")


class Row(NamedTuple):
    pairs_per_second: float
    gib: float                            # the most memory that the process held
    reference_per_second: float = None    # pairs per second while the reference's errors were computed


class Arithmetic(NamedTuple):
    resolution: int           # pixels
    policy: int               # FLOPs of a pair: forward and backward of the policy
    reference: int            # FLOPs of a pair: forward of the reference
    matmul_per_second: float  # FLOP/s that a large matmul reaches


def peak_gib(device):
    """The most GiB that this process has held, on its GPU if it has one (Linux counts the host's in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


# Our step


class TimedReferenceErrors(reference.ReferenceErrors):
    """Notes when the errors of each step are put in."""

    times = []

    def put(self, step, errors, draw_ids):
        super().put(step, errors, draw_ids)
        self.times.append(time.time())


def ours(argv):
    """The Row of a run of train.py."""
    reference.ReferenceErrors = TimedReferenceErrors  # this process runs nothing else
    train.main([*argv, "--steps", str(STEPS), "--sample_every", "0", "--save_minutes", "0"])
    args = train_args(argv)
    lines = (Path(args.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [json.loads(line)["pairs_per_second"] for line in lines[2:]]
    row = Row(statistics.median(speeds), peak_gib(get_device(args.device)))
    times = TimedReferenceErrors.times
    if times:
        seconds = [after - before for before, after in zip(times[1:], times[2:])]
        row = row._replace(reference_per_second=args.batch_size / statistics.median(seconds))
    return row


# The peers' step


class PeersPairs(data.ImagePairs):
    """Pairs that are scaled as diffusers' scripts do it: bilinearly.

    for_sdxl  whether it is done as in the script for SDXL: in floats, and the second image at the size of the first
    """

    for_sdxl = False

    def content(self, row, pair, epoch, prompt):
        pictures = [picture for picture, _ in pair]
        if self.for_sdxl:
            pictures[1] = pictures[1].resize(pictures[0].size)
            pictures = [TF.to_tensor(picture) for picture in pictures]
        pictures = [TF.center_crop(TF.resize(picture, self.resolution), self.resolution) for picture in pictures]
        if not self.for_sdxl:
            pictures = [TF.to_tensor(picture) for picture in pictures]
        height, width = pair[0][0].height, pair[0][0].width
        time_ids = torch.tensor([height, width, 0, 0, self.resolution, self.resolution], dtype=torch.float32)
        return {"pixels": TF.normalize(torch.stack(pictures), [0.5], [0.5]), "time_ids": time_ids.repeat(2, 1)}


def peers(argv, micro_batch):
    """The Row of the peers' step with `micro_batch` pairs per forward."""
    args = train_args(argv)
    trainer = train.Trainer(args, None, {})
    trainer.set_up(None, {})
    model, params = trainer.model, [*trainer.params.values()]
    for network in model.networks().values():
        if network is not model.denoiser:
            network.to(trainer.dtype)  # as in their scripts
    optimizer = run.make_optimizer(args, params)
    micro_batches = args.batch_size // micro_batch
    positions = [range(k * micro_batch, (k + 1) * micro_batch) for k in range(STEPS * micro_batches)]
    pairs = PeersPairs(args.data, args.resolution, args.seed, prompt_dropout=args.prompt_dropout,
                       source_rows=trainer.pairs.source_rows)
    pairs.for_sdxl = isinstance(model, StableDiffusionXL)
    batches = iter(torch.utils.data.DataLoader(
        pairs, batch_sampler=positions, collate_fn=data.collate, num_workers=args.workers,
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
    """Diffusion-DPO's loss of a batch of B pairs of images. The step computes all of it."""
    model, pipe, device, dtype = trainer.model, trainer.model.pipe, trainer.device, trainer.dtype
    pixels = batch["pixels"].transpose(0, 1).flatten(0, 1).to(device, dtype)            # [2 B, 3, H, W]
    with torch.no_grad():
        parts = [pipe.vae.encode(part).latent_dist.sample() for part in pixels.split(VAE_BATCH)]
        latents = torch.cat(parts)                                                      # [2 B, C, h, w]
        embeds = model.encode_prompts(batch["prompt"], dtype)
    latents = model.scale_latents(latents).float()
    noise = torch.randn_like(latents[:len(latents) // 2])                               # [B, C, h, w]
    times = [trainer.process.sample_t(torch.default_generator) for _ in noise]
    t = torch.stack(times).to(device)
    inputs = {"x": latents, "eps": noise.repeat(2, 1, 1, 1), "t": t.repeat(2), "dtype": dtype,
              "cond": model.conditioning(embeds, batch["time_ids"].to(device))}

    def error(network):
        return denoising_error(model.predict, network, trainer.process, **inputs)       # [2 B]

    err_w, err_l = error(trainer.policy).chunk(2)
    with torch.no_grad(), disabled_adapter(trainer.lora_layers):
        ref_err_w, ref_err_l = error(trainer.reference).chunk(2)
    loss, _ = dpo_loss(err_w, err_l, ref_err_w, ref_err_l, trainer.args.beta)
    return loss


# What is done once, and what is counted


def encoding(argv):
    """Pairs per second of encode.py. The time includes the loading of its models."""
    t0 = time.time()
    encode.main(argv)
    manifest = common.read_manifest(argv[argv.index("--out") + 1])
    return manifest["used"] / (time.time() - t0)


def encode_options(args):
    """The options that make encode.py encode pairs as a run wants them."""
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
        add_lora(model, args.lora_rank, args.seed)
    else:
        model.denoiser.requires_grad_(True)
    matmul_per_second = measure_matmul(get_device(args.device), DTYPES[args.precision])
    return Arithmetic(resolution, *run.count_flops(model, *example_inputs(model, resolution, 1)), matmul_per_second)


def example_inputs(model, resolution, pairs):
    """What `predict` takes beside the network for some pairs: x_t, t, cond. Shapes are right, values mean nothing."""
    with torch.no_grad():
        embeds = model.encode_prompt([""] * pairs, model.pipe.text_encoder.device)
    embeds = {name: torch.ones(value.shape) for name, value in embeds.items()}  # a mask of ones counts all tokens
    cond = model.conditioning(embeds, torch.empty(pairs, 2, 6))
    return torch.empty(2 * pairs, *model.latent_shape(resolution)), torch.ones(2 * pairs), cond


@contextlib.contextmanager
def autocast_of_a_gpu():
    """Autocast to bf16 as a GPU does it, on a CPU: norms run in float32, and a CPU would leave them in bf16."""
    def in_float32(norm):
        return lambda x, *more, **options: norm(x.float(), *more, **options)

    with contextlib.ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(unittest.mock.patch.object(F, name, in_float32(getattr(F, name))))
        yield stack.enter_context(torch.autocast("cpu", torch.bfloat16))


def saved_bytes(model, resolution, pairs):
    """Bytes that a forward of the policy keeps for its backward, in bf16, beside the weights and their copies.

    It runs on fake tensors, which have a size and no memory.
    """
    denoiser, storages, inputs = copy.deepcopy(model.denoiser), {}, example_inputs(model, resolution, pairs)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, contextlib.ExitStack() as stack:
        denoiser.to_empty(device="cpu")
        weights = {param.untyped_storage()._cdata for param in denoiser.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = tensor  # it stays alive, so that no other one takes its place
            return tensor

        inputs = tree_map(fake.from_tensor, inputs)
        stack.enter_context(autocast_of_a_gpu())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        prediction = model.predict(denoiser, *inputs)
        del prediction
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def optimizer_numbers(param, optimizer):
    """How many numbers AdamW (two means) or Adafactor (means of rows and columns) keeps for a parameter."""
    if optimizer == "adamw":
        return 2 * param.numel()
    if param.dim() < 2:
        return param.numel()
    return param.numel() // param.shape[-1] + param.numel() // param.shape[-2]


def count(name, lora_rank, optimizer):
    """A row of the table of FLOPs and bytes: a published model, trained whole or by an adapter."""
    with torch.device("meta"):
        model = random_model(name)
        if lora_rank:
            add_lora(model, lora_rank, seed=0)
        else:
            model.denoiser.requires_grad_(True)
    class_name, config = CONFIGS[name]["text_encoder"]
    if class_name.startswith("Qwen"):  # the length of its prompts is a value, so it computes; its layers are narrow
        thin = dict(vocab_size=259, intermediate_size=1, num_key_value_heads=1)
        if "text_config" in config:
            thin = {"text_config": config["text_config"] | thin | dict(num_hidden_layers=1), "vision_config": dict(depth=1)}
        model.pipe.text_encoder = build(class_name, config | thin)
    resolution = model.resolution()
    policy_flops, reference_flops = run.count_flops(model, *example_inputs(model, resolution, 1))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as vae:
        model.moments(model.pipe.vae, torch.empty(2, 3, resolution, resolution))
    model.denoiser.zero_grad()
    sizes = {True: 0, False: 0}
    for param in model.denoiser.parameters():
        sizes[param.requires_grad] += param.numel()
    held = sizes[True] * (4 + 4 + 2) + sizes[False] * 2  # weights and gradients in float32, autocast's copies
    for param in filter(lambda param: param.requires_grad, model.denoiser.parameters()):
        held += 4 * optimizer_numbers(param, optimizer)
    if not lora_rank:
        held += sizes[True] * 2  # the reference
    of_pair = []
    for checkpointing in (False, True):
        if checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        one, two = (saved_bytes(model, resolution, pairs) for pairs in (1, 2))
        of_pair.append(two - one)
    kind = f"LoRA {lora_rank}" if lora_rank else "all weights"
    flops = [policy_flops + reference_flops, reference_flops, vae.get_total_flops()]
    cells = [f"{name}, {resolution} px, {kind}, {optimizer}", *(f"{n / 1e12:.2f}" for n in flops), f"{held / 1e9:.1f}"]
    return "|" + "|".join(cells + [f"{n / 1e9:.2f}" for n in of_pair]) + "|"


COUNTED = [("sd15", 0, "adamw"), ("sd15", 16, "adamw"), ("sdxl", 0, "adafactor"), ("sdxl", 16, "adamw"),
           *((name, 32, "adamw") for name in ("sd3.5-medium", "flux-dev", "z-image", "flux2-klein", "qwen-image"))]


def print_counted():
    print("| |TFLOP per pair|of it the reference|VAE, without a cache|GB held|GB per pair of a forward"
          "|with checkpointing|\n|---|---|---|---|---|---|---|")
    for row in COUNTED:
        print(count(*row))


def measure_matmul(device, dtype):
    """FLOP/s of the fastest of six large matmuls."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        t0 = time.time()
        (a @ a)[0, 0].item()
        seconds.append(time.time() - t0)
    return 2 * n ** 3 / min(seconds)


# The table


def alone(function, *args):
    """The result of a function that runs in a new process, which has its own memory."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def measure(argv, args, folder):
    """({name: Row} of all ways, pairs per second of encoding). They write into `folder`."""
    pairs, cache, errors = str(folder / "pairs.parquet"), str(folder / "cache"), str(folder / "errors")
    rows = sources.read_rows(sources.find_source(args.data))
    first = rows.columns.slice(0, PAIRS).to_pylist()
    first = [columns | rows.images[row] for row, columns in enumerate(first)]
    datasets.Dataset.from_list(first).to_parquet(pairs)
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
    with one_line_errors("bench.py", train.ADVICE):
        argv = sys.argv[1:] if argv is None else argv
        if argv == ["--count"]:
            return print_counted()
        if "--report" in argv:
            return importlib.import_module("extras.card").main(argv)
        with tempfile.TemporaryDirectory() as folder:
            argv = [*DEFAULTS, *argv, "--out", f"{folder}/new"]  # the options of a run in the default --out would count
            args = train_args(argv)
            train_args([*argv, "--loss", "dpo"])  # so that an option that some rows do not take is refused at once
            counted = alone(arithmetic, argv)
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
