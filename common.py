"""What every command shares: processes, keyed randomness, digests, whole files, checkpoints, how a run ends."""

import os

LAUNCHER = os.getppid()  # noted before the imports, which take seconds in which the launcher may be killed

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import multiprocessing
import re
import secrets
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

BEAT, SILENCE = 5, 40  # seconds between the signs of life of a process; after which it is taken for lost
ENDED = threading.Event()  # this process is about to end: nobody need be watched any more
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by --precision


class InputError(ValueError):
    """What the caller can mend: a command prints it as one line. Any other error keeps its traceback."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError where argparse would print its usage and exit."""

    def error(self, message):
        raise InputError(message)


def brief(error):
    """The first line of an exception's text, for messages of one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def one_line(error, advice):
    """What a command says of an error whose meaning is known, in one line; None for any other.

    advice  what helps where memory is short
    """
    text = str(error).strip()
    if "\nOriginal Traceback" in text:  # of a loader's process, which puts that before its message
        text = text.splitlines()[-1].removeprefix("common.InputError: ")
    if isinstance(error, InputError):
        return text
    first_line = brief(text or type(error).__name__)[:200]
    if isinstance(error, MemoryError) or re.search("out of memory|t allocate memory", text):
        return f"out of memory ({first_line}). {advice}"
    if re.search("No space left|os error 28|File too large|uota exceeded", text):
        return f"there is no room to write ({first_line}). With more room the same command goes on"

    # A reader that dies while it hands over a tensor shows as a broken connection to it.
    is_lost = re.search(r"DataLoader (worker \(pid|timed out)", text)
    if isinstance(error, (ConnectionError, EOFError)):
        frames = traceback.extract_tb(error.__traceback__)
        is_lost = any(frame.filename == torch.utils.data.dataloader.__file__ for frame in frames)
    if is_lost:
        return (f"reading the data broke off: {first_line}. The same command goes on from the last checkpoint; "
                "fewer --workers take less memory, a larger --data_timeout waits longer")
    if dist.is_initialized() and re.search("gloo/|NCCL|by peer", text):
        return (f"another process, or the way to it, is lost ({first_line}). The same command goes on from the last "
                "checkpoint")


@contextlib.contextmanager
def one_line_errors(program, advice=""):
    """The body of a command: an error that `one_line` knows ends it in that line and exit code 1.

    Every process says its own: it may be the only one that failed.
    """
    try:
        yield
    except Exception as error:
        message = one_line(error, advice)
        if message is None:
            raise
    else:
        return
    rank, _, _ = torchrun_env()
    name = f"process {rank}: " if rank else ""
    sys.exit(f"{program}: {name}{message}")


def torchrun_env():
    """(rank, rank on this machine, number of processes) as torchrun sets them; without it (0, 0, 1)."""
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in names.items())


def print0(words):
    """One of all processes prints."""
    if torchrun_env()[0] == 0:
        print(words)


def get_device(name=None):
    """The torch.device of this process: `name`, or the best there is; under torchrun "cuda" is its own GPU.

    raises  InputError where it is not there, or where torchrun starts more processes than there are GPUs
    """
    _, local_rank, world_size = torchrun_env()
    gpus = torch.cuda.device_count()
    available = ["cuda"] if gpus else []
    if world_size == 1:
        available += [f"cuda:{i}" for i in range(gpus)]
        available += ["mps"] if torch.backends.mps.is_available() else []
    available.append("cpu")
    name = name or next(kind for kind in ("cuda", "mps", "cpu") if kind in available)
    if name not in available:
        raise InputError(f"--device {name} is not there; this machine has {', '.join(available)}")
    if name == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) > gpus:
        raise InputError(f"more processes than GPUs: --nproc_per_node must be at most {gpus}, or --device cpu")
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)


def keyed_generator(*key):
    """A CPU random generator that is a function of its key (integers and strings) alone."""
    seed = hashlib.sha256(repr(key).encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)


def digest(content):
    """16 hex digits: of bytes, of a network's tensors (name, type, shape, values), else of its JSON."""
    sha = hashlib.sha256()
    if isinstance(content, torch.nn.Module):
        for name, tensor in sorted(content.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
            sha.update(tensor.cpu().contiguous().numpy())
    elif isinstance(content, bytes):
        sha.update(content)
    else:
        sha.update(json.dumps(content, sort_keys=True).encode())
    return sha.hexdigest()[:16]


def fingerprint(network):
    """16 hex digits of a network by its tensors' names, shapes and first, middle and last values in float32.

    Quick at any size, and the same whatever files it was read from. It misses a change of other values alone.
    """
    samples = []
    for name, tensor in sorted(network.state_dict().items()):
        flat, middle = tensor.flatten(), tensor.numel() // 2
        ends = torch.cat([flat[:16], flat[middle:middle + 16], flat[-16:]])
        samples.append([name, [*tensor.shape], ends.float().cpu().numpy().tobytes().hex()])
    return digest(samples)


def is_hidden(path, marks="."):
    """Whether a part of a relative path begins with one of `marks`, as .DS_Store, ._x, .ipynb_checkpoints do."""
    return any(part[0] in marks for part in Path(path).parts)


def hub_id(source):
    """`source` where it may be a NAMESPACE/NAME; else it is a mistyped path, and the hub is not asked."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise FileNotFoundError("there is no such file or folder")
    return source


def clip_tokenizer(length):
    """transformers' CLIPTokenizer with CLIP's own vocabulary, which open_clip carries."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    tokenizer = SimpleTokenizer()
    words = [*tokenizer.encoder][:-2] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, [*tokenizer.bpe_ranks], model_max_length=length)


