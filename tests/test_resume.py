"""Whatever ends a run, the same command resumes to the same bits, and nothing that was saved is lost.

Run as a script, this file is train.py with a fault: `python tests/test_resume.py FAULT NUMBER [options of train.py]`.
"""

import distributed  # first: it notes the launcher

import gc
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import filelock
import pytest
import torch
from PIL import Image

import common
import data
import models
import options as options_file
import reference
import run
import train
from common import InputError, one_line_errors
from distributed import torchrun_env
from extras import tiny
from small_runs import launch, log_of

STEPS, LINES = 6, 13_000  # steps of a run; so many lines of the files in TRACED it executes with --ema, else 9,500
TRACED = [module.__file__ for module in (train, run, reference, distributed, common)]
pytestmark = pytest.mark.usefixtures("quick_models")


# A run with a fault


def faulty(fault, number, argv):
    """train.main with a fault at a line of our code, in a save or in a step; `number` says at which one.

    "line VICTIM" and "half VICTIM" kill this process ("self"), its launcher, or everything. "half" means half a save.
    """
    fault, _, victim = str(fault).partition(" ")
    launcher = os.getppid()
    if fault == "line" and torchrun_env()[0] == 0:
        sys.settrace(killed_at_line(number, victim, launcher))
    if fault == "half":
        torch.save = killed_in_save(number, victim, launcher)
    if fault == "unscanned":
        data.ImagePairs.scan = lambda pairs: None
    if fault == "model":
        run.Output.save_model = without_room(run.Output.save_model)
    if fault == "unmount":
        train.Trainer.place_models = without_images(train.Trainer.place_models, argv)
    train.Trainer.prepare = struck_in_step(train.Trainer.prepare, fault, number)
    train.main(argv)


def strike(victim, launcher):
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    others = [int(child) for child in children if int(child) != os.getpid()]
    victims = {"launcher": [launcher], "everything": [launcher, *others, os.getpid()], "self": [os.getpid()]}
    for process in victims[victim]:
        os.kill(process, signal.SIGKILL)


def killed_at_line(number, victim, launcher):
    """A trace function that strikes when the number-th line of the files in TRACED is executed."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            lines += 1
            if lines == number:
                strike(victim, launcher)
        return trace

    return trace


def killed_in_save(number, victim, launcher):
    """A torch.save whose number-th call strikes when half of its bytes are written."""
    torch_save, saves = torch.save, 0

    def half_a_save(state, stream):
        nonlocal saves
        saves += 1
        whole = io.BytesIO()
        torch_save(state, whole)
        content = whole.getvalue()
        stream.write(content[: len(content) // 2])
        if saves == number:
            stream.flush()
            strike(victim, launcher)
        stream.write(content[len(content) // 2 :])

    return half_a_save


def struck_in_step(prepare, fault, number):
    """Trainer.prepare, which a step calls for each micro-batch, with a fault at its first call in step `number`."""
    calls = 0

    def prepare_and_strike(trainer, batch, images):
        nonlocal calls
        if calls == number * trainer.args.batch_size // (trainer.args.micro_batch * trainer.world_size):
            step_fault(fault, trainer.rank)
        calls += 1
        return prepare(trainer, batch, images)

    return prepare_and_strike


def step_fault(fault, rank):
    if fault in ("SIGTERM", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault == "group":  # torchrun and Slurm signal all processes, the loader's too, and twice
        for process in multiprocessing.active_children() * 2:
            os.kill(process.pid, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault in ("reader", "reader-with-lock"):
        if fault == "reader-with-lock":
            take_lock_of_loader()
        multiprocessing.active_children()[0].kill()
    elif fault == "rank" and rank == 1:
        raise ValueError("this rank fails")
    elif fault == "disk":
        limit_files()
    elif fault == "log":
        for descriptor in os.listdir("/proc/self/fd"):
            if os.path.realpath(f"/proc/self/fd/{descriptor}").endswith("log.jsonl"):
                os.dup2(os.open("/dev/full", os.O_WRONLY), int(descriptor))


def take_lock_of_loader():
    """Takes the lock that a reader holds while it asks whether the loader has ended. Killed then, it never gives it back."""
    loaders = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    (loader,) = [thing for thing in gc.get_objects() if isinstance(thing, loaders)]
    loader._workers_done_event._cond.acquire()


def limit_files():
    """From now on no file can grow over 100 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def without_room(save_model):
    def save(output):
        limit_files()
        save_model(output)

    return save


def without_images(place_models, argv):
    """Trainer.place_models; after it the last --data has lost its pictures."""
    last = len(argv) - argv[::-1].index("--data")

    def place(trainer):
        place_models(trainer)
        Path(argv[last], "a.png").unlink()

    return place


# Runs to compare


