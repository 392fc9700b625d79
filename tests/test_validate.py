"""Held-out pairs are measured, and nothing else changes."""

import json
import math
import shutil
import sys
import types

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import data
import reference
import sources
import train
from data import ImagePairs
from extras import tiny
from extras.curves import plot_validation
from loss import DDPM
from models import StableDiffusion
from options import train_args
from reference import HeldOutStream
from small_runs import launch, log_of
from stats import rate_interval, wilson
from test_encode import write_cache
from test_resume import faulty, left, same_bits

pytestmark = pytest.mark.usefixtures("quick_models")
FIXED = "--steps 4 --batch_size 4 --group_size 4 --sample_every 0 --clip tiny --device cpu --lr 1e-3".split()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A folder of ten drawn pairs, one of which cannot be read."""
    rows = tiny.pair_rows(10, held_out=True)
    rows[4] |= {"jpg_0": b"<html>404</html>"}
    folder = tmp_path_factory.mktemp("held-out")
    datasets.Dataset.from_list(rows).to_parquet(folder / "pairs.parquet")
    return str(folder)


@pytest.fixture
def run(tmp_path, small_model, few_pairs):
    """run(*options) trains the small model for four steps and gives its folder."""

    def run(*options, name="run"):
        out = tmp_path / name
        train.main(["--model", small_model("sd"), "--data", few_pairs, "--out", str(out), *FIXED, *options])
        return out

    return run


def measured(out):
    """{steps taken: {name without "validate/": value}} of a folder's log."""
    found = {}
    for record in log_of(out):
        values = {name[9:]: value for name, value in record.items() if name.startswith("validate/")}
        if values:
            found[record["step"] + 1] = values
    return found


def weights(out):
    state, _ = left(out)
    return state["weights"]


# What is measured


@pytest.mark.parametrize("options", [
    pytest.param((), marks=pytest.mark.slow), pytest.param(("--loss", "sft"), marks=pytest.mark.slow),
    ("--lora_rank", "4"), pytest.param(("--ema", "0.5"), marks=pytest.mark.slow)])
def test_to_measure_changes_no_bit_of_a_run(run, held_out, options):
    with_it = run(*options, "--validate", held_out, "--validate_every", "2", name="with")
    without = run(*options, name="without")
    (state, full_log), (expected, expected_log) = left(with_it), left(without)
    assert all(torch.equal(value, expected["weights"][name]) for name, value in state["weights"].items())
    log = [{name: x for name, x in record.items() if "validate" not in name} for record in full_log]
    assert log == expected_log
    assert [*measured(with_it)] == [2, 4] and not measured(without)
    assert (with_it / "validation.png").exists() and not (without / "validation.png").exists()


