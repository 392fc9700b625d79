"""The command lines of train.py and encode.py: options, presets, and the run that they resolve to.

A value comes from the first of these that has it: the command line; the cache of --data; the folder's config.json, when
a run resumes; the preset of --model and --loss; the preset of --model; the default below.
"""

import argparse
import inspect
import json
import math
import os
from pathlib import Path

import torch

from common import InputError, Parser, brief, is_cache, read_manifest
from data import COLUMNS
from distributed import get_device, torchrun_env
from loading import EMBEDDED, HUB_IDS
from loss import LOSSES, wants

H14 = "ViT-H-14:laion2b_s32b_b79k"
TINY = dict(data="tiny", clip="tiny", sample_prompts="tiny", steps=120, batch_size=16, lr=2e-5, warmup=10, beta=500.0,
            prompt_dropout=0.1, validate_every=20, sample_every=40, sample_steps=20, resolution=32)
FLOW = dict(data="pickapic", clip=H14, steps=1000, batch_size=64, lora_rank=32, lr=1e-5, warmup=50, beta=2000.0,
            sft_weight=0.1, resolution=1024, gradient_checkpointing=True)
PRESETS = {  # by model, then by model and loss
    "tiny": TINY,
    "tiny sft": dict(lr=1e-4),
    "tiny-flow": TINY | dict(lora_rank=16, lr=1e-3, beta=20.0),
    "tiny-flow sft": dict(lr=3e-3),
    # sd15 and sdxl are Diffusion-DPO's launchers, which multiply 1e-8 by the batch. Its paper has 2.048e-8 * 2000 / beta.
    "sd15": dict(data="pickapic", clip=H14, steps=2000, batch_size=2048, lr=2.048e-5, warmup=500,
                 random_flip=True, resolution=512, optimizer="adamw"),
    "sdxl": dict(data="pickapic", clip=H14, steps=2000, batch_size=2048, lr=2.048e-5, warmup=200,
                 random_flip=True, resolution=1024, optimizer="adafactor", gradient_checkpointing=True),
    # We did not tune these. Others report such rates and betas (Flow-Factory: 1e-4 collapses; verl-omni). Others' flow
    # models unlearn their winners; extras/hold.csv shows that sft_weight prevents it.
    "sd3.5-medium": FLOW,
    "flux-dev": FLOW,
    "z-image": FLOW,
    "flux2-klein": FLOW,
    "qwen-image": FLOW | dict(timestep_sampling="uniform", timestep_shift=1.0),  # its own DPO's, arXiv:2508.02324
}
# When a run resumes these may differ. Any other change would make it another run.
MAY_CHANGE = {"steps", "micro_batch", "validate", "validate_every", "validate_pairs", "save_minutes", "save_every",
              "sample_every", "gradient_checkpointing", "compile", "reference_errors", "workers", "data_timeout",
              "device", "out", "dry_run"}
MAY_MOVE = {"model", "config", "init_lora", "data", "clip"}  # a checkpoint knows their content, so names may change
BELONG_TO = {"sft_weight": "sft_weight", "weight_position": "weight_position", "tau": "weights", "similarity": "weights"}
# What the trainer gives a loss by name. Any other parameter is a hyperparameter. See the head of loss.py.
VECTORS = {"err_w", "err_l", "ref_err_w", "ref_err_l", "t", "snr", "weights", *COLUMNS}


def number(kind, least, most=math.inf, above=False, may_be_inf=False):
    """A type for argparse: a finite int or float of at least `least` (or above it) and at most `most`."""
    def parse(text):
        value = kind(text)
        if may_be_inf and value == math.inf:
            return value
        if not math.isfinite(value) or value < least or value > most or above and value == least:
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    parse.__name__ = kind.__name__  # argparse prints it if the text is no number
    return parse


COUNT = number(int, 1)
NATURAL = number(int, 0)
POSITIVE = number(float, 0, above=True)


def count_or_auto(text):
    return text if text == "auto" else COUNT(text)


