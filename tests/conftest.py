"""What every test gets: no network, a cache of its own, one thread, small models and pairs."""

import os
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # both before the libraries read them: nothing is ever looked up
hub_cache = tempfile.TemporaryDirectory()  # removed when the tests end
os.environ["HF_HOME"] = hub_cache.name

import pytest

# The process that gives out the tests reads this file, too, and needs no torch. So the fixtures import it.


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    import torch

    torch.set_num_threads(1)  # as torchrun has it; the small models are no slower, and equal in every process
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        all_workers = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        patch.setenv("XDG_CACHE_HOME", str(all_workers / "cache"))
        if "small_runs" in sys.modules:
            sys.modules["small_runs"].start_forks()  # before the first test
        yield


@pytest.fixture
def quick_models(monkeypatch):
    from small_runs import be_quick

    be_quick(monkeypatch.setattr)


@pytest.fixture(scope="session")
def small_model():
    """small_model(kind): the folder of a small model, see small_models.py."""
    from small_models import small_folder

    return small_folder


@pytest.fixture(scope="session")
def few_pairs(tmp_path_factory):
    """A parquet folder in Pick-a-Pic's schema: 24 drawn pairs, a tie, an empty image and a HTML page."""
    import datasets

    from extras import tiny

    rows = tiny.pair_rows(27)
    rows[3] |= {"label_0": 0.5, "label_1": 0.5}
    rows[5] |= {"jpg_0": b""}
    rows[9] |= {"jpg_1": b"<html>404</html>"}
    folder = tmp_path_factory.mktemp("pairs")
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000.parquet")
    return str(folder)


@pytest.fixture
def command(small_model, few_pairs):
    """command(kind, options, out): the arguments of train.py for two steps of a small model."""

    def command(kind, options, out):
        argv = ["--model", small_model(kind), "--data", few_pairs, "--clip", "tiny", "--device", "cpu", "--out", str(out)]
        argv += "--resolution 32 --batch_size 8 --steps 2 --sample_every 0 --lr 1e-3".split()
        return [*argv, *options.split()]

    return command
