"""A run is a function of its arguments: the same on any number of processes, with any micro-batch."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import data
import tiny
import train
from conftest import QUICK, launch, log_of
from loss import denoising_error, rpo_loss

BATCH, STEPS, BETA, TAU = 16, 6, 100, 0.02
LAYOUTS = [(world, micro) for world in (1, 2, 4) for micro in (1, 2, 4)] + [(1, 8), (2, 8)]
METHODS = [("rpo", 8), ("rpo", 16), ("dpo", 8), ("sft", 8)]


def observed(argv, file):
    """train.main, and what a run does not tell: its first gradient, every draw, how often gradients meet."""
    clip, draw, ddp = torch.nn.utils.clip_grad_norm_, train.draw, torch.nn.parallel.DistributedDataParallel
    seen = {"gradient": None, "noise": {}, "meetings": 0}

    def clip_grad_norm_(parameters, *rest):
        parameters = list(parameters)
        if seen["gradient"] is None and seen["noise"]:  # not that of the embedded CLIP, built before
            seen["gradient"] = torch.cat([parameter.grad.flatten() for parameter in parameters]).clone()
        return clip(parameters, *rest)

    def recorded(args, step, positions, *rest):
        drawn = draw(args, step, positions, *rest)
        for position, t, noise, vae_noise in zip(positions, *drawn):
            seen["noise"][step, position] = (t.item(), noise.sum().item(), vae_noise.sum().item())
        return drawn

    class Counted(ddp):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.register_comm_hook(None, reduce)

    def reduce(_, bucket):
        seen["meetings"] += bucket.is_last()
        return allreduce_hook(None, bucket)

    torch.nn.utils.clip_grad_norm_, train.draw = clip_grad_norm_, recorded
    torch.nn.parallel.DistributedDataParallel = Counted
    rank = data.torchrun()[0]
    train.main(argv)
    torch.save(seen, f"{file}-{rank}")


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_model, few_pairs):
    """run(world, micro, loss, group, optimizer) -> what it left and showed, of all processes; runs are kept."""
    kept = {}

    def run(world, micro, loss, group, optimizer, model="sd"):
        if (key := (world, micro, loss, group, optimizer, model)) in kept:
            return kept[key]
        folder = tmp_path_factory.mktemp("layout")
        argv = ["--model", small_model(model), "--data", few_pairs, "--out", str(folder / "out")]
        argv += [
            "--loss",
            loss,
            "--group_size",
            str(group),
            "--micro_batch",
            str(micro),
            "--optimizer",
            optimizer,
        ]
        argv += f"--steps {STEPS} --batch_size {BATCH} --beta {BETA} --tau {TAU} --sample_every 0".split()
        argv += "--clip tiny --device cpu --max_grad_norm 1e9 --lr 1e-3".split()
        for status, text in launch(folder, world, observed, argv, str(folder / "seen")):
            assert status == 0, text
        seen = [torch.load(folder / f"seen-{rank}", weights_only=True) for rank in range(world)]
        (file,) = (folder / "out").glob("checkpoint-*.pt")
        kept[key] = {
            "weights": torch.load(file, weights_only=True)["unet"],
            "log": log_of(folder / "out"),
            "gradient": seen[0]["gradient"],
            "noise": [process["noise"] for process in seen],
            "meetings": [process["meetings"] for process in seen],
        }
        return kept[key]

    return run


@pytest.fixture(scope="module")
def giant(small_model, few_pairs):
    """giant(loss, group, model): the first gradient by one forward of the whole batch and plain autograd."""

    @functools.cache
    def giant(loss, group, model="sd"):
        args = train.get_args(
            ["--model", small_model(model), "--data", few_pairs, "--batch_size", str(BATCH)]
        )
        pipe = data.load_pipeline(small_model(model))
        pairs = data.PreferencePairs(few_pairs, 32, prompt_dropout=args.prompt_dropout)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "STEPS", QUICK)
            clip = data.Clip("tiny")
        pairs.clip_transform = clip.transform
        batch = data.collate([pairs[position] for position in range(BATCH)])
        t, noise, vae_noise = train.draw(args, 0, range(BATCH), (4, 8, 8), 1000)
        err = {}
        for side, name in enumerate("wl"):
            mean, std = data.encode_images(pipe.vae, batch["pixels"][:, side, None])
            latents = (mean + std * vae_noise[:, side, None])[:, 0] * pipe.vae.config.scaling_factor
            encoded = data.encode_prompts(pipe, batch["prompt"])
            conditioning = data.condition(*encoded, batch["time_ids"][:, side : side + 1])
            inputs = (latents, noise, t, conditioning, pipe.scheduler.alphas_cumprod)
            err[name] = denoising_error(pipe.unet.eval(), *inputs)
        text, image_w, image_l = clip.embed(batch["caption"], batch["clip_pixels"]).unbind(1)
        w, l, total = err["w"], err["l"], 0
        if loss == "sft":
            total = w.mean()
        elif loss == "dpo":  # the reference is the policy: at step 0 every D is zero, its gradient is not
            total = -torch.nn.functional.logsigmoid(-BETA / 2 * ((w - w.detach()) - (l - l.detach()))).mean()
        else:
            for g in (slice(i, i + group) for i in range(0, BATCH, group)):
                weights = data.cross_pair_weights(text[g], image_w[g], image_l[g], TAU)
                some = rpo_loss(w[g], l[g], w[g].detach(), l[g].detach(), BETA, weights)[0]
                total = total + some * group / BATCH
        total.backward()
        return torch.cat([parameter.grad.flatten() for parameter in pipe.unet.parameters()])

    return giant


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def check(run, giant, world, micro, loss, group, small_model, model="sd", optimizers=("sgd", "adamw")):
    start = data.load_pipeline(small_model(model)).unet.state_dict()
    for optimizer in optimizers:
        got = run(world, micro, loss, group, optimizer, model)
        one = run(1, 16, loss, group, optimizer, model)
        assert apart(got["gradient"], giant(loss, group, model)) < 1e-5
        for a, b in zip(got["log"], one["log"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        if optimizer == "sgd":
            for name, weight in got["weights"].items():
                assert apart(weight, one["weights"][name]) < 1e-4, name
        a, b, c = (
            torch.cat([w.flatten() for w in some.values()])
            for some in (got["weights"], one["weights"], start)
        )
        assert (a - b).norm() < 0.01 * (b - c).norm()
        assert got["meetings"] == [STEPS * (world > 1)] * world  # gradients are reduced once a step


@pytest.mark.parametrize(
    "loss, group",
    [("rpo", 16), pytest.param("dpo", 8, marks=pytest.mark.slow), pytest.param("sft", 8, marks=pytest.mark.slow)],
)
def test_two_processes_and_small_micro_batches_change_nothing(run, giant, small_model, loss, group):
    check(run, giant, 2, 2, loss, group, small_model, optimizers=["sgd"])


@pytest.mark.slow
@pytest.mark.parametrize("loss, group", METHODS)
@pytest.mark.parametrize("world, micro", LAYOUTS)
def test_no_layout_changes_anything(run, giant, small_model, world, micro, loss, group):
    check(run, giant, world, micro, loss, group, small_model)


@pytest.mark.slow
def test_no_layout_changes_sdxl(run, giant, small_model):
    check(run, giant, 2, 4, "rpo", 16, small_model, "sdxl")


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_the_group_is_seen(run, small_model, optimizer):
    """What the tests above could not see if the cross pairs did nothing: another group is another run."""
    start = torch.cat([w.flatten() for w in data.load_pipeline(small_model("sd")).unet.state_dict().values()])
    eight, one = (
        torch.cat([w.flatten() for w in run(1, 16, "rpo", group, optimizer)["weights"].values()])
        for group in (8, 1)
    )
    assert (eight - one).norm() > 0.1 * (eight - start).norm()


def test_the_noise_of_a_pair_is_its_own_on_any_process(run):
    """The peers seed every rank alike, so that pairs of one step share their noise."""
    alone, together = (run(world, micro, "dpo", 8, "sgd")["noise"] for world, micro in ((1, 16), (2, 2)))
    assert not together[0].keys() & together[1].keys()
    assert together[0] | together[1] == alone[0]
    assert len(alone[0]) == STEPS * BATCH == len({noise for _, noise, _ in alone[0].values()})
    assert len({vae_noise for *_, vae_noise in alone[0].values()}) == STEPS * BATCH


def measured(argv, file):
    """MiB that the first step of train.main takes at most, over what is loaded: on Linux, of the process."""

    def memory(name):
        used = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        return int(used) / 2**10

    error, clip, used = train.denoising_error, torch.nn.utils.clip_grad_norm_, []

    def before(*inputs):  # the first forward
        used.append(memory("VmRSS")) if not used else None
        return error(*inputs)

    def after(*some):  # all backwards of the first step
        used.append(memory("VmHWM")) if len(used) == 1 else None
        return clip(*some)

    train.denoising_error, torch.nn.utils.clip_grad_norm_ = before, after
    train.main(argv)
    Path(file).write_text(json.dumps(used[1] - used[0]))


@pytest.mark.slow
def test_a_larger_group_takes_no_more_memory(tmp_path, small_model, few_pairs):
    """Two passes keep the graph of one micro-batch: 64 pairs against each other for the memory of 8."""
    peaks = []
    for group in ("8", "64"):
        argv = ["--model", small_model("sd"), "--data", few_pairs, "--clip", "tiny", "--device", "cpu"]
        argv += "--resolution 256 --steps 1 --sample_every 0 --batch_size 64 --micro_batch 8".split()
        argv += ["--group_size", group, "--out", str(tmp_path / f"out-{group}")]
        ((status, text),) = launch(tmp_path, 1, measured, argv, str(tmp_path / group))
        assert status == 0, text
        peaks.append(json.loads((tmp_path / group).read_text()))
    assert peaks[0] > 500 and peaks[1] < 1.05 * peaks[0]  # MiB over the loaded models
