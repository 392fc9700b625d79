"""What does this card reach, and which options are right for it? Speeds of training and encoding as one table.

    python -m extras.bench --report card.jsonl                      all rows, the most telling first
    python -m extras.bench --report card.jsonl --rows sdxl compile  the rows with one of these words in their name
    python -m extras.bench --report card.jsonl --profile            which operators take the time of the first row

Each row runs in a process of its own, with random weights at full size, and is written to the file as soon as it is
known. card.md is the same as tables. The same command resumes with the rows that the file lacks for this card and this
torch. A row that fails says why, and the next one runs. If the memory is short, the row tries half the micro-batch. No
row begins when --minutes have passed. On a CPU the models are small.

A training row is a run of train.py without its outputs: two steps to warm up, then ten that count. It trains on encoded
pairs in memory, whose values are random. With "pairs" in its name, it decodes, enlarges and encodes the embedded
drawings in every step. The peak is that of the data sheet, or of a large matmul on a card that run.py does not list.
"""

import datetime
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch

import run
import train
from common import DTYPES, InputError, Parser, atomic_write, brief, one_line_errors
from data import Pairs
from distributed import get_device
from encode import EncodedPairs
from extras import bench
from extras.random_models import random_model
from loading import place_encoders
from options import train_args

WARMUP, MEASURED = 2, 10  # steps
PAIRS = 64
SD15, SDXL = "--model sd15 --batch_size 32 --micro_batch 16", "--model sdxl --batch_size 8"
LORA_XL = "--lora_rank 16 --no-gradient_checkpointing --micro_batch 4"
SD3, FLUX = "--model sd3.5-medium --batch_size 8 --micro_batch 8", "--model flux-dev --batch_size 2 --micro_batch 2"
ROWS = {  # name: options of train.py; rows without --data train from a cache
    "sd15, all weights, DPO": f"{SD15} --loss dpo",
    "sd15, all weights, DPO, compile": f"{SD15} --loss dpo --compile",
    "sdxl, all weights, DPO": f"{SDXL} --loss dpo --micro_batch 8",
    "sdxl, LoRA 16, DPO": f"{SDXL} --loss dpo {LORA_XL}",
    "sd3.5-medium, LoRA 32, DPO": f"{SD3} --loss dpo",
    "flux-dev, LoRA 32, DPO": f"{FLUX} --loss dpo",
    "sd15, LoRA 16, DPO": f"{SD15} --loss dpo --lora_rank 16",
    "sd15, all weights, RPO, groups of 8": SD15,
    "sdxl, all weights, DPO, compile": f"{SDXL} --loss dpo --micro_batch 8 --compile",
    "sdxl, LoRA 16, DPO, compile": f"{SDXL} --loss dpo {LORA_XL} --compile",
    "sd15, LoRA 16, DPO, compile": f"{SD15} --loss dpo --lora_rank 16 --compile",
    "sd3.5-medium, LoRA 32, DPO, compile": f"{SD3} --loss dpo --compile",
    "flux-dev, LoRA 32, DPO, compile": f"{FLUX} --loss dpo --compile",
    "sd15, all weights, DPO, reference's errors cached": f"{SD15} --loss dpo --reference_errors ERRORS",
    "sd15, all weights, DPO, pairs": f"{SD15} --loss dpo --data tiny",
    "sdxl, all weights, DPO, pairs": f"{SDXL} --loss dpo --micro_batch 8 --data tiny",
    "sd15, LoRA 16, DPO, pairs": f"{SD15} --loss dpo --lora_rank 16 --data tiny",
    "sdxl, LoRA 16, DPO, pairs": f"{SDXL} --loss dpo {LORA_XL} --data tiny",
    "sd15, LoRA 16, RPO, groups of 8": f"{SD15} --lora_rank 16",
    "sdxl, all weights, RPO, groups of 8": f"{SDXL} --micro_batch 8",
    "sdxl, LoRA 16, RPO, groups of 8": f"{SDXL} {LORA_XL}",
}
ENCODERS = {f"{name}, encoders, {precision}": (name, precision)
            for name in ("sd15", "sdxl", "sd3.5-medium") for precision in ("bf16", "fp32")}
ONE_LAYER = {  # training from a cache needs the text encoders' widths alone
    "text_encoder": dict(num_hidden_layers=1), "text_encoder_2": dict(num_hidden_layers=1),
    "t5": dict(num_layers=1, vocab_size=98, d_ff=64, d_kv=8, num_heads=2)}