@pytest.fixture(scope="module")
def options(small_model, few_pairs):
    """A run in two passes: two micro-batches make a group."""
    argv = ["--model", small_model("sd"), "--data", few_pairs, "--clip", "tiny", "--device", "cpu"]
    argv += f"--steps {STEPS} --batch_size 8 --micro_batch 4".split()
    return argv + "--save_every 2 --sample_every 0 --lr 1e-3".split()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, options):
    """unbroken(world_size, *more): the folder of a run that nobody killed; `more` are further options."""
    runs = {}

    def unbroken(world_size, *more):
        key = (world_size, *more)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("unbroken") / "out"
            argv = [*options, *more, "--out", str(runs[key])]
            for status, text in launch(runs[key].parent, world_size, faulty, None, 0, argv):
                assert status == 0, text
        return runs[key]

    return unbroken


def left(out):
    """The checkpoint and the log of a folder, the log without its times."""
    (file,) = out.glob("checkpoint-*.pt")
    log = log_of(out)
    for line in log:
        del line["pairs_per_second"]
    return torch.load(file, weights_only=True), log


def same_bits(out, expected):
    """Two folders hold the same run: log, weights, optimizer, average, model/."""
    (state, log), (expected_state, expected_log) = left(out), left(expected)
    assert [line["step"] for line in log] == list(range(len(expected_log)))
    assert log == expected_log
    for part in ("weights", "optimizer", "ema"):
        a, b = (torch.utils._pytree.tree_leaves(kept[part]) for kept in (state, expected_state))
        assert len(a) == len(b) > 0, part
        for x, y in zip(a, b):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, part
    files, expected_files = ({file.relative_to(folder) for file in folder.glob("model/**/*")} for folder in (out, expected))
    assert files == expected_files
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert weights
    for file in weights:
        assert (out / file).read_bytes() == (expected / file).read_bytes()


