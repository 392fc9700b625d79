"""A run around its loop: the checks before the first step, what it leaves in its folder, and how it resumes."""

import contextlib
import importlib
import json
import math
import re
import shutil
import time

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import save_image
from tqdm import tqdm

import distributed
import reference
from common import (DTYPES, CheckpointWriter, InputError, Log, atomic_write, brief, is_cache, is_hidden, keyed_generator,
                    newest_checkpoint)
from data import COLUMNS, ImagePairs
from encode import EncodedPairs, check_cache
from extras.prompts import read_prompts
from loading import EMBEDDED, find_model, fuse_lora, load_model, save_model
from loss import LOSSES, wants
from options import H14, fit_micro_batch, recorded_run

SHOWN = {"loss": "loss", "reward/margin": "margin", "reward/accuracy": "accuracy", "validate/accuracy": "held out",
         "skipped": "skipped"}  # scalars in the progress bar
# Dense bf16 by NVIDIA's data sheets, by words of the card's name; the first that fits counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 836, "H100": 989, "H200": 989, "B200": 2250, "A100": 312,
               "L40S": 362, "L40": 181, "L4": 121, "A10": 125, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71}


# Before the first step


def open_parts(args, out, state, device):
    """(pairs, held-out pairs or None, model) of a run. Options that depend on the model get their values."""
    distributed.init_processes(device)
    distributed.check_shared(out)
    if not args.random_init and args.model not in EMBEDDED:  # these are built below, once the data are found good
        find_model(args.model, args.config)
    if is_cache(args.data):
        pairs = EncodedPairs(args.data, args.seed, args.prompt_dropout)
    else:
        pairs = ImagePairs(args.data, args.resolution, args.seed, args.random_crop, args.random_flip,
                           args.prompt_dropout)
    held_out = reference.open_held_out(args, pairs) if args.validate else None
    if state and state["pairs"] != len(pairs):
        raise InputError(f"{out} was begun with {state['pairs']} pairs, but {args.data} now holds {len(pairs)}")
    pairs.check_columns(wants(LOSSES[args.loss]).keys() & set(COLUMNS))

    model = load_model(args.model, args.random_init, args.config)
    if args.init_lora:
        fuse_lora(model, args.init_lora)
    for source in (args.data, args.validate):
        if source and is_cache(source):
            check_cache(source, model, args.model)
    if args.sample_every:
        model.check_scheduler()
    args.resolution = pairs.resolution = model.resolution(args.resolution)
    if held_out:
        held_out.resolution = args.resolution
        reference.check_held_out(args)
    args.micro_batch = args.micro_batch or fit_micro_batch(args)
    model.vae_dtype = DTYPES[args.vae_precision]
    model.set_times(args)
    args.optimizer = args.optimizer or model.optimizer
    args.guidance = model.guidance if args.guidance is None else args.guidance
    args.clip = args.clip or ("tiny" if model.is_toy else H14)
    importlib.import_module("extras.check_loss").check_coupling(args, pairs, model.process)
    distributed.wait_for_data()
    return pairs, held_out, model


def check_same_content(out, state, now):
    """InputError if a checkpoint belongs to another run than this code and this command.

    now  what `Trainer.identity` gives for the steps that the checkpoint has taken
    """
    for name, value in state["digests"].items():
        if now["digests"].get(name) != value:
            raise InputError(f"{out} was begun with another {name} ({value}, now {now['digests'].get(name)}), or by "
                             "other code. Give back what it was begun with, or pass another --out")
    reference.check_draws(f"{out} was trained", state["draw_ids"], now["draw_ids"], state["step"] - 1)
    if now["learning_rates"] != state["learning_rates"]:
        raise InputError(f"with this --steps or this code, the {state['step']} steps that {out} has taken would have "
                         "other learning rates. Pass the --steps that it was begun with, or another --out")


