"""How a run stops, dies and goes on: the folder, its checkpoints, signals, lost processes, stalled storage.

A run is a function of its arguments, and a checkpoint of the steps taken: weights, optimizer, scaler, step.
No generator has a state to save: timestep, noise, crop and order follow from (seed, step or epoch, position).
So the same command goes on by itself, and ends in the weights of a run that nobody killed: in the same bits in
float32 on a CPU.
"""

import os

LAUNCHER = os.getppid()  # before the seconds that other imports take, in which it may be killed

import json
import multiprocessing
import re
import signal
import sys
import threading
import time

import torch

MAY_CHANGE = {  # when a run goes on; anything else would make it another run
    "steps", "micro_batch", "save_every", "sample_every", "gradient_checkpointing", "compile",
    "reference_errors", "workers", "data_timeout", "device", "out", "dry_run"}
RELIEF = [  # of memory: an option, whether it is used already, whether the same run may take it
    ("--micro_batch 1", lambda args: args.micro_batch == 1, True),
    ("--gradient_checkpointing", lambda args: args.gradient_checkpointing, True),
    ("--reference_errors FILE (no second UNet)",
     lambda args: args.reference_errors or args.lora_rank or args.loss == "sft", True),
    ("fewer --workers", lambda args: not args.workers, True),
    ("--lora_rank 16", lambda args: args.lora_rank, False),
    ("--optimizer adafactor", lambda args: args.optimizer != "adamw" or args.lora_rank, False),
    ("a smaller --resolution", lambda args: False, False)]
MEANINGS = {  # of words in the libraries' errors
    r"DataLoader worker \(pid": "a process that reads images has died; if for memory, try fewer --workers",
    "be decoded any more": "the data are out of reach",
    "onnection (closed|reset) by peer|remote process exited": "another process of this run has ended",
    "No space left|os error 28|File too large|uota exceeded": "there is no room to write",
}


def newest(out):
    """The file of the last checkpoint of a folder, or None."""
    return max(out.glob("checkpoint-*.pt"), default=None)


def load(out, args):
    """The state in the last checkpoint of the folder `out`, {} where there is none, for a run of `args`.

    raises  SystemExit, in one line, where the folder is another run's or holds anything else
    """
    file, config = newest(out), out / "config.json"
    strange = {file.name for file in out.glob("*")} - {"lock", "config.json.part"}
    try:
        state = torch.load(file, "cpu", weights_only=True, mmap=True) if file else {}
        theirs = state["args"] if state else json.loads(config.read_text()) if config.exists() else {}
    except Exception as error:
        sys.exit(f"train.py: {file or config} cannot be read ({error!r:.200}); give another --out")
    if strange and "loss" not in theirs:
        sys.exit(f"train.py: {out} holds something else ({min(strange)}); give another --out")
    for name, value in vars(args).items():  # None will become what it became then
        if name not in MAY_CHANGE and value is not None and value != theirs.get(name, value):
            sys.exit(f"train.py: {out} holds a run with --{name} {theirs[name]}, not {value}; give another "
                     "--out, or remove it")
    if state and state["step"] > args.steps:
        sys.exit(f"train.py: {out} has taken {state['step']} steps already; --steps {args.steps} is less")
    return state


def save(out, state):
    """Writes a checkpoint aside, flushes it, renames it, then removes the one before: one is always whole."""
    file = out / f"checkpoint-{state['step']:06d}.pt"
    part = file.with_suffix(".part")
    try:
        with open(part, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        if "DataLoader worker" in str(error):  # it may be raised anywhere
            raise
        sys.exit(f"train.py: {file} cannot be written ({error!r:.200}). Kept: {newest(out) or 'no checkpoint'}. "
                 "With more room the same command goes on")
    part.replace(file)
    for old in out.glob("checkpoint-*.pt"):
        if old != file:
            old.unlink()


def write(file, content, own=""):
    """Text or bytes as a file, aside first and flushed, so that nobody reads half of it.

    own  a name of this process where others may write the same file
    """
    part = file.with_name(f"{file.name}{own}.part")
    try:
        with open(part, "wb") as stream:
            stream.write(content if isinstance(content, bytes) else content.encode())
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def catch_signals():
    """A list that grows by SIGTERM and Ctrl-C, for the step to be finished; a second Ctrl-C ends all."""
    def asked(number, _):
        stop.append(number)
        if number == signal.SIGINT:  # not SIGTERM, of which Slurm and torchrun may both send one
            signal.signal(signal.SIGINT, signal.default_int_handler)

    stop = []
    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, asked)
    return stop


def ignore_signals(_):
    """For the loader's processes: torchrun, Slurm and Ctrl-C signal them too; the step needs their data."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def release():
    """Gives the signals back and ends the loader's processes, which ignore a request, or hang in a read."""
    for number in (signal.SIGTERM, signal.SIGCHLD):  # the latter is the loader's, to report dead processes
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def end_with_launcher():
    """Ends this process soon after torchrun: killed by -9, that leaves its workers running."""
    def watch():
        while os.getppid() == LAUNCHER:
            time.sleep(0.2)
        os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def within(seconds, iterator):
    """Yields what `iterator` does. Where that takes longer for one of them, this process ends in one line."""
    def stalled(*_):  # not sys.exit, which would wait for a thread that hangs in a read
        release()
        os.write(2, f"train.py: no data came for {seconds} s: is the storage slow, or gone? The same command "
                    "goes on from the last checkpoint; --data_timeout sets the limit\n".encode())
        os._exit(1)

    signal.signal(signal.SIGALRM, stalled)
    while True:
        signal.alarm(seconds)
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            signal.alarm(0)
        yield item


def out_of_memory(error):
    """The first line of an error of Python, CUDA, torch or oneDNN that means too little memory, else None."""
    text = str(error).strip() or type(error).__name__
    short = "out of memory|MemoryError|(can't|annot) allocate memory|not (create|execute) a primitive"
    return text.splitlines()[0][:200] if re.search(short, text) else None


def explain(error, args):
    """Ends the process in one line where a library's error has a known meaning; else does nothing."""
    if short := out_of_memory(error):
        now, anew = ([name for name, used, may in RELIEF if may == same and not used(args)]
                     for same in (True, False))
        now = f"The same command goes on with {' or '.join(now)}; in" if now else "In"
        sys.exit(f"train.py: out of memory ({short}). {now} another --out, {' or '.join(anew)} helps")
    text = str(error).strip() or type(error).__name__
    if isinstance(error, (ConnectionError, EOFError)):  # Python's own; those between ranks are torch's
        text = f"DataLoader worker (pid unknown): {text}"
    for words, meaning in MEANINGS.items():
        if re.search(words, text):
            sys.exit(f"train.py: {meaning} ({text.splitlines()[-1]}). The same command goes on "
                     "from the last checkpoint")