def same_losses(out, expected):
    for a, b in zip(left(out)[1], left(expected)[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def one_line_of(text):
    """The one line in which train.py says how it ended, and nothing else of an error."""
    lines = [line for line in text.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


# Killed


def killed(attempt, out, expected, kills):
    """Kills a run at random moments from its set-up to its end, every fourth time in the midst of a save. Then lets it end.

    A run that ends before it is killed does not count, and the next one begins anew.

    attempt  (fault, number) -> (exit status, output) of the run
    """
    rng, count = random.Random(0), 0
    while count < kills:
        moment = ("line", rng.randrange(1, LINES)) if count % 4 else ("half", rng.choice((1, 2)))
        status, text = attempt(*moment)
        assert status in (0, -signal.SIGKILL), text
        if status == 0:
            same_bits(out, expected)
            shutil.rmtree(out)
        else:
            count += 1
    status, text = attempt(None, 0)
    assert status == 0, text
    same_bits(out, expected)
    names = {file.name for file in (out / "model").iterdir()}
    assert names & {"model_index.json", "pytorch_lora_weights.safetensors"} and not list(out.glob("*.part"))


EMA = ("--ema", "0.9", "--validate", "tiny", "--validate_pairs", "6", "--validate_every", "3")
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kills, more", [(1, EMA), pytest.param(10, EMA, marks=SLOW), pytest.param(10, (), marks=SLOW)]
)
def test_killed_at_random_moments(tmp_path, unbroken, options, kills, more):
    argv = [*options, *more, "--out", str(tmp_path / "out")]

    def attempt(fault, number):
        (ended,) = launch(tmp_path, 1, faulty, f"{fault} self", number, argv)
        return ended

    killed(attempt, tmp_path / "out", unbroken(1, *more), kills)


def by_torchrun(folder, fault, number, options, world_size=2):
    """A run by torchrun. It returns once the launcher and every process that writes to its pipes have ended."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--standalone"]
    command += [__file__, str(fault), str(number), *options, "--out", str(folder / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "everything"])
def test_torchrun_killed_at_random_moments(tmp_path, unbroken, options, victim):
    """The launcher alone, whose processes would go on if they did not watch it; and all of them at once."""

    def attempt(fault, number):
        ended = by_torchrun(tmp_path, f"{fault} {victim}", number, options)
        return ended.returncode, ended.stderr

    killed(attempt, tmp_path / "out", unbroken(2), 2)


# Signals


@pytest.mark.slow
@pytest.mark.parametrize("workers, fault", [("0", "SIGINT"), ("2", "group")])
def test_a_signal_saves_the_step_and_the_run_goes_on(tmp_path, unbroken, options, workers, fault):
    """So does a signal that torchrun or Slurm sends to the loader's processes, too, and more than once."""
    argv = [*options, "--workers", workers, "--save_every", "0", "--out", str(tmp_path / "out")]
    ((status, text),) = launch(tmp_path, 1, faulty, fault, 2, argv)
    assert status == 1 and one_line_of(text) == "train.py: saved after 3 steps; the same command resumes"
    assert left(tmp_path / "out")[0]["step"] == 3
    ((status, text),) = launch(tmp_path, 1, faulty, None, 0, argv)
    assert status == 0 and "going on after 3 steps" in text
    same_bits(tmp_path / "out", unbroken(1))


@pytest.mark.slow
def test_processes_agree_on_the_step_that_a_signal_ends(tmp_path, unbroken, options):
    """Only the second one gets the signal. The run resumes with another number of processes."""
    argv = [*options, "--out", str(tmp_path / "out")]
    first, second = launch(tmp_path, 2, signalled_second, argv)
    assert first[0] == second[0] == 1 and "saved after 4 steps" in first[1], first[1]
    ((status, text),) = launch(tmp_path, 1, faulty, None, 0, argv)
    assert status == 0, text
    same_losses(tmp_path / "out", unbroken(1))


def signalled_second(argv):
    rank, _, _ = torchrun_env()
    faulty("SIGTERM" if rank == 1 else None, 3, argv)


# Going on


def test_what_may_change_when_a_run_goes_on(tmp_path, unbroken, options):
    out = tmp_path / "out"
    train.main([*options, "--steps", "4", "--out", str(out)])
    assert (out / "model").is_dir()
    for change, complaint in [
        ("--lr 2e-3", "holds a run with --lr 0.001, not 0.002. Pass another --out"),
        ("--seed 1", "--seed 0, not 1"),
        ("--loss dpo", "--loss rpo, not dpo"),
        ("--group_size 4", "--group_size 8, not 4"),
        ("--batch_size 16", "--batch_size 8, not 16"),
        ("--precision bf16", "--precision fp32, not bf16"),
        ("--random_flip", "--random_flip False, not True"),
        ("--optimizer sgd", "--optimizer adamw, not sgd"),
        ("--ema 0.9", "--ema 0.0, not 0.9"),
        ("--steps 3", "has taken 4 steps already; --steps 3 is less"),
    ]:
        with pytest.raises(SystemExit, match=f"^train.py: {out} .*{complaint}"):
            train.main([*options, "--steps", "4", *change.split(), "--out", str(out)])
    free = "--micro_batch 8 --save_every 3 --sample_every 4 --gradient_checkpointing --workers 1"
    train.main([*options, *free.split(), "--out", str(out)])
    assert (out / "model").is_dir() and (out / "model-000004").is_dir()  # the shorter run's is kept
    same_losses(out, unbroken(1))


def test_what_was_trained_on_is_not_decoded_again(tmp_path, options, monkeypatch):
    monkeypatch.setattr(data.ImagePairs, "scan", lambda pairs: None)
    argv = [*options, "--out", str(tmp_path / "out")]
    train.main([*argv, "--steps", "2"])
    decoded, get = [], data.Pairs.__getitem__

    def noted(pairs, position):
        decoded.append(position)
        return get(pairs, position)

    monkeypatch.setattr(data.Pairs, "__getitem__", noted)
    train.main([*argv, "--steps", "3"])
    assert decoded == list(range(16, 24))


@pytest.mark.parametrize("optimizer, loss", [("adafactor", "rpo"), pytest.param("sgd", "sft", marks=pytest.mark.slow)])
def test_four_steps_are_two_and_two(tmp_path, options, optimizer, loss):
    argv = [*options, "--optimizer", optimizer, "--loss", loss]
    argv += ["--sft_weight", "0.5"] if loss == "rpo" else []
    for steps, name in (("4", "four"), ("2", "two"), ("4", "two")):
        train.main([*argv, "--steps", steps, "--out", str(tmp_path / name)])
    same_bits(tmp_path / "two", tmp_path / "four")


@pytest.mark.slow
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
    same_bits(tmp_path / "two", tmp_path / "four")


def test_a_run_that_is_done_says_so_and_is_left_alone(tmp_path, options, capsys):
    out = tmp_path / "out"
    argv = [*options, "--steps", "1", "--out", str(out)]

    def times():
        return {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and file.name != "lock"}

    train.main(argv)
    before = times()
    train.main(argv)
    assert "holds all 1 steps of this run. To go on, pass more --steps. To train again, remove the folder" in capsys.readouterr().out
    assert times() == before


@pytest.mark.parametrize("name, text", [("thesis.tex", "precious"), ("config.json", '{"hidden_size": 8}')])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path, options, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=f"^train.py: .*holds something else .{name}.. Pass another --out"):
        train.main([*options, "--out", str(tmp_path)])
    assert (tmp_path / name).read_text() == text


def test_a_resumed_run_lets_go_of_the_old_checkpoint(tmp_path, options, monkeypatch):
    """A file that is still mapped would take its room on the disk until the run ends."""
    argv = [*options, "--out", str(tmp_path / "out")]
    train.main([*argv, "--steps", "2"])
    prepare, calls = train.Trainer.prepare, []

    def prepare_and_look(trainer, batch, images):
        calls.append("checkpoint-" in Path("/proc/self/maps").read_text())
        return prepare(trainer, batch, images)

    monkeypatch.setattr(train.Trainer, "prepare", prepare_and_look)
    train.main([*argv, "--steps", "3"])
    assert calls == [False] * 2


def test_other_data_under_the_same_name_are_refused(tmp_path, options):
    folder = tmp_path / "pairs"
    folder.mkdir()
    argv = [*options, "--data", str(folder), "--out", str(tmp_path / "out")]
    datasets.Dataset.from_list(tiny.pair_rows(8)).to_parquet(folder / "train-0.parquet")
    train.main([*argv, "--steps", "1"])
    datasets.Dataset.from_list(tiny.pair_rows(9)).to_parquet(folder / "train-0.parquet")
    with pytest.raises(SystemExit, match="^train.py: .*was begun with 8 pairs, but .* now holds 9"):
        train.main([*argv, "--steps", "2"])


def test_a_live_run_keeps_others_out_of_its_folder(tmp_path, options):
    out = tmp_path / "out"
    out.mkdir()
    refused = pytest.raises(SystemExit, match="^train.py: another live run is writing to")
    with filelock.FileLock(out / "lock"), refused:
        train.main([*options, "--out", str(out)])
    assert [file.name for file in out.iterdir()] == ["lock"]


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, options):
    train.main([*options, "--steps", "1", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("checkpoint-*.pt")
    damaged = file.read_bytes()[:1000]
    file.write_bytes(damaged)
    with pytest.raises(SystemExit, match="^train.py: .*checkpoint-000001.pt cannot be read"):
        train.main([*options, "--steps", "2", "--out", str(tmp_path)])
    assert file.read_bytes() == damaged


def test_a_checkpoint_without_what_identifies_a_run_is_refused_and_kept(tmp_path, options):
    """Another program's checkpoint may have the same name."""
    (tmp_path / "config.json").write_text(json.dumps(vars(train.train_args(options))))
    foreign = {"step": 1, "weights": {}, "optimizer": {}, "digests": {}}
    file = tmp_path / "checkpoint-000001.pt"
    torch.save(foreign, file)
    with pytest.raises(SystemExit) as refused:
        train.main([*options, "--out", str(tmp_path)])
    assert str(refused.value).startswith(f"train.py: {file} cannot be read (") and "no draw_ids" in str(refused.value)
    assert torch.load(file, weights_only=True) == foreign


# Every option of a run that resumes


OTHERS = {  # two values of each option; neither is its default or the preset's
    "model": ("sdxl", "tiny-flow"), "config": ("folder", "other"), "random_init": (True, False),
    "init_lora": ("lora", "other"), "data": ("pairs", "other"), "clip": ("ViT-B-32:laion2b", "ViT-B-32:openai"),
    "resolution": (64, 96), "random_flip": (True, False), "random_crop": (True, False), "vae_sample": ("mean", "sample"),
    "vae_precision": ("bf16", "fp32"), "loss": ("dpo", "sft"), "beta": (10.0, 20.0), "group_size": (4, 2),
    "tau": (0.1, 0.2), "similarity": ("text", "image"), "weight_position": ("inside", "outside"),
    "group_noise": ("both", "timestep"), "loss_args": ("gamma=2", "gamma=3"), "prompt_dropout": (0.3, 0.4),
    "timestep_sampling": ("uniform", "logit_normal"), "timestep_mean": (1.0, 2.0), "timestep_scale": (2.0, 3.0),
    "timestep_shift": (2.0, 3.0), "train_guidance": (2.0, 3.0), "steps": (7, 9), "batch_size": (32, 64),
    "micro_batch": (4, 2), "optimizer": ("sgd", "adafactor"), "lr": (1e-3, 2e-3), "warmup": (5, 6),
    "weight_decay": (0.1, 0.2), "max_grad_norm": (2.0, 3.0), "lora_rank": (4, 8), "ema": (0.5, 0.6), "seed": (1, 2),
    "validate": ("held_out", "other"), "validate_every": (3, 4), "validate_pairs": (5, 6), "device": ("mps", "cpu"),
    "precision": ("bf16", "fp32"), "workers": (3, 4), "gradient_checkpointing": (True, False), "compile": (True, False),
    "reference_errors": ("file", "other"), "data_timeout": (5, 6), "save_minutes": (1.0, 2.0), "save_every": (3, 4),
    "sample_every": (3, 4), "sample_prompts": ("file", "other"), "sample_steps": (3, 4), "guidance": (1.5, 2.5)}
SAME_AS_A_DEFAULT = [("tiny", "steps", 1000), ("tiny", "prompt_dropout", 0.2), ("sdxl", "gradient_checkpointing", False),
                     ("sd15", "random_flip", False), ("sdxl", "optimizer", "adamw")]  # (model, option, value)


def further_options():
    """{name: two values} of options that are not in OTHERS, as those of a fork."""
    options, found = options_file.train_options(), {}
    for action in options.parser._actions:
        name, default = action.dest, options.defaults.get(action.dest)
        if name in OTHERS or name in ("help", "out", "dry_run"):
            continue
        kind = getattr(action.type, "__name__", "bool")
        values = action.choices or {"bool": (True, False), "int": (3, 4), "float": (0.25, 0.5)}.get(kind, ("one", "other"))
        found[name] = sorted(values, key=lambda value: value == default)[:2]  # the default last
    return found


def gamma_loss(err_w, gamma=1.0):
    return gamma * err_w.mean(), {}


def words(name, value):
    return [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]


def begin_run(out, argv):
    """Leaves what a run leaves of its arguments, and returns them."""
    args = vars(train.train_args([*argv, "--out", str(out)]))
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(args))
    return args


@pytest.fixture
def any_option(monkeypatch):
    """Every option can be resolved here: there is a second device, and a loss with a hyperparameter of its own."""
    monkeypatch.setattr(options_file, "get_device", lambda name=None: torch.device(name or "cpu"))
    monkeypatch.setitem(train.LOSSES, "gamma", gamma_loss)


@pytest.mark.parametrize("name", OTHERS | further_options())
def test_an_option_that_is_left_out_is_the_recorded_one(tmp_path, any_option, name):
    """Typed again with another value, it is taken if it may change, and refused by name if not."""
    first, second = (OTHERS | further_options())[name]
    model = {"random_init": ["--model", "sd15"], "loss_args": ["--loss", "gamma"]}.get(name, [])
    before = begin_run(tmp_path, [*model, *words(name, first)])
    plain = train.train_args([*model, "--out", str(tmp_path / "plain")])
    assert before[name] != getattr(plain, name)

    assert vars(train.train_args(["--out", str(tmp_path)])) == before
    assert vars(train.train_args([*words(name, first), "--out", str(tmp_path)])) == before
    changed = [*words(name, second), "--out", str(tmp_path)]
    if name in options_file.MAY_CHANGE:
        assert vars(train.train_args(changed)) == before | {name: second}
        return
    with pytest.raises(InputError, match=f"holds a run with --{name} .*, not .*. Pass another --out"):
        train.train_args(changed)
    (tmp_path / "checkpoint-000001.pt").touch()
    if name in options_file.MAY_MOVE:  # a checkpoint knows the content, so the name may change
        assert getattr(train.train_args(changed), name) == second
        return
    with pytest.raises(InputError, match=f"holds a run with --{name} .*, not .*. Pass another --out"):
        train.train_args(changed)


@pytest.mark.parametrize("model, name, value", SAME_AS_A_DEFAULT)
def test_a_recorded_option_counts_before_a_preset(tmp_path, any_option, model, name, value):
    """It does so even if its value is the option's default, and the preset's is another."""
    before = begin_run(tmp_path, ["--model", model, *words(name, value)])
    assert before[name] == value != options_file.PRESETS[model][name]
    assert vars(train.train_args(["--model", model, "--out", str(tmp_path)])) == before


@pytest.mark.parametrize("before, now", [("0.5", "0.25"), ("0.5", "held_out"), ("held_out", "0.5")])
def test_a_share_of_held_out_prompts_stays(tmp_path, before, now):
    """Another share would train on other pairs. Pairs of their own may change."""
    begin_run(tmp_path, ["--validate", before])
    with pytest.raises(InputError, match="held out a share of .* of the prompts .--validate., not "):
        train.train_args(["--validate", now, "--out", str(tmp_path)])


@pytest.mark.parametrize("steps_taken", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sgd_that_is_left_out_stays_sgd(tmp_path, options, monkeypatch, steps_taken):
    """It does so before the first checkpoint, too, when config.json alone knows it."""
    out, sgd = tmp_path / "out", ["--optimizer", "sgd"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="saved after 1|the storage is gone"):
        if steps_taken:
            patch.setattr(train.Trainer, "prepare", struck_in_step(train.Trainer.prepare, "SIGTERM", 0))
        else:
            patch.setattr(train.Trainer, "prepare", without_storage)
        train.main([*options, *sgd, "--steps", "2", "--out", str(out)])
    assert len([*out.glob("checkpoint-*.pt")]) == steps_taken
    train.main([*options, "--steps", "2", "--out", str(out)])
    train.main([*options, *sgd, "--steps", "2", "--out", str(tmp_path / "unbroken")])
    same_bits(out, tmp_path / "unbroken")


def without_storage(*inputs):
    raise InputError("the storage is gone")


# The learning rate


def cosine(step, args):
    return args.lr * (1 + math.cos(math.pi * step / args.steps)) / 2


def test_a_schedule_that_depends_on_steps_goes_on_with_the_same_steps_alone(tmp_path, options, monkeypatch):
    """With more of them, the steps that were taken would have had other learning rates."""
    out = tmp_path / "out"
    monkeypatch.setattr(train, "learning_rate", cosine)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="saved after 2 steps"):
        patch.setattr(train.Trainer, "prepare", struck_in_step(train.Trainer.prepare, "SIGTERM", 1))
        train.main([*options, "--steps", "4", "--out", str(out)])
    with pytest.raises(SystemExit, match="^train.py: with this --steps or this code, the 2 steps .* have other learning rates. Pass the"):
        train.main([*options, "--steps", "5", "--out", str(out)])
    train.main([*options, "--steps", "4", "--out", str(out)])
    train.main([*options, "--steps", "4", "--out", str(tmp_path / "unbroken")])
    same_bits(out, tmp_path / "unbroken")


@pytest.mark.slow
def test_the_schedule_goes_on_with_more_steps(tmp_path, options):
    """Its warm-up does not depend on --steps."""
    options = [*options, "--warmup", "3"]
    for steps, name in (("2", "out"), ("4", "out"), ("4", "unbroken")):
        train.main([*options, "--steps", steps, "--out", str(tmp_path / name)])
    same_bits(tmp_path / "out", tmp_path / "unbroken")


# No room


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, unbroken, options):
    """There is no room from step 3 on, so the second checkpoint fails in the midst of its bytes."""
    out = tmp_path / "out"
    argv = [*options, "--out", str(out)]
    ((status, text),) = launch(tmp_path, 1, faulty, "disk", 3, argv)
    line = one_line_of(text)
    assert status == 1 and "checkpoint-000004.pt cannot be written" in line
    assert "Kept: " in line and "checkpoint-000002.pt. Free some space, then the same command resumes" in line
    assert left(out)[0]["step"] == 2 and not list(out.glob("*.part"))
    ((status, text),) = launch(tmp_path, 1, faulty, None, 0, argv)
    assert status == 0, text
    same_bits(out, unbroken(1))


