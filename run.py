"""What a run leaves in its folder, and how it goes on: log, samples, checkpoints, model/, and lines about bad ends."""

import contextlib
import json
import math
import os
import secrets
import shutil
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch.utils._pytree import tree_map
from torchvision.utils import save_image
from tqdm import tqdm

import distributed
from common import DTYPES, InputError, atomic_write, brief, is_hidden, keyed_generator
from loading import save_model
from options import recorded_run
from prompts import read_prompts

SHOWN = {"loss": "loss", "reward/margin": "margin", "reward/accuracy": "accuracy", "validate/accuracy": "held out",
         "skipped": "skipped"}  # scalars in the progress bar


def check_shared(folder):
    """InputError if a process does not see the files that rank 0 writes to a folder."""
    rank, _, world_size = distributed.torchrun_env()
    if world_size == 1:
        return
    token, *_ = distributed.all_gather_list([secrets.token_hex(8)])
    file = folder / f".shared-{token}.part"  # a hidden name, in case it is left behind
    try:
        if rank == 0:
            file.touch()
        distributed.barrier()
        blind = distributed.all_gather_list([] if file.exists() else [str(rank)])
    finally:
        if rank == 0:
            file.unlink(missing_ok=True)
    if blind:
        raise InputError(f"process {', '.join(blind)} does not see what process 0 writes to {folder}. The folder must "
                         "lie on storage that all machines share")


# Checkpoints


def newest_checkpoint(folder):
    """The file of a folder's last checkpoint, or None."""
    return max(folder.glob("checkpoint-*.pt"), default=None)


def load_checkpoint(folder):
    """The state of a run's last checkpoint, {} without one.

    raises  InputError if it cannot be read, or if the folder holds anything else than a run
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
        return state
    except Exception as error:
        raise InputError(f"{file} cannot be read ({error!r:.200}). Pass another --out")


def save_checkpoint(folder, state):
    """Writes checkpoint-STEP.pt aside, flushes it, renames it, and removes the earlier ones."""
    file = folder / f"checkpoint-{state['step']:06d}.pt"
    part = file.with_suffix(".part")
    try:
        with open(part, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{file} cannot be written ({brief(error)[:200]}). Kept: "
                         f"{newest_checkpoint(folder) or 'no checkpoint'}. Free some space, then the same command goes on")
    part.replace(file)
    for old in folder.glob("checkpoint-*.pt"):
        if old != file:
            old.unlink()


class CheckpointWriter:
    """Writes the checkpoints of a folder in a thread, one at a time, from copies in the host's memory."""

    def __init__(self, folder):
        self.folder, self.thread, self.error = folder, None, None

    def save(self, state):
        """Starts to write a state, once the one before is written."""
        self.wait()
        state = tree_map(lambda x: x.detach().to("cpu", copy=True) if torch.is_tensor(x) else x, state)
        self.thread = threading.Thread(target=self.write, args=(state,), daemon=True)  # Ctrl-C ends it, too
        self.thread.start()

    def write(self, state):
        try:
            save_checkpoint(self.folder, state)
        except Exception as error:
            self.error = error

    def check(self):
        """Raises the thread's error, if it had one."""
        error, self.error = self.error, None
        if error:
            raise error

    def wait(self):
        """Returns when all is written. InputError if it cannot be written."""
        if self.thread:
            self.thread.join()
        self.check()


# The log


