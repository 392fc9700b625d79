"""The command lines of train.py and encode.py: options, presets, and the run that follows from them.

A value comes from the defaults below, then the preset of --model, then the preset of --model and --loss, then
the command line. Against a cache, what the cache was made with takes the place of defaults and presets.
"""

import argparse
import inspect
import math
import os
from pathlib import Path

import torch

from common import InputError, Parser, get_device, torchrun_env
from data import COLUMNS, is_cache, read_manifest
from loss import LOSSES, wants
from models import CONFIGS

ROOMY = 75e9  # bytes of a GPU on which an adapter of SDXL trains without gradient checkpointing
H14 = "ViT-H-14:laion2b_s32b_b79k"
TINY = dict(data="tiny", clip="tiny", sample_prompts="tiny", steps=120, batch_size=16, lr=2e-5, warmup=10, beta=500.0,
            prompt_dropout=0.1, validate_every=20, sample_every=40, sample_steps=20, guidance=3.0, resolution=32)
PRESETS = {  # by model, then by model and loss; sd15, sdxl: the launchers of Diffusion-DPO, whose 1e-8 is
    # multiplied by the batch to 2.048e-5 (its paper says 2.048e-8 * 2000 / beta)
    "tiny": TINY,
    "tiny sft": dict(lr=1e-4),
    "tiny-flow": TINY | dict(lora_rank=16, lr=1e-3, beta=20.0),
    "tiny-flow sft": dict(lr=3e-3),
    "sd15": dict(data="pickapic", clip=H14, steps=2000, batch_size=2048, lr=2.048e-5, warmup=500,
                 random_flip=True, resolution=512, optimizer="adamw"),
    "sdxl": dict(data="pickapic", clip=H14, steps=2000, batch_size=2048, lr=2.048e-5, warmup=200,
                 random_flip=True, resolution=1024, optimizer="adafactor", gradient_checkpointing=True,
                 guidance=5.0),
    # Not tuned by us: rates and betas that others report of such runs (Flow-Factory: 1e-4 collapses; verl-omni).
    "sd3.5-medium": dict(data="pickapic", clip=H14, steps=1000, batch_size=64, lora_rank=32, lr=1e-5, warmup=50,
                         beta=2000.0, resolution=1024, gradient_checkpointing=True, guidance=4.5),
    "flux-dev": dict(data="pickapic", clip=H14, steps=1000, batch_size=64, lora_rank=32, lr=1e-5, warmup=50,
                     beta=2000.0, resolution=1024, gradient_checkpointing=True, guidance=3.5),
}
# When a run goes on these may differ; anything else would make it another run.
MAY_CHANGE = {"steps", "micro_batch", "validate", "validate_every", "validate_pairs", "save_minutes", "save_every",
              "sample_every", "gradient_checkpointing", "compile", "reference_errors", "workers", "data_timeout",
              "device", "out", "dry_run"}
MAY_MOVE = {"model", "config", "init_lora", "data", "clip"}  # names of what is known by its content
# What a loss is given by name; any other parameter of it is a hyperparameter. See the head of loss.py.
VECTORS = {"err_w", "err_l", "ref_err_w", "ref_err_l", "t", "snr", "weights", *COLUMNS}


def number(kind, least, most=math.inf, above=False, may_be_inf=False):
    """A type for argparse: a finite int or float of at least `least`, or above it, and at most `most`."""
    def parse(text):
        value = kind(text)
        if may_be_inf and value == math.inf:
            return value
        if not math.isfinite(value) or value < least or value > most or above and value == least:
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


COUNT = number(int, 1)
NATURAL = number(int, 0)
POSITIVE = number(float, 0, above=True)
SHARE = number(float, 0, 1)


def count_or_auto(text):
    return text if text == "auto" else COUNT(text)


class Options:
    """An argument parser that leaves out what was not typed, and the defaults beside it."""

    def __init__(self, program, usage):
        self.defaults = {}
        self.parser = Parser(
            prog=program, usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110))

    def add(self, name, default, kind, text=None, metavar=None):
        """kind: a type, a list of choices, or bool for a flag with its --no-."""
        self.defaults[name] = default
        if kind is bool:
            self.parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(kind, (list, dict)):
            self.parser.add_argument(f"--{name}", choices=[*kind], help=text)
        else:
            self.parser.add_argument(f"--{name}", type=kind, help=text, metavar=metavar)


