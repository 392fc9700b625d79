"""What the test files share: no network, a cache of their own, small models, processes."""

import copy
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import socket
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # both before the libraries read them: nothing is ever looked up
hub_cache = tempfile.TemporaryDirectory()  # removed when the tests end
os.environ["HF_HOME"] = hub_cache.name

import pytest
import torch

import encode
import loading
import train
from extras import curves, tiny
from loading import EMBEDDED
from small_models import clip_loaded, loaded, small_folder

torch.set_num_threads(1)  # as torchrun has it; the small models are no slower, and equal in every process
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def fresh(folder, random_init=False, config=None):
    """What loading.load_model gives; a model that no test changes is read once."""
    if folder not in EMBEDDED and not str(folder).startswith(os.environ["XDG_CACHE_HOME"]):
        return loading.load_model(folder, random_init, config)
    model = loaded(folder, random_init, config)
    tokenizers = [part for name, part in model.pipe.components.items() if "tokenizer" in name]
    return copy.deepcopy(model, {id(part): part for part in tokenizers})


def be_quick(setattr):
    """Small runs take what was read before: a copy of the model, and the Clip. They draw no figure."""
    for module in [*sys.modules.values()]:
        if module is not loading and getattr(module, "load_model", None) is loaded.__wrapped__:
            setattr(module, "load_model", fresh)
    setattr(train, "Clip", clip_loaded)
    setattr(encode, "Clip", clip_loaded)
    setattr(curves, "plot_validation", lambda out: (out / "validation.png").touch())


@pytest.fixture
def quick_models(monkeypatch):
    be_quick(monkeypatch.setattr)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        all_workers = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        patch.setenv("XDG_CACHE_HOME", str(all_workers / "cache"))
        yield


forks = multiprocessing.get_context("forkserver")  # children of a process that has imported torch already
forks.set_forkserver_preload("train encode conftest open_clip datasets".split())


@functools.cache
def start_forks():
    """Starts the process that all children are forked from. It has read a small model already."""
    small_folder("sd")
    os.environ["PRELOAD"] = "1"
    multiprocessing.forkserver.ensure_running()
    del os.environ["PRELOAD"]


def in_child(rank, world, port, text, environment, function, args):
    os.environ.update(environment)
    if world > 1:  # as torchrun sets them
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        torch.set_num_threads(1)
    sys.stdout.flush()
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


@pytest.fixture(scope="session")
def small_model():
    """small_model(kind): the folder of a small model, see small_models.py."""
    return small_folder


@pytest.fixture(scope="session")
def few_pairs(tmp_path_factory):
    """A parquet folder in Pick-a-Pic's schema: 24 drawn pairs, a tie, an empty image and a HTML page."""
    rows = tiny.pair_rows(27)
    rows[3] |= {"label_0": 0.5, "label_1": 0.5}
    rows[5] |= {"jpg_0": b""}
    rows[9] |= {"jpg_1": b"<html>404</html>"}
    folder = tmp_path_factory.mktemp("pairs")
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000.parquet")
    return str(folder)


if os.environ.get("PRELOAD"):
    loaded(small_folder("sd"), False, None)
    clip_loaded("tiny", torch.device("cpu"), torch.float32)