SMALL_UNET = dict(block_out_channels=(32, 64, 64, 64), norm_num_groups=8)
SMALL_XL = dict(block_out_channels=(32, 64, 64), norm_num_groups=8, transformer_layers_per_block=1, attention_head_dim=2)
SMALL_VAE = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
SMALL = {  # changes of the full-size denoisers, for a CPU
    "sd15": dict(unet=SMALL_UNET),
    "sdxl": dict(unet=SMALL_XL),
    "sd3.5-medium": dict(transformer=dict(num_layers=2, num_attention_heads=2, caption_projection_dim=128,
                                          dual_attention_layers=(0,), pos_embed_max_size=16)),
    "flux-dev": dict(transformer=dict(num_layers=1, num_single_layers=1, num_attention_heads=2)),
}
KINDS = {  # what the profile adds up, by a pattern in the names of operators and kernels
    "normalisation": "norm", "copies and casts": "copy|cat|memcpy", "convolutions": "conv|cudnn|mkldnn",
    "matrix products": "mm|gemm|linear", "attention": "attention|flash|fmha", "optimizer": "adam|foreach|_fused"}


def make_model(name, device, small_denoiser=False, short_text=False):
    """A model with random weights on a device. On a CPU it is small. `short_text`: one layer for each text encoder."""
    is_small = device.type == "cpu"
    changes = dict(SMALL[name]) if is_small or small_denoiser else {}
    if is_small:
        changes["vae"] = SMALL_VAE
    if is_small or short_text:
        changes |= {"text_encoder": ONE_LAYER["text_encoder"]}
        changes |= {"text_encoder_2": ONE_LAYER["t5" if name == "flux-dev" else "text_encoder_2"]}
        changes |= {"text_encoder_3": ONE_LAYER["t5"]}
    with torch.device(device):
        return random_model(name, **changes)


# A training row


class MemoryPairs(EncodedPairs):
    """Encoded pairs in memory, with random values."""

    def __init__(self, source, seed, prompt_dropout):
        Pairs.__init__(self, seed, prompt_dropout)
        self.num_rows, self.rows, self.columns = PAIRS, np.arange(PAIRS), {}
        self.ties, self.unlabelled, self.left_out = 0, 0, {}

    def fill(self, model):
        """Gives the pairs the shapes of a model's encoders. One pair stands for all."""
        latents = torch.randn(2, *model.latent_shape(self.resolution))
        embeds = model.encode_prompts([""])
        time_ids = torch.tensor([[self.resolution, self.resolution, 0, 0, self.resolution, self.resolution]] * 2)
        self.item = {name: value[0].cpu() for name, value in embeds.items()}
        self.item |= {"mean": latents, "std": latents.abs() / 10, "time_ids": time_ids.float(),
                      "clip_embeds": torch.randn(3, 1024)}

    def digest(self):
        return "memory"

    def load(self, row):
        return row

    def caption(self, row):
        return "a prompt"

    def content(self, row, index, epoch, prompt):
        return self.item | {"image_ids": torch.tensor([2 * row, 2 * row + 1])}


class Recorder:
    """Stands in the place of run.Output: it writes nothing and notes when each step ends."""

    profile = None  # a torch.profiler.profile of three steps, if it is asked for

    def __init__(self, out, args, model, params, optimizer, scaler):
        Recorder.last, self.out, self.scaler, self.device = self, out, scaler, get_device(args.device)
        self.checkpoints = self

    def begin(self, start, pairs, held_out, seconds_at_peak):
        self.seconds_at_peak = seconds_at_peak

    def restore(self, state):
        self.times = [time.time()]

    def after_step(self, step, scalars, flags, progress, held_out, identity):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.time())
        if step == 0:
            self.margin = scalars["reward/margin"]
        if self.profile and step == WARMUP - 1:
            self.profile.start()
        if self.profile and step == WARMUP + 2:
            self.profile.stop()

    def is_save_due(self):
        return False

    def nothing(self, *inputs):
        """The other things that a run does to its output."""

    wait = save_model = nothing


