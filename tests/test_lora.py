"""Adapters, torch.compile, random weights at full size, memory that is short, and a step that never waits."""

import functools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import distributed
import encode
import loading
import loss as loss_file
import reference
import run as run_room
import train
from common import InputError
from extras import kohya, random_models, tiny
from loading import disabled_adapter
from loss import denoising_error
from models import cast_for_autocast
from small_runs import fresh, launch, loaded, log_of
from test_resume import left
from test_train import pair_inputs

ROOT = Path(__file__).parent.parent
STEPS = 2
ADAPTER = Path("model") / "pytorch_lora_weights.safetensors"
LORA = "--lora_rank 4 --lr 1e-2"  # at this rate two steps are to be seen


def observed(argv, file=None):
    """Calls train.main; gives its model, and its gradients of every step before they are clipped, to a file, too."""
    clip, seen = torch.nn.utils.clip_grad_norm_, SimpleNamespace(gradients=[])

    def clip_grad_norm_(params, *rest):
        params = list(params)
        seen.gradients.append(torch.cat([param.grad.flatten() for param in params]))
        return clip(params, *rest)

    def load_model(*rest):
        seen.model = fresh(*rest)
        return seen.model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)
        patch.setattr(run_room, "load_model", load_model)
        train.main(argv)
    if file:
        rank, _, _ = distributed.torchrun_env()
        torch.save(seen.gradients, f"{file}-{rank}")
    return seen


@pytest.fixture(scope="module")
def command(small_model, few_pairs):
    """command(model, options, out): a run of two steps."""

    def command(model, options, out):
        fixed = f"--steps {STEPS} --batch_size 8 --sample_every 0 --clip tiny --device cpu".split()
        paths = ["--model", small_model(model), "--data", few_pairs, "--out", str(out)]
        return [*paths, *fixed, *options.split()]

    return command


@pytest.fixture(scope="module")
def run(tmp_path_factory, command):
    """run(model, options) -> what such a run showed and left in `out`, `log`; runs are kept."""

    @functools.cache
    def run(model, options):
        out = tmp_path_factory.mktemp("run") / "out"
        seen = observed(command(model, options, out))
        seen.out, seen.log = out, log_of(out)
        return seen

    return run


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


# The adapter


RUNS = [("sd", "rpo", "fp32"), pytest.param("sdxl", "dpo", "bf16", marks=pytest.mark.slow)]


