"""What makes steps fast and small changes no number: the optimizer, compiled blocks, kept graphs, the micro-batch."""

import functools
import math
import threading

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline

import common
import models
import options as options_file
import train
from common import InputError
from conftest import fresh, launch, log_of
from data import ImagePairs, Stream
from options import train_args

pytestmark = pytest.mark.usefixtures("quick_tiny", "quick_models")


@pytest.fixture
def command(small_model, few_pairs):
    def command(options, out, kind="sd"):
        argv = ["--model", small_model(kind), "--data", few_pairs, "--clip", "tiny", "--device", "cpu"]
        argv += "--batch_size 8 --steps 3 --sample_every 0 --lr 1e-3".split()
        return [*argv, *options.split(), "--out", str(out)]

    return command


def numbers_of(out, names=("loss", "grad_norm", "reward/margin")):
    return [record[name] for record in log_of(out) for name in names]


# The optimizer


@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (6, 1), (4, 3, 3, 3), (8, 4, 1, 1)])
def test_adafactor_is_transformers_adafactor(shape):
    """Over 20 steps in float64, with gradients of many sizes, some of them zero: the same weights to 1e-12."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, dtype=torch.float64, generator=generator)
    ends = []
    gradients = torch.randn((20, *shape), dtype=torch.float64, generator=generator)
    gradients *= 10 ** torch.randn((20, *shape), dtype=torch.float64, generator=generator)
    gradients *= torch.rand((20, *shape), generator=generator) > 0.2
    for optimizer_class in (transformers.Adafactor, train.Adafactor):
        param = start.clone().requires_grad_()
        settings = dict(lr=1e-2, weight_decay=0.01, scale_parameter=False, relative_step=False)
        optimizer = optimizer_class([param], **settings)
        for k in range(20):
            param.grad = gradients[k].clone()
            optimizer.step()
        ends.append(param.detach())
    assert (ends[0] - start).abs().max() > 0.01
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_adafactor_goes_on_from_its_state_and_from_transformers():
    """A checkpoint of either kind: 6 steps are 3 and 3."""
    ends = []
    settings = dict(lr=1e-2, scale_parameter=False, relative_step=False)
    gradients = torch.randn((6, 4, 5), generator=torch.Generator().manual_seed(0))
    for first in (train.Adafactor, transformers.Adafactor):
        param = torch.ones(4, 5, requires_grad=True)
        optimizer = first([param], **settings)
        for k, gradient in enumerate(gradients):
            if k == 3:
                state = optimizer.state_dict()
                optimizer = train.Adafactor([param], **settings)
                optimizer.load_state_dict(state)
            param.grad = gradient.clone()
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("setting", [{"scale_parameter": True}, {"relative_step": True}, {"beta1": 0.9}])
def test_adafactor_refuses_what_it_does_not_do(setting):
    settings = dict(lr=None if "relative_step" in setting else 1e-2, scale_parameter=False, relative_step=False)
    with pytest.raises(ValueError, match="no scale_parameter, no relative_step and no beta1"):
        train.Adafactor([torch.ones(2, requires_grad=True)], **settings | setting)


# Two passes


@pytest.mark.parametrize("micro_batch, forwards", [(8, 1), (4, 3), (2, 7), (1, 15)])
def test_the_last_graph_of_a_group_is_kept(tmp_path, command, monkeypatch, micro_batch, forwards):
    """Of k micro-batches, 2k - 1 forwards of the policy; at most one graph at once; and the gradient of one pass."""
    graphs, seen = 0, []
    policy_error = train.Trainer.policy_error

    def watched(trainer, batch):
        nonlocal graphs
        err = policy_error(trainer, batch)
        seen.append(batch)
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


@pytest.mark.parametrize("kind, options", [("sd", ""), ("sdxl", "--lora_rank 4 --gradient_checkpointing")])
def test_compiled_blocks_make_no_new_graph_after_the_first_step(tmp_path, command, monkeypatch, kind, options):
    """With the adapter on and off, with and without gradient; and the losses are those of the plain network."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    after_step = train.Output.after_step

    def counted(output, *rest):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return after_step(output, *rest)

    options += " --micro_batch 4 --sample_every 1 --sample_steps 1"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        patch.setattr(train.Output, "after_step", counted)
        train.main(command(f"{options} --compile", tmp_path / "compiled", kind))
    assert graphs[0] > 0 and graphs == [graphs[0]] * 3
    train.main(command(options, tmp_path / "plain", kind))
    assert numbers_of(tmp_path / "compiled") == pytest.approx(numbers_of(tmp_path / "plain"), rel=1e-3, abs=1e-3)
    assert log_of(tmp_path / "compiled")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_blocks_hold_nearly_all_weights():
    """A renamed class of diffusers would leave --compile without effect, and nobody would notice."""
    for name, family in (("sd15", models.StableDiffusion), ("sdxl", models.StableDiffusionXL)):
        with torch.device("meta"):
            network = random_models.random_model(name).denoiser
        in_blocks = set()
        for module in network.modules():
            if type(module).__name__ in family.blocks:
                in_blocks |= set(module.parameters())
        share = sum(param.numel() for param in in_blocks) / sum(param.numel() for param in network.parameters())
        assert share > 0.9


