"""What a run promises, shown on small models of the Stable Diffusion and SDXL formats."""

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import loss as loss_file
import tiny
import train
from conftest import log_of
from loss import denoising_error, frozen_reference

KEYS = set(
    "step loss grad_norm lr pairs_per_second reward/chosen reward/rejected reward/margin reward/accuracy "
    "mse/policy_w mse/policy_l mse/ref_w mse/ref_l".split()
)


@pytest.fixture
def run(tmp_path, small_model, few_pairs, quick_tiny, quick_models):
    """run(model, *options) trains for two steps and gives its folder."""

    def run(model, *options, name="run"):
        out = tmp_path / name
        fixed = "--steps 2 --batch_size 8 --sample_every 0 --clip tiny --device cpu".split()
        train.main(["--model", small_model(model), "--data", few_pairs, "--out", str(out), *fixed, *options])
        return out

    return run


# A whole run


@pytest.mark.parametrize("model, optimizer", [("sd", "adamw"), ("sdxl", "adafactor"), ("sd-v", "sgd")])
def test_a_run_leaves_what_it_promises(run, small_model, model, optimizer):
    """Also that the result is a stock pipeline in which the UNet alone, all of it in float32, has moved."""
    options = "--sample_every 1 --sample_steps 2 --precision bf16 --workers 2 --lr 1e-3"
    flags = "--gradient_checkpointing --random_flip --random_crop"
    out = run(model, "--optimizer", optimizer, *options.split(), *flags.split())
    assert json.loads((out / "config.json").read_text())["resolution"] == 32
    assert json.loads((out / "data.json").read_text()) == {
        "rows": 27,
        "used": 24,
        "ties": 1,
        "unlabelled": 0,
        "unreadable": [5, 9],
    }
    log = log_of(out)
    assert [record["step"] for record in log] == [0, 1] and all(KEYS <= record.keys() for record in log)
    grids = sorted((out / "samples").iterdir())
    assert [grid.name for grid in grids] == ["000001.png", "000002.png"]
    assert Image.open(grids[0]).size == (8 * 128, 2 * 128)  # eight prompts; the starting model above
    tops = [Image.open(grid).crop((0, 0, 8 * 128, 128)).tobytes() for grid in grids]
    assert tops[0] == tops[1] and len(set(tops[0])) > 10
    assert (
        not (out / "model.part").exists()
        and "library_name: diffusers" in (out / "model" / "README.md").read_text()
    )

    before, after = (
        DiffusionPipeline.from_pretrained(folder) for folder in (small_model(model), out / "model")
    )
    assert type(before) is type(after) and before.scheduler.config == after.scheduler.config
    for name, module in before.components.items():
        if isinstance(module, torch.nn.Module):
            changed = any(
                not torch.equal(a, b)
                for a, b in zip(module.parameters(), after.components[name].parameters())
            )
            assert changed == (name == "unet")
    assert {parameter.dtype for parameter in after.unet.parameters()} == {torch.float32}
    after.set_progress_bar_config(disable=True)
    assert after("a red circle", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)