class Log:
    """log.jsonl, a line per step; TensorBoard if it is installed; Weights & Biases if WANDB_PROJECT is set.

    Lines from step `start` on are cut off: these steps come again. Weights & Biases keeps its own; they are the same.
    """

    def __init__(self, folder, start):
        file = folder / "log.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        atomic_write(file, "".join(lines[:start]))
        self.stream = open(file, "a", encoding="utf-8")
        self.board = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=start)
        self.wandb_run = self.begin_wandb(folder) if os.environ.get("WANDB_PROJECT") else None

    @staticmethod
    def begin_wandb(folder):
        """A run of Weights & Biases; a run that goes on continues its own."""
        try:
            import wandb
        except ImportError:
            print("WANDB_PROJECT is set, but wandb is not installed: nothing is logged there")
            return None
        id_file = folder / "wandb-id"
        if not id_file.exists():
            atomic_write(id_file, secrets.token_hex(4))
        arguments = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        try:
            return wandb.init(dir=folder, id=id_file.read_text(), name=folder.name, resume="allow", config=arguments,
                              reinit="finish_previous")
        except Exception as error:
            raise InputError(f"WANDB_PROJECT is set, but wandb cannot begin a run: {brief(error)}. Log in to it, set "
                             "WANDB_MODE=offline, or unset WANDB_PROJECT")

    def write(self, step, scalars):
        print(json.dumps({"step": step} | scalars), file=self.stream, flush=True)
        if self.board:
            for name, value in scalars.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)
        if self.wandb_run:
            self.wandb_run.log(scalars, step=step)

    def sync(self):
        os.fsync(self.stream.fileno())


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
            self.write_json("config.json", vars(args))
            if args.ema:
                self.ema = EMAModel(params.values(), decay=args.ema, foreach=True)

    def write_json(self, name, content):
        atomic_write(self.out / name, json.dumps(content, indent=1))

    def write_report(self):
        report = self.pairs.report()
        if self.held_out:
            report["validate"] = self.held_out.report()
        self.write_json("data.json", report)

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
        if not state:
            return
        for name, param in self.params.items():
            param.data.copy_(state["weights"][name])
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

    def begin(self, start, pairs, held_out):
        """Makes the folder ready for step `start`: removes what is half-written or belongs to later steps."""
        self.logged_at, self.pairs, self.held_out = time.time(), pairs, held_out
        if not self.is_writer:
            return
        for part in self.out.glob("*.part"):
            if part.is_file():
                part.unlink()
        self.write_report()
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
        now = time.time()
        scalars["pairs_per_second"] = args.batch_size / (now - self.logged_at)  # includes saving and drawing
        self.logged_at = now
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
                held_out.plot(self.out)
            if "weights/own" in scalars and args.group_size > 1:
                self.say_what_weights(step, scalars["weights/own"])
            shown = self.measured | scalars
            progress.set_postfix({SHOWN[name]: shown[name] for name in SHOWN if name in shown})
            if is_due(done, args.sample_every, is_last and args.sample_every > 0):
                self.save_samples(done)
        if is_due(done, args.save_every, is_last or flags["stop"] or flags["save"]):
            self.save_checkpoint(done, identity(done))
        if flags["stop"] and not is_last:
            self.checkpoints.wait()
            distributed.end_early(f"saved after {done} steps; the same command goes on")

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
    return bool(at_once or every and done % every == 0)


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


# Lines about bad ends


def explain_not_finite(out, step, scalars, terms):
    """One line about a step with a number that is not finite: the first bad term, and the rows of its pairs.

    terms  for each micro-batch of this rank (rows [B], {name: tensor [B or S*B, ...]} in the order of computation)
    """
    faults = []
    for rows, values in terms:
        for order, (name, value) in enumerate(values.items()):
            is_finite = value.isfinite().unflatten(0, (-1, len(rows)))                  # [1 or S, B, ...]
            is_whole = is_finite.transpose(0, 1).flatten(1).all(dim=1).cpu()            # [B]
            faults += [(order, name, row) for row in rows[~is_whole].tolist()]
    faults = distributed.all_gather_list(faults)
    where = "the loss or its gradient, although all errors are finite"
    if faults:
        first, name, _ = min(faults)
        rows = [str(row) for order, _, row in faults if order == first]
        where = f"{name} of rows {', '.join(rows[:32])}"
    kept = newest_checkpoint(out) or "no checkpoint"
    return (f"step {step}: loss {scalars['loss']}, gradient norm {scalars['grad_norm']}. Not finite: {where}. Kept: "
            f"{kept}. In another --out, try a smaller --lr or --precision fp32")
