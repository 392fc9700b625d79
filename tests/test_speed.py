"""What makes steps fast and small changes no number: kept graphs, compiled blocks, the micro-batch, checkpoints."""

import distributed  # first: it notes the launcher

import argparse
import functools
import json
import math
import threading

from types import SimpleNamespace

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline

import common
import data
import models
import options as options_file
import run
import train
from common import InputError
from data import ImagePairs, Stream
from extras import random_models
from loading import FAMILIES, add_lora, disabled_adapter
from options import recorded_run, train_args
from small_runs import fresh, launch, log_of

pytestmark = pytest.mark.usefixtures("quick_models")


@pytest.fixture
def command(small_model, few_pairs):
    def command(options, out, kind="sd"):
        argv = ["--model", small_model(kind), "--data", few_pairs, "--clip", "tiny", "--device", "cpu"]
        argv += "--batch_size 8 --steps 3 --sample_every 0 --lr 1e-3".split()
        return [*argv, *options.split(), "--out", str(out)]

    return command


def numbers_of(out, names=("loss", "grad_norm", "reward/margin")):
    return [line[name] for line in log_of(out) for name in names]


# The optimizer


def test_adafactor_steps_by_the_learning_rate_alone():
    """transformers' own defaults would scale the step by the weights' size, or replace the rate by one of their own."""
    args = argparse.Namespace(optimizer="adafactor", lr=1e-2, weight_decay=0.0)
    steps = []
    for size in (1.0, 100.0):
        param = torch.full((4, 4), size, requires_grad=True)
        optimizer = run.make_optimizer(args, [param])
        assert type(optimizer) is transformers.Adafactor
        param.grad = torch.ones(4, 4)
        optimizer.step()
        steps.append(size - param.detach())
    torch.testing.assert_close(steps[0], torch.full((4, 4), 1e-2))  # a first step has the size of the rate
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=0)


def test_all_param_groups_get_the_learning_rate_of_the_step(tmp_path, command, monkeypatch):
    """A researcher may give some parameters a group of their own."""
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def two_groups(args, params):
        return Watched([{"params": params[:3]}, {"params": params[3:], "lr": 7.0}], lr=args.lr)

    monkeypatch.setattr(run, "make_optimizer", two_groups)
    train.main(command("--warmup 3", tmp_path / "out"))
    learning_rates = [line["lr"] for line in log_of(tmp_path / "out")]
    assert learning_rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert seen == [[rate, rate] for rate in learning_rates]


# Two passes


@pytest.mark.parametrize("micro_batch, forwards", [
    (8, 1), (2, 7), pytest.param(4, 3, marks=pytest.mark.slow), pytest.param(1, 15, marks=pytest.mark.slow)])
def test_the_last_graph_of_a_group_is_kept(tmp_path, command, monkeypatch, micro_batch, forwards):
    """k micro-batches take 2k - 1 forwards of the policy, hold at most one graph, and give the gradient of one pass."""
    graphs, seen = 0, []
    policy_error = train.Trainer.policy_error

    def watched(trainer, inputs):
        nonlocal graphs
        err = policy_error(trainer, inputs)
        seen.append(inputs)
        if err.requires_grad:
            graphs += 1
            assert graphs == 1

            def done(gradient):
                nonlocal graphs
                graphs -= 1

            err.register_hook(done)
        return err

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "policy_error", watched)
        train.main(command(f"--micro_batch {micro_batch} --group_size 8 --steps 1", tmp_path / "out"))
    assert len(seen) == forwards and graphs == 0
    train.main(command("--micro_batch 8 --group_size 8 --steps 1", tmp_path / "whole"))
    assert numbers_of(tmp_path / "out") == pytest.approx(numbers_of(tmp_path / "whole"), rel=1e-5)


# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("kind, options", [
    ("sd", "--micro_batch 8 --loss dpo"), ("sd", "--micro_batch 4"),
    ("sdxl", "--micro_batch 4 --lora_rank 4 --gradient_checkpointing")])