def test_sft_needs_no_loser_and_no_reference(run, monkeypatch):
    monkeypatch.setattr(train, "frozen_reference", None)  # calling it would raise
    log = log_of(run("sd", "--loss", "sft"))
    assert log[0].keys() == {"step", "loss", "mse/policy_w", "grad_norm", "lr", "pairs_per_second"}
    assert log[0]["loss"] == pytest.approx(log[0]["mse/policy_w"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["dpo", "rpo"])
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_step_0_has_no_margin_and_loss_log_2(run, model, loss, precision):
    """Policy and reference are one network there, so any margin is an error of the arithmetic."""
    first, second = log_of(run(model, "--loss", loss, "--precision", precision, "--lr", "1e-3"))
    assert first["reward/margin"] == 0 and first["reward/accuracy"] == 0.5
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["mse/policy_w"] == first["mse/ref_w"] and first["mse/policy_l"] == first["mse/ref_l"]
    assert second["reward/margin"] != 0  # and at step 1 they are two networks


def test_the_same_command_gives_the_same_weights(run):
    first, second, other = (
        torch.cat([p.flatten() for p in DiffusionPipeline.from_pretrained(out / "model").unet.parameters()])
        for out in (run("sd", name="a"), run("sd", name="b"), run("sd", "--seed", "1", name="c"))
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_without_tensorboard_a_run_still_runs(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import of it fails
    out = run("sd")
    assert (out / "model").is_dir() and not (out / "tensorboard").exists()


def test_a_loss_that_is_not_finite_ends_the_run(run):
    with pytest.raises(
        SystemExit, match="step 1: loss nan.* Not finite: the policy's errors of rows .* Kept: no checkpoint"
    ):
        run("sd", "--lr", "1e30", "--optimizer", "sgd", "--max_grad_norm", "1e30")


def test_the_winner_is_what_the_log_calls_the_winner(tmp_path, small_model, quick_tiny):
    """From the label to mse/policy_w: the errors of step 0 are those of the known winner and loser."""
    import datasets

    rows = tiny.pairs(8)
    datasets.Dataset.from_list(list(rows)).to_parquet(tmp_path / "train-0.parquet")
    options = ["--steps", "1", "--batch_size", "8", "--loss", "dpo", "--sample_every", "0", "--device", "cpu"]
    options += ["--vae_sample", "mean", "--prompt_dropout", "0", "--model", small_model("sd")]
    train.main(options + ["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    pipe = data.load_pipeline(small_model("sd"))
    args = train.get_args(options + ["--data", str(tmp_path)])
    timesteps, noise, _ = train.draw(args, 0, range(8), (4, 8, 8), 1000)
    order = torch.randperm(8, generator=data.keyed_generator(0, "order", 0)).tolist()
    for side, key in ((0, "mse/policy_w"), (1, "mse/policy_l")):
        images = []
        for row in (rows[k] for k in order):
            winner = 0 if row["label_0"] == 1 else 1
            image = data.read_image(row[f"jpg_{winner if side == 0 else 1 - winner}"])
            images.append(data.crop_and_resize(image, 32, 0.5, 0.5, False)[0])
        conditioning = data.condition(
            *data.encode_prompts(pipe, [rows[k]["caption"] for k in order]), torch.zeros(8, 1, 6)
        )
        latents = (
            data.encode_images(pipe.vae, torch.stack(images)[:, None])[0][:, 0]
            * pipe.vae.config.scaling_factor
        )
        alphas_cumprod = pipe.scheduler.alphas_cumprod
        err = denoising_error(pipe.unet, latents, noise, timesteps, conditioning, alphas_cumprod)
        assert log_of(tmp_path / "out")[0][key] == pytest.approx(err.mean().item(), rel=1e-5)


def test_weights_as_older_libraries_wrote_them_load(tmp_path, small_model):
    """As SD 1.5 itself: a text_model. prefix that transformers 5 dropped, position_ids, .bin files."""
    shutil.copytree(small_model("sd"), folder := tmp_path / "model")
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = {
        f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    (file,) = (folder / "vae").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    old, new = data.load_pipeline(str(folder)), data.load_pipeline(small_model("sd"))
    for name in ("text_encoder", "vae"):
        for a, b in zip(getattr(old, name).parameters(), getattr(new, name).parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("fault", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_with_a_hole_is_refused(tmp_path, small_model, fault):
    """The libraries fill a missing tensor at random, and say so in a warning among many."""
    shutil.copytree(small_model("sd"), folder := tmp_path / "model")
    if fault == "tokenizer":
        for file in (folder / "tokenizer").iterdir():
            file.unlink()
    elif fault == "scheduler":
        (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(
            json.dumps(index | {"scheduler": ["diffusers", "EDMEulerScheduler"]})
        )
    else:
        (file,) = (folder / fault).glob("*.safetensors")
        tensors = load_file(file)
        del tensors[next(name for name in sorted(tensors) if name.endswith("weight"))]
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        SystemExit, match=f"model: .* cannot be loaded: its .*{fault if fault != 'scheduler' else 'noise'}"
    ):
        data.load_pipeline(str(folder))


# The forward pass


def checkpointed(unet, inputs, on):
    """Loss gradient, and how many bytes the forward keeps for the backward pass."""
    (unet.enable_gradient_checkpointing if on else unet.disable_gradient_checkpointing)()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    unet.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = denoising_error(unet, **inputs).mean()
    loss.backward()
    return [parameter.grad.clone() for parameter in unet.parameters()], sum(kept.values())


def pair_inputs(pipe):
    torch.manual_seed(0)
    return dict(
        latents=torch.randn(8, 4, 8, 8),
        noise=torch.randn(8, 4, 8, 8),
        timesteps=torch.randint(1000, (8,)),
        conditioning=data.condition(*data.encode_prompts(pipe, ["a cat"] * 4), torch.full((4, 2, 6), 32.0)),
        alphas_cumprod=torch.linspace(0.999, 0.005, 1000),
    )


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(small_model, model):
    pipe = data.load_pipeline(small_model(model))
    inputs = pair_inputs(pipe)
    plain, kept = checkpointed(pipe.unet.eval(), inputs, on=False)
    saved, kept_less = checkpointed(pipe.unet, inputs, on=True)
    for a, b in zip(plain, saved):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    parameters = sum(parameter.untyped_storage().nbytes() for parameter in pipe.unet.parameters())
    assert kept_less < 0.7 * kept and kept > 2 * parameters


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_a_reference_in_bf16_is_the_policy_under_autocast(small_model, model):
    """On diffusers' own UNet: only Linear and Conv weights are in half, and the errors are equal bits."""
    pipe = data.load_pipeline(small_model(model))
    reference = frozen_reference(pipe.unet.eval(), torch.bfloat16)
    halves = {
        type(module).__name__
        for module in reference.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dtype == torch.bfloat16
    }
    assert halves == {"Linear", "Conv2d"}
    inputs = pair_inputs(pipe)
    err, ref_err = (denoising_error(unet, **inputs, dtype=torch.bfloat16) for unet in (pipe.unet, reference))
    assert torch.equal(err, ref_err) and err.requires_grad


def test_prompts_are_encoded_as_the_pipeline_encodes_them(small_model):
    """SDXL: states of both encoders, pooled of the second, an empty prompt as zeros, float32 time_ids."""
    time_ids = torch.arange(24).view(2, 2, 6).float() + 1023  # bf16 cannot hold 1023
    pipe = data.load_pipeline(small_model("sdxl"))
    got = data.condition(*data.encode_prompts(pipe, ["a cat", ""]), time_ids)
    states, _, pooled, _ = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
    assert got["encoder_hidden_states"].shape == (4, 77, 32 + 48)
    for row in (0, 2):  # winners, then losers: the same prompts
        torch.testing.assert_close(got["encoder_hidden_states"][row], states[0])
        torch.testing.assert_close(got["added_cond_kwargs"]["text_embeds"][row], pooled[0])
        assert (
            not got["encoder_hidden_states"][row + 1].any()
            and not got["added_cond_kwargs"]["text_embeds"][row + 1].any()
        )
    assert torch.equal(got["added_cond_kwargs"]["time_ids"], torch.stack([*time_ids[:, 0], *time_ids[:, 1]]))
    half = data.condition(*data.encode_prompts(pipe, ["a cat", ""], torch.bfloat16), time_ids)
    assert torch.equal(half["added_cond_kwargs"]["time_ids"], got["added_cond_kwargs"]["time_ids"])

    pipe = data.load_pipeline(small_model("sd"))
    got = data.condition(*data.encode_prompts(pipe, ["a cat", "", "dog " * 500]), time_ids[[0, 0, 1]][:, :1])
    assert got.keys() == {"encoder_hidden_states"} and got["encoder_hidden_states"].shape == (3, 77, 32)
    assert got["encoder_hidden_states"][1].any()  # SD1.x: the encoded empty prompt


def test_latents_are_the_vaes_posterior(small_model):
    vae = data.load_pipeline(small_model("sdxl")).vae
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    mean, std = data.encode_images(vae, pixels[:, None])
    torch.testing.assert_close(mean[:, 0], posterior.mean)
    torch.testing.assert_close(std[:, 0], posterior.std)


def test_draws_depend_on_seed_step_and_position_alone():
    """Not on the micro-batch, the rank or what was drawn before; the peers give every rank the same noise."""
    args = train.get_args(["--model", "tiny", "--seed", "3"])
    whole = train.draw(args, 7, range(8), (4, 8, 8), 1000)
    parts = [train.draw(args, 7, range(first, first + 2), (4, 8, 8), 1000) for first in (6, 0, 4, 2)]
    for k in range(3):
        assert torch.equal(whole[k], torch.cat([parts[i][k] for i in (1, 3, 2, 0)]))
    timesteps, noise, vae_noise = whole
    assert len(set(timesteps.tolist())) > 4 and len(noise.unique(dim=0)) == 8
    assert len(vae_noise.flatten(0, 1).unique(dim=0)) == 16  # winner and loser have their own posterior
    assert not torch.equal(noise, train.draw(args, 8, range(8), (4, 8, 8), 1000)[1])
    args.seed = 4
    assert not torch.equal(noise, train.draw(args, 7, range(8), (4, 8, 8), 1000)[1])


@pytest.mark.parametrize("shared, timesteps, noises", [("own", 8, 8), ("timestep", 2, 8), ("both", 2, 2)])
def test_group_noise_says_what_the_pairs_of_a_group_share(shared, timesteps, noises):
    args = train.get_args(["--group_noise", shared, "--group_size", "4"])
    t, noise, vae_noise = train.draw(args, 0, range(8), (4, 8, 8), 10**9)
    assert (
        len(set(t.tolist())) == timesteps
        and len(noise.unique(dim=0)) == noises
        and len(vae_noise.unique(dim=0)) == 8
    )


def test_timesteps_are_uniform():
    args = train.get_args(["--batch_size", "4000"])
    t = train.draw(args, 0, range(4000), (1,), 1000)[0].float()
    assert 0 <= t.min() < 5 and 995 <= t.max() < 1000 and abs(t.mean() - 499.5) < 3 * 288.7 / 4000**0.5


# CLIP


def test_clip_from_a_local_file(tmp_path):
    """--clip ARCH:FILE, the weights in open_clip's format, for an architecture that the test adds."""
    config = dict(
        embed_dim=16,
        vision_cfg=dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16),
        text_cfg=dict(context_length=12, vocab_size=49408, width=16, heads=2, layers=1),
    )
    (tmp_path / "test-arch.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "test-arch.json")
    model = open_clip.CLIP(**config)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    clip = data.Clip(f"test-arch:{tmp_path / 'weights.pt'}")
    image = clip.transform(Image.new("RGB", (50, 40), "red"))
    text, image_w, image_l = clip.embed(["a red field"], torch.stack([image, image])[None]).unbind(1)
    torch.testing.assert_close(text, model.eval().encode_text(clip.tokenizer(["a red field"])).detach())
    torch.testing.assert_close(image_w, model.encode_image(image[None]).detach())
    assert torch.equal(image_w, image_l)


@pytest.mark.parametrize("spec, quick", [("ViT-L-14:openai", True), ("ViT-H-14:laion2b_s32b_b79k", False)])
def test_openais_weights_get_their_activation(monkeypatch, spec, quick):
    """open_clip loads OpenAI's weights into the wrong activation with a mere warning."""
    asked = {}

    def create(arch, weights, **options):
        asked.update(options)
        raise ConnectionError("no hub here")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(SystemExit, match="cannot be loaded .no hub here.; give --clip"):
        data.Clip(spec)
    assert asked["force_quick_gelu"] is quick


# The command line


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--model", "sd16"], "sd16 is no preset, so it needs --data"),
        (["--modle", "tiny"], "unrecognized arguments: --modle"),
        (["--bet", "3"], "unrecognized arguments: --bet"),
        (["--loss", "ppo"], "invalid choice: 'ppo'"),
        (["--tau", "0"], "--tau must be a positive number"),
        (["--tau", "nan"], "--tau must be a positive number"),
        (["--beta", "-1"], "--beta must be a positive number"),
        (["--lr", "inf"], "--lr must be a positive number"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--batch_size", "2.5"], "invalid int value: '2.5'"),
        (["--prompt_dropout", "1.5"], "--prompt_dropout 1.5 is out of range"),
        (["--batch_size", "12"], "--batch_size 12 is not a multiple of --group_size 8"),
        (
            ["--micro_batch", "5", "--loss", "dpo"],
            "--batch_size 16 is not a multiple of 1 processes . --micro_batch 5",
        ),
        (["--save_every", "-1"], "--save_every -1 is out of range"),
        (["--precision", "fp16", "--device", "cpu"], "--precision fp16 needs CUDA or MPS"),
        (["--device", "tpu"], "--device tpu is not there"),
        (
            ["--model", "nosuch/model", "--data", "tiny"],
            "model: nosuch/model cannot be read as a diffusers pipeline",
        ),
        (
            ["--model", "nosuch/a/model", "--data", "tiny"],
            "nosuch/a/model cannot be read .* no such file or folder",
        ),
        (["--data", "nosuch/pairs"], "data: nosuch/pairs cannot be read: Couldn.t reach"),
        (["--data", "./nosuch.parquet"], "nosuch.parquet cannot be read: there is no such file"),
        (
            ["--model", "{sd}", "--data", "{pairs}", "--clip", "ViT-B-32"],
            "clip: ViT-B-32 is neither tiny nor ARCH:WEIGHTS",
        ),
        (
            ["--model", "{sd}", "--data", "{pairs}", "--clip", "ViT-B-32:nosuch.pt"],
            "clip: ViT-B-32:nosuch.pt cannot be loaded",
        ),
        (
            ["--model", "{sd}", "--data", "{pairs}", "--resolution", "36"],
            "--resolution 36 is no multiple of 8",
        ),
        (
            ["--model", "{labels}", "--data", "{pairs}"],
            "model: .*labels cannot be read as a diffusers pipeline",
        ),
        (["--model", "{sd}", "--data", "{labels}"], "1 rows .* have a label_0 other than 0, 0.5 or 1"),
        (["--model", "{no-unet}", "--data", "{pairs}"], "lacks its unet"),
        (["--model", "{no-weights}", "--data", "{pairs}"], "no-weights cannot be loaded"),
        (["--model", "{other}", "--data", "{pairs}"], "is a DDPMPipeline, not of the SD 1.x"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_written(
    tmp_path, small_model, few_pairs, quick_tiny, options, complaint, capsys
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
    row = tiny.pairs(1)[0] | {"label_0": 3.0, "label_1": -2.0}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "labels" / "train-0.parquet")
    with pytest.raises(SystemExit) as end:
        train.main([paths.get(option, option) for option in options] + ["--out", str(tmp_path / "out")])
    message = str(end.value.code)
    assert re.search(complaint, message) and "\n" not in message
    assert not (tmp_path / "out").exists() and "Traceback" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be made: .*file is no folder that can be written to"):
        train.main(["--model", "no/model", "--data", "no/pairs", "--out", str(tmp_path / "file" / "run")])


def test_precedence_is_default_preset_command_line():
    def value(*options):
        return train.get_args(["--device", "cpu", *options]).lr

    assert value("--model", "x", "--data", "y") == 1e-5  # the default
    assert value("--model", "sdxl") == 2.048e-5  # the preset
    assert value("--model", "sdxl", "--lr", "3e-6") == 3e-6  # the command line


def test_presets_are_whole_runs():
    """`--model sdxl` alone says it all, and the launchers of Diffusion-DPO are what it says."""
    for model, size, optimizer in (("sd15", 512, "adamw"), ("sdxl", 1024, "adafactor")):
        args = train.get_args(["--model", model])
        assert (args.data, args.clip, args.resolution, args.optimizer) == (
            "pickapic",
            "ViT-H-14:laion2b_s32b_b79k",
            size,
            optimizer,
        )
        assert (args.batch_size, args.lr, args.warmup, args.beta) == (2048, 2.048e-5, 500, 5000)
        assert args.batch_size % args.micro_batch == 0 and args.micro_batch % args.group_size == 0


def test_help_fits_two_screens(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 2 * 50 and max(map(len, lines)) <= 110


def test_every_command_of_the_documents_parses():
    """README, and the heads of the scripts: what they tell to type is accepted."""
    texts = [Path(__file__).with_name(name).read_text() for name in ("README.md", "train.py")]
    commands = re.findall(r"python (train\.py(?: [\w./-]+)*)", "\n".join(texts))
    assert len(commands) >= 8
    for command in commands:
        train.get_args(shlex.split(command)[1:])


def test_the_readmes_own_loss_trains(run, monkeypatch):
    """A new loss is a function and an entry, as in the README; one that asks for weights gets them."""
    snippet = re.search(r"```python\n(.*?)```", Path(__file__).with_name("README.md").read_text(), re.S)[1]
    names = vars(loss_file).copy()
    exec(snippet, names)
    seen = []

    def weighted(err_w, err_l, ref_err_w, ref_err_l, beta, weights):
        seen.append(weights)
        return names["hinge_loss"](err_w, err_l, ref_err_w, ref_err_l, beta)

    monkeypatch.setitem(loss_file.LOSSES, "hinge", names["LOSSES"]["hinge"])
    monkeypatch.setitem(loss_file.LOSSES, "weighted", weighted)
    assert log_of(run("sd", "--loss", "hinge", name="a"))[0]["loss"] == 1
    assert log_of(run("sd", "--loss", "weighted", "--group_size", "4", name="b"))[0]["loss"] == 1
    assert len(seen) == 4 and all(weights.shape == (4, 4) for weights in seen)


def test_a_dry_run_prints_the_resolved_run_and_writes_nothing(tmp_path, capsys):
    train.main(["--model", "sdxl", "--dry_run", "--out", str(tmp_path / "out")])
    assert json.loads(capsys.readouterr().out)["optimizer"] == "adafactor" and not (tmp_path / "out").exists()