# The micro-batch


def limited_to(pairs, monkeypatch):
    """Forwards of more pairs than these are out of memory."""
    policy_error = train.Trainer.policy_error

    def limited(trainer, batch):
        if len(batch.row) > pairs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return policy_error(trainer, batch)

    monkeypatch.setattr(train.Trainer, "policy_error", limited)


def auto_on_a_gpu(monkeypatch):
    """`--micro_batch auto` as a GPU has it: resolved by trying."""
    fit = train_args.__globals__["fit_micro_batch"]

    def fit_micro_batch(args, group_size):
        return "auto" if args.micro_batch == "auto" else fit(args, group_size)

    monkeypatch.setitem(train_args.__globals__, "fit_micro_batch", fit_micro_batch)


@pytest.mark.parametrize("options", ["", "--lora_rank 4", "--loss sft", "--optimizer adafactor --ema 0.9"])
def test_auto_takes_the_largest_micro_batch_that_fits(tmp_path, command, monkeypatch, options):
    """Nothing of the trial is left: the run is bit for bit that of the number, and goes on with it."""
    auto_on_a_gpu(monkeypatch)
    limited_to(4, monkeypatch)
    train.main(command(f"--micro_batch auto {options}", tmp_path / "auto"))
    train.main(command(f"--micro_batch 4 {options}", tmp_path / "four"))
    assert numbers_of(tmp_path / "auto", ["loss", "grad_norm"]) == numbers_of(tmp_path / "four", ["loss", "grad_norm"])
    assert train.run_room.load_checkpoint(tmp_path / "auto")[1]["micro_batch"] == 4
    monkeypatch.setattr(train.Trainer, "largest_micro_batch", None)  # calling it would raise
    train.main(command(f"--micro_batch auto --steps 4 {options}", tmp_path / "auto"))
    assert len(log_of(tmp_path / "auto")) == 4


