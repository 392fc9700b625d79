"""Z-Image, FLUX.2 [klein] and Qwen-Image: each is its stock pipeline. test_flow.py has the promises of every flow family's run."""

import json
import math
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

import common
import data
import encode
import loading
import run as run_room
import train
from common import InputError
from extras import random_models
from loss import denoising_error
from models import cast_for_autocast
from small_runs import fresh, log_of
from test_flow import forbid, numbers_of

KINDS = ["z-image", "flux2-klein", "qwen-image"]
pytestmark = pytest.mark.usefixtures("quick_models")
SIZE = dict(height=32, width=32)
PROMPTS = ["a cat", "", "two dogs in front of a house"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(small_model, kind):
    return fresh(small_model(kind))


def generators(count=1):
    return [common.keyed_generator(k) for k in range(count)]


# The stock pipeline


@torch.no_grad()
def test_the_denoising_error_is_that_of_the_pipelines_own_call(model, kind, monkeypatch):
    """We note a call that the pipeline makes for a batch of prompts. At its time, ours is the same to rounding."""
    pipe, seen = model.pipe, []
    forward = type(pipe.transformer).forward

    def noted(network, *inputs, **more):
        seen.append((inputs, more))
        return forward(network, *inputs, **more)

    guidance = {"true_cfg_scale": 1.0} if kind == "qwen-image" else {"guidance_scale": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.transformer), "forward", noted)
        prompts = [prompt or model.negative_prompt for prompt in PROMPTS]
        pipe(prompt=prompts, num_inference_steps=2, generator=generators(3), output_type="latent", **SIZE, **guidance)
    inputs, more = seen[1]

    x, eps = torch.randn(2, 3, *model.latent_shape(32), generator=common.keyed_generator(0))
    t = (1 - inputs[1]) if kind == "z-image" else more["timestep"]
    x_t, velocity = model.process.diffuse(x, eps, t)
    pack = {"flux2-klein": lambda x: pipe._pack_latents(pipe._patchify_latents(x)),
            "qwen-image": lambda x: pipe._pack_latents(x, *x.shape)}
    if kind == "z-image":  # its call, with our x_t in the place of its own
        theirs = -torch.stack(pipe.transformer([*x_t[:, :, None]], *inputs[1:], **more)[0])[:, :, 0]
    else:
        packed = pack[kind](x_t)
        theirs, velocity = pipe.transformer(**more | {"hidden_states": packed})[0], pack[kind](velocity)
        assert packed.shape == more["hidden_states"].shape
    expected = (theirs - velocity).square().flatten(1).mean(1)

    cond = model.conditioning(model.encode_prompts(PROMPTS), torch.zeros(3, 1, 6))
    err = denoising_error(model.predict, model.denoiser, model.process, x, eps, t, cond)
    torch.testing.assert_close(err, expected, rtol=1e-6, atol=1e-6)
    assert err.unique().numel() == 3
    pairs = model.conditioning(model.encode_prompts(PROMPTS), torch.zeros(3, 2, 6))  # both images have the pair's prompt
    twice = [value.repeat(2, *(1,) * (value.ndim - 1)) for value in (x, eps, t)]
    both = denoising_error(model.predict, model.denoiser, model.process, *twice, pairs)
    torch.testing.assert_close(both, err.repeat(2), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does_it(model, kind):
    """They are equal to the bit, the longest one is cut, and the mask says which rows are tokens."""
    prompts = [*PROMPTS, "dog, " * 600]
    ours = model.encode_prompts(prompts)
    asked = [prompt or model.negative_prompt for prompt in prompts]  # Qwen-Image's authors take " " for no prompt
    theirs = model.pipe.encode_prompt(asked, device="cpu", **(
        {"do_classifier_free_guidance": False} if kind == "z-image" else {"max_sequence_length": 512}))[0]
    for k, expected in enumerate(theirs):
        assert torch.equal(ours["prompt_embeds"][k, :len(expected)], expected)
        assert not ours["prompt_embeds"][k, len(expected):].any()
    assert ours["prompt_embeds"].shape[:2] == (4, 512)
    if kind != "flux2-klein":
        lengths = ours["prompt_embeds_mask"].sum(1)
        assert lengths[1] < lengths[0] < lengths[2] < lengths[3] == 512


@torch.no_grad()
def test_a_prompt_is_as_long_as_its_template_allows(model, kind, monkeypatch):
    """The longest one that is not cut, in the pipeline's own template, has just 512 tokens."""
    tokenizer, most = model.longest_tokenizer()
    assert len(tokenizer("d" * most).input_ids) == most < 512
    read, call = [], type(tokenizer).__call__
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "__call__", lambda self, text, **more: read.append(text) or call(self, text, **more))
        model.encode_prompts(["d" * most])
    (text,) = read[0] if isinstance(read[0], list) else read
    dropped = model.pipe.prompt_template_encode_start_idx if kind == "qwen-image" else 0
    assert len(tokenizer(text).input_ids) - dropped == 512


