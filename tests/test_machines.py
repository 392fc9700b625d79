"""Several machines: if one of them is lost, the run ends on all, soon and in one line, and the same command resumes."""

import distributed  # first: it notes the launcher

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import run
import common
import train
from distributed import torchrun_env
from small_runs import launch, log_of

pytestmark = pytest.mark.usefixtures("quick_models")


@pytest.fixture
def options(small_model, few_pairs):
    argv = ["--model", small_model("sd"), "--data", few_pairs, "--clip", "tiny", "--device", "cpu"]
    return argv + "--steps 4 --batch_size 8 --micro_batch 2 --sample_every 0 --lr 1e-3".split()


def lines_of(text):
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("train.py: ")]


# Signs of life


def quicker():
    distributed.BEAT, distributed.SILENCE = 0.2, 2


class Line:
    """A store that works until the line to it is cut."""

    cut = threading.Event()

    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        if self.cut.is_set():
            raise RuntimeError("there is no way to the store")
        return getattr(self.store, name)


def without_a_way_out(*batch):
    """Cuts the line in the first step. It ends after the others, so that they do not notice its closed connections."""
    distributed.SILENCE = 5
    Line.cut.set()
    threading.Event().wait()


def last_is_cut_off(argv):
    """The last process loses its way to the others. It neither sends nor hears, and its step waits for ever."""
    quicker()
    rank, _, world_size = torchrun_env()
    if rank == world_size - 1:
        torchrun_store = distributed.torchrun_store
        distributed.torchrun_store = lambda name: Line(torchrun_store(name))
        train.Trainer.prepare = without_a_way_out
    train.main(argv)


def test_a_silent_process_ends_all_in_one_line(tmp_path, options):
    """The first two processes wait in a collective that never ends, and the first tells the second who is lost. The
    third never comes to it."""
    argv = [*options, "--batch_size", "24", "--out", str(tmp_path / "out")]
    for rank, (status, text) in enumerate(launch(tmp_path, 3, last_is_cut_off, argv)):
        (line,) = lines_of(text)
        lost, seconds = (0, 5) if rank == 2 else (2, 2)
        assert status == 1 and line == (
            f"train.py: process {rank}: process {lost} was silent for {seconds} s: a machine or the "
            "network is gone. The same command resumes from the last checkpoint")


def busy_first(argv):
    """The first process draws its first samples for longer than the others wait for a silent one."""
    quicker()
    draw_base_grid = run.Output.draw_base_grid

    def long_draw(output, pairs):
        never = threading.Event()
        never.wait(1.5 * distributed.SILENCE)
        return draw_base_grid(output, pairs)

    run.Output.draw_base_grid = long_draw
    train.main(argv)


@pytest.mark.slow
def test_a_process_that_is_busy_is_waited_for(tmp_path, options):
    argv = [*options, "--sample_every", "4", "--sample_steps", "1", "--steps", "1", "--out", str(tmp_path / "out")]
    for status, text in launch(tmp_path, 2, busy_first, argv):
        assert status == 0 and not lines_of(text), text
    assert (tmp_path / "out" / "model").is_dir()


def killed_second(argv):
    rank, _, _ = torchrun_env()
    if rank == 1:
        train.Trainer.loss_inputs = lambda *_: os.kill(os.getpid(), 9)
    train.main(argv)


def test_a_process_that_dies_is_noticed_at_once(tmp_path, options):
    """No launcher ends the others here; they notice it by their connection."""
    first, second = launch(tmp_path, 2, killed_second, [*options, "--out", str(tmp_path / "out")])
    (line,) = lines_of(first[1])
    assert first[0] == 1 and second[0] == -9
    assert line.startswith("train.py: another process or the network is lost (")


# The gradient of all processes


def save_gradients(argv, folder):
    """train.main; every process keeps the gradient that its optimizer gets in the last step."""
    sum_gradients, (rank, _, _) = distributed.sum_gradients, torchrun_env()

    def sum_and_save(params):
        sum_gradients(params)
        torch.save(torch.cat([param.grad.flatten() for param in params]), folder / f"{rank}.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "sum_gradients", sum_and_save)
        train.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["rpo --group_size 8", "dpo"])
def test_two_processes_and_several_chunks_have_the_gradient_of_one_process(tmp_path, options, loss):
    """The second step counts: in the first one the policy is the reference, and no error reaches the gradient."""
    argv = [*options, *"--batch_size 16 --steps 2 --optimizer sgd --lr 0.1 --beta 100 --loss".split(), *loss.split()]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    save_gradients([*argv, "--micro_batch", "16", "--out", str(one / "out")], one)
    for status, text in launch(two, 2, save_gradients, [*argv, "--micro_batch", "2", "--out", str(two / "out")], two):
        assert status == 0, text
    expected = torch.load(one / "0.pt")
    for rank in (0, 1):
        assert (torch.load(two / f"{rank}.pt") - expected).norm() < 5e-5 * expected.norm()


# What all machines must see


def with_folder_of_its_own(argv, own):
    """The second process sees another --out, as if it lay on each machine's own disk."""
    rank, _, _ = torchrun_env()
    train.main([*argv, "--out", own if rank else f"{own}-first"])