class Options:
    """An argument parser that returns only what was typed, and the defaults beside it."""

    def __init__(self, program, usage):
        self.defaults = {}
        self.parser = Parser(
            prog=program, usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110))

    def group(self, title):
        """The options added from now on stand below this title in --help."""
        self.section = self.parser.add_argument_group(title)

    def add(self, name, default, kind, text, metavar=None):
        """kind: a type, a list of choices, or bool for a flag with its --no-. The help ends with the default."""
        self.defaults[name] = default
        if "[" not in text:
            text += f" [{'off' if default is False else default}]"
        settings = {"type": kind, "metavar": metavar}
        if kind is bool:
            settings = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, (list, dict)):
            settings = {"choices": [*kind]}
        self.section.add_argument(f"--{name}", help=text, **settings)


def add_model_and_data(options):
    options.group("model and data")
    add = options.add
    models = ", ".join([*EMBEDDED, *HUB_IDS])
    add("model", "tiny", str, f"a preset ({models}), a diffusers folder, a hub id, or a .safetensors file of SD or SDXL")
    add("config", None, str, "for a --model in one file: a diffusers folder with its configuration [found "
        "from the weights]", "DIR")
    add("random_init", False, bool, "start a preset with random weights; nothing is downloaded")
    add("init_lora", None, str, "LoRA weights that policy and reference start with: a folder, a file or a hub id [none]",
        "LORA")
    add("data", None, str, "pairs: tiny, pickapic, a parquet or .jsonl file, a folder, a hub id, or a cache of encode.py "
        "[the preset's]", "PAIRS")
    add("clip", None, str, "CLIP for RPO's weights: tiny, or open_clip's ARCH with a tag or a file [the preset's]",
        "ARCH:WEIGHTS")
    add("resolution", None, COUNT, "side of the training images in pixels [the model's own]")
    add("random_flip", False, bool, "mirror half of the pairs")
    add("random_crop", False, bool, "crop a pair at a random place, not in the middle")
    add("vae_sample", "sample", ["mean", "sample"], "take a sample or the mean of the VAE's posterior")
    add("vae_precision", None, ["fp32", "bf16"], "precision of the VAE's encoder [bf16 on cuda, else fp32]")


def add_hardware(options):
    options.group("hardware")
    add = options.add
    add("device", None, str, "cuda, mps or cpu [the best there is]")
    add("precision", None, ["fp32", "bf16", "fp16"], "autocast of the forward passes; what trains is float32 [bf16 on "
        "cuda, else fp32]")
    add("workers", None, NATURAL, "processes (train) or threads (encode) that read images [train: 8 beside a GPU, else "
        "0; encode: all cores]")


