"""The builder of style pairs: the styled image comes from the plain one, and no held-out prompt is in a pair."""

import inspect
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import report
from extras import style_pairs
from loading import load_model
from evaluate import read_prompts
from small_runs import launch

pytestmark = pytest.mark.usefixtures("quick_models")
PROMPTS = ["a red fox", "a blue bird", "snow\nand ice", "a red fox", "two dogs", "a cat"]


@pytest.fixture
def arguments(tmp_path, small_model):
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    argv = ["--model", small_model("sd"), "--prompts", str(tmp_path / "prompts.json"), "--steps", "4"]
    return [*argv, "--style", "{}, in oil", "--held_out", "2", "--batch_size", "2", "--guidance", "3"]


def contents(folder):
    return {
        str(file.relative_to(folder)): np.array(Image.open(file)).tolist()
        for file in sorted(folder.rglob("*.png"))
    }


def test_pairs_are_in_pick_a_pics_schema_and_prompts_on_one_side_only(tmp_path, arguments):
    """train.py reads them. A repeated prompt counts once, or it could be in a pair and in the reference."""
    out = tmp_path / "out"
    style_pairs.main([*arguments, "--out", str(out)])
    rows = datasets.load_dataset("parquet", data_files=str(out / "pairs" / "*.parquet"), split="train")
    held_out = json.loads((out / "prompts.json").read_text())
    assert len(rows) == 3 and len(held_out) == 2 == len(list((out / "reference").glob("*.png")))
    assert {*rows["caption"]} | {*held_out} == {*PROMPTS} and not {*rows["caption"]} & {*held_out}
    pairs = data.ImagePairs(str(out / "pairs"), 32)
    counts = {"rows": 3, "used": 3, "ties": 0, "unlabelled": 0}
    assert pairs.report() == counts | {"unreadable": {}, "left_out": {}}
    assert read_prompts(str(out / "prompts.json")) == held_out
    (winner, _), (loser, _) = pairs.load(0)
    prompts = list(dict.fromkeys(PROMPTS))
    for kind, image in (("styled", winner), ("plain", loser)):
        file = out / "images" / f"{prompts.index(rows[0]['caption']):05d}-{kind}.png"
        assert image.tobytes() == Image.open(file).tobytes(), f"the {kind} image is on the wrong side"
    for prompt, reference in zip(held_out, sorted((out / "reference").glob("*.png")), strict=True):
        styled = out / "images" / f"{prompts.index(prompt):05d}-styled.png"
        assert reference.name == styled.name.replace("-styled", "") and reference.read_bytes() == styled.read_bytes()


def test_the_plain_image_is_the_models_own_and_the_styled_one_comes_from_it(tmp_path, arguments, small_model):
    """The plain image is that of `evaluate.py generate`. At a lower strength the styled image is nearer to it."""
    distance = {}
    for strength in ("0.25", "1"):
        out = tmp_path / strength
        style_pairs.main([*arguments, "--out", str(out), "--strength", strength])
        images = [
            np.array(Image.open(out / "images" / f"00001-{kind}.png"), float) for kind in ("plain", "styled")
        ]
        distance[strength] = np.abs(images[0] - images[1]).mean()
    assert 0 < distance["0.25"] < distance["1"]
    generated = tmp_path / "generated"
    argv = [
        "--model",
        small_model("sd"),
        "--prompts",
        str(tmp_path / "prompts.json"),
        "--out",
        str(generated),
    ]
    evaluate.main(["generate", *argv, "--steps", "4", "--guidance", "3", "--batch_size", "2"])
    assert np.array_equal(np.array(Image.open(generated / "00001.png")), images[0])


@pytest.mark.slow
def test_a_builder_that_was_stopped_goes_on(tmp_path, arguments, monkeypatch):
    """It makes the images of an unbroken run, also on two processes. Images of other settings are refused."""
    style_pairs.main([*arguments, "--out", str(tmp_path / "unbroken")])
    save, saved = report.save_png, []

    def stopped(*some):
        saved.append(save(*some))
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(report, "save_png", stopped)
    with pytest.raises(KeyboardInterrupt):
        style_pairs.main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "pairs").exists()
    monkeypatch.undo()
    for option, value, complaint in (
        ("--strength", "0.5", "strength 0.7, not 0.5"),
        ("--precision", "bf16", "precision 'torch.float32', not 'torch.bfloat16'"),
    ):
        with pytest.raises(SystemExit, match=f"style_pairs.py: .* was begun with {complaint}"):
            style_pairs.main([*arguments, "--out", str(tmp_path / "out"), option, value])
    argv = [*arguments, "--out", str(tmp_path / "out")]
    for status, text in launch(tmp_path / "text", 2, style_pairs.main, argv):
        assert status == 0, text
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
    one, other = (
        datasets.load_dataset(
            "parquet", data_files=str(tmp_path / name / "pairs" / "*.parquet"), split="train"
        )
        for name in ("out", "unbroken")
    )
    assert list(one) == list(other)


