"""The processes of a run: ranks, collectives, signals, and the end of all when one of them is lost.

Without torchrun there is one process, and every collective returns what it was given.
"""

import os

LAUNCHER = os.getppid()  # noted before the imports below: they take seconds, and torchrun may be killed meanwhile

import contextlib
import itertools
import multiprocessing
import secrets
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import IN_WORKER, InputError, ReaderDied, brief

BEAT, SILENCE = 5, 40  # seconds between two signs of life; seconds of silence after which a process counts as lost
ENDED = threading.Event()  # this process is about to end, so nobody has to be watched any more


def torchrun_env():
    """(rank, rank on this machine, number of processes) as torchrun sets them; (0, 0, 1) without it."""
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, default)) for name, default in names.items())


def print0(words):
    """Prints on rank 0 alone."""
    if torchrun_env()[0] == 0:
        print(words)


def get_device(name=None):
    """This process's torch.device: `name`, or the best there is. Under torchrun "cuda" means the rank's own GPU.

    raises  InputError if it is not there, or if torchrun starts more processes than there are GPUs
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
        raise InputError(f"there are more processes than GPUs: pass --nproc_per_node {gpus} at most, or --device cpu")
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)


def to_device(tensor, device):
    """Copies a tensor from the host to a device without waiting for the device's queue."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def init_processes(device):
    """Joins the processes of torchrun. Without torchrun it does nothing."""
    if torchrun_env()[2] > 1:
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(device)
        # The timeout is long because the others wait while rank 0 samples and saves. The heartbeat finds lost ranks.
        dist.init_process_group("nccl" if is_cuda else "gloo", timeout=timedelta(minutes=30),
                                device_id=device if is_cuda else None)
        Heartbeat().start()


# Collectives


@contextlib.contextmanager
def collective():
    """The body of a collective: a RuntimeError in it means that another process, or the way to it, is lost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(f"another process or the network is lost ({brief(error)[:200]}). The same command resumes "
                         "from the last checkpoint")


def barrier():
    """Waits until every process is here."""
    if dist.is_initialized():
        with collective():
            dist.barrier()


def all_gather(x):
    """[n, ...] of every process -> [world_size * n, ...], in the order of their ranks."""
    if not dist.is_initialized():
        return x
    gathered = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    with collective():
        dist.all_gather_into_tensor(gathered, x.contiguous())
    return gathered


def gather_micro_batches(micro_batches, across=True):
    """The micro-batches of each process, a list of [B, ...] -> [n, ...] in the order of their positions.

    across  whether to gather from all processes, or to join this rank's own
    """
    values = torch.stack(micro_batches)[None]                           # [1, micro-batches, B, ...]
    if across:
        values = all_gather(values)                                     # [ranks, micro-batches, B, ...]
    return values.transpose(0, 1).flatten(0, 2)


def all_gather_list(items):
    """Joins the lists of plain objects of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    with collective():
        dist.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def broadcast(tensor):
    """Replaces `tensor` by that of rank 0, in place."""
    if dist.is_initialized():
        with collective():
            dist.broadcast(tensor.data, 0)


def sum_gradients(params):
    """Replaces each parameter's gradient by its sum over the processes, in place."""
    if dist.is_initialized():
        with collective():
            sums = [dist.all_reduce(param.grad, async_op=True) for param in params if param.grad is not None]
            for transfer in sums:
                transfer.wait()


def mean_over_processes(values):
    if dist.is_initialized():
        with collective():
            dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def mean_scalars(metrics, grad_norm, flags):
    """({name: float}, {flag: bool}): means over groups and ranks; whether a flag is set on any rank.

    metrics    the dicts of this rank's groups, all with the same keys
    grad_norm  [] on the device
    flags      {name: bool} of this rank
    """
    scalars = {}
    for name in metrics[0]:
        of_groups = torch.stack([group[name] for group in metrics])
        scalars[name] = of_groups.mean()
    scalars["grad_norm"] = grad_norm
    for name, flag in flags.items():
        scalars[name] = torch.tensor(float(flag)).to(grad_norm.device, non_blocking=True)
    means = mean_over_processes(torch.stack([*scalars.values()]))
    scalars = dict(zip(scalars, means.tolist()))
    return scalars, {name: scalars.pop(name) > 0 for name in flags}