@torch.no_grad()
def test_a_latent_is_what_the_pipeline_makes_of_an_image(model, kind):
    """Scaling and decoding undo each other, and the scale is that of the pipeline's own class."""
    pixels = torch.randint(0, 256, (1, 2, 3, 32, 32), dtype=torch.uint8, generator=common.keyed_generator(1))
    mean, std = model.encode_images(pixels)
    assert mean.shape == std.shape == (1, 2, *model.latent_shape(32)) and (std > 0).all()
    images, vae = pixels[0].float() / 127.5 - 1, model.pipe.vae
    scaled = model.scale_latents(mean[0])
    if kind == "flux2-klein":
        theirs = model.pipe._unpatchify_latents(model.pipe._encode_vae_image(images, generator=None))
    elif kind == "qwen-image":
        config = vae.config
        shift, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        theirs = (vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0] - shift) / scale
    else:
        theirs = (vae.encode(images).latent_dist.mode() - 0.0609) * 1.5305
    torch.testing.assert_close(scaled, theirs, rtol=1e-5, atol=1e-5)
    decoded = vae.decode(mean[0][:, :, None] if kind == "qwen-image" else mean[0]).sample
    decoded = decoded[:, :, 0] if kind == "qwen-image" else decoded
    torch.testing.assert_close(model.decode(scaled), (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_a_sample_is_the_stock_pipelines_image(model, small_model, kind):
    """With guidance, whose negative prompt for Qwen-Image is one space, by its authors. And without text encoders."""
    sampled = model.sample(["a cat", "two dogs"], generators(2), 3, 3.0, **SIZE)
    embeds = model.sampling_embeds(["a cat", "two dogs"])
    stock = DiffusionPipeline.from_pretrained(small_model(kind))
    stock.set_progress_bar_config(disable=True)
    guidance = {"guidance_scale": 3.0}
    if kind == "qwen-image":
        guidance = {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]}
    theirs = stock(prompt=["a cat", "two dogs"], num_inference_steps=3, generator=generators(2), output_type="pt", **SIZE,
                   **guidance).images
    torch.testing.assert_close(model.decode(sampled), theirs, rtol=0, atol=1e-4)
    forbid(model)
    again = model.sample(None, generators(2), 3, 3.0, **embeds, **SIZE)
    torch.testing.assert_close(again, sampled, rtol=0, atol=1e-4)


def test_times_are_shifted_as_the_pipeline_samples(model, kind):
    """Qwen-Image's and klein's shift grow with the image. klein's is that of 50 steps."""
    tokens = (64 // model.pipe.vae_scale_factor // 2) ** 2
    expected = {"z-image": 6.0, "flux2-klein": math.exp(compute_empirical_mu(tokens, 50)),
                "qwen-image": math.exp(0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256))}[kind]
    assert model.shift(64) == pytest.approx(expected)


def test_padding_changes_no_prediction(model, kind):
    """Beside a longer prompt a shorter one is padded."""
    if kind == "flux2-klein":
        pytest.skip("its prompts have one length")
    embeds = model.encode_prompts(PROMPTS)
    padded = {name: torch.nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, 70)) for name, value in embeds.items()}
    x_t, t = torch.randn(6, *model.latent_shape(32)), torch.linspace(0.1, 0.9, 6)
    conds = [model.conditioning(some, torch.zeros(3, 2, 6)) for some in (embeds, padded)]
    ours, with_padding = (model.predict(model.denoiser, x_t, t, cond) for cond in conds)
    torch.testing.assert_close(with_padding, ours, rtol=0, atol=1e-5)
    one = model.conditioning({name: value[1:2] for name, value in padded.items()}, torch.zeros(1, 1, 6))
    alone = model.predict(model.denoiser, x_t[1:2], t[1:2], one)  # the shortest prompt without the longer ones
    torch.testing.assert_close(alone, ours[1:2], rtol=0, atol=1e-5)