def test_the_curves_are_drawn(tmp_path):
    """They are a picture of the log's measurements; other runs of these tests draw none."""
    names = ("accuracy", "accuracy_low", "accuracy_high", "margin", "policy_w", "policy_l", "ref_w", "ref_l",
             *(f"accuracy_t{k}" for k in range(4)))
    lines = [json.dumps({"step": step, **{f"validate/{name}": 0.1 * step + 0.5 for name in names}}) for step in range(3)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    plot_validation(tmp_path)
    assert len(np.unique(np.array(Image.open(tmp_path / "validation.png")))) > 50


def test_the_figures_are_those_of_the_definition(run, held_out, small_model, monkeypatch):
    """By hand, on the saved model and the starting one: D = err - err_ref, margin = -beta/2 (D_w - D_l)."""
    out = run("--validate", held_out, "--beta", "300", "--vae_sample", "mean")
    last = measured(out)[4]
    errors = {}
    for name, folder in (("policy", str(out / "model")), ("ref", small_model("sd"))):
        args = train_args(["--model", folder, "--data", held_out, "--out", "x", *FIXED, "--vae_sample", "mean"])
        trainer = train.Trainer(args, None, {})
        trainer.set_up(None, {})
        pairs = ImagePairs(held_out, 32)
        stream = HeldOutStream(pairs, trainer.model.process, (4, 8, 8), 10)
        items, quarters = {}, {}
        for position in range(10):
            item = stream[position]
            quarters.setdefault(int(item["row"]), position % 4)
            items.setdefault(int(item["row"]), item)  # one stands for the pair that cannot be read: it counts once
        errors[name] = []
        for row in sorted(items):
            with torch.no_grad():
                batch = trainer.encode(data.collate([items[row]]), 2)
                errors[name].append(trainer.policy_error(batch.inputs))
    policy, ref = torch.stack(errors["policy"]), torch.stack(errors["ref"])                     # [9, 2]
    assert len(policy) == 9
    d = policy - ref
    margin = -300 / 2 * (d[:, 0] - d[:, 1])
    assert last["margin"] == pytest.approx(margin.mean().item(), rel=1e-3)
    assert last["accuracy"] == pytest.approx((margin > 0).float().mean().item())
    for k, name in enumerate(("w", "l")):
        assert last[f"policy_{name}"] == pytest.approx(policy[:, k].mean().item(), rel=1e-5)
        assert last[f"ref_{name}"] == pytest.approx(ref[:, k].mean().item(), rel=1e-5)
    of_quarters = torch.tensor([quarters[row] for row in sorted(items)])
    for quarter in range(4):
        share = (margin[of_quarters == quarter] > 0).float().mean().item()
        assert last[f"accuracy_t{quarter}"] == pytest.approx(share)
    captions = [pairs.caption(row) for row in sorted(items)]
    _, *interval = rate_interval((margin > 0).numpy(), captions)
    assert [last["accuracy_low"], last["accuracy_high"]] == pytest.approx(interval)


def test_to_measure_is_one_forward_of_each_image(run, held_out, monkeypatch):
    """The pairs are encoded once, before the first step, when the reference is measured. SFT's own forwards all have
    a graph, so those without one are the measurement's. Ten pairs are three forwards of four."""
    predict, encode_images = StableDiffusion.predict, StableDiffusion.encode_images
    measured_rows, encoded = [], []

    def observed(model, network, x_t, t, cond):
        if not torch.is_grad_enabled():
            measured_rows.append(len(x_t))
        return predict(model, network, x_t, t, cond)

    def observed_images(model, pixels):
        encoded.append(pixels.shape[:2])
        return encode_images(model, pixels)

    monkeypatch.setattr(StableDiffusion, "predict", observed)
    monkeypatch.setattr(StableDiffusion, "encode_images", observed_images)
    run("--loss", "sft", "--validate", held_out, "--validate_every", "2")
    assert measured_rows == [8] * 3 * 3
    assert [pairs for pairs, images in encoded if images == 2] == [4] * 3


def test_a_model_that_has_learnt_nothing_is_at_one_half(run, held_out):
    """At a rate that moves no float32 weight, every margin is exactly 0."""
    for values in measured(run("--validate", held_out, "--validate_every", "1", "--lr", "1e-30")).values():
        assert values["margin"] == 0 and values["accuracy"] == 0.5
        assert all(values[f"accuracy_t{quarter}"] == 0.5 for quarter in range(4))
        assert values["policy_w"] == values["ref_w"] > 0


@pytest.mark.parametrize("steps", [1000, 10, 7])
def test_timesteps_are_spread_over_four_quarters(few_pairs, steps):
    """Pair k is in quarter k % 4, whatever the length of the schedule, and every step of the quarter may come."""
    process = DDPM(torch.linspace(0.99, 0.01, steps))
    stream = HeldOutStream(ImagePairs(few_pairs, 32), process, (4, 8, 8), 400)
    t = [int(stream.draw(position)["t"]) for position in range(400)]
    assert all(steps * (k % 4) // 4 <= t[k] < steps * (k % 4 + 1) // 4 for k in range(400))
    assert len(set(t)) == steps if steps <= 10 else len(set(t)) > 200


def test_draws_are_the_same_whatever_the_run(run, held_out):
    """Seed, batch, micro-batch, dropout, flip and crop belong to the run, not to the measurement."""
    options = "--seed 7 --batch_size 8 --micro_batch 2 --prompt_dropout 0.9 --random_flip --random_crop --group_size 8"
    one = run("--validate", held_out, "--steps", "1", name="one")
    other = run("--validate", held_out, "--steps", "1", *options.split(), name="other")
    for name in ("ref_w", "ref_l"):
        assert measured(one)[1][name] == pytest.approx(measured(other)[1][name], rel=1e-6)


def test_a_pair_that_cannot_be_read_does_not_count(run, held_out, capsys):
    out = run("--validate", held_out)
    values = measured(out)[4]
    assert values["accuracy"] * 9 == pytest.approx(round(values["accuracy"] * 9))
    report = json.loads((out / "data.json").read_text())["validate"]
    assert report["unreadable"] == {"not a picture": [4]} and report["used"] == 9
    assert "10 pairs" in capsys.readouterr().out


def test_at_most_so_many_pairs(run, held_out, capsys):
    """Five pairs are asked for, and one of them may replace the pair that cannot be read."""
    values = measured(run("--validate", held_out, "--validate_pairs", "5"))[4]
    (n,) = {n for n in (4, 5) if f"{n} are measured" in capsys.readouterr().out}
    assert values["accuracy"] * n == pytest.approx(round(values["accuracy"] * n))


def test_fewer_pairs_than_quarters(run, held_out):
    """A quarter without a pair has no accuracy, not 0."""
    values = measured(run("--validate", held_out, "--validate_pairs", "2"))[4]
    assert values["accuracy_t0"] is not None and values["accuracy_t3"] is None


@pytest.mark.slow
def test_an_average_is_measured_where_there_is_one(run, held_out):
    """A run that starts from the average of --ema and does not move measures the same."""
    out = run("--ema", "0.5", "--validate", held_out)
    average = measured(out)[4]
    still = ["--model", str(out / "model"), "--lr", "1e-30", "--steps", "1", "--validate", held_out]
    again = measured(run(*still, name="again"))[1]
    assert average["policy_w"] == pytest.approx(again["policy_w"], rel=1e-6)
    assert average["policy_w"] != measured(run("--validate", held_out, name="plain"))[4]["policy_w"]


@pytest.mark.parametrize("options", [pytest.param((), marks=pytest.mark.slow), ("--ema", "0.5")])
def test_processes_measure_what_one_does(tmp_path, small_model, few_pairs, held_out, options):
    """With ten pairs on two processes and micro-batches of four, the last forward is filled up.

    Without the average we also see that to measure in the middle of a run changes no bit of it on any process.
    """
    argv = ["--model", small_model("sd"), "--data", few_pairs, *FIXED, *options]
    argv += "--batch_size 8 --group_size 8 --micro_batch 4 --validate_every 2".split()

    def run(name, world_size, *more):
        out = ["--out", str(tmp_path / name)]
        ended = launch(tmp_path / f"log-{name}", world_size, faulty, None, 0, [*argv, *more, *out])
        assert all(status == 0 for status, _ in ended), ended
        return tmp_path / name

    found = [measured(run(str(world_size), world_size, "--validate", held_out))[4] for world_size in (1, 2)]
    if not options:
        unmeasured, as_measured = weights(run("unmeasured", 2)), weights(tmp_path / "2")
        assert all(torch.equal(unmeasured[name], as_measured[name]) for name in unmeasured)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-3, abs=1e-4), name
    state_1, state_2 = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(torch.allclose(state_1[name], state_2[name], atol=1e-4) for name in state_1)


@pytest.mark.slow
def test_from_a_cache_as_from_the_pairs(tmp_path, run, small_model, held_out, few_pairs):
    """What is trained on and what is held out may each be pairs or a cache."""
    write_cache(small_model("sd"), held_out, tmp_path / "held-out")
    write_cache(small_model("sd"), few_pairs, tmp_path / "cache")
    found = []
    for k, source in enumerate((few_pairs, str(tmp_path / "cache"))):
        for j, validate in enumerate((held_out, str(tmp_path / "held-out"))):
            options = ["--data", source, "--validate", validate, "--vae_sample", "mean"]
            found.append(measured(run(*options, name=f"{k}{j}"))[4])
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-3, abs=1e-4)