@pytest.mark.slow
def test_a_full_disk_under_the_log(tmp_path, options):
    """The log becomes a device on which there is no space."""
    argv = [*options, "--out", str(tmp_path / "out")]
    ((status, text),) = launch(tmp_path, 1, faulty, "log", 3, argv)
    assert status == 1
    line = one_line_of(text)
    assert "there is no room to write ([Errno 28] No space left on device). Free some space, then the same command" in line
    assert left(tmp_path / "out")[0]["step"] == 2


@pytest.mark.slow
def test_a_full_disk_under_the_model(tmp_path, unbroken, options):
    """The error is safetensors' own. All steps are in the checkpoint."""
    out = tmp_path / "out"
    argv = [*options, "--out", str(out)]
    ((status, text),) = launch(tmp_path, 1, faulty, "model", 0, argv)
    assert status == 1 and "there is no room to write" in one_line_of(text)
    assert left(out)[0]["step"] == STEPS and not (out / "model").exists()
    ((status, text),) = launch(tmp_path, 1, faulty, None, 0, argv)
    assert status == 0, text
    same_bits(out, unbroken(1))


# What is not finite


@pytest.mark.parametrize(
    "term, complaint",
    [
        pytest.param("VAE", "the VAE's latents of rows 4, 16", marks=pytest.mark.slow),
        ("CLIP", "the CLIP embeddings of rows 4, 16"),
        pytest.param("reference", "the reference's errors of rows 4, 16", marks=pytest.mark.slow),
        pytest.param("policy", "the policy's errors of rows 4, 16", marks=pytest.mark.slow),
        ("gradient", "the loss or its gradient, although all errors are finite"),
    ],
)
def test_a_step_that_goes_bad_names_its_term_and_rows(tmp_path, options, monkeypatch, term, complaint):
    """The first pair of each micro-batch goes bad from the third step on, also when that step is computed again."""
    pairs = data.ImagePairs(options[options.index("--data") + 1], 32)
    assert [int(pairs[position]["row"]) for position in range(16, 24, 4)] == [4, 16]
    argv = [*options, "--out", str(tmp_path / "out")]
    encode, embed, denoising = models.StableDiffusion.encode_images, data.Clip.embed, train.denoising_error
    calls_of_a_step = 3 if term == "policy" else 2  # the first micro-batch goes through the policy twice
    calls = 0

    def is_bad(name):
        """Counts the calls of the term."""
        nonlocal calls
        if term != name:
            return False
        calls += 1
        return calls > 2 * calls_of_a_step

    def spoiled(values, name):
        if is_bad(name):
            values = values.clone()
            values[0] = float("nan")
        return values

    def encode_images(model, pixels):
        mean, std = encode(model, pixels)
        return spoiled(mean, "VAE"), std

    def embed_pairs(*args):
        return spoiled(embed(*args), "CLIP")

    def error(predict, network, *args, **inputs):
        is_policy = any(param.requires_grad for param in network.parameters())
        err = denoising(predict, network, *args, **inputs)
        if torch.is_grad_enabled() and is_bad("gradient"):
            err.register_hook(lambda dloss_derr: dloss_derr * float("nan"))
        return spoiled(err, "policy" if is_policy else "reference")

    monkeypatch.setattr(models.StableDiffusion, "encode_images", encode_images)
    monkeypatch.setattr(data.Clip, "embed", embed_pairs)
    monkeypatch.setattr(train, "denoising_error", error)
    kept = "Kept: .*checkpoint-000002.pt"
    with pytest.raises(SystemExit, match=f"^train.py: step 2: .* Not finite: {complaint}. {kept}"):
        train.main(argv)
    assert left(tmp_path / "out")[0]["step"] == 2