# Files and folders


def atomic_write(file, content, suffix=""):
    """Text or bytes as a file, written aside, flushed and renamed, so that nobody reads half of it.

    suffix  a name of this process where others may write the same file
    """
    part = file.with_name(f"{file.name}{suffix}.part")
    try:
        with open(part, "wb") as stream:
            stream.write(content if isinstance(content, bytes) else content.encode())
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_csv(file, names, rows):
    """Rows, dicts, as a csv file of these columns, whole or not there; None and what is missing are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(file, text.getvalue())


def newest_checkpoint(folder):
    """The file of the last checkpoint of a folder, or None."""
    return max(folder.glob("checkpoint-*.pt"), default=None)


class CheckpointWriter:
    """Writes the checkpoints of a folder by a thread, one at a time, from copies on the host: steps go on meanwhile."""

    def __init__(self, folder):
        self.folder, self.thread, self.error = folder, None, None

    def save(self, state, kept=None):
        """Begins to write a state, once the one before is written."""
        self.wait()
        state = tree_map(lambda x: x.detach().to("cpu", copy=True) if torch.is_tensor(x) else x, state)
        self.thread = threading.Thread(target=self.write, args=(state, kept), daemon=True)  # Ctrl-C ends it, too
        self.thread.start()

    def write(self, state, kept):
        try:
            save_checkpoint(self.folder, state, kept)
        except Exception as error:
            self.error = error

    def check(self):
        """Raises what went wrong in the thread, if it has ended."""
        error, self.error = self.error, None
        if error:
            raise error

    def wait(self):
        """Returns when all is written. InputError where it cannot be."""
        if self.thread:
            self.thread.join()
        self.check()


def save_checkpoint(folder, state, kept=None):
    """Writes checkpoint-STEP.pt aside, flushes, renames it, and removes those before, but one that is to be kept."""
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
                         f"{newest_checkpoint(folder) or 'no checkpoint'}. With more room the same command goes on")
    part.replace(file)
    for old in folder.glob("checkpoint-*.pt"):
        if old not in (file, kept):
            old.unlink()


def load_checkpoint(folder):
    """(state, arguments) of a run's last checkpoint, or ({}, those of its config.json), or ({}, {}).

    raises  InputError where one cannot be read, or the folder holds anything else
    """
    file, config = newest_checkpoint(folder), folder / "config.json"
    state, arguments = {}, {}
    try:
        if file:
            state = torch.load(file, "cpu", weights_only=True, mmap=True)
            arguments = state["args"]
        elif config.exists():
            arguments = json.loads(config.read_text())
    except Exception as error:
        raise InputError(f"{file or config} cannot be read ({error!r:.200}); give another --out")
    strange = {path.name for path in folder.glob("*") if not is_hidden(path.name)} - {"lock", "config.json.part"}
    if strange and "loss" not in arguments:
        raise InputError(f"{folder} holds something else ({min(strange)}); give another --out")
    if state and "records" not in state:
        raise InputError(f"{file} was written by the first edition; give another --out")
    return state, arguments


class Log:
    """log.jsonl, a line a step; TensorBoard where it is installed; Weights & Biases where WANDB_PROJECT is set.

    Lines from step `start` on are cut off. Weights & Biases keeps what it has of them: they come again the same.
    """

    def __init__(self, folder, start):
        file = folder / "log.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        atomic_write(file, "".join(lines[:start]))
        self.stream = open(file, "a")
        self.board = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=start)
        self.wandb_run = None
        if os.environ.get("WANDB_PROJECT"):
            self.wandb_run = self.begin_wandb(folder)

    @staticmethod
    def begin_wandb(folder):
        """A run of Weights & Biases, the same whenever the folder's run goes on."""
        try:
            import wandb
        except ImportError:
            print("WANDB_PROJECT is set, but wandb is not installed: nothing is logged there")
            return None
        id_file = folder / "wandb-id"
        if not id_file.exists():
            atomic_write(id_file, secrets.token_hex(4))
        arguments = json.loads((folder / "config.json").read_text())
        try:
            return wandb.init(dir=folder, id=id_file.read_text(), name=folder.name, resume="allow", config=arguments,
                              reinit="finish_previous")
        except Exception as error:
            raise InputError(f"WANDB_PROJECT is set, but wandb cannot begin a run: {brief(error)}. Log in to it, set "
                             "WANDB_MODE=offline, or unset WANDB_PROJECT")

    def write(self, step, record):
        line = json.dumps({"step": step} | record)
        print(line, file=self.stream, flush=True)
        if self.board:
            for name, value in record.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)
        if self.wandb_run:
            self.wandb_run.log(record, step=step)

    def sync(self):
        os.fsync(self.stream.fileno())