def test_prompts_of_different_lengths_make_a_batch():
    """Zeros fill the shorter ones; what is no prompt must have one size."""
    items = [{"prompt_embeds": torch.ones(length, 4), "prompt_embeds_mask": torch.ones(length), "row": torch.tensor(length),
              "unreadable": []} for length in (2, 5)]
    batch = data.collate(items)
    assert batch["prompt_embeds"].shape == (2, 5, 4) and batch["prompt_embeds_mask"].sum(1).tolist() == [2, 5]
    assert batch["prompt_embeds"].sum() == 7 * 4 and batch["prompt_embeds"][0, 2:].abs().sum() == 0
    with pytest.raises(RuntimeError):
        data.collate([item | {"mean": torch.ones(number)} for number, item in enumerate(items, 1)])


def test_an_adapter_trains_the_attention_of_images_and_of_text(model, kind):
    """In klein's single blocks one layer makes queries, keys, values and the inner layer, and another one takes all."""
    linear = [name for name, layer in model.denoiser.named_modules() if isinstance(layer, torch.nn.Linear)]
    loading.add_lora(model, 2, 0)
    trained = {name.split(".lora_")[0] for name, param in model.denoiser.named_parameters() if param.requires_grad}
    assert trained == {name for name in linear if ".attn" in name or ".attention." in name} and len(trained) > 8


@torch.no_grad()
def test_text_encoders_cast_for_autocast_compute_the_same(small_model, kind):
    """klein's has a head that shares the weights of its word vectors, which autocast leaves in float32."""
    plain, cast = fresh(small_model(kind)), fresh(small_model(kind))
    cast_for_autocast(cast.pipe.text_encoder, torch.bfloat16)
    for name, value in plain.encode_prompts(PROMPTS, torch.bfloat16).items():
        assert torch.equal(value, cast.encode_prompts(PROMPTS, torch.bfloat16)[name])


# Runs


@pytest.mark.parametrize("options", [
    "--lora_rank 4 --precision bf16", pytest.param("--lora_rank 4 --loss dpo", marks=pytest.mark.slow),
    pytest.param("", marks=pytest.mark.slow)])