def test_a_bad_pair_of_one_process_ends_all_and_the_first_names_it(tmp_path, options):
    first, second = launch(tmp_path, 2, bad_second, [*options, "--out", str(tmp_path / "out")])
    assert first[0] == second[0] == 1
    line = one_line_of(first[1])
    assert "step 1: loss nan" in line and "Not finite: the VAE's latents of rows" in line
    assert "Traceback" not in second[1]


def bad_second(argv):
    """train.main; the second process's latents go bad from its second micro-batch on, which is in step 1."""
    encode, calls = models.StableDiffusion.encode_images, 0
    rank, _, _ = torchrun_env()

    def encode_images(model, pixels):
        nonlocal calls
        calls += 1
        mean, std = encode(model, pixels)
        if rank == 1 and calls > 1:
            mean = mean * float("nan")
        return mean, std

    models.StableDiffusion.encode_images = encode_images
    train.main(argv)


def test_fp16s_skipped_steps_are_counted_and_shown(tmp_path, options, monkeypatch, capsys):
    """A CPU's fp16 is refused, so the test passes that by. A scale of 2^127 overflows until the scaler has halved it."""
    train_args, scaler = train.train_args, torch.amp.GradScaler

    def fp16_args(argv):
        args = train_args(argv)
        args.precision = "fp16"
        return args

    def high_scaler(device, enabled):
        return scaler(device, init_scale=2.0**127, enabled=enabled)

    monkeypatch.setattr(train, "train_args", fp16_args)
    monkeypatch.setattr(torch.amp, "GradScaler", high_scaler)
    train.main([*options, "--steps", "4", "--out", str(tmp_path / "out")])
    log = log_of(tmp_path / "out")
    assert log[0]["skipped"] == 1 and log[0]["grad_norm"] is None
    assert "skipped=" in capsys.readouterr().err


