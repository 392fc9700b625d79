"""Small runs, in this process and in processes of their own."""

import atexit
import contextlib
import functools
import gc
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import shutil
import socket
import sys

import open_clip
import pytest
import torch

import encode
import loading
import train
from extras import curves
from loading import EMBEDDED
from small_models import clip_loaded, loaded, small_folder

open_clip.get_tokenizer = functools.cache(open_clip.get_tokenizer)  # to build one takes a fifth of a second
gc.freeze()  # the libraries' objects are no garbage; to look through them again and again takes a tenth of the time
atexit.register(gc.unfreeze)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def fresh(folder, random_init=False, config=None):
    """What loading.load_model gives; a model that no test changes is read once."""
    if folder not in EMBEDDED and not str(folder).startswith(os.environ["XDG_CACHE_HOME"]):
        return loading.load_model(folder, random_init, config)
    return copy_of(folder, random_init, config)


def copy_of(*model):
    """What copy.deepcopy gives, but four times as fast. Tokenizers are shared."""
    pickled, kept = pickled_model(*model)
    reader = pickle.Unpickler(io.BytesIO(pickled))
    copies = {}

    def load(number):
        if number not in copies:
            value = kept[number]
            is_parameter = isinstance(value, torch.nn.Parameter)
            copy = value.detach().clone() if isinstance(value, torch.Tensor) else value
            copies[number] = torch.nn.Parameter(copy, value.requires_grad) if is_parameter else copy
        return copies[number]

    reader.persistent_load = load
    return reader.load()


@functools.cache
def pickled_model(*model):
    """A loaded model as bytes, and the tensors and tokenizers that the bytes name by their number."""
    kept = {}

    def number(value):
        if isinstance(value, torch.Tensor) or "Tokenizer" in type(value).__name__:
            return kept.setdefault(id(value), (len(kept), value))[0]

    pickled = io.BytesIO()
    writer = pickle.Pickler(pickled)
    writer.persistent_id = number
    writer.dump(loaded(*model))
    return pickled.getvalue(), [value for _, value in kept.values()]


def be_quick(setattr):
    """Small runs take what was read before: a copy of the model, and the Clip. They draw no figure."""
    for module in [*sys.modules.values()]:  # what getattr finds in a lazy module takes long
        if module is not loading and vars(module).get("load_model") is loaded.__wrapped__:
            setattr(module, "load_model", fresh)
    setattr(train, "Clip", clip_loaded)
    setattr(encode, "Clip", clip_loaded)
    setattr(curves, "plot_validation", lambda out: (out / "validation.png").touch())


forks = multiprocessing.get_context("forkserver")


@functools.cache
def start_forks():
    """Starts the process that all children are forked from. It is as this one is now: it has imported all libraries and
    read a small model, and no test has run. In a process that was forked later, torch may refuse a backward."""
    loaded(small_folder("sd"), False, None)
    clip_loaded("tiny", torch.device("cpu"), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.util, "spawnv_passfds", fork_instead)
        forks.set_forkserver_preload(["small_runs"])
        multiprocessing.forkserver.ensure_running()


def fork_instead(_, argv, kept):
    """multiprocessing would start Python anew, which imports for ten seconds. argv ends with the code that it would run."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2 and descriptor not in kept:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        exec(argv[-1])
    finally:
        os._exit(0)


def in_child(rank, world, port, text, environment, function, args):
    os.environ.update(environment)
    if world > 1:  # as torchrun sets them
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(text, os.O_CREAT | os.O_APPEND | os.O_WRONLY), stream)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's processes: it is quicker
    be_quick(setattr)
    function(*args)


def launch(folder, world, function, *args):
    """(exit status, output) of each of `world` new processes that call an importable function."""
    start_forks()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True, parents=True)
    texts = [folder / f"rank-{rank}.txt" for rank in range(world)]
    for text in texts:
        text.write_text("")
    environment = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME", "XDG_CACHE_HOME")}
    children = [
        forks.Process(target=in_child, args=(rank, world, port, text, environment, function, args))
        for rank, text in enumerate(texts)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(300)  # seconds; a guard, not a promise
        if child.is_alive():
            for other in children:
                other.kill()
            pytest.fail(f"a process hangs: {[text.read_text()[-2000:] for text in texts]}")
    return [(child.exitcode, text.read_text()) for child, text in zip(children, texts)]