def train_options():
    options = Options("train.py", "python train.py [options]")
    add = options.add
    add_model_and_data(options)
    options.group("method")
    add("loss", "rpo", LOSSES, "the objective, a name in LOSSES of loss.py")
    add("beta", 5000.0, POSITIVE, "strength of the pull to the reference (the KL term)")
    add("sft_weight", 0.0, number(float, 0), "dpo, rpo: weight of an SFT term, sft_weight * beta/2 * mean D^w, which "
        "keeps the winners' error from growing; 0 is the papers' form")
    add("group_size", 8, COUNT, "rpo: how many pairs are contrasted with each other")
    add("tau", 0.5, number(float, 0, above=True, may_be_inf=True),
        "rpo: temperature of the cross-pair weights; inf gives uniform weights and loads no CLIP")
    add("similarity", "both", ["text", "image", "both"], "rpo: what the weights compare")
    add("weight_position", "outside", ["outside", "inside"], "rpo: weights outside or inside the log-sigmoid")
    add("group_noise", "own", ["own", "timestep", "both"], "what the pairs of a group share: nothing, the timestep, or "
        "timestep and noise")
    options.defaults["loss_args"] = []
    options.section.add_argument("--loss_args", nargs="+", action="extend", metavar="NAME=VALUE",
                                 help="hyperparameters of the loss that have no option [their defaults]")
    add("prompt_dropout", 0.2, number(float, 0, 1), "share of the pairs that are trained without their prompt")
    add("timestep_sampling", None, ["uniform", "logit_normal"], "flow matching: distribution of times before the shift "
        "[logit_normal; qwen-image: uniform]")
    add("timestep_mean", None, number(float, -math.inf), "flow matching: mean of the logit [0]")
    add("timestep_scale", None, POSITIVE, "flow matching: standard deviation of the logit [1]")
    add("timestep_shift", None, POSITIVE, "flow matching: above 1 favours noisy times [the scheduler's]")
    add("train_guidance", None, number(float, 0), "flux: the guidance that the network is told in training [1]")

    options.group("optimisation")
    add("steps", 1000, COUNT, "optimizer steps")
    add("batch_size", 32, COUNT, "pairs per step, over all processes")
    add("micro_batch", None, count_or_auto, "pairs per forward of one process; changes memory, not the result; auto "
        "tries 1 to 16 [16 up to 512 px; above 768 px without checkpointing 4; else 8]", "N|auto")
    add("optimizer", None, ["adamw", "adafactor", "sgd"], "the optimizer [adafactor for SDXL, else adamw]")
    add("lr", 1e-5, POSITIVE, "learning rate; it is never rescaled")
    add("warmup", 0, NATURAL, "steps of linear warm-up, then the rate is constant")
    add("weight_decay", 0.01, number(float, 0), "weight decay of the optimizer")
    add("max_grad_norm", 1.0, POSITIVE, "gradients are clipped to this norm")
    add("lora_rank", 0, NATURAL, "train an adapter of this rank; 0 trains the whole network")
    add("ema", 0.0, number(float, 0, 0.999999), "keep an exponential moving average of the weights, sample from it and "
        "save it as model/; 0 keeps none", "DECAY")
    add("seed", 0, NATURAL, "seed of all that is random in the run")

    options.group("held-out pairs")
    add("validate", None, str, "measure on held-out pairs: a file, a folder, a cache, tiny, or a share of --data's "
        "prompts such as 0.02 [none]", "PAIRS|SHARE")
    add("validate_every", 100, COUNT, "steps between two measurements")
    add("validate_pairs", 512, COUNT, "measure this many held-out pairs at most")
    add_hardware(options)
    add("gradient_checkpointing", False, bool, "less memory for a third more time [flow presets: on; sdxl: on, but off for "
        "an adapter on a GPU of 80 GB]")
    add("compile", False, bool, "torch.compile the network's blocks; the first step takes minutes")
    add("reference_errors", None, str, "compute the reference's errors before the first step and keep them in FILE, for "
        "all runs that differ in loss, beta, tau or lr only [none]", "FILE")
    add("data_timeout", 600, COUNT, "seconds that --workers may take for a batch")

    options.group("what it leaves")
    add("out", None, str, "the run's folder; the same command resumes from there [out/MODEL-LOSS]", "DIR")
    add("save_minutes", 15.0, number(float, 0), "minutes between two checkpoints; 0 means only --save_every counts")
    add("save_every", 0, NATURAL, "steps between two checkpoints, too; 0 means only --save_minutes counts")
    add("sample_every", 100, NATURAL, "steps between two grids of samples; 0 draws none")
    add("sample_prompts", None, str, "a file of prompts for the grids; the first eight are drawn [captions of the data]",
        "FILE")
    add("sample_steps", 30, COUNT, "denoising steps of a sample")
    add("guidance", None, number(float, 0), "classifier-free guidance of a sample [the model's own]")
    add("dry_run", False, bool, "print the resolved run and stop")
    return options


def train_args(argv=None):
    """The resolved run of train.py. InputError if an option is unknown, a value is out of range, a batch does not fit."""
    options = train_options()
    typed = vars(options.parser.parse_args(argv))
    model, loss = (typed.get(name, options.defaults[name]) for name in ("model", "loss"))
    out = typed.setdefault("out", f"out/{Path(model).name.removesuffix('.safetensors')}-{loss}")
    recorded = recorded_run(Path(out))
    args = resolve(options, typed, recorded)
    if args.workers is None:
        args.workers = 8 if args.device.startswith("cuda") else 0
    loss_fn = LOSSES[args.loss]
    args.loss_args = parse_loss_args(args, loss_fn, typed.get("loss_args", []), recorded.get("loss_args", {}))
    held_out_share(args.validate)
    if args.reference_errors and not {"ref_err_w", "ref_err_l"} & wants(loss_fn).keys():
        raise InputError(f"--reference_errors: {args.loss} has no reference")
    for name, needed in BELONG_TO.items():
        if typed.get(name) and not {name, needed} & wants(loss_fn).keys():
            raise InputError(f"--{name}: {args.loss} takes no {needed}")
    if "micro_batch" not in typed and not fits(args.micro_batch, args):
        args.micro_batch = None  # it was recorded for another number of processes
    if args.micro_batch == "auto" and fits(recorded.get("micro_batch"), args):
        args.micro_batch = recorded["micro_batch"]  # what was found at the start
    micro_batch = fit_micro_batch(args)
    if args.resolution or args.micro_batch:
        args.micro_batch = micro_batch  # otherwise run.open_parts fits it to the model's own resolution
    check_same_options(args, typed, recorded)
    return args