# Data that stop coming


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reader", "reader-with-lock"])
def test_a_reader_that_dies_ends_the_run_in_one_line(tmp_path, unbroken, options, fault):
    argv = [*options, "--workers", "2", "--out", str(tmp_path / "out")]
    ((status, text),) = launch(tmp_path, 1, faulty, fault, 3, argv)
    line = one_line_of(text)
    assert status == 1 and line.startswith("train.py: reading the data broke off: DataLoader worker (pid")
    assert "The same command resumes from the last checkpoint" in line
    ((status, text),) = launch(tmp_path, 1, faulty, None, 0, argv)
    assert status == 0, text
    same_bits(tmp_path / "out", unbroken(1))


class Failing(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


def read(error, workers=0, has_workers=True):
    """Reads the batches of a loader whose data raise an error. In a worker's place, that error is the loader's own."""
    loader = torch.utils.data.DataLoader(Failing(error), num_workers=workers)
    for _ in distributed.guarded(iter(loader), has_workers):
        pass


@pytest.mark.parametrize(
    "error, meaning",
    [
        (ConnectionResetError(104, "Connection reset by peer"), "[Errno 104] Connection reset by peer. "),
        (EOFError(), "EOFError. "),
    ],
)
def test_a_reader_that_dies_while_it_hands_over_a_tensor_is_named_too(error, meaning):
    """Then Python's socket to it breaks. Any other connection that breaks keeps its traceback."""
    with pytest.raises(SystemExit) as ended, one_line_errors("train.py"):
        read(error)
    assert str(ended.value).startswith(f"train.py: reading the data broke off: {meaning}")
    with pytest.raises(type(error)), one_line_errors("train.py"):
        read(error, has_workers=False)
    with pytest.raises(type(error)), one_line_errors("train.py"):
        raise error.with_traceback(None)


def test_an_error_of_a_reader_keeps_its_meaning():
    """The loader hands it on with its traceback. The message is the last line; a fault of the code stays whole."""
    with pytest.raises(SystemExit) as ended, one_line_errors("train.py"):
        read(InputError("8 pairs in a row"), workers=1)
    assert str(ended.value) == "train.py: 8 pairs in a row"
    with pytest.raises(SystemExit) as ended, one_line_errors("train.py"):
        read(RuntimeError("unable to write: No space left on device (28)"), workers=1)
    meaning = "train.py: there is no room to write (RuntimeError: unable to write: No space left on device (28)). "
    assert str(ended.value).startswith(meaning)
    with pytest.raises(RuntimeError, match="Original Traceback"), one_line_errors("train.py"):
        read(RuntimeError("shapes do not match"), workers=1)


def test_a_run_that_broke_off_leaves_the_next_runs_in_the_process_their_readers():
    """extras.learning trains many runs in a process. A loader's readers end with it, also after a run that broke off."""
    for _ in range(6):  # torch knows a loader by its address, which the next one could get
        with pytest.raises(ValueError, match="broken"):
            read(ValueError("broken"), workers=1)
        distributed.release_signals()
    pairs = torch.utils.data.DataLoader(range(4), num_workers=2)
    batches = iter(pairs)
    readers = [*multiprocessing.active_children()]
    assert [batch.item() for batch in distributed.guarded(batches, True)] == [0, 1, 2, 3]
    assert readers and not any(reader.is_alive() for reader in readers)


def test_many_loaders_of_a_run_report_a_dead_reader_once(monkeypatch):
    """Each validation has a loader of its own. A handler that wraps the last one's would be as deep as their number."""
    set_handlers = []
    monkeypatch.setattr(signal, "getsignal", lambda number: [torchs_handler, *set_handlers][-1])
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_handlers.append(handler))
    for _ in range(3):
        assert [*distributed.guarded(iter([1]), has_workers=True)] == [1]
    assert len(set_handlers) == 1
    with pytest.raises(distributed.ReaderDied):
        set_handlers[0](signal.SIGCHLD, None)


