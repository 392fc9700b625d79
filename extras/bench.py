"""What a training step costs: ours and the step of the peers' scripts, side by side in one run.

    python -m extras.bench                                              the embedded model, here
    python -m extras.bench --model sd15 --random_init --resolution 64 --lora_rank 16    full size, no download
    python -m extras.bench --model sdxl --random_init --data my_pairs   train.py's options, all rows
    python -m extras.bench --count                                      FLOP and bytes of the full-size models

Every row is a process of its own. All rows share pairs, model, batch, precision and adapter:

    Diffusion-DPO's way   Every step encodes the images by the VAE and the prompts by the text encoders. One pair per
                          forward; the reference runs after the policy; each loss is read at once.
    diffusers' way        The same with --micro_batch pairs per forward, as train_diffusion_dpo.py does it.
    ours                  train.py by DPO: from the pairs; from a cache; with the reference's errors cached, too. By RPO
                          from the cache: groups that fit one forward, and one group of the whole batch.

Share of peak: the denoiser's useful FLOP per second, divided by what a large matmul reaches here in the same precision.
Useful are the forward and backward of the policy, and the forward of the reference if it runs. torch counts them;
recomputation is not counted.
"""

import concurrent.futures
import contextlib
import copy
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
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import encode
import train
from loss import denoising_error, dpo_loss
from models import StableDiffusionXL, disabled_adapter, load_model, random_model
from options import train_args

STEPS = 30 if torch.cuda.is_available() else 6  # per row; the first two do not count
PAIRS = 64  # pairs of the data to use
VAE_BATCH = 8  # images per call of the VAE in diffusers' scripts
DEFAULTS = ["--batch_size", "16", "--micro_batch", "8", "--group_size", "1", "--data", "tiny"]
ENCODE_OPTIONS = ("model", "config", "init_lora", "clip", "device", "precision", "resolution", "vae_sample",
                  "vae_precision", "seed")
ENCODE_FLAGS = ("random_init", "random_flip", "random_crop")


class Row(NamedTuple):
    pairs_per_second: float
    gib: float                            # peak memory of the process
    reference_per_second: float = None    # pairs per second while the reference's errors are computed


class Arithmetic(NamedTuple):
    resolution: int           # pixels
    policy: int               # FLOP per pair: forward and backward of the policy
    reference: int            # FLOP per pair: forward of the reference
    matmul_per_second: float  # FLOP/s that a large matmul reaches