# A share of the prompts


def test_no_prompt_is_on_both_sides(few_pairs):
    pairs = ImagePairs(few_pairs, 32)
    rows = pairs.rows
    held = reference.hold_out(pairs, 0.3)
    assert sorted([*held, *pairs.rows]) == sorted(rows) and 0 < len(held) < len(rows)
    captions = [{pairs.caption(row).casefold() for row in side} for side in (held, pairs.rows)]
    assert not captions[0] & captions[1]
    assert pairs.report()["held_out"] == len(held) and pairs.report()["used"] == len(pairs.rows)


def test_case_and_blanks_make_no_other_prompt():
    for share in np.linspace(0.05, 0.95, 19):
        told = {reference.is_held_out(text, share) for text in ("A red  circle", "a Red circle ", "a red\tcircle\n")}
        assert len(told) == 1
    held = np.mean([reference.is_held_out(f"prompt {k}", 0.1) for k in range(5000)])
    assert abs(held - 0.1) < 0.02
    smaller = [k for k in range(500) if reference.is_held_out(f"prompt {k}", 0.05)]
    assert all(reference.is_held_out(f"prompt {k}", 0.1) for k in smaller)  # a larger share holds the smaller one


def test_a_share_from_a_cache_as_from_the_pairs(tmp_path, run, small_model, few_pairs, capsys):
    """The same rows are trained on and held out, also with pairs that cannot be read."""
    write_cache(small_model("sd"), few_pairs, tmp_path / "cache")
    options = ["--validate", "0.3", "--vae_sample", "mean"]
    one = run(*options, name="pairs")
    other = run(*options, "--data", str(tmp_path / "cache"), name="from-cache")
    reports = [json.loads((out / "data.json").read_text()) for out in (one, other)]
    assert reports[0]["held_out"] == reports[1]["held_out"] > 0 and reports[0]["used"] == reports[1]["used"]
    assert torch.equal(left(one)[0]["draw_ids"], left(other)[0]["draw_ids"])
    assert measured(one)[4] == pytest.approx(measured(other)[4], rel=1e-2, abs=1e-4)
    text = capsys.readouterr().out
    assert text.count("prompts, 0 of which are trained on") == 2


