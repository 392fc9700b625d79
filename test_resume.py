"""Whatever ends a run, the same command goes on to the same bits, and nothing that was saved is lost.

As a script it is train.py with a fault: `python test_resume.py FAULT NUMBER [options of train.py]`.
"""

import resume  # first, to know the launcher

import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch

import data
import tiny
import train
from conftest import QUICK, launch, log_of

STEPS = 8
pytestmark = pytest.mark.usefixtures("quick_tiny", "quick_models")


def faulty(fault, number, argv):
    """train.main with a fault, at the number-th line of ours, the number-th save, or in the step `number`.

    "line VICTIM" and "half VICTIM", of a save, kill this process, its launcher, or everything.
    """
    lines, saves, micro_batches, struck, condition, torch_save = 0, 0, 0, False, data.condition, torch.save
    launcher, (rank, _, world), (fault, _, victim) = os.getppid(), data.torchrun(), str(fault).partition(" ")

    def strike():
        others = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        others = [int(other) for other in others if int(other) != os.getpid()]
        victims = {
            "launcher": [launcher],
            "everything": [launcher, *others, os.getpid()],
            "self": [os.getpid()],
        }
        for process in victims[victim]:
            os.kill(process, signal.SIGKILL)

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in (train.__file__, resume.__file__) or rank > 0:
            return None
        lines += event == "line"
        if lines == number and event == "line":
            strike()
        return trace

    def half_a_save(state, stream):
        nonlocal saves
        torch_save(state, whole := io.BytesIO())
        content, saves = whole.getvalue(), saves + 1
        stream.write(content[: len(content) // 2])
        if saves == number:
            stream.flush()
            strike()
        stream.write(content[len(content) // 2 :])

    def condition_and(*some):  # called by the step itself, once for each micro-batch: 2 of a step's 8 pairs
        nonlocal struck, micro_batches
        step, micro_batches = micro_batches * 2 * world // 8, micro_batches + 1
        if step == number and not struck:
            struck = True
            if fault in ("SIGTERM", "SIGINT"):
                os.kill(os.getpid(), getattr(signal, fault))
            elif fault == "group":  # as torchrun and Slurm signal: all processes, the loader's too, and twice
                for process in multiprocessing.active_children() * 2:
                    os.kill(process.pid, signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            elif fault == "reader":
                multiprocessing.active_children()[0].kill()
            elif fault == "rank" and rank == 1:
                raise ValueError("this rank fails")
            elif fault == "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            elif fault == "log":
                (log,) = (
                    descriptor
                    for descriptor in os.listdir("/proc/self/fd")
                    if os.path.realpath(f"/proc/self/fd/{descriptor}").endswith("log.jsonl")
                )
                os.dup2(os.open("/dev/full", os.O_WRONLY), int(log))
        return condition(*some)

    if fault == "line":
        sys.settrace(trace)
    if fault == "half":
        torch.save = half_a_save
    if fault == "no scan":
        data.SCAN_LIMIT = 0
    data.condition = condition_and
    train.main(argv)


@pytest.fixture(scope="module")
def options(small_model, few_pairs):
    """A run in two passes: two micro-batches make a group."""
    return ["--model", small_model("sd"), "--data", few_pairs, "--clip", "tiny", "--device", "cpu"] + (
        f"--steps {STEPS} --batch_size 8 --micro_batch 2 --save_every 2 --sample_every 0 --lr 1e-3".split()
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, options):
    """unbroken(world): what a run leaves that nobody killed."""
    runs = {}

    def unbroken(world):
        if world not in runs:
            runs[world] = tmp_path_factory.mktemp("unbroken") / "out"
            for status, text in launch(
                runs[world].parent, world, faulty, None, 0, [*options, "--out", str(runs[world])]
            ):
                assert status == 0, text
        return left(runs[world])

    return unbroken


def left(out):
    """The checkpoint and the log of a folder, the log without its times."""
    (file,) = out.glob("checkpoint-*.pt")
    log = log_of(out)
    for record in log:
        del record["pairs_per_second"]
    return torch.load(file, weights_only=True), log


def same_bits(got, expected):
    assert [record["step"] for record in got[1]] == list(range(len(expected[1]))) and got[1] == expected[1]
    for part in ("unet", "optimizer"):
        a, b = (torch.utils._pytree.tree_leaves(state[part]) for state, _ in (got, expected))
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True)), (
            part
        )


def killed(run, folder, unbroken, kills, world):
    """Kills at random lines of the run, from set-up to ending, then lets it end; a run that ends before counts
    for nothing, and the next begins anew."""
    rng, out, count = random.Random(0), folder / "out", 0
    while count < kills:
        status, text = run(
            *rng.choice([("line", rng.randrange(1, 6000))] * 3 + [("half", rng.choice((1, 2)))])
        )
        assert status in (0, -signal.SIGKILL), text
        count += status != 0
        if status == 0:
            same_bits(left(out), unbroken(world))
            shutil.rmtree(out)
    status, text = run(None, 0)
    assert status == 0, text
    same_bits(left(out), unbroken(world))
    assert (out / "model" / "model_index.json").exists() and not list(out.glob("*.part"))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, unbroken, options, kills):
    def run(fault, number):
        (ended,) = launch(
            tmp_path, 1, faulty, f"{fault} self", number, [*options, "--out", str(tmp_path / "out")]
        )
        return ended

    killed(run, tmp_path, unbroken, kills, 1)


def by_torchrun(folder, fault, number, options, world=2):
    """Runs until the launcher and every process that writes to its pipes have ended."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--standalone"]
    command += [__file__, str(fault), str(number), *options, "--out", str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "everything"])
def test_torchrun_killed_at_random_moments(tmp_path, unbroken, options, victim):
    """The launcher alone, which leaves its processes running but for our watch; and all of them at once."""

    def run(fault, number):
        ended = by_torchrun(tmp_path, f"{fault} {victim}", number, options)
        return ended.returncode, ended.stderr

    killed(run, tmp_path, unbroken, 10, 2)


@pytest.mark.parametrize("workers, fault", [("0", "SIGINT"), ("2", "group")])
def test_a_signal_saves_the_step_and_the_run_goes_on(tmp_path, unbroken, options, workers, fault):
    """Also one that torchrun or Slurm sends to the loader's processes and more than once."""
    argv = [*options, "--workers", workers, "--save_every", "0", "--out", str(tmp_path / "out")]
    ((status, text),) = launch(tmp_path, 1, faulty, fault, 2, argv)
    assert status == 1 and "train.py: saved after 3 steps; the same command goes on" in text
    assert left(tmp_path / "out")[0]["step"] == 3 and "Traceback" not in text
    ((status, text),) = launch(tmp_path, 1, faulty, None, 0, argv)
    assert status == 0 and "going on after 3 steps" in text
    same_bits(left(tmp_path / "out"), unbroken(1))


def test_processes_agree_on_the_step_that_a_signal_ends(tmp_path, unbroken, options):
    """Only the second one gets it; and on another number of processes the run goes on."""
    argv = [*options, "--out", str(tmp_path / "out")]
    first, second = launch(tmp_path, 2, signalled_second, argv)
    assert first[0] == second[0] == 1 and "saved after 4 steps" in first[1], first[1]
    ((status, text),) = launch(tmp_path, 1, faulty, None, 0, argv)
    assert status == 0, text
    for a, b in zip(left(tmp_path / "out")[1], unbroken(1)[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def signalled_second(argv):
    faulty("SIGTERM" if data.torchrun()[0] == 1 else None, 3, argv)


def test_what_may_change_when_a_run_goes_on(tmp_path, unbroken, options):
    out = tmp_path / "out"
    train.main([*options, "--steps", "4", "--out", str(out)])
    assert (out / "model").is_dir()
    for change, complaint in [
        ("--lr 2e-3", "holds a run with --lr 0.001, not 0.002; give another --out"),
        ("--seed 1", "--seed 0, not 1"),
        ("--loss dpo", "--loss rpo, not dpo"),
        ("--group_size 4", "--group_size 8, not 4"),
        ("--batch_size 16", "--batch_size 8, not 16"),
        ("--precision bf16", "--precision fp32, not bf16"),
        ("--random_flip", "--random_flip False, not True"),
        ("--optimizer sgd", "--optimizer adamw, not sgd"),
        ("--steps 3", "has taken 4 steps already; --steps 3 is less"),
    ]:
        with pytest.raises(SystemExit, match=complaint):
            train.main([*options, "--steps", "4", *change.split(), "--out", str(out)])
    free = "--micro_batch 8 --save_every 3 --sample_every 4 --gradient_checkpointing --workers 1"
    train.main([*options, *free.split(), "--out", str(out)])
    assert (out / "model").is_dir() and (out / "model-000004").is_dir()  # the shorter run's is kept
    for a, b in zip(left(out)[1], unbroken(1)[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_what_was_trained_on_is_not_decoded_again(tmp_path, options, monkeypatch):
    monkeypatch.setattr(data, "SCAN_LIMIT", 0)
    argv = [*options, "--out", str(tmp_path / "out")]
    train.main([*argv, "--steps", "2"])
    decoded, get = [], data.PreferencePairs.__getitem__
    monkeypatch.setattr(
        data.PreferencePairs, "__getitem__", lambda pairs, p: decoded.append(p) or get(pairs, p)
    )
    train.main([*argv, "--steps", "3"])
    assert decoded == list(range(16, 24))


@pytest.mark.parametrize("optimizer, loss", [("adafactor", "rpo"), ("sgd", "sft")])
def test_four_steps_are_two_and_two(tmp_path, options, optimizer, loss):
    argv = [*options, "--optimizer", optimizer, "--loss", loss]
    for steps, name in (("4", "four"), ("2", "two"), ("4", "two")):
        train.main([*argv, "--steps", steps, "--out", str(tmp_path / name)])
    same_bits(left(tmp_path / "two"), left(tmp_path / "four"))


def test_a_checkpoint_of_another_device_takes_the_layout_of_this_one(tmp_path, options):
    """On MPS weights are not channels-last, and the CPU's fused AdamW walks through memory as it lies."""
    for steps, name in (("4", "four"), ("2", "two")):
        train.main([*options, "--steps", steps, "--out", str(tmp_path / name)])
    (file,) = (tmp_path / "two").glob("checkpoint-*.pt")
    state = torch.load(file, weights_only=True)
    for kept in state["optimizer"]["state"].values():
        assert kept["exp_avg"].dim() < 4 or kept["exp_avg"].is_contiguous(memory_format=torch.channels_last)
        kept.update(exp_avg=kept["exp_avg"].contiguous(), exp_avg_sq=kept["exp_avg_sq"].contiguous())
    torch.save(state, file)
    train.main([*options, "--steps", "4", "--out", str(tmp_path / "two")])
    same_bits(left(tmp_path / "two"), left(tmp_path / "four"))


def test_a_run_that_is_done_says_so_and_is_left_alone(tmp_path, options, capsys):
    argv = [*options, "--steps", "1", "--out", str(tmp_path / "out")]
    train.main(argv)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}
    train.main(argv)
    assert "holds all 1 steps of this run; to train it again remove" in capsys.readouterr().out
    assert before == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()
    }


@pytest.mark.parametrize("name, text", [("thesis.tex", "precious"), ("config.json", '{"hidden_size": 8}')])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path, options, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=f"holds something else .{name}.; give another --out"):
        train.main([*options, "--out", str(tmp_path)])
    assert (tmp_path / name).read_text() == text


def test_a_resumed_run_lets_go_of_the_old_checkpoint(tmp_path, options, monkeypatch):
    """A file that is still mapped takes its room on the disk until the run ends."""
    argv = [*options, "--out", str(tmp_path / "out")]
    train.main([*argv, "--steps", "2"])
    draw = train.draw

    def mapped(*some):
        assert "checkpoint-" not in Path("/proc/self/maps").read_text()
        return draw(*some)

    monkeypatch.setattr(train, "draw", mapped)
    train.main([*argv, "--steps", "3"])


def test_other_data_under_the_same_name_are_refused(tmp_path, options, few_pairs):
    import datasets

    folder = tmp_path / "pairs"
    folder.mkdir()
    argv = [*options, "--data", str(folder), "--steps", "1", "--out", str(tmp_path / "out")]
    for n in (8, 9):
        datasets.Dataset.from_list(list(tiny.pairs(n))).to_parquet(folder / "train-0.parquet")
        if n == 8:
            train.main(argv)
    with pytest.raises(SystemExit, match="was begun with 8 pairs; .* now holds 9"):
        train.main([*argv, "--steps", "2"])


def test_a_live_run_keeps_others_out_of_its_folder(tmp_path, options):
    (out := tmp_path / "out").mkdir()
    with filelock.FileLock(out / "lock"), pytest.raises(SystemExit, match="another live run is writing to"):
        train.main([*options, "--out", str(out)])
    assert [file.name for file in out.iterdir()] == ["lock"]


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, options):
    train.main([*options, "--steps", "1", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("checkpoint-*.pt")
    file.write_bytes(damaged := file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="checkpoint-000001.pt cannot be read"):
        train.main([*options, "--steps", "2", "--out", str(tmp_path)])
    assert file.read_bytes() == damaged


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, unbroken, options):
    """No file can grow over 100 kB from step 3 on: the second checkpoint fails in the midst of its bytes."""
    argv = [*options, "--out", str(tmp_path / "out")]
    ((status, text),) = launch(tmp_path, 1, faulty, "disk", 3, argv)
    assert status == 1 and "checkpoint-000004.pt cannot be written" in text, text
    assert "Kept: " in text and "checkpoint-000002.pt. With more room the same command goes on" in text
    assert left(tmp_path / "out")[0]["step"] == 2 and not list((tmp_path / "out").glob("*.part"))
    ((status, text),) = launch(tmp_path, 1, faulty, None, 0, argv)
    same_bits(left(tmp_path / "out"), unbroken(1))


def test_a_full_disk_under_the_log(tmp_path, options):
    """The log becomes a device on which there is no space."""
    argv = [*options, "--out", str(tmp_path / "out")]
    ((status, text),) = launch(tmp_path, 1, faulty, "log", 3, argv)
    assert status == 1 and "train.py: there is no room to write" in text and "Traceback" not in text, text
    assert left(tmp_path / "out")[0]["step"] == 2


# What is not finite


@pytest.mark.parametrize(
    "term, complaint",
    [
        ("VAE", "the VAE's latents of rows 4, 20, 16, 12"),
        ("CLIP", "the CLIP embeddings of rows 4, 20, 16, 12"),
        ("reference", "the reference's errors of rows 4, 20, 16, 12"),
        ("policy", "the policy's errors of rows 4, 20, 16, 12"),
        (
            "gradient",
            "the loss or its gradient, at finite errors",
        ),
    ],
)
def test_a_step_that_goes_bad_names_its_term_and_rows(tmp_path, options, monkeypatch, term, complaint):
    """The first pair of each micro-batch goes bad from the third step on."""
    pairs = data.PreferencePairs(options[options.index("--data") + 1], 32)
    assert [pairs[position]["row"] for position in range(16, 24, 2)] == [4, 20, 16, 12]
    argv = [*options, "--out", str(tmp_path / "out")]
    calls, encode, embed, denoising = {"n": 0}, data.encode_images, data.Clip.embed, train.denoising_error

    def bad_at_the_third_step(values, name):
        calls["n"] += term == name
        if term == name and calls["n"] > (8 if name in ("VAE", "CLIP", "reference") else 16):
            values = values.clone()
            values[0] = float("nan")
        return values

    def error(unet, *inputs):
        name = "policy" if any(parameter.requires_grad for parameter in unet.parameters()) else "reference"
        err = denoising(unet, *inputs)
        if term == "gradient" and torch.is_grad_enabled():
            calls["n"] += 1
            err.register_hook(lambda slope: slope * float("nan") if calls["n"] > 8 else slope)
        return bad_at_the_third_step(err, name)

    monkeypatch.setattr(
        data, "encode_images", lambda *some: (bad_at_the_third_step((e := encode(*some))[0], "VAE"), e[1])
    )
    monkeypatch.setattr(data.Clip, "embed", lambda *some: bad_at_the_third_step(embed(*some), "CLIP"))
    monkeypatch.setattr(train, "denoising_error", error)
    with pytest.raises(SystemExit, match=f"step 2: .* Not finite: {complaint}.*Kept: .*checkpoint-000002.pt"):
        train.main(argv)
    assert left(tmp_path / "out")[0]["step"] == 2


def test_a_bad_pair_of_one_process_ends_all_and_the_first_names_it(tmp_path, options):
    first, second = launch(tmp_path, 2, bad_second, [*options, "--out", str(tmp_path / "out")])
    assert first[0] == second[0] == 1
    assert "step 1: loss nan" in first[1] and "Not finite: the VAE's latents of rows" in first[1], first[1]
    assert "Traceback" not in first[1] + second[1]


def bad_second(argv):
    encode, steps = data.encode_images, []

    def bad(*some):
        steps.append(1)
        mean, std = encode(*some)
        return mean * (float("nan") if len(steps) > 2 and data.torchrun()[0] == 1 else 1), std

    data.encode_images = bad
    train.main(argv)


def test_fp16s_skipped_steps_are_counted_and_shown(tmp_path, options, monkeypatch, capsys):
    """On the CPU, past the refusal of fp16 there: a scale of 2^127 overflows until the scaler has halved it."""
    get_args = train.get_args

    def fp16(argv):
        (args := get_args(argv)).precision = "fp16"
        return args

    scaler = torch.amp.GradScaler
    monkeypatch.setattr(train, "get_args", fp16)
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *some, **more: scaler(*some, init_scale=2.0**127, **more)
    )
    train.main([*options, "--steps", "4", "--out", str(tmp_path / "out")])
    log = log_of(tmp_path / "out")
    assert log[0]["skipped"] == 1 and log[0]["grad_norm"] is None
    assert "skipped=" in capsys.readouterr().err


# Data that stop coming


def test_a_reader_that_dies_ends_the_run_in_one_line(tmp_path, unbroken, options):
    argv = [*options, "--workers", "2", "--out", str(tmp_path / "out")]
    ((status, text),) = launch(tmp_path, 1, faulty, "reader", 3, argv)
    assert (
        status == 1 and "train.py: a process that reads images has died" in text and "Traceback" not in text
    ), text
    ((status, text),) = launch(tmp_path, 1, faulty, None, 0, argv)
    same_bits(left(tmp_path / "out"), unbroken(1))


def test_a_reader_that_dies_while_it_hands_over_a_tensor_is_named_too():
    """Then Python's socket to it breaks; what breaks between ranks is torch's error, and says so."""
    for error, meaning in (
        (ConnectionResetError(104, "Connection reset by peer"), "a process that reads images has died"),
        (EOFError(), "a process that reads images has died"),
        (RuntimeError("[gloo] Connection closed by peer"), "another process of this run has ended"),
    ):
        with pytest.raises(SystemExit, match=meaning):
            resume.explain(error, train.get_args([]))


@pytest.mark.parametrize("fault, workers", [(None, "0"), ("no scan", "0"), ("no scan", "2")])
def test_storage_that_hangs_ends_the_run_in_one_line(tmp_path, options, fault, workers):
    """An image is a pipe that nobody writes to, so that to open it waits for ever."""
    os.mkfifo(tmp_path / "b.png")
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "a.png", "rejected": "b.png"}\n' * 8)
    argv = [*options, "--data", str(tmp_path), "--workers", workers, "--data_timeout", "1"]
    ((status, text),) = launch(
        tmp_path / "logs", 1, faulty, fault, 0, [*argv, "--out", str(tmp_path / "out")]
    )
    assert status == 1 and "train.py: no data came for 1 s: is the storage slow, or gone?" in text, text
    assert "Traceback" not in text


@pytest.mark.parametrize("workers", ["0", "2"])
def test_storage_that_goes_away_ends_the_run_in_one_line(tmp_path, options, workers):
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "a.png", "rejected": "a.png"}\n' * 8)
    argv = [*options, "--data", str(tmp_path), "--workers", workers, "--out", str(tmp_path / "out")]
    ((status, text),) = launch(tmp_path / "logs", 1, without_images, argv)
    assert status == 1 and "the data are out of reach" in text and "Traceback" not in text, text
    assert "8 pairs in a row cannot be decoded any more" in text


def without_images(argv):
    load = data.load_pipeline

    def load_and_unmount(model):
        Path(argv[argv.index("--data", argv.index("--data") + 1) + 1], "a.png").unlink()
        return load(model)

    data.load_pipeline = load_and_unmount
    train.main(argv)


@pytest.mark.slow
def test_a_rank_that_fails_brings_the_others_down(tmp_path, options):
    """By torchrun, as a user meets it: the message of the one that failed, an end of all within the time limit."""
    ended = by_torchrun(tmp_path, "rank", 2, options)
    assert ended.returncode == 1 and "ValueError: this rank fails" in ended.stderr


if __name__ == "__main__":
    tiny.STEPS = QUICK
    faulty(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