@contextlib.contextmanager
def run_folder(folder):
    """Makes `folder` and keeps other live runs out of it; leaves no trace where nothing else was written."""
    folder = Path(folder)
    nearest = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{folder} cannot be made: {nearest} is no folder that can be written to")
    is_new = not folder.exists()
    lock = filelock.FileLock(folder / "lock", timeout=2)
    try:
        if torchrun_env()[0] == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        yield folder
    except filelock.Timeout:
        raise InputError(f"another live run is writing to {folder}")
    finally:
        if lock.is_locked and [file.name for file in folder.iterdir()] == ["lock"]:
            (folder / "lock").unlink()
            if is_new:
                folder.rmdir()
        lock.release()


# Processes and signals


def to_device(tensor, device):
    """A tensor of the host on a device, without waiting for what the device still has to do."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def init_processes(device):
    """Joins the processes of torchrun; nothing to do without it."""
    if torchrun_env()[2] > 1:
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(device)
        # Patient: others wait while the first one samples and saves. What is lost is noticed by the heartbeat.
        dist.init_process_group("nccl" if is_cuda else "gloo", timeout=timedelta(minutes=30),
                                device_id=device if is_cuda else None)
        Heartbeat().start()


class Heartbeat:
    """Ends this process, in one line, where another one or the way to it is lost: a collective would wait for it.

    A thread of every process writes a number to the launcher's store every BEAT seconds, whatever the process is
    doing: it may sample or save for as long as it takes. The first process listens to all and says who is lost, the
    others listen to the first. A second thread keeps the time, for the first may itself wait for the store.
    """

    def __init__(self):
        self.rank, _, world_size = torchrun_env()
        now = time.monotonic()
        self.heard = {rank: now for rank in (range(1, world_size) if self.rank == 0 else [0])}  # {rank: when}
        self.lost = None  # who, in words

    def start(self):
        ENDED.clear()
        for task in (self.exchange, self.watch):
            threading.Thread(target=task, daemon=True).start()

    @contextlib.contextmanager
    def store(self):
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        with contextlib.suppress(RuntimeError):  # it is gone, or out of reach: then all are silent
            yield dist.PrefixStore(f"heartbeat {attempt}", dist.TCPStore(host, port, is_master=False))

    def exchange(self):
        beats = {}
        with self.store() as store:
            for beat in itertools.count():
                store.set(str(self.rank), str(beat))
                for rank in self.heard:
                    heard = store.get(str(rank)) if store.check([str(rank)]) else None
                    if heard != beats.get(rank):
                        beats[rank], self.heard[rank] = heard, time.monotonic()
                if self.rank == 0 and self.lost:
                    store.set("lost", self.lost)
                elif store.check(["lost"]):
                    self.lost = store.get("lost").decode()
                if ENDED.wait(BEAT):
                    break

    def watch(self):
        last_look = time.monotonic()
        while not ENDED.wait(BEAT / 5):
            now = time.monotonic()
            if now - last_look > BEAT:  # this process was stopped itself, as by Slurm, and could not hear
                self.heard = dict.fromkeys(self.heard, now)
            last_look = now
            silent = [rank for rank, when in self.heard.items() if now - when > SILENCE]
            if silent:
                self.lost = f"nothing was heard of process {', '.join(map(str, silent))} for {SILENCE} s"
            if silent and self.rank == 0 and ENDED.wait(2 * BEAT):  # in which the others read it
                break
            if self.lost:
                print(f"\ntrain.py: process {self.rank}: {self.lost}: a machine or the network is gone. The same "
                      "command goes on from the last checkpoint", file=sys.stderr, flush=True)  # below the bar
                os._exit(1)


def check_shared(folder):
    """InputError where a process does not see the files of the first one in a folder."""
    if not dist.is_initialized():
        return
    rank, _, _ = torchrun_env()
    token, *_ = all_gather_list([secrets.token_hex(8)])
    file = folder / f".shared-{token}.part"  # hidden: should it be left, it is nobody's
    try:
        if rank == 0:
            file.touch()
        dist.barrier()
        blind = all_gather_list([] if file.exists() else [str(rank)])
    finally:
        if rank == 0:
            file.unlink(missing_ok=True)
    if blind:
        raise InputError(f"process {', '.join(blind)} does not see what process 0 writes to {folder}; it must lie on "
                         "storage that all machines share")


def check_alike(values):
    """InputError where a process has other values, {name: value}, than the first one."""
    first, *others = all_gather_list([values])
    for rank, other in enumerate(others, 1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise InputError(f"process {rank} has another {name} than process 0 ({other.get(name)}, "
                                 f"{first.get(name)}); give all machines the same files")


def all_gather(x):
    """[n, ...] of every process -> [world_size n, ...], in the order of their ranks."""
    if not dist.is_initialized():
        return x
    gathered = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous())
    return gathered


def gather_micro_batches(micro_batches, across=True):
    """Micro-batches [[B, ...]] of each process -> [n, ...] in the order of their positions.

    across  the micro-batches of all processes, else of this one alone
    """
    values = torch.stack(micro_batches)[None]                           # [1, micro-batches, B, ...]
    if across:
        values = all_gather(values)                                     # [processes, micro-batches, B, ...]
    return values.transpose(0, 1).flatten(0, 2)


def all_gather_list(items):
    """The lists of plain objects of all processes as one list, in the order of their ranks."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def broadcast(tensor):
    """Makes `tensor` that of the first process, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor.data, 0)


class GradientSum:
    """Replaces each parameter's gradient by its sum over the processes, in place.

    `begins` is set before the last backward of a step: from then on each gradient is sent as soon as it is complete,
    while those of earlier layers are computed. Every process does so in the same order, that of the graph.
    """

    def __init__(self, params):
        self.params, self.begins, self.sent = params, False, {}  # {parameter: its transfer}
        if dist.is_initialized():
            for param in params:
                param.register_post_accumulate_grad_hook(self.send)

    def send(self, param):
        if self.begins:
            self.sent[param] = dist.all_reduce(param.grad, async_op=True)

    def finish(self):
        """Sends what had no part in the last backward, and waits until all is summed."""
        if dist.is_initialized():
            for param in self.params:
                if param not in self.sent:
                    self.send(param)
            for transfer in self.sent.values():
                transfer.wait()
        self.begins, self.sent = False, {}


def mean_over_processes(values):
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


class StopSignal:
    """SIGTERM or Ctrl-C, to be obeyed after the step: `requested` turns true. A second Ctrl-C ends at once."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self.request)
        signal.signal(signal.SIGINT, self.request)

    def request(self, number, frame):
        self.requested = True
        if number == signal.SIGINT:  # not SIGTERM, of which Slurm and torchrun may both send one
            signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_signals(worker):
    """For the loader's processes: torchrun, Slurm and Ctrl-C signal them too; the step needs their data."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def release_signals():
    """Gives the signals back and ends the loader's processes, which ignore a request, or hang in a read."""
    for number in (signal.SIGTERM, signal.SIGCHLD):  # the latter is the loader's, to report dead processes
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ENDED.set()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
    # One that was killed with the loader's lock in its hands would let the loader's own ending wait for ever.
    torch.utils.data._utils._set_python_exit_flag()


def end_with_launcher():
    """Ends this process soon after torchrun: killed by -9, that leaves its workers running."""
    def watch():
        while os.getppid() == LAUNCHER:
            time.sleep(0.2)
        os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()