def test_compiled_blocks_make_no_new_graph_after_the_first_step(tmp_path, command, monkeypatch, kind, options):
    """That holds with the adapter on and off, with and without gradient. The losses are those of the plain network."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    after_step = run.Output.after_step

    def counted(output, *inputs):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return after_step(output, *inputs)

    options += " --sample_every 1 --sample_steps 1"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        patch.setattr(run.Output, "after_step", counted)
        train.main(command(f"{options} --compile", tmp_path / "compiled", kind))
    assert graphs[0] > 0 and graphs == [graphs[0]] * 3
    train.main(command(options, tmp_path / "plain", kind))
    assert numbers_of(tmp_path / "compiled") == pytest.approx(numbers_of(tmp_path / "plain"), rel=1e-3, abs=1e-3)
    assert log_of(tmp_path / "compiled")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_blocks_hold_nearly_all_weights():
    """If diffusers renamed a class, --compile would have no effect, and nobody would notice."""
    for name, pipeline in random_models.PIPELINES.items():
        family, parts = FAMILIES[pipeline], random_models.CONFIGS[name]
        with torch.device("meta"):
            network = random_models.build(*parts[family.denoiser_name])
        in_blocks = set()
        for module in network.modules():
            if type(module).__name__ in family.blocks:
                in_blocks |= set(module.parameters())
        share = sum(param.numel() for param in in_blocks) / sum(param.numel() for param in network.parameters())
        assert share > 0.9


# The micro-batch


def limited_to(pairs, monkeypatch):
    """A forward of more pairs than these runs out of memory."""
    policy_error = train.Trainer.policy_error

    def limited(trainer, inputs):
        if len(inputs["x"]) > pairs * trainer.images_per_pair:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return policy_error(trainer, inputs)

    monkeypatch.setattr(train.Trainer, "policy_error", limited)


def auto_on_a_gpu(monkeypatch):
    """`--micro_batch auto` as on a GPU: it is found by trying."""
    fit = options_file.fit_micro_batch

    def fit_micro_batch(args):
        return "auto" if args.micro_batch == "auto" else fit(args)

    monkeypatch.setattr(options_file, "fit_micro_batch", fit_micro_batch)


@pytest.mark.parametrize("options", [
    "--loss sft",
    *(pytest.param(more, marks=pytest.mark.slow) for more in ("", "--lora_rank 4", "--optimizer adafactor --ema 0.9"))])
def test_auto_takes_the_largest_micro_batch_that_fits(tmp_path, command, monkeypatch, options):
    """Nothing of the trial is left: the run is, bit for bit, the one with that number typed, and it resumes with it."""
    auto_on_a_gpu(monkeypatch)
    limited_to(4, monkeypatch)
    train.main(command(f"--micro_batch auto {options}", tmp_path / "auto"))
    train.main(command(f"--micro_batch 4 {options}", tmp_path / "four"))
    assert numbers_of(tmp_path / "auto", ["loss", "grad_norm"]) == numbers_of(tmp_path / "four", ["loss", "grad_norm"])
    assert recorded_run(tmp_path / "auto")["micro_batch"] == 4
    monkeypatch.setattr(distributed, "largest_micro_batch", None)  # calling it would raise
    train.main(command(f"--micro_batch auto --steps 4 {options}", tmp_path / "auto"))
    assert len(log_of(tmp_path / "auto")) == 4


def test_auto_where_not_one_pair_fits_ends_before_anything_is_written(tmp_path, command, monkeypatch):
    auto_on_a_gpu(monkeypatch)
    limited_to(0, monkeypatch)
    with pytest.raises(SystemExit, match="^train.py: out of memory with one pair per forward. --gradient_checkpointing"):
        train.main(command("--micro_batch auto", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_the_recorded_micro_batch_if_it_fits(tmp_path, command, monkeypatch):
    """It is the recorded one if it was found by auto. For other processes it may not fit, and then it is chosen anew."""
    out = tmp_path / "out"
    out.mkdir()
    begun = vars(train_args(command("--resolution 32", out)))
    assert begun["micro_batch"] == 8
    (out / "config.json").write_text(json.dumps(begun | {"micro_batch": 4}))
    assert train_args(command("", out)).micro_batch == train_args(command("--micro_batch auto", out)).micro_batch == 4
    auto_on_a_gpu(monkeypatch)
    assert train_args(command("--micro_batch auto", out)).micro_batch == 4
    (out / "config.json").write_text(json.dumps(begun))
    monkeypatch.setenv("WORLD_SIZE", "2")  # 8 pairs per forward of one process would be 16 of both, and a step has 8
    assert train_args(command("", out)).micro_batch == 4
    assert train_args(command("--micro_batch auto", out)).micro_batch == "auto"  # it is tried anew
    with pytest.raises(InputError, match="8 is not a multiple of 2 processes \\* --micro_batch 8"):
        train_args(command("--micro_batch 8", out))


def test_the_micro_batch_is_chosen_for_the_models_own_resolution(tmp_path, command):
    """Not for a guess: 16 pairs of small images fit, but not 8 of 1024 pixels without checkpointing."""
    assert train_args(command("--batch_size 16", tmp_path / "out")).micro_batch is None
    assert train_args(command("--batch_size 16 --resolution 1024", tmp_path / "out")).micro_batch == 4
    train.main(command("--batch_size 16 --steps 1", tmp_path / "out"))
    assert recorded_run(tmp_path / "out")["micro_batch"] == 16


def train_with(argv):
    train.main(argv)


def test_a_run_of_one_process_goes_on_with_two(tmp_path, command):
    """Its own micro-batch was chosen for one process."""
    out = tmp_path / "out"
    train.main(command("--steps 1", out))
    for status, text in launch(tmp_path, 2, train_with, command("--steps 2", out)):
        assert status == 0, text
    train.main(command("--steps 2", tmp_path / "one"))
    assert (recorded_run(tmp_path / "one")["micro_batch"], recorded_run(out)["micro_batch"]) == (8, 4)
    assert numbers_of(out) == pytest.approx(numbers_of(tmp_path / "one"), rel=1e-3)


def test_auto_on_a_cpu_is_the_default(command, tmp_path):
    auto, plain = (train_args(command(f"--resolution 32 {options}", tmp_path)) for options in ("--micro_batch auto", ""))
    assert auto.micro_batch == plain.micro_batch == 8
    with pytest.raises(InputError, match="invalid count_or_auto value: 'automatic'"):
        train_args(command("--micro_batch automatic", tmp_path))


def auto_of_unlike_processes(argv):
    """Process 1 has memory for one pair, process 0 for two."""
    with pytest.MonkeyPatch.context() as patch:
        auto_on_a_gpu(patch)
        rank, _, _ = distributed.torchrun_env()
        limited_to(2 - rank, patch)
        train.main(argv)


@pytest.mark.slow
def test_auto_is_the_least_of_all_processes(tmp_path, command):
    out = tmp_path / "out"
    for status, text in launch(tmp_path, 2, auto_of_unlike_processes, command("--micro_batch auto --workers 0", out)):
        assert status == 0, text
    assert recorded_run(out)["micro_batch"] == 1


# The adapter


def test_an_adapter_is_switched_without_a_search(small_model):
    """All layers that peft's own switch would turn are turned, and what trains goes on training."""
    model = fresh(small_model("sdxl"))
    lora_layers = add_lora(model, 4, seed=0)
    adapter = [param for param in model.denoiser.parameters() if param.requires_grad]
    layers = [module for module in model.denoiser.modules() if getattr(module, "lora_A", None)]
    assert len(layers) > 4 and lora_layers == layers
    with disabled_adapter(lora_layers):
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers) and all(param.requires_grad for param in adapter)


