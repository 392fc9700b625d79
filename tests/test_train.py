"""What a run promises, shown on small models of the Stable Diffusion and SDXL formats."""

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import data
import evaluate
import loading
import loss as loss_file
import models
import options
import pictures
import run as run_room
import train
from common import InputError
from extras import check_loss, tiny
from loss import DDPM, denoising_error, wants
from options import encode_args, hyperparameters, train_args
from small_runs import fresh, log_of
from test_resume import left, same_bits

ROOT = Path(__file__).parent.parent
KEYS = set(
    "step loss grad_norm lr pairs_per_second reward/chosen reward/rejected reward/margin reward/accuracy "
    "mse/policy_w mse/policy_l mse/ref_w mse/ref_l".split()
)


@pytest.fixture
def run(tmp_path, small_model, few_pairs, quick_models):
    """run(model, *options) trains for two steps and gives its folder."""

    def run(model, *options, name="run"):
        out = tmp_path / name
        fixed = "--steps 2 --batch_size 8 --sample_every 0 --clip tiny --device cpu".split()
        train.main(["--model", small_model(model), "--data", few_pairs, "--out", str(out), *fixed, *options])
        return out

    return run


# A whole run


@pytest.mark.parametrize("model, optimizer", [
    ("sdxl", "adafactor"), *(pytest.param(*run, marks=pytest.mark.slow) for run in [("sd", "adamw"), ("sd-v", "sgd")])])
def test_a_run_leaves_what_it_promises(run, small_model, model, optimizer):
    """The result is a stock pipeline. Its UNet alone has moved, and all of it is float32."""
    options = "--sample_every 1 --sample_steps 2 --precision bf16 --workers 2 --lr 1e-3"
    flags = "--gradient_checkpointing --random_flip --random_crop"
    out = run(model, "--optimizer", optimizer, *options.split(), *flags.split())
    assert json.loads((out / "config.json").read_text())["resolution"] == 32
    report = {"rows": 27, "used": 24, "ties": 1, "unlabelled": 0, "left_out": {}}
    report |= {"unreadable": {"no image": [5], "not a picture": [9]}}
    assert json.loads((out / "data.json").read_text()) == report
    log = log_of(out)
    assert [record["step"] for record in log] == [0, 1] and all(KEYS <= record.keys() for record in log)
    grids = sorted((out / "samples").iterdir())
    assert [grid.name for grid in grids] == ["000001.png", "000002.png"]
    assert Image.open(grids[0]).size == (8 * 128, 2 * 128)  # eight prompts; the starting model above
    tops = [Image.open(grid).crop((0, 0, 8 * 128, 128)).tobytes() for grid in grids]
    assert tops[0] == tops[1] and len(set(tops[0])) > 10
    assert not (out / "model.part").exists()
    assert "library_name: diffusers" in (out / "model" / "README.md").read_text()

    before = DiffusionPipeline.from_pretrained(small_model(model))
    after = DiffusionPipeline.from_pretrained(out / "model")
    assert type(before) is type(after) and before.scheduler.config == after.scheduler.config
    for name, module in before.components.items():
        if isinstance(module, torch.nn.Module):
            pairs = zip(module.parameters(), after.components[name].parameters(), strict=True)
            has_moved = any(not torch.equal(a, b) for a, b in pairs)
            assert has_moved == (name == "unet")
    assert {param.dtype for param in after.unet.parameters()} == {torch.float32}
    after.set_progress_bar_config(disable=True)
    assert after("a red circle", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)


def images_encoded(monkeypatch):
    """A list that is given the images of a pair, one or two, whenever pairs are encoded."""
    encode_images, counts = models.StableDiffusion.encode_images, []

    def observed(model, pixels):
        counts.append(pixels.shape[1])
        return encode_images(model, pixels)

    monkeypatch.setattr(models.StableDiffusion, "encode_images", observed)
    return counts


def test_sft_needs_no_loser_and_no_reference(run, monkeypatch):
    monkeypatch.setattr(train, "frozen_reference", None)  # calling it would raise
    counts = images_encoded(monkeypatch)
    log = log_of(run("sd", "--loss", "sft"))
    assert log[0].keys() == {"step", "loss", "mse/policy_w", "grad_norm", "lr", "pairs_per_second"}
    assert log[0]["loss"] == pytest.approx(log[0]["mse/policy_w"])
    assert set(counts) == {1}


@pytest.mark.parametrize("model, loss, precision", [
    ("sd", "dpo", "fp32"), ("sdxl", "rpo", "bf16"),
    *(pytest.param(*run, marks=pytest.mark.slow) for run in [
        ("sd", "rpo", "fp32"), ("sd", "dpo", "bf16"), ("sdxl", "dpo", "fp32"), ("sd", "rpo", "bf16"),
        ("sdxl", "rpo", "fp32"), ("sdxl", "dpo", "bf16")])])
def test_step_0_has_no_margin_and_loss_log_2(run, model, loss, precision):
    """Policy and reference are one network there, so any margin is an error of the arithmetic."""
    first, second = log_of(run(model, "--loss", loss, "--precision", precision, "--lr", "1e-3"))
    assert first["reward/margin"] == 0 and first["reward/accuracy"] == 0.5
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["mse/policy_w"] == first["mse/ref_w"] and first["mse/policy_l"] == first["mse/ref_l"]
    assert second["reward/margin"] != 0  # and at step 1 they are two networks


