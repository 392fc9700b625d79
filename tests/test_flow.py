"""Flow-matching models, SD3 and FLUX: their process, and the promises of a UNet's run, which theirs keep."""

import copy
import json
import math
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

import common
import encode
import evaluate
import loading
import run as run_room
import train
from common import InputError
from data import ImagePairs, Stream
from extras import random_models
from loss import DDPM, Flow, denoising_error
from small_runs import fresh, launch, log_of
from test_resume import faulty, killed

KINDS = ["sd3", "flux"]
EVERY_KIND = [*KINDS, "z-image", "flux2-klein", "qwen-image"]
pytestmark = pytest.mark.usefixtures("quick_models")


# The process


def latents(count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, count, 4, 8, 8), generator=generator)


def test_an_ideal_velocity_has_no_error():
    x, eps = latents()
    t = torch.tensor([0.1, 0.5, 0.9])
    ideal = denoising_error(lambda *_: eps - x, None, Flow(), x, eps, t, None)
    assert torch.equal(ideal, torch.zeros(3))
    off = denoising_error(lambda *_: eps - x + 0.5, None, Flow(), x, eps, t, None)
    torch.testing.assert_close(off, torch.full((3,), 0.25))


def test_ddpm_and_flow_are_one_path():
    """x_t over (sqrt(a) + sqrt(1 - a)) is x_s at s = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)); the velocity that follows
    from epsilon leads to the same clean image; and the signal-to-noise ratios agree."""
    x, eps = latents()
    ddpm, flow = DDPM(torch.linspace(0.99, 0.01, 100)), Flow()
    t = torch.tensor([3, 50, 96])
    a = ddpm.alphas_cumprod[t].view(-1, 1, 1, 1)
    total = a.sqrt() + (1 - a).sqrt()
    s = ((1 - a).sqrt() / total).flatten()
    x_t, epsilon = ddpm.diffuse(x, eps, t)
    x_s, velocity = flow.diffuse(x, eps, s)
    torch.testing.assert_close(x_t / total, x_s, rtol=0, atol=1e-6)
    clean = (x_t - (1 - a).sqrt() * epsilon) / a.sqrt()
    torch.testing.assert_close(x_s - s.view(-1, 1, 1, 1) * (epsilon - clean), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(x_s - s.view(-1, 1, 1, 1) * velocity, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.snr(s), ddpm.snr(t), rtol=1e-4, atol=0)


def drawn(process, count=4000, low=0.0, high=1.0):
    return torch.stack([process.sample_t(common.keyed_generator(k), low, high) for k in range(count)])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_shift_is_the_schedulers_own(monkeypatch, shift):
    """If uniform draws fall on the scheduler's points, the times are its sigmas, with its dynamic shift, too."""
    points = torch.linspace(0.999, 0.001, 999, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **more: points)
    times = Flow("uniform", shift=shift).sample_t(None)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(times, scheduler.sigmas[1:], rtol=0, atol=1e-6)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=points.numpy(), mu=math.log(shift))
    torch.testing.assert_close(times, dynamic.sigmas[:-1].float(), rtol=0, atol=1e-6)


def test_times_are_distributed_as_they_are_said_to_be():
    """We check the quantiles of sigmoid(mean + scale * normal) after the shift, and that quarters part the times."""
    process = Flow("logit_normal", 0.5, 2.0, 3.0)
    t = drawn(process).double()
    assert t.dtype == torch.float64 and 0 < t.min() and t.max() < 1
    unshifted = t / (3 - 2 * t)
    standard = (torch.logit(unshifted) - 0.5) / 2
    for share in (0.1, 0.5, 0.9):
        assert (torch.special.ndtr(standard) < share).double().mean() == pytest.approx(share, abs=0.025)
    uniform = drawn(Flow("uniform"))
    for share in (0.1, 0.5, 0.9):
        assert (uniform < share).double().mean() == pytest.approx(share, abs=0.025)
    edges = [drawn(process, 200, quarter / 4, (quarter + 1) / 4) for quarter in range(4)]
    for lower, upper in zip(edges, edges[1:]):
        assert lower.max() <= upper.min()


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_draws_by_its_own_schedulers_shift(small_model, kind):
    model = fresh(small_model(kind))
    expected = 3.0 if kind == "sd3" else math.exp(calculate_shift(64 * 64))
    assert model.process.shift == pytest.approx(expected)