@pytest.mark.parametrize("model, loss, precision", RUNS)
def test_an_adapter_starts_from_the_base_model_and_is_held_against_it(run, model, loss, precision):
    """Its step 0 is that of a run that trains everything, and so is the reference at step 1, when the adapter has
    moved. Both are so to rounding, because weights may lie in another order in memory."""
    adapter = run(model, f"{LORA} --loss {loss} --precision {precision}").log
    whole = run(model, f"--lr 1e-3 --loss {loss} --precision {precision}").log
    assert adapter[0]["reward/margin"] == adapter[0]["reward/chosen"] == 0
    assert adapter[0]["reward/accuracy"] == 0.5 and adapter[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    close = functools.partial(pytest.approx, rel=1e-6 if precision == "fp32" else 5e-4)
    for name in ("mse/policy_w", "mse/policy_l", "mse/ref_w", "mse/ref_l"):
        assert adapter[0][name] == close(whole[0][name])
    for name in ("mse/ref_w", "mse/ref_l"):
        assert adapter[1][name] == close(whole[1][name])
    assert adapter[1]["reward/margin"] != 0


def test_four_steps_of_an_adapter_are_two_and_two(tmp_path, command):
    """Both runs take two passes. The one that resumes draws the adapter's first values again, and drops them."""
    options = f"{LORA} --micro_batch 2 --steps"
    for steps, name in (("4", "four"), ("2", "two"), ("4", "two")):
        observed(command("sd", f"{options} {steps}", tmp_path / name))
    (state, log), (expected, expected_log) = left(tmp_path / "two"), left(tmp_path / "four")
    assert log == expected_log and len(log) == 4
    for part in ("weights", "optimizer"):
        a, b = (torch.utils._pytree.tree_leaves(kept[part]) for kept in (state, expected))
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, part
    assert (tmp_path / "two" / ADAPTER).read_bytes() == (tmp_path / "four" / ADAPTER).read_bytes()
    with pytest.raises(SystemExit, match="holds a run with --lora_rank 4, not 8"):
        train.main(command("sd", f"{options} 5 --lora_rank 8", tmp_path / "two"))


def test_sft_of_an_adapter_needs_no_reference(run, monkeypatch):
    monkeypatch.setattr(train, "disabled_adapter", None)  # calling it would raise
    trained = run("sd", f"{LORA} --loss sft")
    assert trained.log[0].keys() == {"step", "loss", "mse/policy_w", "grad_norm", "lr", "pairs_per_second"}
    state, _ = left(trained.out)
    assert all(weight.any() for weight in state["weights"].values())


@pytest.mark.parametrize("model, loss, precision", RUNS)
def test_stock_diffusers_draws_with_the_adapter_what_the_run_drew(run, small_model, model, loss, precision):
    """They agree to rounding, because the run's weights may lie in another order in memory."""
    trained = run(model, f"{LORA} --loss {loss} --precision {precision}")
    files = sorted(file.name for file in (trained.out / "model").iterdir())
    assert files == ["README.md", ADAPTER.name]

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        noise = [torch.Generator().manual_seed(0)]
        return trained.model.sample(["a red circle"], noise, 3, 5.0, common.DTYPES[precision], pipe,
                                    height=32, width=32)

    stock = DiffusionPipeline.from_pretrained(small_model(model))
    base = draw(stock)
    stock.load_lora_weights(trained.out / "model", weight_name=ADAPTER.name)
    assert apart(draw(stock), draw(trained.model.pipe)) < (1e-5 if precision == "fp32" else 5e-3)
    assert apart(draw(stock), base) > 0.01  # or two base models would agree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_its_adapter_a_network_is_the_base_model(small_model, dtype):
    """It is so bit for bit. Whatever happens inside, the adapter is on afterwards and can be trained."""
    model = fresh(small_model("sdxl"))
    unet, inputs = model.denoiser, pair_inputs(model) | {"dtype": dtype}
    base = denoising_error(network=unet, **inputs)
    lora_layers = loading.add_lora(model, 4, seed=0)
    adapter = [param for param in unet.parameters() if param.requires_grad]
    for param in adapter:
        torch.nn.init.normal_(param)
    cast_for_autocast(unet, dtype)
    on = denoising_error(network=unet, **inputs)
    with disabled_adapter(lora_layers):
        off = denoising_error(network=unet, **inputs)
    assert torch.equal(off, base) and not torch.equal(on, base)
    with pytest.raises(KeyboardInterrupt), disabled_adapter(lora_layers):
        raise KeyboardInterrupt
    assert all(param.requires_grad for param in adapter)
    assert torch.equal(denoising_error(network=unet, **inputs), on)


def test_what_is_trained_is_float32_and_the_rest_is_the_base_model(run, small_model):
    """In bf16, frozen weights are held as autocast casts them. What trains is not: no learning rate could move it."""
    trained = run("sdxl", f"{LORA} --loss dpo --precision bf16")
    base, pipe = loaded(small_model("sdxl")).pipe, trained.model.pipe
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        start = getattr(base, part).state_dict()
        for path, module in getattr(pipe, part).named_modules():
            is_adapter = "lora_" in path
            is_cast = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and part != "vae" and not is_adapter
            for name, weight in module.named_parameters(recurse=False):
                assert weight.requires_grad == is_adapter
                assert weight.dtype == (torch.bfloat16 if is_cast else torch.float32), path
                if not is_adapter:
                    base_name = f"{path}.{name}".replace(".base_layer", "")
                    assert torch.equal(weight, start.pop(base_name).to(weight.dtype)), base_name
        assert not any(torch.is_floating_point(value) for value in start.values())  # none was passed over
    adapter = {name: param for name, param in pipe.unet.named_parameters() if "lora_" in name}
    kept = left(trained.out)[0]["weights"]
    attentions = sum(path.endswith(("attn1", "attn2")) for path, _ in base.unet.named_modules())
    assert len(adapter) == 2 * 4 * attentions and kept.keys() == adapter.keys()  # A and B of q, k, v and out
    assert all(torch.equal(kept[name], adapter[name]) for name in kept)
    written = load_file(trained.out / ADAPTER)
    assert len(written) == len(kept) and {value.dtype for value in written.values()} == {torch.float32}


# SGD is linear, so rounding stays rounding at the second step.
SGD = "--lora_rank 4 --optimizer sgd --lr 1 --weight_decay 0 --beta 100"


def check_gradients(got, expected, rounding):
    """Only the second step's has both factors: at the first, the one that starts at zero hides the other."""
    assert not expected[0].all() and expected[1].count_nonzero() > 0.9 * len(expected[1])
    assert apart(got[0], expected[0]) < rounding and apart(got[1], expected[1]) < 10 * rounding


def test_an_adapters_gradient_is_that_of_any_micro_batch(run):
    """A group of 8 takes two passes."""
    check_gradients(run("sd", f"{SGD} --micro_batch 2").gradients, run("sd", SGD).gradients, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [2, 4])
def test_an_adapters_gradient_is_that_of_any_number_of_processes(tmp_path, run, command, micro):
    """A group of 8 spans two processes, in two passes or one."""
    argv = command("sd", f"{SGD} --micro_batch {micro}", tmp_path / "out")
    for status, text in launch(tmp_path, 2, observed, argv, str(tmp_path / "gradients")):
        assert status == 0, text
    gradients = torch.load(tmp_path / "gradients-0", weights_only=True)
    check_gradients(gradients, run("sd", SGD).gradients, 1e-5)


def test_gradient_checkpointing_changes_nothing_for_an_adapter(run):
    plain, saved = run("sd", SGD), run("sd", f"{SGD} --gradient_checkpointing")
    assert saved.model.denoiser.is_gradient_checkpointing and not plain.model.denoiser.is_gradient_checkpointing
    check_gradients(saved.gradients, plain.gradients, 1e-6)


def test_an_adapter_in_bf16_draws_its_samples(run):
    """Its network is held in half precision, as `train.py --lora_rank 4` has it on CUDA."""
    out = run("sd", f"{LORA} --precision bf16 --sample_every 1 --sample_steps 2").out
    before, after = ((out / "samples" / f"{step:06d}.png").read_bytes() for step in (1, 2))
    assert before != after


# Two stages


@pytest.mark.slow
def test_the_first_stages_model_is_policy_and_reference_of_the_second(run, command, tmp_path):
    """After SFT, RPO from out/sft/model is pulled to the SFT model, no longer to the base."""
    first = run("sd", "--loss sft --lr 1e-3")
    argv = command("sd", "--lr 1e-3", tmp_path / "out")
    observed([*argv, "--model", str(first.out / "model")])
    check_second_stage(log_of(tmp_path / "out"), run("sd", "--lr 1e-3").log)


def check_second_stage(log, log_from_base):
    """There is no margin at step 0 and one at step 1, and the reference is not the base model."""
    assert log[0]["reward/margin"] == log[0]["reward/chosen"] == 0 and log[1]["reward/margin"] != 0
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("mse/ref_w", "mse/ref_l"):
        assert log[0][name] != pytest.approx(log_from_base[0][name], rel=1e-3)


@pytest.mark.parametrize("model, rank", [("sd", 4), pytest.param("sdxl", 0, marks=pytest.mark.slow)])
def test_the_first_stages_adapter_is_policy_and_reference(run, command, tmp_path, small_model, model, rank):
    """Whatever the second stage trains, it is the run from a pipeline into which the adapter was fused."""
    adapter = run(model, f"{LORA} --loss sft").out / "model"
    second = run(model, f"--lora_rank {rank} --lr 1e-2 --init_lora {adapter}")
    check_second_stage(second.log, run(model, LORA).log)
    merged = fresh(small_model(model))
    loading.fuse_lora(merged, adapter)
    loading.save_model(merged, tmp_path / "merged")
    argv = command(model, f"--lora_rank {rank} --lr 1e-2", tmp_path / "out")
    observed([*argv, "--model", str(tmp_path / "merged")])
    for record, expected in zip(second.log, log_of(tmp_path / "out"), strict=True):
        for name in ("mse/ref_w", "mse/policy_l", "loss", "grad_norm"):
            assert record[name] == pytest.approx(expected[name], rel=1e-3), name


def test_an_adapter_knows_the_one_that_it_stands_on(run, small_model, tmp_path):
    """Alone it would be another model's, so fuse_lora adds both, and with it evaluate's --lora and the task's judge."""
    first = run("sd", f"{LORA} --loss sft").out / "model"
    second = run("sd", f"{LORA} --init_lora {first}")
    both = fresh(small_model("sd"))
    loading.fuse_lora(both, second.out / "model")
    inputs = pair_inputs(both)
    trained = denoising_error(network=second.model.denoiser, **inputs)
    assert apart(denoising_error(network=both.denoiser, **inputs), trained) < 1e-5
    one_by_one = fresh(small_model("sd"))  # as diffusers needs it; the first is not fused twice
    loading.fuse_lora(one_by_one, first)
    loading.fuse_lora(one_by_one, second.out / "model")
    assert apart(denoising_error(network=one_by_one.denoiser, **inputs), trained) < 1e-5
    by_file = fresh(small_model("sd"))
    loading.fuse_lora(by_file, second.out / ADAPTER)
    assert apart(denoising_error(network=by_file.denoiser, **inputs), trained) < 1e-5
    judged = tiny.load(second.out / "model")
    assert apart(denoising_error(network=judged.unet, **inputs), trained) < 1e-5
    lone = shutil.copytree(second.out / "model", tmp_path / "lone", ignore=lambda *_: [loading.LOWER_LORA])
    alone = fresh(small_model("sd"))
    loading.fuse_lora(alone, lone)
    assert apart(denoising_error(network=alone.denoiser, **inputs), trained) > 1e-3
    (tmp_path / "lone" / loading.LOWER_LORA).write_text(json.dumps({"init_lora": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match=f"LoRA weights {tmp_path}/gone cannot be loaded"):
        loading.fuse_lora(fresh(small_model("sd")), lone)


# Adapters for other programs


def stock_error(model, adapter=None):
    """The errors of a model into which the stock pipeline has loaded an adapter file, for the inputs of `pair_inputs`."""
    parts = fresh(model)
    if adapter:
        parts.pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
    return denoising_error(network=parts.denoiser, **pair_inputs(parts))


@pytest.mark.parametrize("model", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_kohyas_file_is_the_adapter(run, small_model, model):
    """A stock pipeline reads it. With two stages one file holds both adapters."""
    first = run(model, f"{LORA} --loss sft")
    second = run(model, f"{LORA} --init_lora {first.out / 'model'}")
    for trained in (first, second):
        kohya.main([str(trained.out / "model")])
        expected = denoising_error(network=trained.model.denoiser, **pair_inputs(trained.model))
        assert apart(stock_error(small_model(model), trained.out / "model-kohya.safetensors"), expected) < 1e-5
        assert apart(stock_error(small_model(model)), expected) > 5e-4
    with pytest.raises(SystemExit, match="lies beside init_lora.json; pass a file in another folder"):
        kohya.main([str(second.out / ADAPTER), "--out", str(second.out / "model" / "by-file.safetensors")])
    kohya.main([str(second.out / ADAPTER), "--out", str(second.out / "by-file.safetensors")])
    weights = load_file(second.out / "model-kohya.safetensors")
    assert weights.keys() == load_file(second.out / "by-file.safetensors").keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(second.out / "by-file.safetensors").items())
    assert {name: alpha.item() for name, alpha in weights.items() if name.endswith(".alpha")} == {
        name.replace(".lora_down.weight", ".alpha"): len(down) for name, down in weights.items() if "lora_down" in name}


UNET = r"(down_blocks_\d_attentions_\d|mid_block_attentions_0|up_blocks_\d_attentions_\d)_transformer_blocks_\d"
COMFYUI = {  # the layers of comfy/lora.py and comfy/utils.py that an adapter of ours may have
    "sd": rf"lora_unet_{UNET}_attn[12]_to_(q|k|v|out_0)\.(lora_down\.weight|lora_up\.weight|alpha)",
    "sd3": r"transformer\.transformer_blocks\.\d\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|attn2\.(to_[qkv]"
           r"|to_out\.0))\.lora_[AB]\.weight",
    "flux": r"transformer\.(single_transformer_blocks\.\d\.attn\.to_[qkv]|transformer_blocks\.\d\.attn\.(to_[qkv]|to_out\.0|"
            r"add_[qkv]_proj|to_add_out))\.lora_[AB]\.weight",
}
COMFYUI["sdxl"] = COMFYUI["sd"]


@pytest.mark.parametrize("model", ["sd", "flux", pytest.param("sdxl", marks=pytest.mark.slow), pytest.param("sd3", marks=pytest.mark.slow)])
def test_comfyui_knows_every_name(small_model, tmp_path, model):
    """SD and SDXL by kohya's names, SD3 and FLUX by diffusers' own, which extras.kohya says."""
    parts = fresh(small_model(model))
    loading.add_lora(parts, 2, seed=0)
    loading.save_model(parts, tmp_path / "model")
    file = tmp_path / ADAPTER
    if parts.denoiser_name == "unet":
        kohya.main([str(file.parent)])
        file = tmp_path / "model-kohya.safetensors"
    else:
        with pytest.raises(SystemExit, match=f"is an adapter of a transformer.* ComfyUI reads {file} as it is"):
            kohya.main([str(file.parent)])
    names = load_file(file).keys()
    assert len(names) > 15 and all(re.fullmatch(COMFYUI[model], name) for name in names)


def test_kohyas_file_keeps_the_scale_of_an_adapter_of_others(small_model, tmp_path):
    """peft multiplies B by alpha / rank. diffusers writes alpha into the file's metadata, and its converter drops it."""
    from peft import LoraConfig, get_peft_model_state_dict

    model = fresh(small_model("sd"))
    model.denoiser.add_adapter(LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=["to_q"]))
    weights = get_peft_model_state_dict(model.denoiser)
    metadata = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q"]}
    model.pipe.save_lora_weights(tmp_path, weights, unet_lora_adapter_metadata=metadata)
    file = tmp_path / ADAPTER.name
    kohya.main([str(file), "--out", str(tmp_path / "out" / "kohya.safetensors")])
    expected = denoising_error(network=model.denoiser, **pair_inputs(model))
    assert apart(stock_error(small_model("sd"), tmp_path / "out" / "kohya.safetensors"), expected) < 1e-5


@pytest.mark.parametrize(
    "weights, complaint",
    [
        ({"unet.a.to_q.lora_A.weight": (2, 4)}, "unet.a.to_q is no adapter of a linear layer"),
        ({"unet.a.conv.lora_A.weight": (2, 4, 3, 3), "unet.a.conv.lora_B.weight": (4, 2, 1, 1)}, "unet.a.conv is no"),
        ({"lora_unet_a_to_q.lora_down.weight": (2, 4)}, "lora_unet_a_to_q.lora_down.weight is no tensor of a UNet"),
        ({"text_encoder.a.q_proj.lora_A.weight": (2, 4)}, "text_encoder.a.q_proj.lora_A.weight is no tensor of a UNet"),
        ({"unet.a.to_q.lora_A.weight": (2, 4), "unet.a.to_q.dora_scale": (4,)}, "cannot be read: they are DoRA weights"),
    ],
)
def test_what_kohyas_file_cannot_hold_is_refused(tmp_path, weights, complaint):
    save_file({name: torch.ones(shape) for name, shape in weights.items()}, tmp_path / "a.safetensors")
    with pytest.raises(SystemExit, match=f"^kohya.py: .*{re.escape(complaint)}"):
        kohya.main([str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "b.safetensors")])
    with pytest.raises(SystemExit, match="is no folder, so pass --out FILE"):
        kohya.main([str(tmp_path / "a.safetensors")])
    (tmp_path / loading.LOWER_LORA).write_text(json.dumps({"init_lora": "some/hub-id"}))
    save_file({"unet.a.to_q.lora_A.weight": torch.ones(2, 4), "unet.a.to_q.lora_B.weight": torch.ones(4, 2)},
              tmp_path / "a.safetensors")
    with pytest.raises(SystemExit, match=f"was trained above some/hub-id, which is not here. Name its folder in {tmp_path}"):
        kohya.main([str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "out" / "b.safetensors")])
    (tmp_path / loading.LOWER_LORA).unlink()
    for name in ("nowhere", "some/hub-id"):
        with pytest.raises(SystemExit, match="no such folder or file. Download an adapter of the hub first"):
            kohya.main([name, "--out", str(tmp_path / "b.safetensors")])
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lora_weights_of_which_some_fit_nowhere_are_refused(run, small_model, tmp_path, dtype):
    """diffusers would draw with the rest. Whole weights of either type are taken."""
    weights = load_file(run("sd", f"{LORA} --loss sft").out / ADAPTER)
    weights = {name: value.to(dtype) for name, value in weights.items()}
    first = min(weights)
    unknown = {"block": first.replace("attn1", "attn9"), "network": first.replace("unet.", "transformer.")}
    for what, name in [("whole", first), *unknown.items()]:
        changed = dict(weights)
        changed[name] = changed.pop(first)
        save_file(changed, tmp_path / f"{what}.safetensors")
    loading.fuse_lora(fresh(small_model("sd")), tmp_path / "whole.safetensors")
    for what in unknown:
        with pytest.raises(InputError, match=f"{what}.safetensors cannot be loaded"):
            loading.fuse_lora(fresh(small_model("sd")), tmp_path / f"{what}.safetensors")