def test_margins_are_exactly_zero_at_first(tmp_path, command, kind, options):
    train.main(command(kind, f"{options} --batch_size 2 --group_size 2", tmp_path / "out"))
    first, second = log_of(tmp_path / "out")
    assert first["reward/margin"] == first["reward/chosen"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and second["reward/chosen"] != 0


def test_a_cache_trains_as_the_pairs_do(tmp_path, command, small_model, few_pairs, kind):
    """Prompts of several lengths are stored without padding, as half floats, too, and "" stands in for a dropped one."""
    if kind == "flux2-klein":
        pytest.skip("its prompts have one length")
    cache = tmp_path / "cache"
    encode.main(["--model", small_model(kind), "--data", few_pairs, "--clip", "tiny", "--device", "cpu",
                 "--resolution", "32", "--vae_sample", "mean", "--store", "fp16", "--out", str(cache)])
    options = "--lora_rank 2 --prompt_dropout 0.5 --vae_sample mean --steps 1 --beta 100"
    train.main(command(kind, options, tmp_path / "pairs"))
    train.main([*command(kind, options, tmp_path / "cached"), "--data", str(cache)])
    assert numbers_of(tmp_path / "cached") == pytest.approx(numbers_of(tmp_path / "pairs"), rel=2e-3)


# What does not fit


def test_another_familys_adapter_is_refused(tmp_path, command, small_model):
    """Names of layers differ, or their sizes do."""
    adapters = {}
    for kind in ("sd3", *KINDS):
        adapted = fresh(small_model(kind))
        loading.add_lora(adapted, 2, 0)
        loading.save_model(adapted, tmp_path / kind)
        adapters[kind] = str(tmp_path / kind)
    for number, kind in enumerate(KINDS):
        for other in ("sd3", KINDS[number - 1]):
            with pytest.raises(SystemExit, match="cannot be loaded into this model"):
                train.main(command(kind, f"--init_lora {adapters[other]}", tmp_path / "out"))


def test_another_familys_cache_is_refused(tmp_path, command, small_model, few_pairs, kind):
    other = "z-image" if kind == "qwen-image" else "qwen-image"
    encode.main(["--model", small_model(other), "--data", few_pairs, "--clip", "tiny", "--device", "cpu",
                 "--resolution", "32", "--out", str(tmp_path / "cache")])
    with pytest.raises(SystemExit, match="was encoded with the .* of .*, which has another one"):
        train.main([*command(kind, "--lora_rank 2", tmp_path / "out"), "--data", str(tmp_path / "cache")])


def test_another_chat_template_is_another_tokenizer(tmp_path, small_model, kind):
    """The words of a template are read with the prompt, so a cache belongs to its template."""
    model = fresh(small_model(kind))
    before = loading.encoder_digests(model)
    tokenizer = model.pipe.tokenizer
    kept, tokenizer.chat_template = tokenizer.chat_template, tokenizer.chat_template.replace("assistant", "painter")
    try:
        after = loading.encoder_digests(model)
    finally:
        tokenizer.chat_template = kept  # tests share it
    assert {name for name in before if before[name] != after[name]} == {"tokenizer"}
    if kind == "qwen-image":  # it reads a template of its pipeline
        model.pipe.prompt_template_encode = "a picture: {}"
        assert loading.encoder_digests(model)["prompt template"] != before["prompt template"]


@pytest.mark.parametrize("part, key, value, why", [
    ("text_encoder", "hidden_size", 24, "its transformer and its text encoders do not fit"),
    ("vae", "latent_channels", 8, "its transformer and its vae do not fit"),
    ("vae", "class", "AutoencoderTiny", "its vae is an AutoencoderTiny")])
def test_parts_of_another_model_are_refused(small_model, kind, part, key, value, why):
    """One line names both parts, before anything is encoded."""
    pipe, config = fresh(small_model(kind)).pipe, None
    family = type(fresh(small_model(kind)))
    if key == "class":
        from diffusers import AutoencoderTiny
        pipe.register_modules(vae=AutoencoderTiny(latent_channels=4))
    elif part == "vae":
        pipe.vae = type(pipe.vae).from_config(pipe.vae.config)
        pipe.vae.register_to_config(**{"z_dim" if kind == "qwen-image" else key: value})
    else:
        config = pipe.text_encoder.config.get_text_config()
        config.hidden_size, kept = value, config.hidden_size
    try:
        with pytest.raises(ValueError, match=why):
            loading.check_widths(pipe, family)
    finally:
        if config:
            config.hidden_size = kept


def test_a_tokenizer_of_another_family_is_refused(tmp_path, small_model, kind):
    """It has more words than the text encoder has vectors, or no words of a chat. Both show before a prompt is read."""
    folder = shutil.copytree(small_model(kind), tmp_path / "model")
    tokenizer = fresh(small_model(kind)).pipe.tokenizer
    shutil.rmtree(folder / "tokenizer")
    clip_tokenizer = fresh(small_model("sd")).pipe.tokenizer
    clip_tokenizer.save_pretrained(folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"][1] = type(clip_tokenizer).__name__
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="its tokenizer has more words than its text_encoder knows"):
        loading.load_model(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "check_tokenizers", lambda pipe: None)
        with pytest.raises(InputError, match="its tokenizer is not Qwen's"):
            loading.load_model(str(folder))
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        if kind == "qwen-image":  # its template is the pipeline's own
            type(fresh(small_model(kind)))(fresh(small_model(kind)).pipe)
        else:
            with pytest.raises(ValueError, match="its tokenizer has no chat template"):
                type(fresh(small_model(kind)))(fresh(small_model(kind)).pipe)
    finally:
        tokenizer.chat_template = kept  # tests share it


# Full size


@pytest.mark.parametrize("name, size, text_size, shift", [
    ("z-image", 6_154_908_736, 4_022_468_096, 6.0), ("flux2-klein", 3_875_544_576, 4_022_468_096, 7.5636),
    ("qwen-image", 20_430_401_088, 8_292_166_656, 2.0008)])
def test_random_weights_have_the_published_architecture(name, size, text_size, shift):
    with torch.device("meta"):
        model = random_models.random_model(name)
    assert (model.num_parameters, sum(param.numel() for param in model.pipe.text_encoder.parameters())) == (size, text_size)
    assert model.resolution() == 1024 and model.shift() == pytest.approx(shift, abs=1e-4)
    if name != "flux2-klein":
        assert model.latent_shape(1024) == (16, 128, 128)


@pytest.mark.parametrize("kind", ["z-image", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_flops_are_counted_without_computing(small_model, kind):
    """Twice the work is counted for two prompts, whatever their lengths."""
    model = fresh(small_model(kind))
    embeds = model.encode_prompts(["a cat", "a cat"])
    x_t, t = torch.randn(2, *model.latent_shape(32)), torch.rand(2)
    counted = []
    for count in (1, 2):
        cond = model.conditioning({name: value[:count] for name, value in embeds.items()}, torch.zeros(count, 1, 6))
        counted.append(run_room.count_flops(model, x_t[:count], t[:count], cond))
    assert counted[1] == tuple(2 * flops for flops in counted[0]) and counted[0][0] > 2 * counted[0][1] > 0