def add_shared_options(options):
    """What encoded pairs depend on, and the machine."""
    add = options.add
    add("model", "tiny", str, "tiny, tiny-flow, sd15, sdxl, sd3.5-medium, flux-dev, or a diffusers folder or a hub id of such a "
        "kind, or a .safetensors (SD 1.x/2.x, SDXL) [tiny]")
    add("config", None, str, "a diffusers folder that describes a --model in one .safetensors file", "DIR")
    add("random_init", False, bool, "of a preset: random weights, nothing is downloaded")
    add("init_lora", None, str, "LoRA weights that policy and reference start with: an earlier run's model/, a "
        "file or a hub id", "LORA")
    add("data", None, str, "tiny, pickapic, a parquet file, a folder, a hub id [the preset's]", "PAIRS")
    add("clip", None, str, "rpo: of open_clip, a tag or a file; or tiny [the preset's]", "ARCH:WEIGHTS")
    add("resolution", None, COUNT, "side of the training images, pixels [the model's own]")
    add("random_flip", False, bool, "mirror half of the pairs")
    add("random_crop", False, bool, "crop a pair anywhere instead of in the middle")
    add("vae_sample", "sample", ["mean", "sample"], "what the VAE's posterior gives [sample]")
    add("vae_precision", None, ["fp32", "bf16"], "in which the VAE encodes [bf16 on cuda, else fp32]")
    add("seed", 0, NATURAL)
    add("device", None, str, "cuda, mps or cpu [the best there is]")
    add("precision", None, ["fp32", "bf16", "fp16"], "of the forward pass [bf16 on cuda, else fp32]")
    add("workers", None, NATURAL, "that decode images [train: 8 beside a GPU, else 0; encode: all cores]")


def train_args(argv=None):
    """The resolved run of train.py. InputError on an unknown option, a value out of range, a bad batch."""
    options = Options("train.py", "python train.py [options]")
    add_shared_options(options)
    add = options.add
    add("out", None, str, "the run's folder; started again, it goes on [out/MODEL-LOSS]", "DIR")
    # the method
    add("loss", "rpo", LOSSES, "[rpo]")
    add("beta", 5000.0, POSITIVE, "strength of the pull to the reference")
    add("group_size", 8, COUNT, "rpo: pairs contrasted with each other [8]")
    add("tau", 0.5, number(float, 0, above=True, may_be_inf=True),
        "rpo: temperature of the cross-pair weights; inf: all alike, no CLIP [0.5]")
    add("similarity", "both", ["text", "image", "both"], "rpo: what weights compare [both]")
    add("weight_position", "outside", ["outside", "inside"], "rpo: of the log-sigmoid [outside]")
    add("group_noise", "own", ["own", "timestep", "both"], "what a group shares [own]")
    options.defaults["loss_args"] = []
    options.parser.add_argument("--loss_args", nargs="+", action="extend", metavar="NAME=VALUE",
                                help="what the loss has no option for")
    add("timestep_sampling", None, ["uniform", "logit_normal"], "flow matching: of times, before their shift [the "
        "family's]")
    add("timestep_mean", None, number(float, -math.inf), "flow matching, logit_normal: mean [0]")
    add("timestep_scale", None, POSITIVE, "flow matching, logit_normal: deviation [1]")
    add("timestep_shift", None, POSITIVE, "flow matching: above 1 more noisy times [the scheduler's]")
    add("train_guidance", None, number(float, 0), "flux: the guidance that the network is told in training [1]")
    add("prompt_dropout", 0.2, SHARE, "share of pairs trained without their prompt [0.2]")
    # optimisation
    add("steps", 1000, COUNT)
    add("batch_size", 32, COUNT, "pairs per step, over all processes")
    add("micro_batch", None, count_or_auto, "pairs per forward; for memory alone; auto: the most of 1, 2, 4, 8, 16 "
        "that fit [16 up to 512 px; above 768 px without checkpointing 4; else 8]", "N|auto")
    add("optimizer", None, ["adamw", "adafactor", "sgd"], "[adafactor for SDXL, else adamw]")
    add("lr", 1e-5, POSITIVE)
    add("warmup", 0, NATURAL, "steps of linear warm-up to a constant rate")
    add("weight_decay", 0.01, number(float, 0), "[0.01]")
    add("max_grad_norm", 1.0, POSITIVE, "[1]")
    add("lora_rank", 0, NATURAL, "of an adapter of the attention; 0 = train the whole network [0]")
    add("ema", 0.0, number(float, 0, 0.999999), "of an average of the weights, which model/ and samples then are; "
        "0 = none [0]", "DECAY")
    add("skip_above", 0.0, number(float, 0), "skip a step whose gradient norm is above K times the median of the last "
        "100; 0 = none [0]", "K")
    # is it learning
    add("validate", None, str, "held-out pairs to measure on: a file, folder or cache as of --data, tiny; or a "
        "share of --data's prompts, as 0.02", "PAIRS|SHARE")
    add("validate_every", 100, COUNT, "steps between measurements [100]")
    add("validate_pairs", 512, COUNT, "held-out pairs at most [512]")
    # machine
    add("gradient_checkpointing", False, bool, "less memory for a third more time [sdxl: yes, but for an adapter on a GPU "
        "of 80 GB]")
    add("compile", False, bool, "torch.compile the network: minutes at first, then faster")
    add("reference_errors", None, str, "compute the reference's errors before the first step, for all runs that "
        "differ in loss, beta, tau, lr alone; no second network in memory", "FILE")
    add("data_timeout", 600, COUNT, "seconds that workers may take for a batch [600]")
    # what it leaves
    add("save_minutes", 15.0, number(float, 0), "minutes between checkpoints; 0 = by --save_every alone [15]")
    add("save_every", 0, NATURAL, "steps between checkpoints, beside; 0 = none but the last [0]")
    add("sample_every", 100, NATURAL, "steps between grids of samples; 0 = never")
    add("sample_prompts", None, str, "a txt file, a prompt a line; eight are drawn [captions of the data]", "FILE")
    add("sample_steps", 30, COUNT, "denoising steps of a sample")
    add("guidance", 7.5, number(float, 0), "classifier-free guidance of a sample")
    add("dry_run", False, bool, "print the resolved run and stop")

    args = resolve(options, argv)
    args.out = args.out or f"out/{Path(args.model).name.removesuffix('.safetensors')}-{args.loss}"
    if args.workers is None:
        args.workers = 8 if args.device.startswith("cuda") else 0
    loss_fn = LOSSES[args.loss]
    args.loss_args = parse_loss_args(args, loss_fn)
    held_out_share(args.validate)
    if 0 < args.skip_above <= 1:
        raise InputError(f"--skip_above {args.skip_above:g} would skip half of the steps; it is 0 or above 1")
    if args.reference_errors and not {"ref_err_w", "ref_err_l"} & wants(loss_fn).keys():
        raise InputError(f"--reference_errors: {args.loss} has no reference")
    args.micro_batch = fit_micro_batch(args, args.group_size if "weights" in wants(loss_fn) else 1)
    return args