# torch.compile


def names_of(out):
    """The names of all tensors that a run leaves, by their file."""
    files = (out / "model").rglob("*.safetensors")
    names = {str(file.relative_to(out)): sorted(load_file(file)) for file in files}
    return names | {"checkpoint": sorted(left(out)[0]["weights"])}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_compile_leaves_no_trace(tmp_path, run, command, small_model, monkeypatch, kind):
    """With plain SGD weights move by the gradients. Kernels that are fused otherwise round otherwise, by 1e-7."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = SGD if kind == "adapter" else SGD.replace("--lora_rank 4 ", "")
    plain, compiled = run("sd", options), run("sd", f"{options} --compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # it was no fall-back
    assert names_of(plain.out) == names_of(compiled.out)
    assert compiled.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for k in range(STEPS):
        assert apart(compiled.gradients[k], plain.gradients[k]) < 1e-4
    start = loaded(small_model("sd")).denoiser.state_dict()
    moved = []
    for out in (compiled.out, plain.out):
        weights = left(out)[0]["weights"]  # of an adapter, the factors that start at zero
        moved.append(torch.cat([(weight - start.get(name, 0)).flatten() for name, weight in weights.items()
                                if "lora_A" not in name]))
    assert apart(*moved) < 1e-4 and moved[0].norm() > 0.01

    out = tmp_path / "out"
    observed(command("sd", f"{options} --steps 1", out))
    observed(command("sd", f"{options} --compile", out))  # a run resumes with it
    assert names_of(out) == names_of(plain.out) and len(log_of(out)) == STEPS
    assert log_of(out)[1]["loss"] == pytest.approx(plain.log[1]["loss"], rel=1e-4)


# Memory that is short


def starved(argv):
    """Calls train.main; its first forward has a batch for a GiB and may take a quarter of one."""
    error = train.denoising_error

    def starved_error(*networks, x, eps, t, **more):
        n = 2**30 // x[0].nbytes
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
        return error(*networks, x=x[:1].expand(n, -1, -1, -1), eps=eps, t=t[:1].expand(n), **more)

    train.denoising_error = starved_error
    train.main(argv)


def test_memory_that_is_short_ends_the_run_in_one_line(tmp_path, command):
    argv = command("sd", "--micro_batch 8 --workers 1", tmp_path / "out")
    ((status, text),) = launch(tmp_path, 1, starved, argv)
    assert status == 1 and text.count("train.py: ") == 1 and "Traceback" not in text, text
    (line,) = (line for line in text.splitlines() if "train.py: " in line)
    assert line.startswith("train.py: out of memory (") and "allocate memory" in line
    assert line.endswith(f"). {train.ADVICE}") and "The same command resumes with --micro_batch 1" in train.ADVICE


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: bytearray(2**62)])
def test_any_error_of_memory_is_explained(allocate):
    """Python's own error comes without a message."""
    with pytest.raises(SystemExit, match=r"^train.py: out of memory \(.+\)\. The same command resumes"):
        with common.one_line_errors("train.py", train.ADVICE):
            allocate()