def test_another_share_is_another_run(tmp_path, run, small_model, few_pairs):
    out = run("--validate", "0.3")
    for other in ("0.2", few_pairs):
        with pytest.raises(SystemExit, match="held out a share of 0.3"):
            run("--validate", other, "--steps", "6")
    report = (out / "data.json").read_text()
    run("--steps", "6")  # the option is left out, so the recorded share stays held out
    assert json.loads(report)["held_out"] > 0 and (out / "data.json").read_text() == report and 6 in measured(out)
    run("--steps", "2", name="all")
    with pytest.raises(SystemExit, match="held out a share of 0 of the prompts"):
        run("--validate", "0.2", name="all")
    write_cache(small_model("sd"), few_pairs, tmp_path / "cache")
    file = tmp_path / "errors"
    cached = ["--data", str(tmp_path / "cache"), "--reference_errors", str(file)]
    run(*cached, "--validate", "0.3", name="share")
    with pytest.raises(SystemExit, match="belongs to a run with data"):
        run(*cached, name="whole")


# Going on


def test_what_takes_seconds_is_checked_before_reference_errors_that_take_hours(tmp_path, run, held_out):
    small = run("--validate", held_out, "--validate_pairs", "4", "--steps", "1", name="small")
    out = run("--validate", held_out, "--steps", "1")
    shutil.copy(small / "validation.safetensors", out)
    with pytest.raises(SystemExit, match="validation.safetensors belongs to a run with number of pairs"):
        run("--steps", "2", "--reference_errors", str(tmp_path / "errors"))
    assert not (tmp_path / "errors").exists()