def encode_args(argv=None):
    """The resolved run of encode.py."""
    options = Options("encode.py", "python encode.py --out CACHE [options]")
    add_shared_options(options)
    options.add("out", None, str, "the cache's folder; started again, it goes on", "CACHE")
    options.add("store", "fp32", ["fp32", "fp16"], "latents and prompt embeddings; fp16: half as large [fp32]")
    args = resolve(options, argv)
    if not args.out:
        raise InputError("--out CACHE is needed")
    if is_cache(args.data):
        raise InputError(f"--data {args.data} is encoded already")
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    args.workers = args.workers or max(1, os.cpu_count() // processes_here)
    return args


def resolve(options, argv):
    """Defaults, presets, the cache of --data and the command line as one; and what follows from them."""
    typed = vars(options.parser.parse_args(argv))
    chosen = options.defaults | typed
    model = chosen["model"]
    preset = PRESETS.get(model, {}) | PRESETS.get(f"{model} {chosen.get('loss')}", {})
    preset = {name: value for name, value in preset.items() if name in options.defaults}
    preset = vars(options.parser.parse_args(as_typed(preset)))
    args = argparse.Namespace(**options.defaults | preset | typed)

    if not args.data:
        raise InputError(f"--model {model} is no preset, so it needs --data")
    if args.random_init:
        if model not in CONFIGS:
            raise InputError(f"--random_init knows {', '.join(CONFIGS)}, not {model}")
        architecture, _, _ = args.clip.partition(":")
        args.clip = typed.get("clip", f"{architecture}:random")
    for name, value in cache_settings(args.data).items():
        if typed.get(name, value) != value:
            raise InputError(f"--{name} {typed[name]}: {args.data} was encoded with {value}; leave the option "
                             "out, or encode the pairs once more")
        setattr(args, name, value)
    device = get_device(args.device)
    is_free = model == "sdxl" and "gradient_checkpointing" in preset.keys() - typed.keys()
    if is_free and args.lora_rank and gpu_bytes(device) > ROOMY:
        args.gradient_checkpointing = False  # an adapter's activations fit: 0.76 of the arithmetic, 0.88 in two passes
    args.device = args.device or device.type
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    args.vae_precision = args.vae_precision or ("bf16" if device.type == "cuda" else "fp32")
    if args.precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs CUDA or MPS; on the CPU take bf16 or fp32")
    return args


def gpu_bytes(device):
    """The memory of a GPU; 0 of another device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def as_typed(values):
    """The command line that sets some values: so a preset passes the checks of what is typed."""
    argv = []
    for name, value in values.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", str(value)]
    return argv


def cache_settings(source):
    """What a cache decides of a run; {} for other data. InputError where it is not finished."""
    if not is_cache(source):
        return {}
    manifest = read_manifest(source)
    if "files" not in manifest:
        raise InputError(f"--data {source} is not finished; the command of encode.py that began it goes on")
    settings = {name: manifest[name] for name in ("resolution", "random_crop", "random_flip", "clip")}
    settings["vae_precision"] = manifest.get("vae_precision", "fp32")
    if manifest["vae_sample"] == "mean":
        settings["vae_sample"] = "mean"
    return settings


def held_out_share(validate):
    """The share that --validate names; 0 where it names pairs, or is None."""
    try:
        share = float(validate)
    except (TypeError, ValueError):
        return 0.0
    if not 0 < share < 1:
        raise InputError(f"--validate {validate}: a share is between 0 and 1")
    return share


def parse_loss_args(args, loss_fn):
    """{name: value} of the hyperparameters of a loss that are no options; InputError where one is amiss.

    A value is parsed as its default's type; as a float where that is None, or there is none.
    """
    parameters = {name: parameter.default for name, parameter in wants(loss_fn).items()
                  if name not in VECTORS and not hasattr(args, name)}
    values = {name: default for name, default in parameters.items() if default is not inspect.Parameter.empty}
    for text in args.loss_args:
        name, _, value = text.partition("=")
        if name not in parameters:
            raise InputError(f"--loss_args {text}: {args.loss} takes {', '.join(parameters) or 'none'}")
        default = parameters[name]
        kind = float if default in (None, inspect.Parameter.empty) else type(default)
        try:
            values[name] = parse_bool(value) if kind is bool else kind(value)
        except ValueError:
            raise InputError(f"--loss_args {text}: {value!r} is no {kind.__name__}")
    missing = parameters.keys() - values.keys()
    if missing:
        raise InputError(f"{args.loss} needs --loss_args {min(missing)}=VALUE")
    return values


def parse_bool(text):
    """True or False of their names. ValueError of any other text."""
    return ("false", "true").index(text.lower()) == 1


def hyperparameters(args):
    """What the loss of a run is called with beside its vectors."""
    names = wants(LOSSES[args.loss]).keys() - VECTORS
    return {name: args.loss_args.get(name, getattr(args, name, None)) for name in sorted(names)}


def fit_micro_batch(args, group_size):
    """--micro_batch, or the largest that divides; where it can, one whose forwards hold whole groups."""
    _, _, world_size = torchrun_env()
    if args.batch_size % group_size:
        raise InputError(f"--batch_size {args.batch_size} is not a multiple of --group_size {group_size}")
    if args.micro_batch == "auto" and get_device(args.device).type != "cuda":
        args.micro_batch = None  # where memory may be swapped, nothing is too much
    least = 1 if args.micro_batch == "auto" else args.micro_batch or 1
    if not fits(least, args):
        raise InputError(f"--batch_size {args.batch_size} is not a multiple of {world_size} processes * "
                         f"--micro_batch {least}")
    pairs_per_process = args.batch_size // world_size
    most = 16 if (args.resolution or 1024) <= 512 else 8
    if (args.resolution or 0) > 768 and not args.gradient_checkpointing:
        most = 4  # of 15 GB each
    sizes = [n for n in range(1, most + 1) if pairs_per_process % n == 0]
    whole_groups = [n for n in sizes if n * world_size % group_size == 0]
    return args.micro_batch or max(whole_groups or sizes)


def fits(micro_batch, args):
    """Whether the batch of all processes is made of such micro-batches."""
    _, _, world_size = torchrun_env()
    return isinstance(micro_batch, int) and args.batch_size % (micro_batch * world_size) == 0


def check_same_run(args, before, out, has_digests=False):
    """InputError where a folder holds a run of other arguments, {name: value}, than those that may change.

    has_digests  of a checkpoint that knows its model and its data by their content: those may have moved
    """
    may_change = MAY_CHANGE | MAY_MOVE if has_digests else MAY_CHANGE
    share, share_before = held_out_share(args.validate), held_out_share(before.get("validate"))
    if before and share != share_before:
        raise InputError(f"{out} holds a run that held out a share of {share_before:g}, not {share:g}, of the "
                         "prompts (--validate); give another --out, or remove it")
    for name, value in vars(args).items():
        recorded = before.get(name, value)
        if name not in may_change and value not in (None, recorded):  # None will become what it became then
            raise InputError(f"{out} holds a run with --{name} {recorded}, not {value}; give another --out, or "
                             "remove it")