def test_a_folder_that_is_not_shared_is_refused(tmp_path, options):
    own = str(tmp_path / "own")
    Path(own).mkdir()
    for status, text in launch(tmp_path, 2, with_folder_of_its_own, options, own):
        (line,) = lines_of(text)
        assert status == 1 and "process 1 does not see what process 0 writes to" in line
    assert not Path(f"{own}-first").exists()


def with_other_files(argv, option, first, second):
    rank, _, _ = torchrun_env()
    train.main([*argv, option, second if rank else first])


@pytest.mark.slow
def test_other_pairs_or_reference_errors_on_another_machine_are_refused(tmp_path, options, few_pairs):
    out = ["--out", str(tmp_path / "out")]
    other = tmp_path / "other"
    shutil.copytree(few_pairs, other)
    (other / "train-00000.parquet").rename(other / "train-00001.parquet")
    for status, text in launch(tmp_path, 2, with_other_files, [*options, *out], "--data", few_pairs, str(other)):
        (line,) = lines_of(text)
        assert status == 1 and "process 1 has another data than process 0" in line

    for status, text in launch(tmp_path, 2, with_other_files, [*options, *out], "--validate", few_pairs, str(other)):
        (line,) = lines_of(text)
        assert status == 1 and "process 1 has another held-out pairs than process 0" in line

    errors = [str(tmp_path / "errors"), str(tmp_path / "other_errors")]
    train.main([*options, "--reference_errors", errors[0], "--steps", "1", "--out", str(tmp_path / "alone")])
    argv = [*options, *out]
    for status, text in launch(tmp_path, 2, with_other_files, argv, "--reference_errors", *errors):
        (line,) = lines_of(text)
        assert status == 1 and "has another number of missing reference errors" in line


# Two network namespaces of one machine


@pytest.fixture
def two_machines():
    """{rank: name of a network namespace}; their addresses are 10.77.0.1 and 10.77.0.2."""
    names = {rank: f"diffusion-rpo-{rank}" for rank in (0, 1)}

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, check=True)

    def remove():
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    if not shutil.which("ip"):
        pytest.skip("needs iproute2")
    remove()
    try:
        for name in names.values():
            ip("netns", "add", name)
        ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link1", "netns", names[1])
        for rank, name in names.items():
            ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", f"link{rank}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"link{rank}", "up")
    except subprocess.CalledProcessError as error:
        remove()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
    yield names
    remove()


def on_two_machines(names, folder, argv):
    """Starts torchrun on each machine and returns the two Popens."""
    nodes = []
    for rank, name in names.items():
        words = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        words += [f"--node_rank={rank}", "--nproc_per_node=1", "--master_addr=10.77.0.1", "--master_port=29531"]
        with open(folder / f"node-{rank}.txt", "w") as text:
            nodes.append(subprocess.Popen([*words, train.__file__, *argv], stdout=text, stderr=text,
                                          env=os.environ | {"GLOO_SOCKET_IFNAME": f"link{rank}"}))
    return nodes


def ends(nodes, folder, seconds):
    """(exit status, output) of torchrun on each machine, as two lists. It fails if one does not end in time."""
    try:
        statuses = [node.wait(seconds) for node in nodes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"it hangs: {[(folder / f'node-{rank}.txt').read_text()[-2000:] for rank in (0, 1)]}")
    finally:
        for node in nodes:
            node.kill()
    return statuses, [(folder / f"node-{rank}.txt").read_text() for rank in (0, 1)]


@pytest.mark.slow
def test_two_machines_agree_with_one_and_a_cut_between_them_ends_both(tmp_path, options, two_machines):
    """Twelve steps agree. Then the link goes down in a longer run, which resumes once it is up again."""
    options += "--tau inf --beta 100".split()  # uniform weights need no CLIP
    more = ["--steps", "12", "--out"]
    statuses, texts = ends(on_two_machines(two_machines, tmp_path, [*options, *more, str(tmp_path / "two")]),
                           tmp_path, 200)
    assert statuses == [0, 0], texts
    train.main([*options, *more, str(tmp_path / "one")])
    for two, one in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)

    out = tmp_path / "cut"
    argv = [*options, "--save_every", "4", "--out", str(out), "--steps"]
    nodes = on_two_machines(two_machines, tmp_path, [*argv, "100000"])
    while not list(out.glob("checkpoint-*.pt")) and all(node.poll() is None for node in nodes):
        threading.Event().wait(0.2)
    subprocess.run(["ip", "-n", two_machines[1], "link", "set", "link1", "down"], check=True)
    statuses, texts = ends(nodes, tmp_path, 120)
    assert statuses == [1, 1], texts
    for rank, text in enumerate(texts):
        lines = [line for line in text.splitlines() if line.startswith("train.py: process")]
        assert lines == [f"train.py: process {rank}: process {1 - rank} was silent for 40 s: a machine or the "
                         "network is gone. The same command resumes from the last checkpoint"]
    subprocess.run(["ip", "-n", two_machines[1], "link", "set", "link1", "up"], check=True)
    kept = int(common.newest_checkpoint(out).stem.split("-")[1])
    nodes = on_two_machines(two_machines, tmp_path, [*argv, str(kept + 4)])
    statuses, texts = ends(nodes, tmp_path, 200)
    assert statuses == [0, 0] and f"going on after {kept} steps" in texts[0]