def encode_args(argv=None):
    """The resolved run of encode.py."""
    options = Options("encode.py", "python encode.py --out CACHE [options]")
    add_model_and_data(options)
    add_hardware(options)
    options.group("cache")
    options.add("out", None, str, "the cache's folder; the same command resumes from there [required]", "CACHE")
    options.add("store", "fp32", ["fp32", "fp16"], "precision of stored latents and prompt embeddings; fp16 is half "
                "as large")
    options.add("seed", 0, NATURAL, "seed of crops and flips")
    args = resolve(options, vars(options.parser.parse_args(argv)))
    if not args.out:
        raise InputError("pass --out CACHE")
    if is_cache(args.data):
        raise InputError(f"--data {args.data} is encoded already")
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    args.workers = args.workers or max(1, os.cpu_count() // processes_here)
    return args


def resolve(options, typed, recorded={}):
    """The values of all options. `typed` counts before `recorded`, the arguments of a run that resumes."""
    chosen = options.defaults | recorded | typed
    model = chosen["model"]
    preset = PRESETS.get(model, {}) | PRESETS.get(f"{model} {chosen.get('loss')}", {})
    preset = {name: value for name, value in preset.items() if name in options.defaults}
    preset = vars(options.parser.parse_args(as_typed(preset)))
    args = argparse.Namespace(**options.defaults | preset | recorded | typed)
    if not args.data:
        raise InputError(f"--model {model} is no preset, so pass --data")
    if args.random_init:
        if model not in HUB_IDS:
            raise InputError(f"--random_init knows {', '.join(HUB_IDS)}, not {model}")
        architecture, _, _ = args.clip.partition(":")
        args.clip = typed.get("clip", f"{architecture}:random")
    for name, value in cache_settings(args.data).items():
        if typed.get(name, value) != value:
            raise InputError(f"--{name} {typed[name]}: {args.data} was encoded with {value}. Leave the option out, or "
                             "run encode.py again")
        setattr(args, name, value)
    device = get_device(args.device)
    is_preset = "gradient_checkpointing" in preset.keys() - typed.keys() - recorded.keys()
    if model == "sdxl" and is_preset and args.lora_rank and gpu_bytes(device) > 75e9:
        args.gradient_checkpointing = False  # an adapter's activations fit into 80 GB: 0.76 of the arithmetic
    args.device = args.device or device.type
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    args.vae_precision = args.vae_precision or ("bf16" if device.type == "cuda" else "fp32")
    if args.precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs CUDA or MPS; on a CPU pass bf16 or fp32")
    return args


def as_typed(values):
    """The command line that sets some values, so that a preset passes the checks of what is typed."""
    argv = []
    for name, value in values.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", str(value)]
    return argv


def recorded_run(out):
    """The arguments that a run's folder was begun with, out of its config.json; {} for a new folder."""
    file = out / "config.json"
    try:
        recorded = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({brief(error)[:200]}). Pass another --out")
    return recorded if isinstance(recorded, dict) and "loss" in recorded else {}


def check_same_options(args, typed, recorded):
    """InputError if a folder holds a run with other arguments than those that may change."""
    if not recorded:
        return
    has_checkpoint = any(Path(args.out).glob("checkpoint-*.pt"))
    may_change = MAY_CHANGE | MAY_MOVE if has_checkpoint else MAY_CHANGE
    share, share_before = held_out_share(args.validate), held_out_share(recorded.get("validate"))
    if share != share_before:
        raise InputError(f"{args.out} holds a run that held out a share of {share_before:g} of the prompts "
                         f"(--validate), not {share:g}. Pass another --out, or remove the folder")
    for name in typed.keys() - may_change:
        value, before = getattr(args, name), recorded.get(name)
        if value != before:
            raise InputError(f"{args.out} holds a run with --{name} {before}, not {value}. Pass another --out, or "
                             "remove the folder")


def gpu_bytes(device):
    """The memory of a GPU; 0 for another device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def cache_settings(source):
    """The options that a cache decides; {} for other data. InputError if it is not finished."""
    if not is_cache(source):
        return {}
    manifest = read_manifest(source)
    if "files" not in manifest:
        raise InputError(f"--data {source} is not finished. Run the encode.py command that began it once more")
    settings = {name: manifest[name] for name in ("resolution", "random_crop", "random_flip", "clip")}
    settings["vae_precision"] = manifest.get("vae_precision", "fp32")
    if manifest["vae_sample"] == "mean":
        settings["vae_sample"] = "mean"
    return settings


def held_out_share(validate):
    """The share that --validate names; 0 if it names pairs or is None."""
    try:
        share = float(validate)
    except (TypeError, ValueError):
        return 0.0
    if not 0 < share < 1:
        raise InputError(f"--validate {validate}: a share lies between 0 and 1")
    return share


def parse_loss_args(args, loss_fn, texts, recorded):
    """{name: value} of the loss's hyperparameters that have no option: typed, else recorded, else its defaults.

    A value is parsed as the type of its default, or as a float if there is none. InputError if one is wrong or missing.
    """
    parameters = {name: parameter.default for name, parameter in wants(loss_fn).items()
                  if name not in VECTORS and not hasattr(args, name)}
    values = {name: default for name, default in parameters.items() if default is not inspect.Parameter.empty}
    values |= {name: value for name, value in recorded.items() if name in parameters}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in parameters:
            raise InputError(f"--loss_args {text}: {args.loss} takes {', '.join(parameters) or 'none'}")
        default = parameters[name]
        kind = float if default in (None, inspect.Parameter.empty) else type(default)
        try:
            values[name] = ("false", "true").index(value.lower()) == 1 if kind is bool else kind(value)
        except ValueError:
            raise InputError(f"--loss_args {text}: {value!r} is no {kind.__name__}")
    missing = parameters.keys() - values.keys()
    if missing:
        raise InputError(f"{args.loss} needs --loss_args {min(missing)}=VALUE")
    return values


def hyperparameters(args):
    """What a run's loss is called with beside its vectors."""
    names = wants(LOSSES[args.loss]).keys() - VECTORS
    return {name: args.loss_args.get(name, getattr(args, name, None)) for name in sorted(names)}


def needs_groups(loss_fn):
    """Whether a loss couples pairs, so that it must be called on one whole group of --group_size pairs."""
    return bool({"weights", "group_size"} & wants(loss_fn).keys())


def fit_micro_batch(args):
    """--micro_batch; by default the largest that divides the batch, and if possible holds whole groups."""
    _, _, world_size = torchrun_env()
    group_size = args.group_size if needs_groups(LOSSES[args.loss]) else 1
    if args.batch_size % group_size:
        raise InputError(f"--batch_size {args.batch_size} is not a multiple of --group_size {group_size}")
    if args.micro_batch == "auto" and get_device(args.device).type != "cuda":
        args.micro_batch = None  # a host swaps instead of running out of memory, so there is nothing to try
    least = 1 if args.micro_batch == "auto" else args.micro_batch or 1
    if not fits(least, args):
        raise InputError(f"--batch_size {args.batch_size} is not a multiple of {world_size} processes * "
                         f"--micro_batch {least}")
    pairs_per_process = args.batch_size // world_size
    resolution = args.resolution or 1024
    most = 16 if resolution <= 512 else 8
    if resolution > 768 and not args.gradient_checkpointing:
        most = 4  # each pair takes 15 GB
    sizes = [n for n in range(1, most + 1) if pairs_per_process % n == 0]
    whole_groups = [n for n in sizes if n * world_size % group_size == 0]
    return args.micro_batch or max(whole_groups or sizes)


def fits(micro_batch, args):
    """Whether the batch of all processes divides into such micro-batches."""
    _, _, world_size = torchrun_env()
    return isinstance(micro_batch, int) and args.batch_size % (micro_batch * world_size) == 0