def peak_gib(device):
    """Peak memory of this process in GiB: on its GPU, else in RAM. Linux reports KiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


# Our step


class TimedReferenceErrors(encode.ReferenceErrors):
    """Notes the time at which the errors of each step arrive."""

    times = []

    def put(self, step, errors, records):
        super().put(step, errors, records)
        self.times.append(time.time())


def ours(argv):
    """The Row of a run of train.py."""
    train.ReferenceErrors = TimedReferenceErrors  # in a process of its own
    train.main([*argv, "--steps", str(STEPS), "--sample_every", "0", "--save_minutes", "0"])
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


class PeersPairs(data.ImagePairs):
    """Pairs resized as by diffusers' scripts: bilinear; for SDXL as floats, the second image at the first's size."""

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
        ids = {name: value[0] for name, value in self.tokenize([prompt]).items()}
        return ids | {"pixels": TF.normalize(torch.stack(pictures), [0.5], [0.5]), "time_ids": time_ids.repeat(2, 1)}


def peers(argv, micro_batch):
    """The Row of the peers' step with `micro_batch` pairs per forward."""
    args = train_args(argv)
    trainer = train.set_up(args, None, {})
    model, params = trainer.model, trainer.params.values()
    for network in model.networks().values():
        if network is not model.denoiser:
            network.to(trainer.dtype)  # as their scripts do
    optimizer = train.make_optimizer(args, params)
    micro_batches = args.batch_size // micro_batch
    positions = [range(k * micro_batch, (k + 1) * micro_batch) for k in range(STEPS * micro_batches)]
    pairs = PeersPairs(args.data, args.resolution, args.seed, prompt_dropout=args.prompt_dropout,
                       source_rows=trainer.pairs.source_rows)
    pairs.for_sdxl, pairs.tokenize = isinstance(model, StableDiffusionXL), trainer.pairs.tokenize
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
    """Diffusion-DPO's loss of B pairs of images. Everything is computed in the step."""
    model, pipe, device, dtype = trainer.model, trainer.model.pipe, trainer.device, trainer.dtype
    pixels = batch["pixels"].transpose(0, 1).flatten(0, 1).to(device, dtype)            # [2 B, 3, H, W]
    with torch.no_grad():
        parts = [pipe.vae.encode(part).latent_dist.sample() for part in pixels.split(VAE_BATCH)]
        latents = torch.cat(parts)                                                      # [2 B, C, h, w]
        embeds = model.encode_ids(**{name: batch[name].to(device) for name in model.tokenizers()})
    latents = model.scale_latents(latents).float()
    noise = torch.randn_like(latents[:len(latents) // 2])                               # [B, C, h, w]
    times = [trainer.process.sample_t(torch.default_generator) for _ in noise]
    t = torch.stack(times).to(device)
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


# Encoding, FLOP and bytes


def encoding(argv):
    """Pairs per second of encode.py. The time to load its models counts."""
    t0 = time.time()
    encode.main(argv)
    manifest = data.read_manifest(argv[argv.index("--out") + 1])
    return manifest["used"] / (time.time() - t0)


def encode_options(args):
    """The command line that makes encode.py encode pairs as a run of `args` wants them."""
    words = []
    for name in ENCODE_OPTIONS:
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    for name in ENCODE_FLAGS:
        words.append(f"--{name}" if getattr(args, name) else f"--no-{name}")
    return words


def arithmetic(argv):
    """The Arithmetic of a pair and of this machine."""
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
    """FLOP per pair: (forward and backward, forward). They are counted on the meta device, which computes nothing."""
    with torch.device("meta"):
        denoiser = model.denoiser.to("meta")
        inputs = example_inputs(model, resolution, 1)
        with FlopCounterMode(display=False) as both:
            model.predict(denoiser, *inputs).sum().backward()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model.predict(denoiser, *inputs)
    return both.get_total_flops(), forward.get_total_flops()


def example_inputs(model, resolution, pairs):
    """(x_t, t, cond): the inputs of `predict` for some pairs, without values."""
    embeds = {"prompt_embeds": torch.empty(pairs, *model.prompt_shape())}
    if model.pooled_width():
        embeds["pooled_prompt_embeds"] = torch.empty(pairs, model.pooled_width())
    cond = model.conditioning(embeds, torch.empty(pairs, 2, 6))
    return torch.empty(2 * pairs, *model.latent_shape(resolution)), torch.ones(2 * pairs), cond


@contextlib.contextmanager
def autocast_of_a_gpu():
    """bf16 autocast on a CPU with the norms in float32, as on a GPU; a CPU's own autocast runs them in bf16."""
    def in_float32(norm):
        return lambda x, *more, **options: norm(x.float(), *more, **options)

    with contextlib.ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(unittest.mock.patch.object(F, name, in_float32(getattr(F, name))))
        yield stack.enter_context(torch.autocast("cpu", torch.bfloat16))


def saved_bytes(model, resolution, pairs):
    """Bytes that a bf16 forward of the policy keeps for its backward, without the weights and their copies.

    They are measured on fake tensors, which have a size but no memory.
    """
    denoiser, storages = copy.deepcopy(model.denoiser), {}
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        denoiser.to_empty(device="cpu")
        weights = {param.untyped_storage()._cdata for param in denoiser.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = tensor  # kept, so that no other storage takes its address
            return tensor

        inputs = example_inputs(model, resolution, pairs)
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
    """A row of the table of FLOP and bytes: a published model, trained whole or by an adapter."""
    with torch.device("meta"):
        model = random_model(name)
        if lora_rank:
            model.add_lora(lora_rank, seed=0)
        else:
            model.denoiser.requires_grad_(True)
    resolution = model.resolution()
    policy, reference = denoiser_flops(model, resolution)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as vae:
        model.pipe.vae.encode(torch.empty(2, 3, resolution, resolution))
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
    flops = [policy + reference, reference, vae.get_total_flops()]
    cells = [f"{name}, {resolution} px, {kind}, {optimizer}", *(f"{n / 1e12:.2f}" for n in flops), f"{held / 1e9:.1f}"]
    return "| " + " | ".join(cells + [f"{n / 1e9:.2f}" for n in of_pair]) + " |"


def print_counted():
    print("| | TFLOP of a pair's step | of it the reference | and the VAE, from pairs | GB held | GB per pair of a forward "
          "| with checkpointing |\n|---|---|---|---|---|---|---|")
    for name, optimizer in (("sd15", "adamw"), ("sdxl", "adafactor")):
        print(count(name, 0, optimizer))
        print(count(name, 16, "adamw"))
    for name in ("sd3.5-medium", "flux-dev"):
        print(count(name, 32, "adamw"))


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
    """The result of a function that runs in a new process, so that its peak memory is its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def measure(argv, args, folder):
    """({name: Row} of all ways, pairs per second of encoding). The runs write to `folder`."""
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
        if row.reference_per_second is None:  # otherwise the reference does not run in the step
            flops += counted.reference
        speed = row.pairs_per_second
        share = speed * flops / counted.matmul_per_second
        lines.append(f"| {name} | {speed:.2f} | {speed / diffusers:.2f} | {row.gib:.1f} | {share:.0%} |")
    return "\n".join(lines)


def main(argv=None):
    with common.one_line_errors("bench.py", train.ADVICE):
        argv = sys.argv[1:] if argv is None else argv
        if argv == ["--count"]:
            return print_counted()
        argv = DEFAULTS + argv
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