def test_a_run_that_goes_on_measures_the_same(tmp_path, run, held_out):
    """It does so, too, if the file of the reference's errors was lost."""
    options = ["--validate", held_out, "--validate_every", "1"]
    whole = run(*options, name="whole")
    parts = run(*options, "--steps", "2", name="parts")
    before = (parts / "validation.safetensors").read_bytes()
    run(*options, "--steps", "3", name="parts")
    assert (parts / "validation.safetensors").read_bytes() == before
    (parts / "validation.safetensors").unlink()
    run(*options, name="parts")
    same_bits(parts, whole)


def test_held_out_pairs_may_come_later_but_not_become_others(tmp_path, run, held_out, few_pairs):
    """Training does not depend on them, but the curve of a folder belongs to one set of pairs."""
    out = run("--steps", "2")
    run("--validate", held_out)
    assert [*measured(out)] == [4]
    moved = tmp_path / "moved"
    shutil.copytree(held_out, moved)
    run("--validate", str(moved), "--steps", "5")
    assert [*measured(out)] == [4, 5]
    with pytest.raises(SystemExit, match="validation.safetensors belongs to a run with held-out pairs"):
        run("--validate", few_pairs, "--steps", "6")


def test_changed_draws_are_refused(run, held_out, monkeypatch):
    run("--validate", held_out, "--steps", "2")
    monkeypatch.setattr(HeldOutStream, "sample_t", lambda self, generator, index: torch.tensor(3))
    with pytest.raises(SystemExit, match="validation.safetensors was computed by other code"):
        run("--validate", held_out)


# What --validate names


def test_the_held_out_split_of_a_folder_is_read(tmp_path):
    for name, n in (("train-0.parquet", 3), ("validation-0.parquet", 4), ("test-0.parquet", 5)):
        datasets.Dataset.from_list(tiny.pair_rows(n)).to_parquet(tmp_path / name)
    assert len(sources.read_rows(str(tmp_path), wanted_splits=sources.TO_VALIDATE).columns) == 4
    assert len(sources.read_rows(str(tmp_path)).columns) == 3
    (tmp_path / "validation-0.parquet").unlink()
    assert len(sources.read_rows(str(tmp_path), wanted_splits=sources.TO_VALIDATE).columns) == 5


@pytest.mark.parametrize(
    "value, complaint",
    [("0", "between 0 and 1"), ("1.5", "between 0 and 1"), ("-0.1", "between 0 and 1"), ("nan", "between 0 and 1"),
     ("nowhere", "no such file or folder"), ("0.0001", "would hold out 0 of 26 pairs"),
     ("EMPTY", "--validate .* holds no parquet")],
)
def test_what_cannot_be_held_out_is_refused(tmp_path, run, value, complaint):
    (tmp_path / "EMPTY").mkdir()
    value = str(tmp_path / "EMPTY") if value == "EMPTY" else value
    with pytest.raises(SystemExit, match=complaint):
        run(f"--validate={value}")