def test_a_shift_that_follows_the_size_is_the_pipelines_in_sd3_too(tmp_path, small_model):
    """The times of training are those of sampling, at a size that is not the model's own."""
    folder = shutil.copytree(small_model("sd3"), tmp_path / "dynamic")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True}))
    model = fresh(str(folder))
    tokens = (64 // model.pipe.vae_scale_factor // 2) ** 2
    seen = []
    scheduler = type(model.pipe.scheduler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "set_timesteps", lambda self, *rest, mu=None, set_timesteps=scheduler.set_timesteps,
                      **more: seen.append(mu) or set_timesteps(self, *rest, mu=mu, **more))
        model.sample(["a cat"], [torch.Generator()], 2, 1.0, height=64, width=64)
    assert seen == [calculate_shift(tokens)]
    assert model.shift(64) == pytest.approx(math.exp(seen[0])) and model.shift(64) > model.process.shift


# The families


@pytest.mark.parametrize("kind", KINDS)
def test_the_denoising_error_is_that_of_the_pipelines_own_call(small_model, few_pairs, kind, monkeypatch):
    """We note the inputs of one step of the pipeline. Ours are the same, and so is the prediction."""
    model = fresh(small_model(kind))
    pipe, seen = model.pipe, []
    forward = type(pipe.transformer).forward

    def noted(network, *inputs, **more):
        output = forward(network, *inputs, **more)
        seen.append((inputs, more, output[0]))
        return output

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(type(pipe.transformer), "forward", noted)
            pipe("a cat", num_inference_steps=2, guidance_scale=1.0, height=32, width=32, output_type="latent",
                 generator=torch.Generator().manual_seed(0))
        _, given, theirs = seen[1]
        x_t, t = given["hidden_states"], given["timestep"]
        embeds = model.encode_prompts(["a cat"])
        cond = model.conditioning(embeds, torch.zeros(1, 1, 6))
        torch.testing.assert_close(cond["encoder_hidden_states"], given["encoder_hidden_states"], rtol=0, atol=1e-6)
        torch.testing.assert_close(cond["pooled_projections"], given["pooled_projections"], rtol=0, atol=1e-6)
        if kind == "flux":
            x_t, theirs, model.train_guidance = model.unpack(x_t, 8, 8), model.unpack(theirs, 8, 8), 1.0
        else:
            t = t / 1000
        ours = model.predict(model.denoiser, x_t, t, cond)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

        x, eps = latents(1)
        x_t, target = model.process.diffuse(x, eps, t)
        packed = model.pipe._pack_latents(x_t, 1, 4, 8, 8) if kind == "flux" else x_t
        stock = pipe.transformer(**given | {"hidden_states": packed, "return_dict": False})[0]
        stock = model.unpack(stock, 8, 8) if kind == "flux" else stock
        err = denoising_error(model.predict, model.denoiser, model.process, x, eps, t, cond)
        torch.testing.assert_close(err, (stock - target).square().mean(dim=(1, 2, 3)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_survives_the_vaes_shift_and_scale(small_model, kind):
    """Scaling and decoding gives what the pipeline's VAE decodes."""
    model = fresh(small_model(kind))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scaled = model.scale_latents(z)
    torch.testing.assert_close(scaled, (z - 0.0609) * 1.5305)
    with torch.no_grad():
        pictures = (model.pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode(scaled), pictures, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_stock_pipelines_image(small_model, kind):
    model = fresh(small_model(kind))
    size = dict(height=32, width=32)
    ours = model.decode(model.sample(["a cat"], [common.keyed_generator(1)], 3, 3.0, **size))
    stock = DiffusionPipeline.from_pretrained(small_model(kind))
    stock.set_progress_bar_config(disable=True)
    theirs = stock("a cat", num_inference_steps=3, guidance_scale=3.0, generator=[common.keyed_generator(1)],
                   output_type="pt", **size).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd", "sdxl", *KINDS, "sd3 without T5"])
def test_prompts_are_encoded_as_the_pipeline_does_it(small_model, kind):
    """A row of a batch is what encode_prompt gives for its prompt alone, to rounding, because batches round differently.

    One prompt is cut, and one has a learned word of two vectors, as textual inversion adds them.
    """
    kind, _, without_t5 = kind.partition(" without ")
    model = fresh(small_model(kind))
    if without_t5:
        model.pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    prompts = ["a cat", "dog, " * 600]
    if isinstance(model.pipe, TextualInversionLoaderMixin):
        prompts.append("a photo of <thing>")
        model.pipe.tokenizer = copy.deepcopy(model.pipe.tokenizer)
        model.pipe.load_textual_inversion(torch.randn(2, 32), token="<thing>")
    more = {"prompt_2": None, "prompt_3": None} if kind == "sd3" else {"num_images_per_prompt": 1}
    more |= {"prompt_2": None} if kind == "flux" else {"do_classifier_free_guidance": False}
    ours = model.encode_prompts(prompts)
    for k, prompt in enumerate(prompts):
        theirs = [value for value in model.pipe.encode_prompt(prompt, device="cpu", **more) if torch.is_tensor(value)]
        names = ["prompt_embeds"] if kind == "sd" else ["prompt_embeds", "pooled_prompt_embeds"]
        assert [*ours] == names
        for name, value in zip(names, theirs):
            torch.testing.assert_close(ours[name][k:k + 1], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_sdxls_empty_prompt_is_what_the_pipeline_takes_as_unconditional(small_model, zeros):
    """It is zeros if force_zeros_for_empty_prompt says so, else the encoded "". The prompt beside it stays."""
    model = fresh(small_model("sdxl"))
    model.pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    prompt, negative, pooled, negative_pooled = model.pipe.encode_prompt("a cat", device="cpu", num_images_per_prompt=1,
                                                                         do_classifier_free_guidance=True)
    ours = model.encode_prompts(["", "a cat"])
    torch.testing.assert_close(ours["prompt_embeds"], torch.cat([negative, prompt]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["pooled_prompt_embeds"], torch.cat([negative_pooled, pooled]), rtol=1e-5, atol=1e-6)
    assert zeros != ours["prompt_embeds"][0].any() and ours["prompt_embeds"][1].any()


def forbid(model):
    """Makes every later call of a text encoder fail."""
    for name in model.text_encoders:
        model.networks()[name].forward = None


@pytest.mark.parametrize("kind", ["sd", "sdxl", *KINDS])
def test_samples_need_no_text_encoder_once_their_prompts_are_encoded(small_model, kind):
    """Without them the pictures are the same to rounding."""
    model = fresh(small_model(kind))
    generators = [[common.keyed_generator(k) for k in range(2)] for _ in range(2)]
    size = dict(height=32, width=32)
    expected = model.sample(["a cat", "two dogs"], generators[0], 2, 3.0, **size)
    embeds = model.sampling_embeds(["a cat", "two dogs"])
    forbid(model)
    latents = model.sample(None, generators[1], 2, 3.0, **embeds, **size)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)


# Runs


def numbers_of(out, names=("loss", "grad_norm", "mse/policy_w", "mse/policy_l")):
    return [line[name] for line in log_of(out) for name in names]


@pytest.mark.parametrize("kind, precision, loss", [
    ("sd3", "bf16", "rpo"),
    *(pytest.param(*run, marks=pytest.mark.slow) for run in [
        ("flux", "fp32", "rpo"), ("sd3", "fp32", "rpo"), ("flux", "bf16", "rpo"), ("sd3", "fp32", "dpo"), ("sd3", "bf16", "dpo"),
        ("flux", "fp32", "dpo"), ("flux", "bf16", "dpo")])])
def test_margins_are_exactly_zero_at_first(tmp_path, command, kind, precision, loss):
    """This holds for an adapter, and in fp32 for the whole network, too."""
    runs = ["--lora_rank 4", ""] if precision == "fp32" else ["--lora_rank 4"]
    for options in runs:
        out = tmp_path / f"out{len(options)}"
        train.main(command(kind, f"{options} --precision {precision} --loss {loss} --batch_size 4 --group_size 4", out))
        first, second = log_of(out)
        assert first["reward/margin"] == first["reward/chosen"] == 0
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and second["reward/chosen"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_passes_processes_and_caches_do_not_change_a_run(tmp_path, command, small_model, few_pairs, kind):
    """One pass or two, one or two processes, and a cache with the VAE's mean agree to rounding."""
    options = "--lora_rank 4 --prompt_dropout 0 --vae_sample mean --lr 1e-5 --beta 100 --workers 0"
    train.main(command(kind, f"{options} --micro_batch 8", tmp_path / "one"))
    expected = numbers_of(tmp_path / "one")
    train.main(command(kind, f"{options} --micro_batch 2", tmp_path / "two"))
    assert numbers_of(tmp_path / "two") == pytest.approx(expected, rel=1e-5)
    for status, text in launch(tmp_path, 2, train.main, command(kind, f"{options} --micro_batch 4", tmp_path / "both")):
        assert status == 0, text
    assert numbers_of(tmp_path / "both") == pytest.approx(expected, rel=1e-5)
    cache = str(tmp_path / "cache")
    encode.main(["--model", small_model(kind), "--data", few_pairs, "--clip", "tiny", "--device", "cpu",
                 "--resolution", "32", "--vae_sample", "mean", "--out", cache])
    train.main([*command(kind, f"{options} --micro_batch 8", tmp_path / "cached"), "--data", cache])
    assert numbers_of(tmp_path / "cached") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_two_and_two_steps_are_four_and_the_adapter_loads_anywhere(tmp_path, command, small_model, kind):
    """They agree bit for bit. The stock pipeline loads the adapter and draws the image that ours draws."""
    options = f"--lora_rank 4 --micro_batch 4 --lr 1e-2 --reference_errors {tmp_path / 'errors'}"
    for steps, name in (("4", "four"), ("2", "two"), ("4", "two")):
        train.main(command(kind, f"{options} --steps {steps}", tmp_path / name))
    state, expected = (run_room.load_checkpoint(tmp_path / name, 4) for name in ("two", "four"))
    for part in ("weights", "optimizer"):
        a, b = (torch.utils._pytree.tree_leaves(kept[part]) for kept in (state, expected))
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, part

    stock = DiffusionPipeline.from_pretrained(small_model(kind))
    stock.set_progress_bar_config(disable=True)
    draw = dict(num_inference_steps=2, guidance_scale=1.0, height=32, width=32, output_type="pt")
    before = stock(prompt="a cat", generator=torch.Generator().manual_seed(0), **draw).images
    stock.load_lora_weights(tmp_path / "two" / "model", weight_name="pytorch_lora_weights.safetensors")
    after = stock(prompt="a cat", generator=torch.Generator().manual_seed(0), **draw).images
    assert (after - before).abs().max() > 1e-3
    trained = fresh(small_model(kind))
    loading.add_lora(trained, 4, 0)
    named = dict(trained.denoiser.named_parameters())
    with torch.no_grad():
        for name, weight in state["weights"].items():
            named[name].copy_(weight)
    ours = trained.pipe(prompt="a cat", generator=torch.Generator().manual_seed(0), **draw).images
    torch.testing.assert_close(after, ours, rtol=0, atol=1e-5)
    loading.fuse_lora(fresh(small_model(kind)), str(tmp_path / "two" / "model"))  # every tensor finds its place


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_killed_at_random_moments(tmp_path, command, few_pairs, kind):
    """Kill -9 strikes at lines and in the midst of a save. The bits are those of a run that nobody killed."""
    options = "--steps 8 --micro_batch 2 --save_every 2 --lora_rank 4 --ema 0.9 --validate_every 3 --validate"
    argv = [*command(kind, options, tmp_path / "out"), few_pairs]

    def run(fault, number):
        (ended,) = launch(tmp_path, 1, faulty, f"{fault} self", number, argv)
        return ended

    expected = tmp_path / "expected" / "out"
    ((status, text),) = launch(expected.parent, 1, faulty, None, 0, [*argv, "--out", str(expected)])
    assert status == 0, text
    killed(run, tmp_path / "out", expected, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_samples_validation_and_evaluation(tmp_path, command, few_pairs, kind):
    """A whole run leaves a pipeline, grids and the held-out curve, and evaluate.py draws with the pipeline."""
    options = "--sample_every 2 --sample_steps 2 --ema 0.5"
    argv = [*command(kind, options, tmp_path / "out"), "--validate", few_pairs, "--validate_every", "1", "--validate_pairs", "4"]
    train.main(argv)
    assert "validate/accuracy" in log_of(tmp_path / "out")[1] and (tmp_path / "out/samples/000002.png").exists()
    DiffusionPipeline.from_pretrained(tmp_path / "out" / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    images = tmp_path / "images"
    evaluate.main(["generate", "--model", str(tmp_path / "out" / "model"), "--prompts", str(prompts), "--resolution",
                   "32", "--steps", "2", "--device", "cpu", "--out", str(images)])
    manifest = json.loads((images / "manifest.json").read_text())
    assert len(manifest["images"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_text_encoders_leave_the_device_before_the_first_step(tmp_path, command, small_model, few_pairs, kind, monkeypatch):
    """A run from a cache draws samples and measures held-out images, and no step encodes a prompt."""
    encode.main(["--model", small_model(kind), "--data", few_pairs, "--clip", "tiny", "--device", "cpu",
                 "--resolution", "32", "--out", str(tmp_path / "cache")])
    release, released = train.release_encoders, []

    def release_and_forbid(model, keeps_vae):
        for name, network in model.networks().items():
            monkeypatch.setattr(network, "to", lambda device, name=name: released.append((name, device)))
        release(model, keeps_vae)
        forbid(model)

    monkeypatch.setattr(train, "release_encoders", release_and_forbid)
    options = f"--data {tmp_path / 'cache'} --lora_rank 2 --sample_steps 1 --validate_every 1 --validate_pairs 4 --validate {few_pairs}"
    encoders = {(name, "cpu") for name in fresh(small_model(kind)).text_encoders}
    for every, expected in (("1", encoders), ("0", encoders | {("vae", "cpu")})):
        out = tmp_path / f"every-{every}"
        train.main([*command(kind, "", out), *options.split(), "--sample_every", every])
        assert "validate/accuracy" in log_of(out)[1] and (out / "samples/000002.png").exists() == (every == "1")
        assert {*released} == expected
        released.clear()


@pytest.mark.parametrize("kind", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_how_times_are_drawn_is_part_of_the_run(tmp_path, command, small_model, kind):
    """The options are kept. Others are refused when the run resumes, and by a file of reference errors."""
    errors = f"--reference_errors {tmp_path / 'errors'}"
    times = "--timestep_sampling uniform --timestep_shift 2"
    train.main(command(kind, f"{times} {errors} --lora_rank 2", tmp_path / "out"))
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [kept[f"timestep_{name}"] for name in ("sampling", "mean", "scale", "shift")] == ["uniform", None, None, 2]
    train.main(command(kind, f"{times} {errors} --lora_rank 2 --steps 3", tmp_path / "out"))
    with pytest.raises(SystemExit, match="holds a run with --timestep_shift 2.0, not 3.0"):
        train.main(command(kind, f"{errors} --lora_rank 2 --steps 4 --timestep_shift 3", tmp_path / "out"))
    with pytest.raises(SystemExit, match="belongs to a run with noise schedule"):
        train.main(command(kind, f"{errors} --lora_rank 2 --timestep_shift 3", tmp_path / "other"))


@pytest.mark.slow
def test_uniform_times_go_on_after_a_kill(tmp_path, command):
    """The same command resumes, and so does one that leaves the option out, because the folder knows it."""
    options = "--lora_rank 2 --steps 3 --save_every 1"
    uniform = command("sd3", f"{options} --timestep_sampling uniform", tmp_path / "same")
    ((status, text),) = launch(tmp_path / "logs", 1, faulty, "half self", 2, uniform)
    assert status == -signal.SIGKILL, text
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    train.main([*uniform, "--out", str(tmp_path / "whole")])
    train.main(uniform)
    train.main(command("sd3", options, tmp_path / "other"))
    expected = numbers_of(tmp_path / "whole")
    assert len(expected) == 12 and numbers_of(tmp_path / "same") == numbers_of(tmp_path / "other") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_the_attention_of_images_and_of_text(small_model, kind):
    model = fresh(small_model(kind))
    linear = [name for name, layer in model.denoiser.named_modules() if isinstance(layer, torch.nn.Linear)]
    loading.add_lora(model, 2, 0)
    trained = {name.split(".lora_")[0] for name, param in model.denoiser.named_parameters() if param.requires_grad}
    assert trained == {name for name in linear if ".attn" in name} and len(trained) > 8


def test_flux_is_told_the_guidance_that_it_trains_with(tmp_path, command):
    """Errors differ between two guidances. So the reference errors of one are refused at the other."""
    options, errors = "--steps 1 --loss dpo --lora_rank 2", f"--reference_errors {tmp_path / 'errors'}"
    train.main(command("flux", f"{options} {errors}", tmp_path / "one"))
    train.main(command("flux", f"{options} --train_guidance 3.5", tmp_path / "other"))
    assert numbers_of(tmp_path / "one", ["mse/ref_w"]) != numbers_of(tmp_path / "other", ["mse/ref_w"])
    with pytest.raises(SystemExit, match="holds a run with --train_guidance 1.0, not 3.5"):
        train.main(command("flux", "--loss dpo --lora_rank 2 --steps 2 --train_guidance 3.5", tmp_path / "one"))
    with pytest.raises(SystemExit, match="errors belongs to a run with noise schedule"):
        train.main(command("flux", f"{options} {errors} --train_guidance 3.5", tmp_path / "third"))


def test_flux_draws_times_by_the_shift_of_its_images(tmp_path, command):
    """Its pipeline samples them so. 32 px are 4 x 4 tokens here."""
    train.main(command("flux", "--steps 1 --loss sft", tmp_path / "out"))
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept["timestep_shift"] == pytest.approx(math.exp(calculate_shift(16))) and kept["train_guidance"] == 1


@pytest.mark.parametrize("kind, options, why", [
    ("sd3", "--train_guidance 3", "this model takes no guidance as input"),
    ("flux", "--timestep_sampling uniform --timestep_mean 1", "belong to --timestep_sampling logit_normal"),
    ("flux", "--resolution 36", "36: this model needs a multiple of 8")])
def test_what_would_have_no_effect_is_refused(tmp_path, command, kind, options, why):
    with pytest.raises(SystemExit, match=why):
        train.main(command(kind, options, tmp_path / "out"))


def test_times_of_a_model_with_timesteps_are_refused(tmp_path, command):
    with pytest.raises(SystemExit, match="--timestep_shift is for flow-matching models"):
        train.main(command("sd", "--timestep_shift 3", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# Full size


@pytest.mark.parametrize("name, size", [
    ("sd3.5-medium", 2_243_171_520), pytest.param("flux-dev", 11_901_408_320, marks=pytest.mark.slow)])
def test_random_weights_have_the_published_architecture(name, size):
    with torch.device("meta"):
        model = random_models.random_model(name)
    assert model.num_parameters == size and model.resolution() == 1024
    t5 = model.pipe.text_encoder_3 if name == "sd3.5-medium" else model.pipe.text_encoder_2
    assert sum(param.numel() for param in t5.parameters()) == 4_762_310_656


@pytest.mark.slow
def test_t5_may_be_left_out(tmp_path, small_model):
    """Zeros then stand in its place, as in the pipeline."""
    pipe = DiffusionPipeline.from_pretrained(small_model("sd3"), text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "model")
    model = loading.load_model(str(tmp_path / "model"))
    embeds = model.encode_prompts(["a cat"])["prompt_embeds"]
    theirs, *_ = model.pipe.encode_prompt("a cat", None, None, do_classifier_free_guidance=False, max_sequence_length=256)
    assert torch.equal(embeds, theirs) and embeds[0, :77].any() and not embeds[0, 77:].any()


def test_a_scheduler_of_another_kind_is_refused(tmp_path, small_model):
    folder = tmp_path / "model"
    shutil.copytree(small_model("sd3"), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    shutil.copy(f"{small_model('sd')}/scheduler/scheduler_config.json", file)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="cannot be loaded: its scheduler is not one of flow matching"):
        loading.load_model(str(folder))


def test_a_resolution_without_positions_is_refused(small_model):
    model = fresh(small_model("sd3"))
    assert model.resolution() == 32 and model.resolution(64) == 64
    with pytest.raises(InputError, match="--resolution 72: this model has positions for 64 pixels at most"):
        model.resolution(72)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_functions_of_seed_and_position(small_model, few_pairs, kind):
    process = fresh(small_model(kind)).process
    settings = dict(batch_size=8, group_size=8, group_noise="own", vae_sample="sample")
    streams = [Stream(ImagePairs(few_pairs, 32), process, (4, 8, 8), SimpleNamespace(seed=seed, **settings))
               for seed in (0, 0, 1)]
    times = [torch.stack([stream[p]["t"] for p in range(16)]) for stream in streams]
    assert torch.equal(times[0], times[1]) and not torch.equal(times[0], times[2]) and len(times[0].unique()) == 16