# A step that never waits for the device


class Waits:
    """Where, from a step's first forward to the end of its optimizer's step, the host reads a tensor's value.

    Those are the places at which a GPU is waited for. What reads images and draws noise is on the host anyway,
    and between the gradient's norm and the optimizer's step the log's numbers are read, once.
    """

    OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave"}
    METHODS = {"tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"}

    def __init__(self, patch):
        self.going, self.stepping, self.reading, self.found, self.watched = False, False, False, [], 0
        error, clip = train.denoising_error, torch.nn.utils.clip_grad_norm_
        restore, load = run_room.Output.restore, train.Trainer.load
        read = reference.ReferenceErrors.read

        def denoising_error(*inputs, **more):
            self.stepping = self.going  # before the first step, the reference's errors may be read
            return error(*inputs, **more)

        def clip_grad_norm_(*inputs):
            norm = clip(*inputs)
            self.watched, self.stepping = self.watched + self.stepping, False
            return norm

        def before_the_first_step(*inputs):
            self.going = True
            restore(*inputs)

        def reading_load(*inputs):
            batches = load(*inputs)
            while True:
                self.reading = True
                batch = next(batches, None)
                self.reading = False
                if batch is None:
                    return
                yield batch

        def reading_errors(*inputs):  # by positions and draw_ids, which stay on the host
            self.reading = True
            errors = read(*inputs)
            self.reading = False
            return errors

        patch.setattr(train, "denoising_error", denoising_error)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)
        patch.setattr(run_room.Output, "restore", before_the_first_step)
        patch.setattr(train.Trainer, "load", reading_load)
        patch.setattr(reference.ReferenceErrors, "read", reading_errors)

    def set_stepping(self, value):
        self.stepping = self.going and value

    def see(self, name):
        if self.stepping and not self.reading:
            ours = [frame for frame in traceback.extract_stack() if "test_lora" not in frame.filename][-6:]
            lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in ours]
            self.found.append((name, lines))

    def __enter__(self):
        waits = self

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = function._schema.name.removeprefix("aten::")
                if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
                    name = "nonzero"  # of a mask
                if name in waits.OPERATIONS:
                    waits.see(name)
                return function(*args, **kwargs or {})

        class Methods(TorchFunctionMode):  # a CPU's tensor gives a list without an operation
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if getattr(function, "__name__", "") in waits.METHODS:
                    waits.see(function.__name__)
                return function(*args, **kwargs or {})

        self.modes = [Operations(), Methods()]
        self.hooks = [
            register_optimizer_step_pre_hook(lambda *_: self.set_stepping(True)),
            register_optimizer_step_post_hook(lambda *_: self.set_stepping(False)),
        ]
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)
        for hook in self.hooks:
            hook.remove()


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, small_model, few_pairs):
    """The pairs, encoded once by the small SDXL model."""
    out = str(tmp_path_factory.mktemp("encoded") / "cache")
    argv = ["--model", small_model("sdxl"), "--data", few_pairs, "--clip", "tiny", "--device", "cpu"]
    encode.main([*argv, "--workers", "1", "--out", out])
    return out