@pytest.mark.slow
def test_the_same_command_gives_the_same_weights(run):
    weights = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = run("sd", "--seed", seed, name=name)
        unet = DiffusionPipeline.from_pretrained(out / "model").unet
        weights.append(torch.cat([param.flatten() for param in unet.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_without_tensorboard_a_run_still_runs(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import of it fails
    out = run("sd")
    assert (out / "model").is_dir() and not (out / "tensorboard").exists()


def test_a_step_is_as_long_as_its_options_say(run, small_model):
    """SGD moves by the rate times the clipped gradient. AdamW's decay takes rate x decay x weight off every weight."""
    start = torch.cat([param.flatten() for param in fresh(small_model("sd")).denoiser.parameters()])

    def moved(*options):
        out = run("sd", "--loss", "sft", "--steps", "1", "--warmup", "0", *options, name="-".join(options).replace("/", ""))
        model = loading.load_model(str(out / "model"))
        return torch.cat([param.flatten() for param in model.denoiser.parameters()]) - start

    step = moved(*"--optimizer sgd --lr 10 --weight_decay 0 --max_grad_norm 2e-3".split())
    assert step.double().norm() == pytest.approx(10 * 2e-3, rel=1e-3)
    without, with_decay = (moved(*f"--optimizer adamw --lr 1e-2 --weight_decay {decay}".split()) for decay in ("0", "0.5"))
    torch.testing.assert_close(with_decay - without, -1e-2 * 0.5 * start, rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run(run):
    complaint = "step 1: loss nan.* Not finite: the policy's errors of rows .* Kept: no checkpoint"
    with pytest.raises(SystemExit, match=complaint):
        run("sd", "--lr", "1e30", "--optimizer", "sgd", "--max_grad_norm", "1e30")


def test_the_winner_is_what_the_log_calls_the_winner(tmp_path, small_model):
    """The errors of step 0 in the log are those of the images that the labels call winner and loser."""
    import datasets

    rows = tiny.pair_rows(8)
    datasets.Dataset.from_list(list(rows)).to_parquet(tmp_path / "train-0.parquet")
    argv = "--steps 1 --batch_size 8 --loss dpo --sample_every 0 --device cpu".split()
    argv += "--vae_sample mean --prompt_dropout 0".split()
    train.main([*argv, "--model", small_model("sd"), "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    model = loading.load_model(small_model("sd"))
    drawn = draw(range(8), seed=0, process=model.process)
    order = torch.randperm(8, generator=common.keyed_generator(0, "order", 0)).tolist()
    prompt_embeds = model.encode_prompts([rows[k]["caption"] for k in order])
    cond = model.conditioning(prompt_embeds, torch.zeros(8, 1, 6))
    for is_winner, key in ((True, "mse/policy_w"), (False, "mse/policy_l")):
        images = []
        for row in (rows[k] for k in order):
            side = 0 if (row["label_0"] == 1) == is_winner else 1
            image = pictures.read_image(pictures.stored_bytes(row[f"jpg_{side}"]))
            pixels, _ = data.crop_and_resize(image, 32, 0.5, 0.5, False)
            images.append(pixels)
        mean, _ = model.encode_images(torch.stack(images)[:, None])
        latents = model.scale_latents(mean[:, 0])
        inputs = latents, drawn["noise"], drawn["t"], cond
        err = denoising_error(model.predict, model.denoiser, model.process, *inputs)
        assert log_of(tmp_path / "out")[0][key] == pytest.approx(err.mean().item(), rel=1e-5)


def test_weights_as_older_libraries_wrote_them_load(tmp_path, small_model):
    """SD 1.5 itself has a text_model. prefix that transformers 5 dropped, position_ids, and .bin files."""
    folder = tmp_path / "model"
    shutil.copytree(small_model("sd"), folder)
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    (file,) = (folder / "vae").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    old, new = loading.load_model(str(folder)).networks(), loading.load_model(small_model("sd")).networks()
    for name in ("text_encoder", "vae"):
        for a, b in zip(old[name].parameters(), new[name].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("fault", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_with_a_hole_is_refused(tmp_path, small_model, fault):
    """The libraries fill a missing tensor at random, and say so in a warning among many."""
    folder = tmp_path / "model"
    shutil.copytree(small_model("sd"), folder)
    if fault == "tokenizer":
        for file in (folder / "tokenizer").iterdir():
            file.unlink()
    elif fault == "scheduler":
        (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index))
    else:
        (file,) = (folder / fault).glob("*.safetensors")
        tensors = load_file(file)
        del tensors[next(name for name in sorted(tensors) if name.endswith("weight"))]
        save_file(tensors, file, metadata={"format": "pt"})
    lacking = "noise schedule" if fault == "scheduler" else fault
    with pytest.raises(InputError, match=f"--model .*/model cannot be loaded: its {lacking} "):
        loading.load_model(str(folder))


# Resume and the average of the weights


def test_a_resume_after_the_draw_was_changed_is_refused(run, monkeypatch):
    """The message names the first position of the last step whose timestep the new code draws otherwise."""
    run("sd", "--steps", "2")
    sample_t = DDPM.sample_t
    timesteps = draw(range(8, 16), seed=0)["t"].tolist()
    first = next(k for k in range(1, 8) if timesteps[k] > max(timesteps[:k]))
    most = timesteps[first] - 1
    monkeypatch.setattr(DDPM, "sample_t", lambda process, generator: sample_t(process, generator).clamp(max=most))
    complaint = (f"was trained by other code or on other data: at step 1, position {first}, it drew timestep "
                 f"{most + 1}, not timestep {most}. Use the code")
    with pytest.raises(SystemExit, match=complaint):
        run("sd", "--steps", "3")


def fresh_process():
    return DDPM(torch.linspace(0.999, 0.005, 1000))


@pytest.mark.parametrize("kind", ["whole", pytest.param("adapter", marks=pytest.mark.slow)])
def test_model_and_samples_are_the_average_of_the_weights(run, monkeypatch, kind):
    """The decay of diffusers' EMAModel warms up: it is 0, 2/11, 3/12, ..., at most --ema."""
    draw, save_checkpoint = run_room.Output.draw, common.save_checkpoint
    of_steps, of_samples = [], []

    def observed_draw(output):
        of_samples.append([param.detach().clone() for param in output.params.values()])
        return draw(output)

    def observed_save(folder, state):
        of_steps.append([param.detach().clone() for param in state["weights"].values()])
        save_checkpoint(folder, state)

    monkeypatch.setattr(run_room.Output, "draw", observed_draw)
    monkeypatch.setattr(common, "save_checkpoint", observed_save)
    options = "--ema 0.2 --steps 4 --save_every 1 --sample_every 4 --sample_steps 1 --lr 1e-2"
    lora = "--lora_rank 4" if kind == "adapter" else "--lora_rank 0"
    out = run("sd", *options.split(), *lora.split())
    assert len(of_steps) == 4
    averages = of_steps[0]
    for k, decay in ((1, 2 / 11), (2, 0.2), (3, 0.2)):
        pairs = zip(averages, of_steps[k], strict=True)
        averages = [decay * average + (1 - decay) * param for average, param in pairs]

    state, _ = left(out)
    ema = state["ema"]["shadow_params"]
    for value, average, param in zip(ema, averages, state["weights"].values(), strict=True):
        torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, param, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(of_samples[-1], ema, strict=True))
    if kind == "whole":
        unet = DiffusionPipeline.from_pretrained(out / "model").unet
        written = dict(unet.named_parameters())
        assert all(torch.equal(written[name], value) for name, value in zip(state["weights"], ema, strict=True))
    else:
        written = load_file(out / "model" / "pytorch_lora_weights.safetensors")
        of_ema = sorted(value.flatten().tolist() for value in ema)
        assert sorted(value.flatten().tolist() for value in written.values()) == of_ema


@pytest.mark.slow
def test_four_steps_of_an_average_are_two_and_two(run):
    for name, steps in (("four", "4"), ("two", "2"), ("two", "4")):
        out = run("sd", "--ema", "0.2", "--lr", "1e-3", "--steps", steps, name=name)
    same_bits(out, out.with_name("four"))
    state, _ = left(out)
    assert state["ema"]["optimization_step"] == 4


# The contract of a family


class PixArt(models.Family):
    """PixArt-alpha, a family that the program does not know, by what the contract says it must give and no more."""

    denoiser_name = "transformer"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    text_encoders = ("text_encoder",)
    lora_targets = ["to_q", "to_k", "to_v"]
    blocks = ("BasicTransformerBlock",)
    guidance = 4.5

    def make_process(self):
        return DDPM(self.pipe.scheduler.alphas_cumprod)

    def encode_prompt(self, prompts, device):
        embeds, mask, _, _ = self.pipe.encode_prompt(prompts, False, device=device)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def conditioning(self, embeds, time_ids):
        images = time_ids.shape[1]
        return {"encoder_hidden_states": embeds["prompt_embeds"].repeat(images, 1, 1),
                "encoder_attention_mask": embeds["prompt_attention_mask"].repeat(images, 1)}

    def predict(self, network, x_t, t, cond):
        no_size = {"resolution": None, "aspect_ratio": None}
        return network(x_t, timestep=t, added_cond_kwargs=no_size, **cond, return_dict=False)[0].chunk(2, 1)[0]


@pytest.fixture
def pixart_model(tmp_path, small_model):
    """The folder of a small PixArt with random weights, with the VAE and the T5 of the small SD3."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    lender = loading.load_model(small_model("sd3")).pipe
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        caption_channels=96, norm_num_groups=4)
    scheduler = DPMSolverMultistepScheduler()
    PixArtAlphaPipeline(lender.tokenizer_3, lender.text_encoder_3, lender.vae, transformer,
                        scheduler).save_pretrained(tmp_path / "pixart")
    return str(tmp_path / "pixart")


def test_a_family_is_what_its_contract_says_it_must_give(tmp_path, pixart_model, few_pairs, monkeypatch):
    """A class with these members and one row of FAMILIES load, train, and save a model that loads again."""
    must = re.search(r"It must give\n(.*?)It may change", models.Family.__doc__, re.S)[1]
    given = {name for name in vars(PixArt) if not name.startswith("__")}
    assert given == set(re.findall(r"^ {8}(\w+)", must, re.M))
    monkeypatch.setitem(loading.FAMILIES, "PixArtAlphaPipeline", PixArt)
    argv = "--steps 2 --batch_size 8 --micro_batch 4 --lr 1e-3 --sample_every 0 --clip tiny --device cpu".split()
    out = tmp_path / "out"
    train.main([*argv, "--model", pixart_model, "--data", few_pairs, "--out", str(out)])
    first, second = log_of(out)
    assert first["reward/margin"] == 0 and first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["grad_norm"] > 0 and second["reward/margin"] != 0
    before, after = (loading.load_model(str(folder)) for folder in (pixart_model, out / "model"))
    assert type(after) is PixArt
    start = before.denoiser.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in after.denoiser.state_dict().items())


# What is saved


def test_weights_that_were_cast_are_not_saved(tmp_path, small_model):
    """A part that a fork froze and cast for autocast has lost bits, so a pipeline of it would be another model."""
    model = fresh(small_model("sd"))
    model.denoiser.requires_grad_(True)
    model.denoiser.up_blocks.requires_grad_(False)
    models.cast_for_autocast(model.denoiser, torch.bfloat16)
    with pytest.raises(ValueError, match=r"up_blocks\..*weight is torch.bfloat16"):
        loading.save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_run_that_trains_a_part_saves_the_rest_as_it_was(run, small_model, monkeypatch):
    """A fork may train cross-attention alone, also under autocast to bf16."""
    from diffusers import UNet2DConditionModel

    def requires_grad_(unet, is_on=True):
        for name, param in unet.named_parameters():
            param.requires_grad_(is_on and "attn2" in name)
        return unet

    monkeypatch.setattr(UNet2DConditionModel, "requires_grad_", requires_grad_)
    out = run("sd", "--precision", "bf16", "--lr", "1e-3")
    assert log_of(out)[0]["reward/margin"] == 0
    start = loading.load_model(small_model("sd")).denoiser.state_dict()
    saved = DiffusionPipeline.from_pretrained(out / "model").unet.state_dict()
    assert {value.dtype for value in saved.values()} == {torch.float32}
    moved = {name for name in saved if not torch.equal(saved[name], start[name])}
    assert moved and all("attn2" in name for name in moved)


# The forward pass


def checkpointed(model, inputs, is_on):
    """Loss gradient, and how many bytes the forward keeps for the backward pass."""
    unet, kept = model.denoiser, {}
    if is_on:
        unet.enable_gradient_checkpointing()

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    unet.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = denoising_error(network=unet, **inputs).mean()
    loss.backward()
    return [param.grad.clone() for param in unet.parameters() if param.grad is not None], sum(kept.values())


def pair_inputs(model):
    """What denoising_error takes, but for the network, of two images of four pairs."""
    torch.manual_seed(0)
    return {
        "predict": model.predict,
        "process": fresh_process(),
        "x": torch.randn(8, 4, 8, 8),
        "eps": torch.randn(8, 4, 8, 8),
        "t": torch.randint(1000, (8,)),
        "cond": model.conditioning(model.encode_prompts(["a cat"] * 4), torch.full((4, 2, 6), 32.0)),
    }


@pytest.mark.parametrize("model", ["sd", "sdxl", "sd3", "z-image", "qwen-image", *(
    pytest.param(model, marks=pytest.mark.slow) for model in ("flux", "flux2-klein"))])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(small_model, model):
    model = fresh(small_model(model))
    model.denoiser.requires_grad_(True)
    inputs = pair_inputs(model)
    plain, kept = checkpointed(model, inputs, False)
    saved, kept_less = checkpointed(model, inputs, True)
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    params = sum(param.untyped_storage().nbytes() for param in model.denoiser.parameters())
    assert kept_less < 0.7 * kept and kept > 2 * params


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_a_reference_in_bf16_is_the_policy_under_autocast(small_model, model):
    """In diffusers' own UNet only Linear and Conv weights are in half precision, and the errors are equal bits."""
    model = fresh(small_model(model))
    policy = model.denoiser.requires_grad_(True)
    reference = models.frozen_reference(policy, torch.bfloat16)
    halves = set()
    for module in reference.modules():
        for param in module.parameters(recurse=False):
            if param.dtype == torch.bfloat16:
                halves.add(type(module).__name__)
    assert halves == {"Linear", "Conv2d"}
    inputs = pair_inputs(model)
    err = denoising_error(network=policy, **inputs, dtype=torch.bfloat16)
    ref_err = denoising_error(network=reference, **inputs, dtype=torch.bfloat16)
    assert torch.equal(err, ref_err) and err.requires_grad and not ref_err.requires_grad


def test_prompts_are_encoded_as_the_pipeline_encodes_them(small_model):
    """SDXL takes the states of both encoders, the pooled state of the second, zeros for "", and float32 time_ids."""
    time_ids = torch.arange(24).view(2, 2, 6).float() + 1023  # bf16 cannot hold 1023
    model = loading.load_model(small_model("sdxl"))
    cond = model.conditioning(model.encode_prompts(["a cat", ""]), time_ids)
    states, _, pooled, _ = model.pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
    hidden, added = cond["encoder_hidden_states"], cond["added_cond_kwargs"]
    assert hidden.shape == (4, 77, 32 + 48)
    for row in (0, 2):  # winners, then losers: the same prompts
        torch.testing.assert_close(hidden[row], states[0])
        torch.testing.assert_close(added["text_embeds"][row], pooled[0])
        assert not hidden[row + 1].any() and not added["text_embeds"][row + 1].any()
    assert torch.equal(added["time_ids"], torch.stack([*time_ids[:, 0], *time_ids[:, 1]]))
    half = model.conditioning(model.encode_prompts(["a cat", ""], torch.bfloat16), time_ids)
    assert torch.equal(half["added_cond_kwargs"]["time_ids"], added["time_ids"])

    model = loading.load_model(small_model("sd"))
    cond = model.conditioning(model.encode_prompts(["a cat", "", "dog " * 500]), time_ids[[0, 0, 1]][:, :1])
    assert cond.keys() == {"encoder_hidden_states"} and cond["encoder_hidden_states"].shape == (3, 77, 32)
    assert cond["encoder_hidden_states"][1].any()  # SD1.x: the encoded empty prompt


def test_latents_are_the_vaes_posterior(small_model):
    model = loading.load_model(small_model("sdxl"))
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        posterior = model.pipe.vae.encode(pixels / 127.5 - 1).latent_dist
    mean, std = model.encode_images(pixels[:, None])
    torch.testing.assert_close(mean[:, 0], posterior.mean)
    torch.testing.assert_close(std[:, 0], posterior.std)


def draw(positions, seed=3, batch_size=8, group_size=8, group_noise="own", process=None, shape=(4, 8, 8)):
    """{"t": [n], "noise": [n, C, h, w], "vae_noise": [n, 2, C, h, w]} of some positions."""
    settings = dict(seed=seed, batch_size=batch_size, group_size=group_size, group_noise=group_noise)
    args = SimpleNamespace(**settings, vae_sample="sample")
    stream = data.Stream(None, process or fresh_process(), shape, args)
    return data.collate([stream.draw(position) | {"unreadable": []} for position in positions])


def test_draws_depend_on_seed_step_and_position_alone():
    """The micro-batch, the rank and earlier draws change nothing. Other trainers give every rank the same noise."""
    step_7 = range(7 * 8, 8 * 8)
    whole = draw(step_7)
    parts = {first: draw(step_7[first:first + 2]) for first in (6, 0, 4, 2)}
    for name in ("t", "noise", "vae_noise"):
        assert torch.equal(whole[name], torch.cat([parts[first][name] for first in (0, 2, 4, 6)]))
    assert len(set(whole["t"].tolist())) > 4 and len(whole["noise"].unique(dim=0)) == 8
    assert len(whole["vae_noise"].flatten(0, 1).unique(dim=0)) == 16  # winner and loser have their own posterior
    assert not torch.equal(whole["noise"], draw(range(8 * 8, 9 * 8))["noise"])
    assert not torch.equal(whole["noise"], draw(step_7, seed=4)["noise"])


@pytest.mark.parametrize("shared, timesteps, noises", [("own", 8, 8), ("timestep", 2, 8), ("both", 2, 2)])
def test_group_noise_says_what_the_pairs_of_a_group_share(shared, timesteps, noises):
    process = SimpleNamespace(sample_t=lambda generator: torch.randint(10**9, (), generator=generator))
    drawn = draw(range(8), group_size=4, group_noise=shared, process=process)
    assert len(set(drawn["t"].tolist())) == timesteps
    assert len(drawn["noise"].unique(dim=0)) == noises and len(drawn["vae_noise"].unique(dim=0)) == 8


# CLIP


def test_clip_from_a_local_file(tmp_path):
    """--clip ARCH:FILE takes weights in open_clip's format, here of an architecture that the test adds."""
    config = dict(
        embed_dim=16,
        vision_cfg=dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16),
        text_cfg=dict(context_length=12, vocab_size=49408, width=16, heads=2, layers=1),
    )
    (tmp_path / "test-arch.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "test-arch.json")
    network = open_clip.CLIP(**config)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    clip = data.Clip(f"test-arch:{tmp_path / 'weights.pt'}")
    image = clip.transform(Image.new("RGB", (50, 40), "red"))
    text, image_w, image_l = clip.embed(["a red field"], torch.stack([image, image])[None]).unbind(1)
    torch.testing.assert_close(text, network.eval().encode_text(clip.tokenizer(["a red field"])).detach())
    torch.testing.assert_close(image_w, network.encode_image(image[None]).detach())
    assert torch.equal(image_w, image_l)


@pytest.mark.parametrize("spec, quick", [("ViT-L-14:openai", True), ("ViT-H-14:laion2b_s32b_b79k", False)])
def test_openais_weights_get_their_activation(monkeypatch, spec, quick):
    """open_clip loads OpenAI's weights into the wrong activation with a mere warning."""
    given = {}

    def create(arch, weights, **options):
        given.update(options)
        raise ConnectionError("no hub here")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(InputError, match=f"--clip {spec} cannot be loaded .no hub here.. Pass another"):
        data.Clip(spec)
    assert given["force_quick_gelu"] is quick


# Losses


def test_the_readmes_own_loss_trains(run, monkeypatch):
    """A new loss is a function and an entry, as in the README, and a loss that asks for weights gets them."""
    names, seen = readme_names(), []

    def weighted(err_w, err_l, ref_err_w, ref_err_l, beta, weights):
        seen.append(weights)
        return names["hinge_loss"](err_w, err_l, ref_err_w, ref_err_l, beta)

    monkeypatch.setitem(loss_file.LOSSES, "hinge", names["LOSSES"]["hinge"])
    monkeypatch.setitem(loss_file.LOSSES, "weighted", weighted)
    assert log_of(run("sd", "--loss", "hinge", name="a"))[0]["loss"] == 1
    assert log_of(run("sd", "--loss", "weighted", "--group_size", "4", name="b"))[0]["loss"] == 1
    assert len(seen) == 4 and all(weights.shape == (4, 4) for weights in seen)


def mapo_loss(err_w, err_l, snr, beta):
    """The form of MaPO, arXiv:2406.06424, with its log-odds x / (exp(x) - 1) so that no x overflows."""
    odds_w, odds_l = ((snr * err) * torch.exp(-snr * err) / -torch.expm1(-snr * err) for err in (err_w, err_l))
    ratio = F.logsigmoid(odds_w - odds_l)
    return err_w.mean() - beta * ratio.mean(), {"mse/policy_w": err_w.detach().mean()}


def test_a_loss_without_a_reference_never_meets_one(run, monkeypatch):
    monkeypatch.setitem(loss_file.LOSSES, "mapo", mapo_loss)
    monkeypatch.setattr(train, "frozen_reference", None)  # calling one of them would raise
    monkeypatch.setattr(train.Trainer, "reference_error", None)
    counts = images_encoded(monkeypatch)
    log = log_of(run("sd", "--loss", "mapo", "--beta", "0.1", "--lr", "1e-3"))
    assert len(log) == 2 and log[0]["loss"] > log[0]["mse/policy_w"] and log[0]["grad_norm"] > 0
    assert set(counts) == {2}
    with pytest.raises(SystemExit, match="^train.py: --reference_errors: mapo has no reference$"):
        run("sd", "--loss", "mapo", "--reference_errors", "errors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_is_given_what_it_names(run, small_model, monkeypatch, precision):
    seen = {}

    def inspecting_loss(err_w, t, snr, prompt_dropout, scale=2.0):
        seen.update(err_w=err_w, t=t, snr=snr, hyperparameters=(prompt_dropout, scale))
        return scale * err_w.mean(), {}

    monkeypatch.setitem(loss_file.LOSSES, "inspecting", inspecting_loss)
    run("sd", "--loss", "inspecting", "--steps", "1", "--precision", precision, "--loss_args", "scale=3")
    assert [seen[name].shape for name in ("err_w", "t", "snr")] == [(8,)] * 3
    assert (seen["err_w"].dtype, seen["t"].dtype, seen["snr"].dtype) == (torch.float32, torch.int64, torch.float32)
    a_t = loading.load_model(small_model("sd")).process.alphas_cumprod[seen["t"]]
    torch.testing.assert_close(seen["snr"], a_t / (1 - a_t))
    assert seen["hyperparameters"] == (0.2, 3.0)


def test_a_loss_of_a_fork_takes_sft_weight_by_its_name(monkeypatch):
    """A loss that does not name it cannot have the term, so the option is refused."""
    monkeypatch.setitem(loss_file.LOSSES, "held", lambda err_w, sft_weight: (err_w.mean(), {}))
    assert hyperparameters(train_args(["--loss", "held", "--sft_weight", "0.3", "--device", "cpu"])) == {"sft_weight": 0.3}
    assert hyperparameters(train_args(["--loss", "dpo", "--device", "cpu"]))["sft_weight"] == 0
    with pytest.raises(InputError, match="--sft_weight: sft takes no sft_weight"):
        train_args(["--loss", "sft", "--sft_weight", "0.3", "--device", "cpu"])


@pytest.mark.parametrize("option", ["--tau 0.1", "--similarity text", "--weight_position inside"])
def test_an_option_that_the_loss_does_not_take_is_refused(monkeypatch, option):
    """Or a sweep over tau with a forgotten --loss dpo would be one DPO run after the other."""
    with pytest.raises(InputError, match=f"{option.split()[0]}: dpo takes no weight"):
        train_args(["--loss", "dpo", *option.split()])
    assert train_args(option.split()).loss == "rpo"
    monkeypatch.setitem(loss_file.LOSSES, "own", lambda err_w, tau: (err_w.mean(), {}))
    assert hyperparameters(train_args(["--loss", "own", "--tau", "0.1"])) == {"tau": 0.1}


def free_loss(err_w, beta, margin, power=2, is_hinge=True, form="abs", floor=None):
    return err_w.mean(), {}


def loss_args(monkeypatch, *texts):
    monkeypatch.setitem(loss_file.LOSSES, "free", free_loss)
    return train_args(["--loss", "free", "--device", "cpu", "--loss_args", *texts]).loss_args


def test_a_hyperparameter_is_of_its_defaults_type(monkeypatch):
    """Without a default, or with None, it is a number."""
    defaults = {"power": 2, "is_hinge": True, "form": "abs", "floor": None}
    assert loss_args(monkeypatch, "margin=1") == defaults | {"margin": 1.0}
    texts = ("margin=1e-3", "power=3", "is_hinge=false", "form=4", "floor=2")
    values = loss_args(monkeypatch, *texts)
    assert values == {"margin": 0.001, "power": 3, "is_hinge": False, "form": "4", "floor": 2.0}
    assert [type(values[name]) for name in ("margin", "power", "floor")] == [float, int, float]


@pytest.mark.parametrize(
    "texts, complaint",
    [
        (["margin=1", "speed=3"], "--loss_args speed=3: free takes margin, power, is_hinge, form, floor"),
        (["margin=1", "beta=3"], "--loss_args beta=3: free takes margin"),  # --beta says it
        (["margin=1", "err_w=3"], "--loss_args err_w=3: free takes margin"),
        (["power=3"], "free needs --loss_args margin=VALUE"),
        (["margin"], "--loss_args margin: '' is no float"),
        (["margin=1", "power=2.5"], "--loss_args power=2.5: '2.5' is no int"),
        (["margin=1", "is_hinge=maybe"], "--loss_args is_hinge=maybe: 'maybe' is no bool"),
    ],
)
def test_a_hyperparameter_that_will_not_do_is_refused(monkeypatch, texts, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)):
        loss_args(monkeypatch, *texts)


def test_hyperparameters_may_not_change_in_a_run(run, monkeypatch, capsys):
    monkeypatch.setitem(loss_file.LOSSES, "free", free_loss)
    run("sd", "--loss", "free", "--steps", "1", "--loss_args", "margin=1")
    run("sd", "--loss", "free", "--steps", "1", "--loss_args", "margin=1.0", "power=2")  # the same, in other words
    assert "holds all 1 steps of this run" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds a run with --loss_args .*'margin': 1.0.*, not .*'margin': 2.0"):
        run("sd", "--loss", "free", "--loss_args", "margin=2")


# A loss is the mean of what each pair contributes, or names its group


def kto_loss(err_w, err_l, ref_err_w, ref_err_l, beta):
    """The form of KTO, arXiv:2402.01306: rewards are held against the batch's mean, which takes no gradient."""
    chosen, rejected = -beta / 2 * (err_w - ref_err_w), -beta / 2 * (err_l - ref_err_l)
    baseline = torch.cat([chosen, rejected]).mean().clamp(min=0).detach()
    loss = 2 - torch.sigmoid(chosen - baseline).mean() - torch.sigmoid(baseline - rejected).mean()
    return loss, {}


def snr_normalised_loss(err_w, snr):
    weights = snr.clamp(max=5)
    return (weights * err_w).sum() / weights.sum(), {}


def score_normalised_loss(err_w, score):
    return (score * err_w).sum() / score.sum(), {}


def snr_weighted_loss(err_w, err_l, ref_err_w, ref_err_l, beta, snr):
    """Each pair's own weight couples nothing."""
    d = (err_w - ref_err_w) - (err_l - ref_err_l)
    return -F.logsigmoid(-beta / 2 * snr.clamp(max=5) * d).mean(), {}


def score_weighted_loss(err_w, score):
    return (score * err_w).mean(), {}


def readme_names():
    """What the README's snippet defines, pasted into loss.py."""
    names = vars(loss_file).copy()
    exec(re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1], names)
    return names


def check_coupling(monkeypatch, loss_fn, beta=5000.0, **columns):
    """The check before the first step, on pairs with these columns."""
    monkeypatch.setitem(loss_file.LOSSES, "tried", loss_fn)
    monkeypatch.setattr(options, "VECTORS", options.VECTORS | columns.keys())
    columns = {name: np.array(values, dtype=np.float32) for name, values in columns.items()}
    rows = np.arange(max(map(len, columns.values()), default=8))
    check_loss.check_coupling(SimpleNamespace(loss="tried", beta=beta, sft_weight=0.2, loss_args={}),
                            SimpleNamespace(rows=rows, columns=columns), fresh_process())


@pytest.mark.parametrize("loss_fn", [kto_loss, snr_normalised_loss])
def test_a_loss_that_couples_pairs_is_refused_at_the_start(run, tmp_path, monkeypatch, loss_fn):
    """Its gradient would depend on --micro_batch."""
    monkeypatch.setitem(loss_file.LOSSES, "coupled", loss_fn)
    with pytest.raises(SystemExit, match="^train.py: --loss coupled couples pairs: .*`group_size`") as end:
        run("sd", "--loss", "coupled")
    assert "\n" not in end.value.code and not (tmp_path / "run").exists()


@pytest.mark.parametrize("score", [
    [1, 2, 3, 4, 5, 6, 7, 8],
    [1] * 8 + [2] * 8,  # the first rows are alike
    [0, 1] * 8,  # both halves of the first rows have the same sum
    [math.nan, 1, 2, 3] * 4,  # a pair that cannot be read has no number
])
def test_a_sum_over_a_column_is_found_in_any_data(monkeypatch, score):
    with pytest.raises(InputError, match="couples pairs"):
        check_coupling(monkeypatch, score_normalised_loss, score=score)
    check_coupling(monkeypatch, score_weighted_loss, score=score)


@pytest.mark.slow
def test_losses_that_couple_nothing_pass_at_every_beta(monkeypatch):
    """A saturated sigmoid and a loss near zero must not look like coupled pairs."""
    hinge_loss = readme_names()["hinge_loss"]
    for beta in (1, 10, 100, 500, 1000, 5000):
        for loss_fn in (loss_file.sft_loss, loss_file.dpo_loss, hinge_loss, snr_weighted_loss, mapo_loss):
            check_coupling(monkeypatch, loss_fn, float(beta))


@pytest.mark.parametrize("beta", [1.0, 30.0, 1000.0, 5000.0])
def test_kto_is_refused_at_every_beta(monkeypatch, beta):
    with pytest.raises(InputError, match="couples pairs"):
        check_coupling(monkeypatch, kto_loss, beta)


@pytest.mark.parametrize("loss_fn", [kto_loss, pytest.param(snr_normalised_loss, marks=pytest.mark.slow)])
def test_a_loss_that_names_its_group_is_called_on_whole_groups(run, monkeypatch, loss_fn):
    """--micro_batch changes neither its value nor its gradient."""
    sizes, logs = [], []

    def grouped(err_w, err_l, ref_err_w, ref_err_l, beta, snr, group_size):
        sizes.append((len(err_w), group_size))
        given = dict(err_w=err_w, err_l=err_l, ref_err_w=ref_err_w, ref_err_l=ref_err_l, beta=beta, snr=snr)
        return loss_fn(**{name: given[name] for name in wants(loss_fn)})

    monkeypatch.setitem(loss_file.LOSSES, "grouped", grouped)
    for micro_batch in ("2", "8"):
        fixed = "--loss grouped --batch_size 16 --group_size 8 --optimizer sgd --lr 1e-5 --beta 100".split()
        logs.append(log_of(run("sd", *fixed, "--micro_batch", micro_batch, name=micro_batch)))
    assert sizes == [(8, 8)] * 8  # two groups, two steps, two runs
    for a, b in zip(*logs, strict=True):
        assert a["grad_norm"] > 0 and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def first_gradient(monkeypatch, argv):
    """The gradient of a run's only step, before it is clipped."""
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def clip_grad_norm_(params, *rest):
        params = list(params)
        seen.append(torch.cat([param.grad.flatten() for param in params]))
        return clip(params, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)
        train.main(argv)
    return seen[-1]


def noted_loss(err_w, err_l):
    return err_w.mean(), {"mse/policy_l": err_l.detach().mean()}


def losers_loss(err_l):
    return -err_l.mean(), {}


@pytest.mark.parametrize("loss_fn, is_swapped, sign", [(noted_loss, False, 1), (losers_loss, True, -1)])
def test_a_loss_of_one_side_has_the_gradient_of_that_side(tmp_path, small_model, quick_models, monkeypatch, loss_fn,
                                                         is_swapped, sign):
    """A loss may name err_l for its metrics alone, or take no winner at all: the gradient is SFT's on that side."""
    import datasets

    rows = tiny.pair_rows(8)
    swapped = [row | {"label_0": row["label_1"], "label_1": row["label_0"]} for row in rows]
    monkeypatch.setitem(loss_file.LOSSES, "one", loss_fn)
    gradients = []
    for loss, pairs in (("one", rows), ("sft", swapped if is_swapped else rows)):
        datasets.Dataset.from_list(pairs).to_parquet(tmp_path / loss / "train.parquet")
        argv = f"--steps 1 --batch_size 8 --micro_batch 4 --vae_sample mean --sample_every 0 --loss {loss}".split()
        argv += ["--model", small_model("sd"), "--data", str(tmp_path / loss), "--out", str(tmp_path / f"out-{loss}")]
        gradients.append(first_gradient(monkeypatch, [*argv, "--device", "cpu"]))
    assert (gradients[0] - sign * gradients[1]).norm() < 1e-5 * gradients[1].norm() and gradients[1].norm() > 0


# The command line


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--model", "sd16"], "sd16 is no preset, so pass --data"),
        (["--modle", "tiny"], "unrecognized arguments: --modle"),
        (["--bet", "3"], "unrecognized arguments: --bet"),
        (["--loss", "ppo"], "invalid choice: 'ppo'"),
        (["--tau", "0"], "argument --tau: 0 is out of range"),
        (["--tau", "nan"], "argument --tau: nan is out of range"),
        (["--beta", "-1"], "argument --beta: -1 is out of range"),
        (["--lr", "inf"], "argument --lr: inf is out of range"),
        (["--steps", "0"], "argument --steps: 0 is out of range"),
        (["--batch_size", "0"], "argument --batch_size: 0 is out of range"),
        (["--batch_size", "2.5"], "argument --batch_size: invalid int value: '2.5'"),
        (["--prompt_dropout", "1.5"], "argument --prompt_dropout: 1.5 is out of range"),
        (["--ema", "1"], "argument --ema: 1 is out of range"),
        (["--save_every", "-1"], "argument --save_every: -1 is out of range"),
        (["--batch_size", "12"], "--batch_size 12 is not a multiple of --group_size 8"),
        (["--micro_batch", "5", "--loss", "dpo"],
         "--batch_size 16 is not a multiple of 1 processes . --micro_batch 5"),
        (["--reference_errors", "errors", "--loss", "sft"], "--reference_errors: sft has no reference"),
        (["--precision", "fp16", "--device", "cpu"], "--precision fp16 needs CUDA or MPS"),
        (["--device", "tpu"], "--device tpu is not there"),
        (["--model", "nosuch/model", "--data", "tiny"],
         "--model nosuch/model cannot be read as a diffusers pipeline"),
        (["--model", "nosuch/a/model", "--data", "tiny"],
         "--model nosuch/a/model cannot be read .* no such file or folder"),
        (["--data", "nosuch/pairs"], "--data nosuch/pairs cannot be read: Couldn.t reach"),
        (["--data", "./nosuch.parquet"], "--data ./nosuch.parquet cannot be read: there is no such file"),
        (["--model", "{sd}", "--data", "{pairs}", "--clip", "ViT-B-32"],
         "--clip ViT-B-32 is neither tiny nor ARCH:WEIGHTS"),
        (["--model", "{sd}", "--data", "{pairs}", "--clip", "ViT-B-32:nosuch.pt"],
         "--clip ViT-B-32:nosuch.pt cannot be loaded"),
        (["--model", "{sd}", "--data", "{pairs}", "--resolution", "36"], "--resolution 36: this model needs a multiple of 8"),
        (["--model", "{labels}", "--data", "{pairs}"], "--model .*labels cannot be read as a diffusers pipeline"),
        (["--model", "{sd}", "--data", "{labels}"], "1 rows .* have a label_0 other than 0, 0.5 or 1"),
        (["--model", "{no-unet}", "--data", "{pairs}"], "--model .*no-unet lacks its unet"),
        (["--model", "{no-weights}", "--data", "{pairs}"], "--model .*no-weights cannot be loaded"),
        (["--model", "{other}", "--data", "{pairs}"], "is a DDPMPipeline; known are StableDiffusionPipeline"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_written(
    tmp_path, small_model, few_pairs, options, complaint, capsys
):
    import datasets

    paths = {"{sd}": small_model("sd"), "{pairs}": few_pairs}
    for name in ("no-unet", "no-weights", "other", "labels"):
        paths[f"{{{name}}}"] = str(tmp_path / name)
    for name in ("no-unet", "no-weights", "other"):
        shutil.copytree(small_model("sd"), tmp_path / name)
    shutil.rmtree(tmp_path / "no-unet" / "unet")
    next((tmp_path / "no-weights" / "vae").glob("*.safetensors")).unlink()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (tmp_path / "labels").mkdir()
    row = tiny.pair_rows(1)[0] | {"label_0": 3.0, "label_1": -2.0}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "labels" / "train-0.parquet")
    with pytest.raises(SystemExit) as end:
        train.main([paths.get(option, option) for option in options] + ["--out", str(tmp_path / "out")])
    message = str(end.value.code)
    assert re.search(f"^train.py: .*{complaint}", message) and "\n" not in message
    assert not (tmp_path / "out").exists() and "Traceback" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be made: .*file is no folder that can be written to"):
        train.main(["--model", "no/model", "--data", "no/pairs", "--out", str(tmp_path / "file" / "run")])


def test_precedence_is_default_preset_command_line():
    def value(*options):
        return train_args(["--device", "cpu", *options]).lr

    assert value("--model", "x", "--data", "y") == 1e-5  # the default
    assert value("--model", "sdxl") == 2.048e-5  # the preset
    assert value("--model", "sdxl", "--lr", "3e-6") == 3e-6  # the command line


def test_the_default_micro_batch_holds_whole_groups_if_it_can():
    """Then one pass is enough: of 24 pairs 12 would fit, but 8 are a group."""
    sizes = {group: train_args(f"--batch_size 24 --group_size {group} --out x".split()).micro_batch for group in (1, 8, 24)}
    assert sizes == {1: 12, 8: 8, 24: 12}


def test_presets_are_whole_runs():
    """`--model sdxl` alone says it all, and the launchers of Diffusion-DPO are what it says."""
    for model, size, optimizer, warmup in (("sd15", 512, "adamw", 500), ("sdxl", 1024, "adafactor", 200)):
        args = train_args(["--model", model])
        assert (args.data, args.clip) == ("pickapic", "ViT-H-14:laion2b_s32b_b79k")
        assert (args.resolution, args.optimizer) == (size, optimizer)
        assert (args.batch_size, args.lr, args.warmup, args.beta) == (2048, 2.048e-5, warmup, 5000)
        assert (args.loss, args.weight_position, args.tau, args.group_size) == ("rpo", "outside", 0.5, 8)
        assert args.group_noise == "own"
        assert args.batch_size % args.micro_batch == 0 and args.micro_batch % args.group_size == 0


def test_equal_weights_load_no_clip(run, monkeypatch):
    monkeypatch.setattr(train, "Clip", None)  # calling it would raise
    for record in log_of(run("sd", "--tau", "inf")):
        assert record["weights/own"] == 1 / 8 and record["weights/losers"] == pytest.approx(8)


@pytest.mark.parametrize("tau, is_said", [("1e-5", True), pytest.param("inf", False, marks=pytest.mark.slow)])
def test_a_run_knows_when_it_is_dpo(tmp_path, run, capsys, tau, is_said):
    """Distinct prompts in groups of two at a tiny tau: each winner's own loser has all the weight."""
    import datasets

    rows = {row["caption"]: row for row in tiny.pair_rows(100)}
    datasets.Dataset.from_list(list(rows.values())[:40]).to_parquet(tmp_path / "train.parquet")
    options = f"--tau {tau} --similarity text --group_size 2 --batch_size 2 --steps 20 --lr 1e-9"
    log = log_of(run("sd", *options.split(), "--data", str(tmp_path / "train.parquet")))
    output = capsys.readouterr()
    text = output.out + output.err
    assert f"a winner's own loser has {log[0]['weights/own']:.3f} of the weight" in text
    own = [record["weights/own"] for record in log]
    assert all((weight > 0.999) == is_said for weight in own), own
    assert ("these weights are one-hot, so this run is Diffusion-DPO. See --tau" in text) == is_said


def test_every_command_of_the_documents_parses():
    """The programs accept the commands of the README, the guide and the scripts' own heads."""
    names = ("README.md", "GUIDE.md", "train.py", "encode.py", "evaluate.py")
    texts = [(ROOT / name).read_text() for name in names]
    commands = re.findall(r"(train|encode)\.py((?: --\w+(?: [\w./=-]+)*)+|$)", "\n".join(texts), re.M)
    parsers = {"train": train_args, "encode": encode_args}
    assert len(commands) >= 12
    for program, typed in commands:
        parsers[program](shlex.split(typed))
    commands = re.findall(r"^ *(?:python|torchrun \S+) evaluate\.py (.+)", "\n".join(texts), re.M)
    assert len(commands) >= 12
    for typed in commands:
        evaluate.parse_args(shlex.split(typed))


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_a_dry_run_prints_the_resolved_run_and_writes_nothing(tmp_path, capsys, model):
    argv = ["--model", model, "--out", str(tmp_path / "out")]
    train.main([*argv, "--dry_run"])
    assert json.loads(capsys.readouterr().out) == vars(train_args([*argv, "--dry_run"]))
    assert not (tmp_path / "out").exists()


def test_a_preset_passes_the_checks_of_what_is_typed(monkeypatch):
    """A wrong value of a preset would otherwise be met in the first step."""
    wrong = {"lr": -1.0, "optimizer": "lion", "steps": 1.5}
    for name, value in wrong.items():
        monkeypatch.setitem(options.PRESETS, "sd15", options.PRESETS["sd15"] | {name: value})
        with pytest.raises(InputError, match=f"--{name}"):
            train_args(["--model", "sd15"])
        monkeypatch.undo()
