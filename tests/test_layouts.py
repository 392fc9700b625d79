"""A run is a function of its arguments: the same on any number of processes, with any micro-batch."""

import functools
import json
import re
from pathlib import Path

import datasets
import pytest
import torch

import data
import distributed
import loading
import options
import train
from extras import tiny
from loss import denoising_error, rpo_loss
from small_runs import launch, log_of

BATCH, STEPS, BETA, TAU, SFT_WEIGHT = 16, 6, 100, 0.02, 0.2
LAYOUTS = [(1, 1), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8), (4, 1), (4, 4)]  # (processes, micro-batch)
METHODS = [("rpo", 8), ("rpo", 16), ("dpo", 8), ("sft", 8)]


def observed(argv, file):
    """Calls train.main and saves what a run does not tell: its first gradient, every draw, what is summed."""
    clip, draw = torch.nn.utils.clip_grad_norm_, data.Stream.draw
    draw_ids, sum_gradients = data.Stream.draw_ids, distributed.sum_gradients
    seen = {"gradient": None, "noise": {}, "sums": []}

    def clip_grad_norm_(params, *rest):
        params = list(params)
        if seen["gradient"] is None:
            seen["gradient"] = flat(param.grad for param in params).clone()
        return clip(params, *rest)

    def observed_draw(stream, position):
        drawn = draw(stream, position)
        numbers = drawn["t"].item(), drawn["noise"].sum().item(), drawn["vae_noise"].sum().item()
        seen["noise"][position] = numbers
        return drawn

    def unobserved_draw_ids(stream, *rest):  # a checkpoint draws once more what was trained on
        data.Stream.draw = draw
        ids = draw_ids(stream, *rest)
        data.Stream.draw = observed_draw
        return ids

    def observed_sum(params):
        params = list(params)
        seen["sums"].append(sum(param.grad.numel() for param in params))
        sum_gradients(params)

    torch.nn.utils.clip_grad_norm_, distributed.sum_gradients = clip_grad_norm_, observed_sum
    data.Stream.draw, data.Stream.draw_ids = observed_draw, unobserved_draw_ids
    train.main(argv)
    rank, _, _ = distributed.torchrun_env()
    torch.save(seen, f"{file}-{rank}")


@pytest.fixture(scope="module")
def chained_pairs(tmp_path_factory):
    """24 pairs in which the winner of each is the loser of the next: in most groups an image stands on both sides."""
    rows = tiny.pair_rows(24)
    for row, following in zip(rows, rows[1:]):
        following["jpg_1"] = row["jpg_0"]
    folder = tmp_path_factory.mktemp("chained")
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_model, chained_pairs):
    """run(...) -> what a run of this layout left and showed, of all processes; runs are kept."""

    @functools.cache
    def run(world_size, micro, loss, group, optimizer, kind):
        folder = tmp_path_factory.mktemp("layout")
        argv = ["--model", small_model(kind), "--data", chained_pairs, "--out", str(folder / "out")]
        argv += f"--loss {loss} --group_size {group} --micro_batch {micro} --optimizer {optimizer}".split()
        argv += f"--steps {STEPS} --batch_size {BATCH} --beta {BETA} --sample_every 0".split()
        argv += "--clip tiny --device cpu --max_grad_norm 1e9 --lr 1e-3".split()
        argv += ["--tau", str(TAU)] * (loss == "rpo")
        if loss != "sft":
            argv += ["--sft_weight", str(SFT_WEIGHT)]
        for status, text in launch(folder, world_size, observed, argv, str(folder / "seen")):
            assert status == 0, text
        seen = [torch.load(folder / f"seen-{rank}", weights_only=True) for rank in range(world_size)]
        (file,) = (folder / "out").glob("checkpoint-*.pt")
        return {
            "weights": torch.load(file, weights_only=True)["weights"],
            "log": log_of(folder / "out"),
            "gradient": seen[0]["gradient"],
            "noise": [process["noise"] for process in seen],
            "sums": [process["sums"] for process in seen],
        }

    return run


@pytest.fixture(scope="module")
def giant(small_model, chained_pairs):
    """giant(loss, group, kind): the first gradient by one forward of the whole batch and plain autograd."""

    @functools.cache
    def giant(loss, group, kind):
        argv = ["--model", small_model(kind), "--data", chained_pairs, "--batch_size", str(BATCH)]
        args = options.train_args([*argv, "--group_size", str(group)])
        model = loading.load_model(small_model(kind))
        model.denoiser.requires_grad_(True)
        pairs = data.ImagePairs(chained_pairs, 32, prompt_dropout=args.prompt_dropout)
        clip = data.Clip("tiny")
        pairs.clip_transform = clip.transform
        stream = data.Stream(pairs, model.process, (4, 8, 8), args)
        batch = data.collate([stream[position] for position in range(BATCH)])
        prompt_embeds = model.encode_prompts(batch["prompt"])
        err = {}
        for side, name in enumerate("wl"):
            mean, std = model.encode_images(batch["pixels"][:, side, None])
            latents = model.scale_latents(mean[:, 0] + std[:, 0] * batch["vae_noise"][:, side])
            cond = model.conditioning(prompt_embeds, batch["time_ids"][:, side, None])
            err[name] = denoising_error(model.predict, model.denoiser, model.process, latents, batch["noise"],
                                        batch["t"], cond)
        w, l = err["w"], err["l"]
        if loss == "sft":
            total = w.mean()
        elif loss == "dpo":  # the reference is the policy: at step 0 every D is zero, its gradient is not
            d_w, d_l = w - w.detach(), l - l.detach()
            total = -torch.nn.functional.logsigmoid(-BETA / 2 * (d_w - d_l)).mean() + SFT_WEIGHT * BETA / 2 * d_w.mean()
        else:
            total, masked = 0, 0
            text, image_w, image_l = clip.embed(batch["caption"], batch["clip_pixels"]).unbind(1)
            for i in range(0, BATCH, group):
                g = slice(i, i + group)
                embeds = text[g], image_w[g], image_l[g]
                weights = data.cross_pair_weights(*embeds, TAU, image_ids=batch["image_ids"][g])
                masked = masked + (weights == 0).sum()
                group_loss, _ = rpo_loss(w[g], l[g], w[g].detach(), l[g].detach(), BETA, weights,
                                         args.weight_position, SFT_WEIGHT)
                total = total + group_loss * group / BATCH
            assert masked > 0 and (weights > 0).any(dim=1).all()
        total.backward()
        return flat(param.grad for param in model.denoiser.parameters())

    return giant


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def start_of(folder):
    return loading.load_model(folder).denoiser.state_dict()