# Checkpoints


@pytest.mark.slow
def test_checkpoints_by_the_minute_and_by_the_step(tmp_path, command, monkeypatch):
    """The clock of the first process counts beside --save_every. By default a run this short saves only its last step."""
    saved, save = [], common.save_checkpoint

    def noted(folder, state):
        saved.append(state["step"])
        save(folder, state)

    monkeypatch.setattr(common, "save_checkpoint", noted)
    for options, steps in (("", [3]), ("--save_every 2", [2, 3]), ("--save_minutes 1e-9", [1, 2, 3]),
                           ("--save_minutes 0", [3])):
        saved.clear()
        train.main(command(options, tmp_path / options.replace(" ", "_")))
        assert saved == steps


def test_a_checkpoint_holds_its_step_however_late_it_is_written(tmp_path, command, monkeypatch):
    """The thread waits until the weights have moved on, and it still writes the copies."""
    train.main(command("--steps 1 --ema 0.5", tmp_path / "one"))
    expected = run.load_checkpoint(tmp_path / "one", 1)
    moved_on, states = threading.Event(), []
    save, after_step = common.save_checkpoint, run.Output.after_step

    def late(folder, state):
        assert state["step"] > 1 or moved_on.wait(60)
        save(folder, state)
        states.append(torch.load(common.newest_checkpoint(folder), weights_only=True))

    def noted(output, step, *rest):
        if step == 1:  # the optimizer has stepped again
            moved_on.set()
        after_step(output, step, *rest)

    monkeypatch.setattr(common, "save_checkpoint", late)
    monkeypatch.setattr(run.Output, "after_step", noted)
    train.main(command("--save_every 1 --ema 0.5", tmp_path / "out"))
    assert [state["step"] for state in states] == [1, 2, 3]
    for part in ("weights", "optimizer", "ema"):
        a, b = (torch.utils._pytree.tree_leaves(state[part]) for state in (states[0], expected))
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y