def torchs_handler(number, frame):
    raise RuntimeError("DataLoader worker (pid 7) is killed")


def test_the_process_that_fails_alone_says_so(monkeypatch):
    """Only the second of two may find its storage gone."""
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended, one_line_errors("train.py"):
        raise InputError("is the storage gone?")
    assert str(ended.value) == "train.py: process 1: is the storage gone?"


def image_of_pairs(folder, rejected):
    """A .jsonl of eight pairs of a.png and `rejected`."""
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    line = f'{{"prompt": "a", "chosen": "a.png", "rejected": "{rejected}"}}\n'
    (folder / "pairs.jsonl").write_text("".join([line] * 8))


def test_storage_that_hangs_ends_the_run_in_one_line(tmp_path, options):
    """An image is a pipe that nobody writes to, so opening it waits for ever."""
    image_of_pairs(tmp_path, "b.png")
    os.mkfifo(tmp_path / "b.png")
    argv = [*options, "--data", str(tmp_path), "--workers", "2", "--data_timeout", "1"]
    argv += ["--out", str(tmp_path / "out")]
    ((status, text),) = launch(tmp_path / "logs", 1, faulty, "unscanned", 0, argv)
    line = one_line_of(text)
    assert status == 1 and "reading the data broke off: DataLoader timed out after 1 seconds" in line
    assert "The same command resumes from the last checkpoint" in line and "--data_timeout" in line


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
def test_storage_that_goes_away_ends_the_run_in_one_line(tmp_path, options, workers):
    image_of_pairs(tmp_path, "a.png")
    argv = [*options, "--data", str(tmp_path), "--workers", workers, "--out", str(tmp_path / "out")]
    ((status, text),) = launch(tmp_path / "logs", 1, faulty, "unmount", 0, argv)
    expected = (f"train.py: 8 pairs in a row cannot be decoded ([Errno 2] No such file or directory: '{tmp_path}/a.png'). "
                "Is the storage gone?")
    assert status == 1 and one_line_of(text) == expected