def check(run, giant, world_size, micro, loss, group, small_model, kind="sd", optimizers=("sgd", "adamw")):
    start = start_of(small_model(kind))
    num_parameters = sum(value.numel() for value in start.values())
    for optimizer in optimizers:
        got = run(world_size, micro, loss, group, optimizer, kind)
        one = run(1, 16, loss, group, optimizer, kind)
        assert apart(got["gradient"], giant(loss, group, kind)) < 1e-5
        for a, b in zip(got["log"], one["log"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=7e-4)  # from log 2 on it crosses zero
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        if optimizer == "sgd":
            for name, weight in got["weights"].items():
                assert apart(weight, one["weights"][name]) < 1e-4, name
        got_weights, one_weights = flat(got["weights"].values()), flat(one["weights"].values())
        assert (got_weights - one_weights).norm() < 0.01 * (one_weights - flat(start.values())).norm()
        # All gradients are summed, once a step.
        assert got["sums"] == [[num_parameters] * STEPS] * world_size


@pytest.mark.parametrize(
    "loss, group",
    [("rpo", 8), pytest.param("dpo", 8, marks=pytest.mark.slow), pytest.param("sft", 8, marks=pytest.mark.slow)],
)
def test_two_processes_and_small_micro_batches_change_nothing(run, giant, small_model, loss, group):
    """A step has two chunks; each is a group in two micro-batches of two processes."""
    check(run, giant, 2, 2, loss, group, small_model, optimizers=["sgd"])


def test_every_group_of_a_chunk_weighs_the_same(run, giant):
    """Two groups of eight are in one forward."""
    assert apart(run(1, 16, "rpo", 8, "sgd", "sd")["gradient"], giant("rpo", 8, "sd")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("loss, group", METHODS)
@pytest.mark.parametrize("world_size, micro", LAYOUTS)
def test_no_layout_changes_anything(run, giant, small_model, world_size, micro, loss, group):
    check(run, giant, world_size, micro, loss, group, small_model)


@pytest.mark.slow
def test_no_layout_changes_sdxl(run, giant, small_model):
    check(run, giant, 2, 4, "rpo", 16, small_model, "sdxl")


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_the_group_is_seen(run, small_model, optimizer):
    """Another group is another run. The tests above would pass, too, if the cross pairs did nothing."""
    start = flat(start_of(small_model("sd")).values())
    eight = flat(run(1, 16, "rpo", 8, optimizer, "sd")["weights"].values())
    one = flat(run(1, 16, "rpo", 1, optimizer, "sd")["weights"].values())
    assert (eight - one).norm() > 0.1 * (eight - start).norm()


@pytest.mark.slow
def test_the_noise_of_a_pair_is_its_own_on_any_process(run):
    """Other trainers seed every rank alike, so pairs of one step share their noise."""
    (alone,) = run(1, 16, "rpo", 8, "sgd", "sd")["noise"]
    first, second = run(2, 2, "rpo", 8, "sgd", "sd")["noise"]
    assert not first.keys() & second.keys()
    assert first | second == alone
    assert sorted(alone) == [*range(STEPS * BATCH)]
    assert len({noise for _, noise, _ in alone.values()}) == STEPS * BATCH
    assert len({vae_noise for *_, vae_noise in alone.values()}) == STEPS * BATCH


def measured(argv, file):
    """Writes how many MiB the first step of train.main takes at most, over what is loaded. It needs Linux."""

    def memory(name):
        used = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        return int(used) / 2**10

    error, clip, used = train.denoising_error, torch.nn.utils.clip_grad_norm_, []

    def before(*inputs, **more):  # the first forward
        if not used:
            used.append(memory("VmRSS"))
        return error(*inputs, **more)

    def after(*inputs):  # all backwards of the first step
        if len(used) == 1:
            used.append(memory("VmHWM"))
        return clip(*inputs)

    train.denoising_error, torch.nn.utils.clip_grad_norm_ = before, after
    train.main(argv)
    Path(file).write_text(json.dumps(used[1] - used[0]))


@pytest.mark.slow
def test_a_larger_group_takes_no_more_memory(tmp_path, small_model, chained_pairs):
    """Two passes keep the graph of one micro-batch, so 64 pairs take the memory of 8."""
    peaks = []
    for group in ("8", "64"):
        argv = ["--model", small_model("sd"), "--data", chained_pairs, "--clip", "tiny", "--device", "cpu"]
        argv += "--resolution 288 --steps 1 --sample_every 0 --batch_size 64 --micro_batch 8".split()
        argv += ["--group_size", group, "--out", str(tmp_path / f"out-{group}")]
        ((status, text),) = launch(tmp_path, 1, measured, argv, str(tmp_path / group))
        assert status == 0, text
        peaks.append(json.loads((tmp_path / group).read_text()))
    assert peaks[0] > 500 and peaks[1] < 1.05 * peaks[0]  # MiB over the loaded models