def training_row(options, profile_file=None):
    """What a run of train.py with these options shows, as a dict. It changes the modules of this process."""
    with tempfile.TemporaryDirectory() as folder:
        argv = options.replace("ERRORS", f"{folder}/errors").split()
        argv += ["--random_init", "--steps", str(WARMUP + MEASURED), "--sample_every", "0", "--out", folder]
        if "--data" not in argv:
            argv += ["--data", "memory"]
        device = get_device(None)
        if device.type == "cpu":
            argv += ["--resolution", "64", "--workers", "0"]
        args = train_args(argv)
        peak = run.peak_flops(device) or bench.measure_matmul(device, DTYPES[args.precision])
        run.peak_flops = lambda device: peak
        run.Output, run.EncodedPairs = Recorder, MemoryPairs
        run.is_cache = lambda source: source == "memory"
        run.load_model = lambda name, random_init, config: make_model(name, device, short_text=args.data == "memory")
        open_parts = run.open_parts

        def open_and_fill(args, out, state, device):
            pairs, held_out, model = open_parts(args, out, state, device)
            if isinstance(pairs, MemoryPairs):
                pairs.fill(model)
            return pairs, held_out, model

        run.open_parts, run.check_cache = open_and_fill, lambda source, model, name: None
        if profile_file:
            Recorder.profile = torch.profiler.profile()
        train.train(args, Path(folder), {})
    last = Recorder.last
    if profile_file:
        atomic_write(Path(profile_file), profile_text(last))
    seconds = [after - before for before, after in zip(last.times, last.times[1:])]
    first, measured = seconds[:WARMUP], seconds[WARMUP:]
    median = statistics.median(measured)
    return {
        "pairs_per_second": args.batch_size / median, "seconds": median, "least": min(measured), "most": max(measured),
        "start_seconds": sum(first) - WARMUP * median, "gib": bench.peak_gib(device),
        "tflop_per_pair": last.seconds_at_peak * peak / 1e12, "peak_tflops": peak / 1e12,
        "share_of_peak": last.seconds_at_peak * args.batch_size / median, "margin": last.margin,
        "batch_size": args.batch_size, "micro_batch": args.micro_batch, "precision": args.precision}


def profile_text(recorder):
    """The ten dearest operators of three steps, the share of each kind, and of the time without a kernel."""
    on_gpu = recorder.device.type == "cuda"
    rows = []
    for event in recorder.profile.key_averages():
        is_kernel = event.device_type != torch.autograd.DeviceType.CPU and not event.is_user_annotation
        if on_gpu and is_kernel:  # an operator's device time is that of its kernels, which are events, too
            rows.append((event.self_device_time_total, event.count, event.key))
        elif not on_gpu:
            rows.append((event.self_cpu_time_total, event.count, event.key))
    total = sum(microseconds for microseconds, *_ in rows)
    lines = ["share  calls  operator or kernel"]
    for microseconds, calls, name in sorted(rows, reverse=True)[:10]:
        lines.append(f"{microseconds / total:5.1%} {calls:6}  {name[:100]}")
    for kind, pattern in KINDS.items():
        of_kind = sum(row[0] for row in rows if re.search(pattern, row[2].lower()))
        lines.append(f"{of_kind / total:5.1%}         all of: {kind}")
    if on_gpu:
        wall = recorder.times[WARMUP + 3] - recorder.times[WARMUP]
        lines.append(f"{max(0, 1 - total / 1e6 / wall):5.1%} of the time no kernel ran")
    return "\n".join(lines) + "\n"


# Encoders


def encoders_row(name, precision):
    """Images and prompts that a model's encoders take a second, 8 at a time."""
    device, dtype = get_device(None), DTYPES[precision]
    model = make_model(name, device, small_denoiser=True)
    model.vae_dtype = dtype
    place_encoders(model, device, dtype, only_adapter=True)
    resolution = 64 if device.type == "cpu" else model.resolution()
    pixels = torch.randint(256, (4, 2, 3, resolution, resolution), dtype=torch.uint8)
    prompts = ["a photograph of a red fox in the snow"] * 8
    return {"images_per_second": 8 / median_seconds(device, lambda: model.encode_images(pixels)),
            "prompts_per_second": 8 / median_seconds(device, lambda: model.encode_prompts(prompts, dtype)),
            "gib": bench.peak_gib(device), "resolution": resolution, "precision": precision}


@torch.no_grad()
def median_seconds(device, function):
    seconds = []
    for _ in range(WARMUP + MEASURED):
        t0 = time.time()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.time() - t0)
    return statistics.median(seconds[WARMUP:])


# The table