@pytest.mark.slow
def test_a_rank_that_fails_brings_the_others_down(tmp_path, options):
    """Under torchrun a user sees the message of the rank that failed, and all end within the time limit."""
    ended = by_torchrun(tmp_path, "rank", 2, options)
    assert ended.returncode == 1 and "ValueError: this rank fails" in ended.stderr


if __name__ == "__main__":
    faulty(sys.argv[1], int(sys.argv[2]), sys.argv[3:])


def test_the_scale_of_fp16_goes_on_where_it_was():
    """Without it the first steps after a resume would overflow and be skipped."""
    param = torch.nn.Parameter(torch.ones(2))

    def output(scale):
        room = object.__new__(run.Output)
        room.params, room.ema, room.optimizer = {"w": param}, None, torch.optim.SGD([param], lr=0.1)
        room.scaler, room.is_writer = torch.amp.GradScaler("cpu", init_scale=scale), False
        return room

    before, after = output(8.0), output(65536.0)
    assert before.scaler.scale(torch.ones(())) == 8
    state = {"weights": {"w": torch.zeros(2)}, "optimizer": before.optimizer.state_dict(), "skipped": 3}
    after.restore(state | {"scaler": before.scaler.state_dict()})
    assert after.scaler.scale(torch.ones(())) == 8 and after.skipped == 3 and not param.any()