def test_sdxl_restyles_latents_that_are_already_scaled(small_model):
    """Image-to-image takes the plain latents as they are: at almost no strength it returns them."""
    from diffusers import AutoPipelineForImage2Image

    for kind in ("sd", "sdxl"):
        model = load_model(small_model(kind))
        restyle = AutoPipelineForImage2Image.from_pipe(model.pipe)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        noise = [torch.Generator().manual_seed(1)]
        again = model.sample(["x"], noise, 1000, 1.0, pipe=restyle, image=latents, strength=0.001)
        assert (again - latents).abs().mean() < 0.05


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--style", "oil"], "--style oil: give van-gogh, sketch, winter, or words with a {} for the prompt"),
        (["--strength", "0.1"], "--strength 0.1 leaves none of 4 steps"),
        (["--held_out", "5"], "--held_out 5: 5 different prompts would leave no pair"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path, arguments, options, complaint):
    """They end before anything is drawn."""
    with pytest.raises(SystemExit, match=f"^style_pairs.py: {complaint}"):
        style_pairs.main([*arguments, "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


# An editor


def small_editor(folder, small_model, kind):
    """The small model as an InstructPix2Pix pipeline: its UNet sees the image's latents beside the noise."""
    import diffusers

    pipe = load_model(small_model(kind)).pipe
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, in_channels=8)
    editor_class = getattr(diffusers, f"StableDiffusion{'XL' if kind == 'sdxl' else ''}InstructPix2PixPipeline")
    settings = pipe.components | {"unet": unet, "requires_safety_checker": False}
    names = inspect.signature(editor_class.__init__).parameters
    editor = editor_class(**{name: value for name, value in settings.items() if name in names})
    editor.save_pretrained(folder / f"editor-{kind}")
    return str(folder / f"editor-{kind}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_editor_styles_the_models_own_images(tmp_path, arguments, small_model, kind):
    """The plain image is that of a run without an editor. The styled one is what the stock pipeline makes of it."""
    from diffusers import DiffusionPipeline

    editor = small_editor(tmp_path, small_model, kind)
    edit = [*arguments, "--editor", editor, "--style", "winter"]
    style_pairs.main([*edit, "--out", str(tmp_path / "edited")])
    style_pairs.main([*arguments, "--out", str(tmp_path / "plain")])
    edited, plain = contents(tmp_path / "edited" / "images"), contents(tmp_path / "plain" / "images")
    for name in plain:
        assert (edited[name] == plain[name]) == name.endswith("plain.png"), name
    pipe = DiffusionPipeline.from_pretrained(editor, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    images = [Image.open(tmp_path / "edited" / "images" / f"{i:05d}-plain.png") for i in (0, 1)]
    noise = [style_pairs.keyed_generator(0, "style", i) for i in (0, 1)]
    (stock, _) = pipe(
        [style_pairs.EDITS["winter"]] * 2,
        image=images,
        num_inference_steps=4,
        guidance_scale=3.0,
        image_guidance_scale=1.5,
        generator=noise,
    ).images
    assert np.abs(np.array(stock, int) - edited["00000-styled.png"]).max() <= 1
    (file,) = (tmp_path / "edited" / "pairs").glob("*.parquet")
    rows = datasets.load_dataset("parquet", data_files=str(file), split="train")
    assert rows[0]["model_0"] == f"{editor}: {style_pairs.EDITS['winter']}"
    for option, value in (("--image_guidance", "2"), ("--style", "make it blue")):
        with pytest.raises(SystemExit, match="was begun with"):
            style_pairs.main([*edit, "--out", str(tmp_path / "edited"), option, value])


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_an_editor_styles_a_folder_of_images(tmp_path, arguments, small_model, kind):
    """The images have any size and shape. The rejected image is the folder's own, in the order of the names.

    Both images of a pair have --resolution, or the pairs would prefer sharpness.
    """
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(len(PROMPTS)):
        Image.new("RGB", (48 + 8 * i, 40), (40 * i, 0, 0)).save(photos / f"{i}.jpg", quality=100)
    editor = small_editor(tmp_path, small_model, kind)
    argv = [*arguments, "--editor", editor, "--images", str(photos), "--resolution", "64"]
    style_pairs.main([*argv, "--out", str(tmp_path / "out")])
    for i, number in enumerate((0, 1, 2, 4, 5)):  # the second "a red fox" does not count
        plain = np.array(Image.open(tmp_path / "out" / "images" / f"{i:05d}-plain.png"), int)
        assert plain.shape == (64, 64, 3) and np.abs(plain - (40 * number, 0, 0)).max() <= 3
        assert Image.open(tmp_path / "out" / "images" / f"{i:05d}-styled.png").size == (64, 64)
    Image.new("RGB", (40, 40)).save(photos / "9.png")
    with pytest.raises(SystemExit, match=r"photos holds 7 images, but .*prompts.json has 6 prompts"):
        style_pairs.main([*argv, "--out", str(tmp_path / "other")])
    (photos / "9.png").unlink()
    (photos / "2.jpg").write_bytes(b"<html>404</html>")
    with pytest.raises(SystemExit, match=r"2.jpg cannot be read .*remove it and its prompt"):
        style_pairs.main([*argv, "--out", str(tmp_path / "third")])


def test_what_is_no_editor_is_refused(tmp_path, arguments, small_model):
    for options, complaint in (
        (["--editor", small_model("sd")], "it is a StableDiffusionPipeline, not an InstructPix2Pix pipeline"),
        (["--editor", str(tmp_path / "nowhere")], "--editor .*nowhere cannot be loaded"),
        (["--images", str(tmp_path)], "--images needs --editor"),
    ):
        with pytest.raises(SystemExit, match=complaint):
            style_pairs.main([*arguments, "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()