def test_auto_where_not_one_pair_fits_ends_before_anything_is_written(tmp_path, command, monkeypatch):
    auto_on_a_gpu(monkeypatch)
    limited_to(0, monkeypatch)
    with pytest.raises(SystemExit, match="^train.py: out of memory with one pair a forward; --gradient_checkpointing"):
        train.main(command("--micro_batch auto", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_auto_on_a_cpu_is_the_default(command, tmp_path):
    auto, plain = (train_args(command(options, tmp_path)) for options in ("--micro_batch auto", ""))
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


def test_auto_is_the_least_of_all_processes(tmp_path, command):
    out = tmp_path / "out"
    for status, text in launch(tmp_path, 2, auto_of_unlike_processes, command("--micro_batch auto --workers 0", out)):
        assert status == 0, text
    assert run_room.load_checkpoint(out)[1]["micro_batch"] == 1


# The adapter


def test_an_adapter_is_switched_without_a_search(small_model):
    """All layers that peft's own switch turns, and what trains goes on training."""
    model = fresh(small_model("sdxl"))
    model.add_lora(4, seed=0)
    adapter = [param for param in model.denoiser.parameters() if param.requires_grad]
    layers = [module for module in model.denoiser.modules() if getattr(module, "lora_A", None)]
    assert len(layers) > 4 and model.lora_layers == layers
    with models.disabled_adapter(model.lora_layers):
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers) and all(param.requires_grad for param in adapter)


# Checkpoints


def test_checkpoints_by_the_minute_and_by_the_step(tmp_path, command, monkeypatch):
    """By the clock of the first process, beside --save_every; by default the last alone, in a run this short."""
    saved, save = [], run_room.save_checkpoint

    def noted(folder, state, kept):
        saved.append(state["step"])
        save(folder, state, kept)

    monkeypatch.setattr(common, "save_checkpoint", noted)
    for options, steps in (("", [3]), ("--save_every 2", [2, 3]), ("--save_minutes 1e-9", [1, 2, 3]),
                           ("--save_minutes 0", [3])):
        saved.clear()
        train.main(command(options, tmp_path / options.replace(" ", "_")))
        assert saved == steps


def test_a_checkpoint_holds_its_step_however_late_it_is_written(tmp_path, command, monkeypatch):
    """The thread waits until the weights have moved on: what it writes are the copies."""
    train.main(command("--steps 1 --ema 0.5", tmp_path / "one"))
    expected, _ = run_room.load_checkpoint(tmp_path / "one")
    moved_on, states = threading.Event(), []
    save, after_step = run_room.save_checkpoint, train.Output.after_step

    def late(folder, state, kept):
        assert state["step"] > 1 or moved_on.wait(60)
        save(folder, state, kept)
        states.append(torch.load(run_room.newest_checkpoint(folder), weights_only=True))

    def noted(output, step, *rest):
        if step == 1:  # the optimizer has stepped again
            moved_on.set()
        after_step(output, step, *rest)

    monkeypatch.setattr(common, "save_checkpoint", late)
    monkeypatch.setattr(train.Output, "after_step", noted)
    train.main(command("--save_every 1 --ema 0.5", tmp_path / "out"))
    assert [state["step"] for state in states] == [1, 2, 3]
    for part in ("weights", "optimizer", "ema"):
        a, b = (torch.utils._pytree.tree_leaves(state[part]) for state in (states[0], expected))
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y


# What travels


def test_nothing_travels_that_is_not_used(small_model, few_pairs, tmp_path, command, monkeypatch):
    """Images as bytes; of SFT the winners alone; no noise for the VAE's mean."""
    sent, to_device = [], distributed.to_device

    def noted(tensor, device):
        sent.append(tensor)
        return to_device(tensor, device)

    for module in (common, models):
        monkeypatch.setattr(module, "to_device", noted)
    train.main(command("--loss sft --vae_sample mean --steps 1 --micro_batch 8", tmp_path / "out"))
    shapes = {(tuple(tensor.shape), tensor.dtype) for tensor in sent}
    assert ((1, 3, 32, 32), torch.uint8) in shapes
    assert not any(shape[1:2] == (2,) for shape, dtype in shapes if dtype == torch.float32)
    stream = Stream(ImagePairs(few_pairs, 32), fresh(small_model("sd")).process, (4, 8, 8), 0, 8, 8, "own", "mean")
    assert stream[3].keys() == Stream(*vars_of(stream))[3].keys() - {"vae_noise"}


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_the_loaders_processes_read_the_prompts(tmp_path, command, monkeypatch, kind):
    """Dropped ones, too; the model's tokenizers are not asked in the process of the steps, and the numbers are those of
    a run in which they are."""
    content = ImagePairs.content

    def content_without_ids(*inputs):
        return {name: value for name, value in content(*inputs).items() if not name.startswith("ids")}

    options = "--prompt_dropout 0.5 --steps 2 --micro_batch 4 --sample_every 1 --sample_steps 1 --resolution 32 --workers"
    with monkeypatch.context() as patch:
        patch.setattr(ImagePairs, "content", content_without_ids)
        train.main(command(f"{options} 0", tmp_path / "alone", kind))
    begin = train.Output.begin

    def begin_without_a_reader(output, start):
        monkeypatch.setattr(models, "tokenize", None)
        begin(output, start)

    monkeypatch.setattr(train.Output, "begin", begin_without_a_reader)
    train.main(command(f"{options} 2", tmp_path / "out", kind))
    assert numbers_of(tmp_path / "out") == numbers_of(tmp_path / "alone")


@torch.no_grad()
def test_a_word_of_textual_inversion_stands_for_all_of_its_vectors(small_model):
    """As in the pipeline, to the bit."""
    pipe = DiffusionPipeline.from_pretrained(small_model("sd"))
    pipe.tokenizer.add_tokens(["<thing>", "<thing>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    model = models.StableDiffusion(pipe)
    ours = model.encode_prompts(["a <thing>"])["prompt_embeds"]
    assert torch.equal(ours, pipe.encode_prompt("a <thing>", "cpu", 1, False)[0])
    (ids,) = models.tokenize(model.tokenizers(), ["a <thing>"])["ids"]
    assert set(pipe.tokenizer.convert_tokens_to_ids(["<thing>", "<thing>_1"])) <= set(ids.tolist())


def test_a_text_encoder_that_wants_a_mask_is_refused(small_model):
    pipe = DiffusionPipeline.from_pretrained(small_model("sd"))
    pipe.text_encoder.config.use_attention_mask = True
    with pytest.raises(ValueError, match="its text encoder wants an attention mask"):
        models.StableDiffusion(pipe)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_threads_do_not_change_the_bits_of_a_prompt(small_model, kind):
    model, prompts = fresh(small_model(kind)), [f"a {k} dog" for k in range(6)]
    alone = model.encode_prompts(prompts)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    together = model.encode_prompts(prompts)
    torch.set_num_threads(threads)
    assert alone.keys() == together.keys() and all(torch.equal(alone[name], together[name]) for name in alone)


def vars_of(stream):
    """What makes the same stream, for a VAE that is drawn from."""
    return stream.pairs, stream.process, stream.latent_shape, 0, 8, 8, "own"


@pytest.mark.parametrize("options, memory, expected", [
    ("", 85e9, (True, 8)), ("--lora_rank 4", 24e9, (True, 8)), ("--lora_rank 4", 85e9, (False, 4)),
    ("--lora_rank 4 --gradient_checkpointing", 85e9, (True, 8))])
def test_an_adapter_of_sdxl_is_checkpointed_where_memory_is_short(monkeypatch, options, memory, expected):
    """On 80 GB it is not, unless it is asked for."""
    monkeypatch.setattr(options_file, "gpu_bytes", lambda device: memory)
    args = train_args(["--model", "sdxl", *options.split()])
    assert (args.gradient_checkpointing, args.micro_batch) == expected