def wait_for_all():
    """Under torchrun, wait here for all processes, for a day at most."""
    _, _, world_size = torchrun_env()
    if world_size > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        dist.barrier()


def wait_for_data():
    """Waits, a day at most, until all have read their data and model: a machine may copy for hours what others have."""
    rank, _, world_size = torchrun_env()
    if world_size > 1:
        with collective():  # of the store, because the processes' group has a shorter timeout
            store = torchrun_store("data")
            store.set(str(rank), "read")
            store.wait([str(other) for other in range(world_size)], timedelta(days=1))


def pending_batches(n, size, files, title):
    """This process's share of the batches, each a range of prompt numbers, that lack one of the files files(i).

    All batches of n prompts are cut alike on any number of processes: the rounding of an image depends on its batch.
    """
    rank, _, world_size = torchrun_env()
    batches = [range(start, min(start + size, n)) for start in range(0, n, size)]
    pending = [batch for batch in batches if not all(file.exists() for i in batch for file in files(i))]
    wait_for_all()  # all processes look before the first draws
    return tqdm(pending[rank::world_size], title, unit="batch", disable=rank > 0)


def check_alike(values):
    """InputError if a process has other values, {name: value}, than rank 0."""
    first, *others = all_gather_list([values])
    for rank, other in enumerate(others, 1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise InputError(f"process {rank} has another {name} than process 0 ({other.get(name)}, "
                                 f"{first.get(name)}). Give all machines the same files")


def check_shared(folder):
    """InputError if a process does not see the files that rank 0 writes to a folder."""
    rank, _, world_size = torchrun_env()
    if world_size == 1:
        return
    token, *_ = all_gather_list([secrets.token_hex(8)])
    file = folder / f".shared-{token}.part"  # a hidden name, in case it is left behind
    try:
        if rank == 0:
            file.touch()
        barrier()
        blind = all_gather_list([] if file.exists() else [str(rank)])
    finally:
        if rank == 0:
            file.unlink(missing_ok=True)
    if blind:
        raise InputError(f"process {', '.join(blind)} does not see what process 0 writes to {folder}. The folder must "
                         "lie on storage that all machines share")


def largest_micro_batch(args, device, params, forward_backward):
    """The largest of 1, 2, 4, 8, 16 pairs per forward for which every process has memory (--micro_batch auto).

    forward_backward  calls the forward and the backward of a number of pairs
    raises            InputError if one pair is too many
    """
    _, _, world_size = torchrun_env()
    largest = 0
    for micro_batch in (1, 2, 4, 8, 16):
        if args.batch_size % (micro_batch * world_size):
            break
        has_room = has_room_for(micro_batch, args, device, params, forward_backward)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not all(all_gather_list([has_room])):
            break
        largest = micro_batch
    if not largest:
        raise InputError("out of memory with one pair per forward. --gradient_checkpointing, --lora_rank 16, "
                         "--optimizer adafactor or a smaller --resolution help")
    return largest


def has_room_for(micro_batch, args, device, params, forward_backward):
    """Whether a forward and a backward fit beside the optimizer's state, the average, and 5% more."""
    copies = {"adamw": 2}.get(args.optimizer, 0) + bool(args.ema)
    try:
        held = [torch.empty_like(param) for param in params for _ in range(copies)]
        if device.type == "cuda":
            _, total = torch.cuda.mem_get_info(device)
            held.append(torch.empty(total // 20, dtype=torch.uint8, device=device))
        for param in params:
            param.grad = torch.zeros_like(param)
        forward_backward(micro_batch)
        return True
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        return False
    finally:
        for param in params:
            param.grad = None


# The end of a process


def torchrun_store(name):
    """A part of the store that torchrun keeps for the processes of this start."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"{name} {attempt}", dist.TCPStore(host, port, is_master=False))


class Heartbeat:
    """Ends this process with one line when another process, or the way to it, is lost.

    Without it a collective would wait for half an hour. A thread of every process writes a number to torchrun's store
    every BEAT seconds, whatever the process is doing, so sampling or saving may take as long as they need. Rank 0
    listens to all ranks and says which one is lost. The others listen to rank 0. A second thread measures the silence,
    because the first one may itself wait for the store.
    """

    def __init__(self):
        self.rank, _, world_size = torchrun_env()
        now = time.monotonic()
        self.heard = {rank: now for rank in (range(1, world_size) if self.rank == 0 else [0])}  # {rank: when}
        self.lost = None  # a sentence about who is lost

    def start(self):
        ENDED.clear()
        for task in (self.exchange, self.watch):
            threading.Thread(target=task, daemon=True).start()

    def exchange(self):
        beats = {}
        with contextlib.suppress(RuntimeError):  # the store is gone or out of reach: then everybody is silent
            store = torchrun_store("heartbeat")
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
            if now - last_look > BEAT:  # this process itself was paused, as Slurm does, and could not hear
                self.heard = dict.fromkeys(self.heard, now)
            last_look = now
            silent = [rank for rank, when in self.heard.items() if now - when > SILENCE]
            if silent:
                self.lost = f"process {', '.join(map(str, silent))} was silent for {SILENCE} s"
            if silent and self.rank == 0 and ENDED.wait(4 * BEAT):  # gives the others time to read who is lost
                break
            if self.lost:
                print(f"\ntrain.py: process {self.rank}: {self.lost}: a machine or the network is gone. The same "
                      "command resumes from the last checkpoint", file=sys.stderr, flush=True)  # below the bar
                os._exit(1)


class StopSignal:
    """Remembers SIGTERM or Ctrl-C until the step is done: `requested` turns true. A second Ctrl-C ends at once."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self.request)
        signal.signal(signal.SIGINT, self.request)

    def request(self, number, frame):
        self.requested = True
        if number == signal.SIGINT:  # not for SIGTERM: Slurm and torchrun may both send one
            signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_signals(worker):
    """For the loader's processes: torchrun, Slurm and Ctrl-C signal them too, but the step still needs their data."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# Loaders that were not read to their end. They stay referenced, because to delete one can mean to wait forever for a lock
# that a killed process held.
UNFINISHED = []


def guarded(batches, has_workers):
    """The batches of torch's DataLoader. A process of it that died or hangs becomes an InputError."""
    if has_workers:
        name_dead_readers()
        UNFINISHED.append(batches)
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        if not has_workers or IN_WORKER in str(error):  # an exception of the data code itself
            raise
        raise broke_off(error)
    if has_workers:
        UNFINISHED.remove(batches)


def name_dead_readers():
    """When a process of the loader dies, torch's signal handler raises a RuntimeError wherever this process is then.

    Here it becomes ReaderDied. The loader would catch an Exception, and then wait for a lock that the dead may hold.
    """
    handler = signal.getsignal(signal.SIGCHLD)

    def handle(number, frame):
        try:
            handler(number, frame)
        except RuntimeError as error:
            raise ReaderDied(broke_off(error))

    if callable(handler) and handler.__module__ != __name__:  # every loader asks for it, and once is enough
        signal.signal(signal.SIGCHLD, handle)


def broke_off(error):
    return InputError(f"reading the data broke off: {brief(error)[:200]}. The same command resumes from the last "
                      "checkpoint. Fewer --workers take less memory, a larger --data_timeout waits longer")


def release_signals():
    """Restores the signals and kills the loader's processes, which ignore signals or may hang in a read."""
    for number in (signal.SIGTERM, signal.SIGCHLD):  # the loader uses SIGCHLD to report dead processes
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ENDED.set()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def end_with_launcher():
    """Ends this process soon after torchrun: killed by -9, torchrun leaves its workers running."""
    def watch():
        while os.getppid() == LAUNCHER:
            time.sleep(0.2)
        os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def end_early(message):
    """Ends all processes together with exit code 1. Otherwise torchrun would kill rank 0, which may still be saving."""
    barrier()
    sys.exit(f"train.py: {message}" if torchrun_env()[0] == 0 else 1)


def leave_processes():
    """Waits for all processes and leaves them: if one left earlier, torchrun and NCCL would end the others."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