def measure_row(name, more="", profile_file=None):
    """A row as a dict. `more` are further options of train.py, which count before the row's own."""
    if name in ENCODERS:
        return encoders_row(*ENCODERS[name])
    return training_row(f"{ROWS[name]} {more}", profile_file)


def measure_within_memory(name, micro_batches):
    """A row as a dict; if the memory is short, with half the micro-batch.

    micro_batches  {beginning of a row's name: the micro-batch that fitted}; rows that begin alike begin there
    """
    kind = tuple(name.split(", ")[:2])
    own = [int(size) for size in re.findall(r"--micro_batch (\d+)", ROWS.get(name, ""))]
    size = micro_batches.get(kind, own[-1] if own else 1)
    while True:
        try:
            row = bench.alone(measure_row, name, f"--micro_batch {size}" if own else "")
            micro_batches[kind] = size
            return row
        except Exception as error:
            if "out of memory" not in str(error) or size == 1:
                raise
            size //= 2


def format_tables(lines):
    """The rows of a report, as they stand in its file, as Markdown: tables for each machine."""
    machines = {}
    for line in lines:
        machine = f"{line['card']}, torch {line['torch']}, diffusers {line['diffusers']}, {line['date']}"
        machines.setdefault(machine, []).append(line)
    return "\n".join(f"{machine}\n\n{format_rows(of_machine)}" for machine, of_machine in machines.items())


def format_rows(lines):
    text = "|row|pairs/s|seconds a step (least, most)|GiB at most|TFLOP a pair|share of peak|margin at step 0|start, s|\n"
    text += "|---" * 8 + "|\n"
    of_encoders = ""
    for line in lines:
        if "failed" in line:
            text += f"|{line['row']}|{line['failed']}" + "|" * 7 + "\n"
        elif "images_per_second" in line:
            of_encoders += (f"|{line['row']}|{line['images_per_second']:.1f}|{line['prompts_per_second']:.1f}|"
                            f"{line['gib']:.1f}|\n")
        else:
            text += ("|{row}|{pairs_per_second:.2f}|{seconds:.3f} ({least:.3f}, {most:.3f})|{gib:.1f}|{tflop_per_pair:.3g}|"
                     "{share_of_peak:.1%}|{margin:.2g}|{start_seconds:.1f}|\n".format(**line))
    if of_encoders:
        text += "\n|encoders|images/s|prompts/s|GiB at most|\n|---|---|---|---|\n" + of_encoders
    return text


def parse_args(argv):
    parser = Parser(prog="bench.py --report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--report", required=True, metavar="FILE", help="json lines, one per row")
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="only rows with one of these words in their name")
    parser.add_argument("--minutes", type=float, default=8, help="no row begins after that [%(default)s]")
    parser.add_argument("--profile", action="store_true", help="profile three steps of the first row, to FILE.profile.txt")
    return parser.parse_args(argv)


def main(argv=None):
    with one_line_errors("bench.py", train.ADVICE):
        args, began = parse_args(argv), time.time()
        file = Path(args.report)
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        names = [name for name in [*ROWS, *ENCODERS] if not args.rows or any(word in name for word in args.rows)]
        if not names:
            raise InputError(f"no row has one of these words in its name: {', '.join(args.rows)}")
        if args.profile:
            names = [name for name in names if name in ROWS] or [*ROWS]
            print(names[0], bench.alone(measure_row, names[0], "", str(file.with_suffix(".profile.txt"))))
            return print(file.with_suffix(".profile.txt").read_text(encoding="utf-8"))
        device, micro_batches = get_device(None), {}
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, small models"
        lines = [line for line in lines if "failed" not in line or line["card"] != card]  # these are tried again
        known = {(line["row"], line["card"], line["torch"]) for line in lines}
        for name in names:
            if (name, card, torch.__version__) in known or time.time() - began > 60 * args.minutes:
                continue
            line = {"row": name, "card": card, "torch": torch.__version__, "diffusers": diffusers.__version__,
                    "date": datetime.date.today().isoformat()}
            try:
                line |= measure_within_memory(name, micro_batches)
            except Exception as error:  # out of memory, or a fault of the compiler: the next row may do
                line["failed"] = brief(error)[:200]
            lines.append(line)
            atomic_write(file, "".join(json.dumps(line) + "\n" for line in lines))
            atomic_write(file.with_suffix(".md"), format_tables(lines))
            print(json.dumps(line), flush=True)
        print(format_tables(lines))