def test_a_cache_that_does_not_fit_is_refused(tmp_path, run, small_model, held_out):
    """It may have another size than is typed or than the model's own, another model, other latents, or no end."""
    for name, model, *options in (("small", "sd", "--resolution", "16"), ("other", "sdxl"),
                                  ("mean", "sd", "--vae_sample", "mean"), ("half", "sd")):
        write_cache(small_model(model), held_out, tmp_path / name, *options)
    for typed in ([], ["--resolution", "32"]):
        with pytest.raises(SystemExit, match="encoded with --resolution 16, not 32"):
            run("--validate", str(tmp_path / "small"), *typed)
    with pytest.raises(SystemExit, match="other was encoded with the .* but --model is .* which has another one"):
        run("--validate", str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="encoded with --vae_sample mean, not sample"):
        run("--validate", str(tmp_path / "mean"))
    manifest = json.loads((tmp_path / "half" / "manifest.json").read_text())
    del manifest["files"]
    (tmp_path / "half" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="--validate .* is not finished"):
        run("--validate", str(tmp_path / "half"))


def test_prompts_that_are_trained_on_too_are_said(run, few_pairs, capsys):
    run("--validate", few_pairs)
    prompts = len({ImagePairs(few_pairs).caption(row) for row in ImagePairs(few_pairs).rows})
    words = f"26 pairs of {prompts} prompts, {prompts} of which are trained on; 24 are measured, 2 cannot be read"
    assert words in capsys.readouterr().out


# Where it is logged


def test_weights_and_biases_gets_every_step(run, held_out, tmp_path, monkeypatch):
    """A run that resumes is the same run for Weights & Biases."""
    begun, logged = [], []

    class Run:
        def log(self, record, step):
            logged.append((step, record))

    def init(**options):
        begun.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_PROJECT", "a-project")
    run("--validate", held_out, "--steps", "2")
    run("--validate", held_out)
    assert len(begun) == 2 and begun[0]["id"] == begun[1]["id"] and begun[0]["resume"] == "allow"
    assert [step for step, _ in logged] == [0, 1, 2, 3]
    assert "validate/accuracy" in logged[1][1] and begun[0]["config"]["validate"] == held_out


def test_a_project_that_cannot_be_begun_is_one_line(run, monkeypatch):
    def init(**options):
        raise RuntimeError("no login\nand more")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_PROJECT", "a-project")
    with pytest.raises(SystemExit, match="wandb cannot begin a run: no login. Log in"):
        run()


def test_a_project_without_the_package_is_said(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import raises
    monkeypatch.setenv("WANDB_PROJECT", "a-project")
    run()
    assert "wandb is not installed" in capsys.readouterr().out


def test_the_interval_counts_prompts():
    """With one outcome a prompt it is Wilson's. Copies of an outcome tell nothing new. Coverage is simulated."""
    rng = np.random.default_rng(0)
    outcomes = (rng.random(40) < 0.7).astype(float)
    rate, *interval = rate_interval(outcomes, np.arange(40))
    n = 40 * 39 / 40  # the variance of prompts is estimated
    assert interval == pytest.approx(wilson(rate, n), abs=1e-3)
    assert rate_interval(np.repeat(outcomes, 5), np.repeat(np.arange(40), 5))[1:] == pytest.approx(interval)
    assert rate_interval(np.ones(50), np.repeat(np.arange(10), 5)) == pytest.approx((1, *wilson(1, 10)))
    covered = 0
    for _ in range(1000):
        chances = rng.beta(3, 2, size=60)
        outcomes = rng.random((60, 4)) < chances[:, None]
        _, low, high = rate_interval(outcomes.flatten(), np.repeat(np.arange(60), 4))
        covered += low <= 0.6 <= high
    assert 930 <= covered <= 975


def test_the_interval_is_wilsons():
    """Its ends are the roots of the score equation |rate - p| = z sqrt(p (1 - p) / n)."""
    for rate, n in ((0.5, 10), (0.9, 30), (0.0, 7), (1.0, 7)):
        for p in wilson(rate, n):
            assert abs(rate - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), abs=1e-6)
    assert all(math.isnan(p) for p in wilson(0.5, 0))