def make_optimizer(args, params):
    settings = dict(lr=args.lr, weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(params, **settings, fused=True)
    if args.optimizer == "sgd":
        return torch.optim.SGD(params, **settings)
    from transformers import Adafactor

    return Adafactor(params, **settings, scale_parameter=False, relative_step=False)


def describe(args, model, params, clip, steps_taken):
    """One line on what runs."""
    trained = sum(param.numel() for param in params) / 1e6
    line = (f"{args.loss} on {args.model}: trains {trained:.1f} of {model.num_parameters / 1e6:.1f} M parameters; "
            f"{args.resolution} px, {args.device}, {args.precision}; {args.batch_size} pairs per step, "
            f"{args.micro_batch} per forward, processes: {distributed.torchrun_env()[2]}")
    if "weights" in wants(LOSSES[args.loss]):
        line += (f"; groups of {args.group_size}, weights {args.weight_position}, tau {args.tau:g}, clip "
                 f"{args.clip if clip else 'not loaded'}")
    return line + (f"; going on after {steps_taken} steps" if steps_taken else "")


def seconds_at_peak(model, first_pairs, runs_reference, device):
    """The seconds that a pair's useful arithmetic takes if all GPUs reach their peak in bf16; None if that is unknown.

    first_pairs  a number of pairs -> their MicroBatch
    """
    peak = peak_flops(device)
    if not peak:
        return None
    inputs = first_pairs(1).inputs
    try:
        policy, forward = count_flops(model, inputs["x"], inputs["t"], inputs["cond"])
    except Exception as error:  # of a family of the user's own; a number for the log is no reason to stop
        distributed.print0(f"flops_utilisation is not logged: {brief(error)}")
        return None
    return (policy + runs_reference * forward) / peak / distributed.torchrun_env()[2]


def peak_flops(device):
    """A GPU's dense bf16 FLOP/s by its data sheet; None for an unknown one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name)]
    is_less = "Laptop" in name or "MIG" in name
    return known[0] * 1e12 if known and not is_less else None


def count_flops(model, *inputs):
    """FLOPs of the denoiser, (forward and backward, forward alone), for the inputs of `predict`. Nothing is computed."""
    x_t, t, cond = tree_map(lambda value: value.to("meta"), inputs)
    denoiser = model.denoiser
    with torch.device("meta"):  # a second network that has shapes and no memory
        network = type(denoiser).from_config(denoiser.config).requires_grad_(True)
        for adapter in getattr(denoiser, "peft_config", {}).values():
            network.requires_grad_(False).add_adapter(adapter)
        with FlopCounterMode(display=False) as both:
            model.predict(network, x_t, t, cond).sum().backward()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model.predict(network, x_t, t, cond)
    return both.get_total_flops(), forward.get_total_flops()


def load_checkpoint(folder, steps):
    """The state of a run's last checkpoint, {} without one.

    raises  InputError if it cannot be read or has more steps, or if the folder holds anything else than a run
    """
    visible = {path.name for path in folder.glob("*") if not is_hidden(path.name)} - {"lock", "config.json.part"}
    if visible and not recorded_run(folder):
        raise InputError(f"{folder} holds something else ({min(visible)}). Pass another --out")
    file = newest_checkpoint(folder)
    if file is None:
        return {}
    try:
        state = torch.load(file, "cpu", weights_only=True, mmap=True)
        missing = {"step", "digests", "draw_ids", "weights"} - state.keys()
        if missing:
            raise ValueError(f"it has no {min(missing)}")
    except Exception as error:
        raise InputError(f"{file} cannot be read ({error!r:.200}). Remove it to begin again, or pass another --out")
    if state["step"] > steps:
        raise InputError(f"{folder} has taken {state['step']} steps already; --steps {steps} is less")
    return state


# All that rank 0 writes


class Output:
    """Writes what a run leaves. Rank 0 writes; samples and model/ are the averaged weights, if --ema keeps them.

    ema        diffusers' EMAModel on rank 0, or None
    base_grid  samples of the starting model, in the first row of every grid
    """

    def __init__(self, out, args, model, params, optimizer, scaler):
        self.out, self.args, self.model, self.params = out, args, model, params
        self.optimizer, self.scaler, self.skipped, self.ema = optimizer, scaler, 0, None
        self.is_one_hot = True  # whether every step so far had one-hot weights
        self.measured = {}  # the last measurement of held-out pairs
        self.checkpoints, self.saved_at = CheckpointWriter(out), time.time()
        self.is_writer = distributed.torchrun_env()[0] == 0
        if self.is_writer:
            atomic_write(out / "config.json", json.dumps(vars(args), indent=1))
            if args.ema:
                self.ema = EMAModel(params.values(), decay=args.ema, foreach=True)

    def write_report(self):
        report = self.pairs.report()
        if self.held_out:
            report["validate"] = self.held_out.report()
        atomic_write(self.out / "data.json", json.dumps(report, indent=1))

    def draw_base_grid(self, pairs):
        """Samples from the starting model for eight prompts: those of --sample_prompts, else captions of the data."""
        try:
            prompts = read_prompts(self.args.sample_prompts) if self.args.sample_prompts else []
        except InputError as error:
            raise InputError(str(error).replace("--prompts", "--sample_prompts"))
        prompts = prompts or [pairs.caption(row) for row in pairs.rows[:100]]
        prompts = list(dict.fromkeys(filter(None, prompts)))[:8] or [""]
        self.embeds = self.model.sampling_embeds(prompts, DTYPES[self.args.precision])
        self.base_grid = self.draw()

    def draw(self):
        """Pictures [N, 3, H, W] in [0, 1] of the prompts, always from the same noise. Small ones are enlarged."""
        args, images = self.args, []
        size = {"height": args.resolution, "width": args.resolution}
        count = len(self.embeds["prompt_embeds"])
        for k in range(0, count, 4):  # at most four at once, to save memory
            embeds = {name: value[k:k + 4] for name, value in self.embeds.items()}
            noise = [keyed_generator(args.seed, "sample", i) for i in range(k, min(k + 4, count))]
            with torch.compiler.set_stance("force_eager"):  # no graphs for sizes that no step has
                latents = self.model.sample(None, noise, args.sample_steps, args.guidance, DTYPES[args.precision],
                                            **embeds, **size)
            images.append(self.model.decode(latents))
        return F.interpolate(torch.cat(images), scale_factor=max(1, 128 // args.resolution))

    @contextlib.contextmanager
    def averaged_weights(self):
        """Inside, rank 0's network has the averaged weights, if there are any."""
        params = self.params.values()
        if self.ema:
            self.ema.store(params)
            self.ema.copy_to(params)
        yield
        if self.ema:
            self.ema.restore(params)

    def with_averaged_weights(self, function):
        """`function()`, called on every rank with rank 0's averaged weights, if there are any."""
        if not self.args.ema:
            return function()
        with self.averaged_weights():
            for param in self.params.values():
                distributed.broadcast(param)
            result = function()
        for param in self.params.values():  # back to the weights, which are the same everywhere
            distributed.broadcast(param)
        return result

    def restore(self, state):
        """Loads weights, optimizer, scaler and average of a checkpoint, and lets go of its mapped file."""
        self.logged_at = time.time()
        if self.is_writer:
            self.write_report()
        for name, param in self.params.items():
            if state:
                param.data.copy_(state["weights"][name])
            distributed.broadcast(param)
        if not state:
            return
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for param, of_param in self.optimizer.state.items():
            for name, value in of_param.items():
                if torch.is_tensor(value):
                    of_param[name] = copy_in_layout(value, param)
        if self.ema:
            averages = zip(state["ema"]["shadow_params"], self.params.values())
            copies = [copy_in_layout(value, param) for value, param in averages]
            self.ema.load_state_dict(state["ema"] | {"shadow_params": copies})
        self.skipped = state["skipped"]
        state.clear()

    def begin(self, start, pairs, held_out, seconds_at_peak):
        """Makes the folder ready for step `start`: removes what is half-written or belongs to later steps."""
        self.pairs, self.held_out = pairs, held_out
        self.seconds_at_peak = seconds_at_peak
        if not self.is_writer:
            return
        for part in self.out.glob("*.part"):
            if part.is_file():
                part.unlink()
        (self.out / "samples").mkdir(exist_ok=True)
        model = self.out / "model"
        if start < self.args.steps and model.exists():  # the result of an earlier --steps
            earlier = self.out / f"model-{start:06d}"
            shutil.rmtree(earlier, ignore_errors=True)
            model.rename(earlier)
        self.log = Log(self.out, start)

    def after_step(self, step, scalars, flags, progress, held_out, identity):
        """Measures held-out pairs, logs, draws samples and saves a checkpoint, each when it is due.

        flags     {"stop", "save"}: whether a signal or the clock asks for it
        identity  a number of steps -> what their checkpoint is known by
        """
        args, done = self.args, step + 1
        is_last = done == args.steps
        if self.ema:
            self.ema.step(self.params.values())
        now = time.time()
        scalars["pairs_per_second"] = args.batch_size / (now - self.logged_at)  # includes saving and drawing
        self.logged_at = now
        if self.seconds_at_peak:
            scalars["flops_utilisation"] = scalars["pairs_per_second"] * self.seconds_at_peak
        self.checkpoints.check()
        if self.scaler.is_enabled():
            if not math.isfinite(scalars["grad_norm"]):
                self.skipped += 1
                scalars["grad_norm"] = None
            scalars["skipped"] = self.skipped
        if held_out and is_due(done, args.validate_every, is_last):
            self.measured = self.with_averaged_weights(lambda: held_out.measure(args.beta))
            scalars |= self.measured
        if self.is_writer:
            self.log.write(step, scalars)
            if "validate/margin" in scalars:
                importlib.import_module("extras.curves").plot_validation(self.out)
            if "weights/own" in scalars and args.group_size > 1:
                self.say_what_weights(step, scalars["weights/own"])
            shown = self.measured | scalars
            progress.set_postfix({SHOWN[name]: shown[name] for name in SHOWN if name in shown})
            if is_due(done, args.sample_every, is_last and args.sample_every):
                self.save_samples(done)
        if is_due(done, args.save_every, is_last or flags["stop"] or flags["save"]):
            self.save_checkpoint(done, identity(done))
        if flags["stop"] and not is_last:
            self.checkpoints.wait()
            distributed.end_early(f"saved after {done} steps; the same command resumes")

    def save_samples(self, done):
        with self.averaged_weights():
            grid = torch.cat([self.base_grid, self.draw()])
        file = self.out / "samples" / f"{done:06d}.png"
        save_image(grid, file, nrow=len(self.base_grid), padding=0)

    def say_what_weights(self, step, own_weight):
        """Prints how the first step's groups are weighted, and warns if the first 20 steps are plain DPO."""
        self.is_one_hot &= own_weight > 0.999
        if step == 0:
            tqdm.write(f"in the first groups a winner's own loser has {own_weight:.3f} of the weight")
        if step == 19 and self.is_one_hot:
            tqdm.write("over 20 steps it had more than 0.999: these weights are one-hot, so this run is Diffusion-DPO. "
                       "See --tau")

    def is_save_due(self):
        """Whether --save_minutes have passed by rank 0's clock."""
        minutes = self.args.save_minutes
        return self.is_writer and minutes > 0 and time.time() - self.saved_at > 60 * minutes

    def save_checkpoint(self, done, identity):
        """Starts to write a checkpoint after `done` steps; `identity` is what the run is known by (see train.py)."""
        if not self.is_writer:
            return
        self.log.sync()
        self.saved_at = time.time()
        self.checkpoints.save(identity | {
            "step": done,
            "weights": self.params,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "ema": self.ema.state_dict() if self.ema else None,
        })

    def save_model(self):
        """Saves model/. It is written aside and renamed, so it is whole or not there."""
        if not self.is_writer:
            return
        part = self.out / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        with self.averaged_weights():
            save_model(self.model, part)
        (part / "README.md").write_text(model_card(self.args), encoding="utf-8")
        self.write_report()
        part.rename(self.out / "model")


def is_due(done, every, at_once):
    return at_once or every and done % every == 0


def copy_in_layout(value, param):
    """A copy of a checkpoint's tensor; if it has the parameter's shape, on its device and in its memory layout."""
    if value.shape != param.shape:
        return value.clone()
    return torch.empty_like(param).copy_(value)


def model_card(args):
    tags = ["preference-optimization", args.loss]
    if args.lora_rank:
        tags.append("lora")
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [{", ".join(tags)}]
---
`{args.model}` aligned with the preference pairs `{args.data}` by {args.loss} (diffusion-rpo):

    {json.dumps(vars(args))}
"""


def check_finite(output, step, scalars, terms):
    """InputError if a step's loss or gradient is not finite: it names the first bad term, and the rows of its pairs.

    A gradient that overflows fp16 is fine, because the scaler skips that step.

    terms  a step -> for each micro-batch of this rank (rows [B], {name: tensor [B or S*B, ...]})
    """
    scaler = output.scaler
    is_overflow = scaler.is_enabled() and scaler.get_scale() >= 1
    if math.isfinite(scalars["loss"]) and (is_overflow or math.isfinite(scalars["grad_norm"])):
        return
    output.checkpoints.wait()
    words = {  # in the order of computation
        "latents": "the VAE's latents", "clip_embeds": "the CLIP embeddings", "ref_err_w": "the reference's errors",
        "ref_err_l": "the reference's errors", "err": "the policy's errors"}
    faults = []
    for rows, values in terms(step):
        for order, (key, name) in enumerate(words.items()):
            if key not in values:
                continue
            is_finite = values[key].isfinite().unflatten(0, (-1, len(rows)))            # [1 or S, B, ...]
            is_whole = is_finite.transpose(0, 1).flatten(1).all(dim=1).cpu()            # [B]
            faults += [(order, name, row) for row in rows[~is_whole].tolist()]
    faults = distributed.all_gather_list(faults)
    where = "the loss or its gradient, although all errors are finite"
    if faults:
        first, name, _ = min(faults)
        rows = [str(row) for order, _, row in faults if order == first]
        where = f"{name} of rows {', '.join(rows[:32])}"
    kept = newest_checkpoint(output.out) or "no checkpoint"
    raise InputError(f"step {step}: loss {scalars['loss']}, gradient norm {scalars['grad_norm']}. Not finite: {where}. "
                     f"Kept: {kept}. In another --out, try a smaller --lr or --precision fp32")