# What travels


def test_nothing_travels_that_is_not_used(small_model, few_pairs, tmp_path, command, monkeypatch):
    """Images travel as bytes, SFT sends the winners alone, and the VAE's mean needs no noise."""
    sent, to_device = [], distributed.to_device

    def noted(tensor, device):
        sent.append(tensor)
        return to_device(tensor, device)

    for module in (train, data, models):
        monkeypatch.setattr(module, "to_device", noted)
    train.main(command("--loss sft --vae_sample mean --steps 1 --micro_batch 8", tmp_path / "out"))
    shapes = {(tuple(tensor.shape), tensor.dtype) for tensor in sent}
    assert ((8, 3, 32, 32), torch.uint8) in shapes
    assert not any(shape[1:2] == (2,) for shape, dtype in shapes if dtype == torch.float32)
    pairs, process = ImagePairs(few_pairs, 32), fresh(small_model("sd")).process
    settings = dict(seed=0, batch_size=8, group_size=8, group_noise="own")
    mean, sample = (Stream(pairs, process, (4, 8, 8), SimpleNamespace(**settings, vae_sample=vae_sample))
                    for vae_sample in ("mean", "sample"))
    assert mean[3].keys() == sample[3].keys() - {"vae_noise"}


@torch.no_grad()
def test_a_word_of_textual_inversion_stands_for_all_of_its_vectors(small_model):
    """The pipeline's own encode_prompt does that, so its embeddings are those of all the vectors' names."""
    pipe = DiffusionPipeline.from_pretrained(small_model("sd"))
    pipe.tokenizer.add_tokens(["<thing>", "<thing>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    model = models.StableDiffusion(pipe)
    ours = model.encode_prompts(["a <thing>"])["prompt_embeds"]
    ids = pipe.tokenizer("a <thing> <thing>_1", padding="max_length", return_tensors="pt").input_ids
    assert set(pipe.tokenizer.convert_tokens_to_ids(["<thing>", "<thing>_1"])) <= set(ids[0].tolist())
    torch.testing.assert_close(ours, pipe.text_encoder(ids)[0])


def test_a_text_encoder_that_needs_a_mask_is_refused(small_model):
    pipe = DiffusionPipeline.from_pretrained(small_model("sd"))
    pipe.text_encoder.config.use_attention_mask = True
    with pytest.raises(ValueError, match="its text encoder needs an attention mask"):
        models.StableDiffusion(pipe)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_threads_do_not_change_a_prompt(small_model, kind):
    """They may change its rounding, because all prompts of a batch are encoded at once."""
    model, prompts = fresh(small_model(kind)), [f"a {k} dog" for k in range(6)]
    alone = model.encode_prompts(prompts)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    together = model.encode_prompts(prompts)
    torch.set_num_threads(threads)
    assert alone.keys() == together.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-5)



@pytest.mark.parametrize("options, memory, expected", [
    ("", 85e9, (True, 8)), ("--lora_rank 4", 24e9, (True, 8)), ("--lora_rank 4", 85e9, (False, 4)),
    ("--lora_rank 4 --gradient_checkpointing", 85e9, (True, 8))])
def test_an_adapter_of_sdxl_is_checkpointed_where_memory_is_short(monkeypatch, options, memory, expected):
    """With 80 GB it is not, unless the user asks for it."""
    monkeypatch.setattr(options_file, "gpu_bytes", lambda device: memory)
    args = train_args(["--model", "sdxl", *options.split()])
    assert (args.gradient_checkpointing, args.micro_batch) == expected