@pytest.mark.parametrize(
    "model, options",
    [
        pytest.param("sd", "--optimizer adamw --micro_batch 2", marks=pytest.mark.slow),
        pytest.param("sdxl", "--data CACHE --optimizer adafactor --lora_rank 4 --precision bf16 --gradient_checkpointing",
                     marks=pytest.mark.slow),
        ("sd", "--optimizer adamw --lora_rank 4 --reference_errors FILE --micro_batch 4 --group_size 4"),
        pytest.param("sdxl", "--data CACHE --optimizer adafactor --reference_errors FILE --micro_batch 2",
                     marks=pytest.mark.slow),
    ],
)
def test_a_step_waits_for_the_device_once(tmp_path, command, encoded, monkeypatch, model, options):
    """There are one or several micro-batches, in one pass or two."""
    options = options.replace("CACHE", encoded).replace("FILE", str(tmp_path / "errors"))
    with Waits(monkeypatch) as waits:
        observed(command(model, f"{options} --workers 0", tmp_path / "out"))
    assert waits.watched == STEPS and waits.found == []


def test_a_wait_would_be_seen(tmp_path, command, monkeypatch):
    """The forward, the loss and the optimizer are the places where a step could hide one."""
    error, rpo, adamw = train.denoising_error, loss_file.rpo_loss, torch.optim.AdamW.step

    def waiting_error(*networks, x, **more):
        x[x > 9]
        return error(*networks, x=x, **more)

    @functools.wraps(rpo)
    def waiting_loss(err_w, **more):
        if err_w.mean() > 9:
            raise ValueError
        err_w.tolist()
        return rpo(err_w, **more)

    def waiting_step(optimizer, *rest):
        optimizer.param_groups[0]["params"][0].sum().item()
        return adamw(optimizer, *rest)

    monkeypatch.setattr(train, "denoising_error", waiting_error)
    monkeypatch.setitem(loss_file.LOSSES, "rpo", waiting_loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", torch.optim.Optimizer.profile_hook_step(waiting_step))
    with Waits(monkeypatch) as waits:
        observed(command("sd", "--workers 0", tmp_path / "out"))
    assert {"nonzero", "_local_scalar_dense", "tolist", "item"} <= {name for name, _ in waits.found}


# Random weights at full size


SIZES = {
    "sd15": dict(unet=859_520_964, vae=83_653_863, text_encoder=123_060_480),
    "sdxl": dict(unet=2_567_463_684, vae=83_653_863, text_encoder=123_060_480, text_encoder_2=694_659_840),
}


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_architectures_have_their_published_sizes(name):
    with torch.device("meta"):  # which has no memory
        networks = random_models.random_model(name).networks()
    sizes = {part: sum(param.numel() for param in network.parameters()) for part, network in networks.items()}
    assert sizes == SIZES[name]


def test_random_weights_are_always_the_same():
    """Their seed is 0, whatever was drawn before, and the generator that others draw from takes no step."""
    text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    small = dict(
        unet=dict(block_out_channels=(32, 32, 32, 32), cross_attention_dim=8, layers_per_block=1),
        vae=dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
        text_encoder=text,
    )
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        networks = random_models.random_model("sd15", **small).networks()
        drawn.append([param for network in networks.values() for param in network.parameters()])
        after = torch.rand(1)
        assert torch.equal(after, torch.rand(1, generator=torch.Generator().manual_seed(seed)))
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize("program", [train, encode])
def test_random_weights_of_another_model_are_refused(tmp_path, few_pairs, program):
    argv = ["--model", "my/model", "--random_init", "--data", few_pairs, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        program.main(argv)
    known = ", ".join(loading.HUB_IDS)
    assert end.value.code == f"{program.__name__}.py: --random_init knows {known}, not my/model"
    assert not (tmp_path / "out").exists()


def available():
    """GB of memory that a new process could have."""
    return int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) / 1e6


@pytest.mark.slow
@pytest.mark.parametrize("model, need", [("sd15", 8), ("sdxl", 18)])
def test_the_ordinary_command_at_full_size(tmp_path, few_pairs, model, need):
    """An adapter of the whole model takes a step, on a machine that has the memory."""
    if available() < need:
        pytest.skip(f"needs {need} GB of memory")
    options = "--resolution 64 --lora_rank 4 --steps 1 --batch_size 1 --group_size 1 --micro_batch 1"
    argv = ["--model", model, "--random_init", "--data", few_pairs, *options.split()]
    argv += ["--sample_every", "0", "--device", "cpu", "--out", str(tmp_path / "out")]
    with open(tmp_path / "text", "w") as text:
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], stdout=text, stderr=text)
        _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, (tmp_path / "text").read_text()
    (record,) = log_of(tmp_path / "out")
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-6) and record["reward/margin"] == 0
    print(f"{model}: {usage.ru_maxrss / 1e6:.1f} GB, {usage.ru_utime + usage.ru_stime:.0f} s of a core")
    assert usage.ru_maxrss < 24e6  # kB
