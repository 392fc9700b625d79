"""The promises of the embedded task. Tests of whole runs are slow."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

import data
import evaluate
import train
from common import clip_tokenizer, digest
from data import Clip, cross_pair_weights
from extras import tiny, tiny_build
from loading import EMBEDDED, add_lora, load_model, save_model
from loss import denoising_error
from pictures import read_image


def test_pairs_differ_in_style_alone_and_the_sketch_wins():
    rows = tiny.pair_rows(40)
    captions = {tiny.caption(scene) for scene in tiny.HELD_OUT}
    for row in rows:
        winner, loser = (
            np.asarray(read_image(row[f"jpg_{side}"])).astype(float)
            for side in (int(row["label_0"] == 0), int(row["label_0"] == 1))
        )
        assert np.abs(winner[0, 0] - tiny.PAPER).max() < 1  # the winner is drawn on paper
        assert np.abs(loser[0, 0] - winner[0, 0]).max() > 5  # the loser is drawn on the caption's background
        assert row["label_0"] + row["label_1"] == 1 and row["caption"] not in captions
    assert 5 < sum(row["label_0"] for row in rows) < 35  # the winner stands on either side


def test_the_pairs_are_a_folder_like_any_other():
    """The pairs have Pick-a-Pic's schema and all are usable. The prompts of the file are in no pair."""
    folder = tiny.part("pairs")
    pairs = data.ImagePairs(str(folder), tiny.SIZE)
    counts = {"rows": 1500, "used": 1500, "ties": 0, "unlabelled": 0}
    assert pairs.report() == counts | {"unreadable": {}, "left_out": {}}
    for number, row in enumerate(tiny.pair_rows(3)):
        (winner, _), (loser, _) = pairs.load(number)
        first, second = (read_image(row[f"jpg_{side}"]).tobytes() for side in (0, 1))
        expected = [first, second] if row["label_0"] else [second, first]
        assert [winner.tobytes(), loser.tobytes()] == expected
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert prompts == [tiny.caption(scene) for scene in tiny.HELD_OUT]
    assert not {*prompts} & {*map(pairs.caption, pairs.rows)}


def test_the_pairs_are_those_of_the_published_figures():
    """Other captions, labels or draws would be another experiment under the same name."""
    assert digest([[row["caption"], row["label_0"]] for row in tiny.pair_rows(200)]) == "5e47f613a6880a35"


def test_the_same_seed_draws_the_same():
    first, second, other = (tiny.drawings(6, seed=seed, sketches=0.5)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_style_leaves_the_geometry_alone():
    """A filled shape and its outline cover the same box, up to the width of the pen."""
    for scene in (("star", "red", "white"), ("ring", "blue", "white"), ("cross", "green", "yellow")):
        boxes = []
        for sketch in (False, True):
            image = np.asarray(tiny.draw(scene, sketch, random.Random(3))).astype(int)
            ys, xs = np.where(np.abs(image - image[0, 0]).sum(axis=2) > 90)
            boxes.append((ys.min(), ys.max(), xs.min(), xs.max()))
        assert np.abs(np.subtract(*boxes)).max() <= 2


def test_the_shipped_files_make_the_same_models_everywhere():
    """Nothing is computed on first use. So every version, machine and number of threads gets the noted digests."""
    note = json.loads((tiny.FILES / "embedded.json").read_text())
    files = sorted(tiny.FILES.glob("*.safetensors"))
    assert note["digests"] == {file.name: digest(file.read_bytes()) for file in files}
    networks = {"clip": {"clip": Clip("tiny").model}} | {name: load_model(name).networks() for name in EMBEDDED}
    assert note["models"] == {name: tiny.networks_digest(parts) for name, parts in networks.items()}
    assert sum(file.stat().st_size for file in files) < 12e6


@pytest.mark.parametrize("name", [pytest.param("tiny", marks=pytest.mark.slow), "tiny-flow"])
def test_latents_have_the_scale_that_the_denoisers_were_trained_on(name):
    """Unit variance; for flow matching a mean of zero, too."""
    model, (pixels, *_) = load_model(name), tiny.drawings(256, seed=1, sketches=1 / 6)
    mean, _ = model.encode_images(((pixels + 1) * 127.5).to(torch.uint8)[:, None])
    latents = model.scale_latents(mean)
    assert latents.std() == pytest.approx(1, abs=0.05)
    assert name == "tiny" or latents.mean().abs() < 0.05


def test_what_is_written_is_what_was_packed(tmp_path):
    """In float16, but for counters and the frozen words. A file without a tensor is refused."""
    torch.manual_seed(0)
    network, other = tiny.judge_network((2, 3)), tiny.judge_network((2, 3))
    network[0].requires_grad_(False)
    network[1].num_batches_tracked.fill_(3001)  # float16 has no 3001
    tiny.pack({"a": network}, tmp_path / "a.safetensors", {"scale": 0.1})
    assert {key[:4] for key in load_file(tmp_path / "a.safetensors")} == {f"a.{k}." for k in (1, 3, 4, 6, 7, 9)} | {"a.10", "a.13"}
    kept = other[0].weight.clone()
    other[0].requires_grad_(False)
    assert tiny.unpack({"a": other}, tmp_path / "a.safetensors") == {"scale": 0.1}
    assert torch.equal(other[0].weight, kept)
    for (name, value), expected in zip(list(other.state_dict().items())[2:], list(network.state_dict().values())[2:]):
        assert value.dtype == expected.dtype, name
        assert torch.equal(value, expected.half().float() if value.is_floating_point() else expected), name
    tiny.pack({"a": network[:-1]}, tmp_path / "a.safetensors")
    with pytest.raises(SafetensorError, match="a.13"):
        tiny.unpack({"a": other}, tmp_path / "a.safetensors")


def test_the_judge_is_right_about_each_picture_alone():
    """Its verdict on a drawing does not depend on what else it is shown."""
    assert min(tiny.judge_accuracy(200).values()) >= 0.98
    pixels = tiny.drawings(8, seed=9, sketches=0.5)[0]
    assert torch.equal(tiny.judge(pixels), torch.cat([tiny.judge(picture[None]) for picture in pixels]))


def test_the_words_are_apart():
    """Frozen vectors of deviation 0.5 that share no direction; another key gives others."""
    first, second = torch.nn.Embedding(1000, 64), torch.nn.Embedding(1000, 64)
    tiny.draw_words(first, "words")
    tiny.draw_words(second, "other words")
    assert not first.weight.requires_grad and first.weight.std() == pytest.approx(0.5, rel=0.01)
    cosines = F.normalize(first.weight) @ F.normalize(torch.cat([first.weight, second.weight])).T
    assert (cosines - torch.eye(1000, 2000)).abs().max() < 0.7


def test_a_part_is_written_once_and_again_only_when_damaged():
    writes = []

    def write(folder):  # a recipe of this test alone: this file belongs to it
        assert torch.is_grad_enabled()
        writes.append(1)
        (folder / "weights").write_bytes(torch.rand(3).numpy().tobytes())

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():  # as where a judge is first asked for
        weights = tiny.part("anything", write) / "weights"
    assert torch.equal(torch.rand(3), expected)  # the caller's random state stays
    intact = weights.read_bytes()
    assert tiny.part("anything", write) == weights.parent and len(writes) == 1
    weights.write_bytes(intact[:-5])  # a disk that was full
    assert tiny.part("anything", write) == weights.parent and len(writes) == 2
    assert weights.read_bytes() == intact  # seeded: the same again
    (weights.parent / ".digests.json").unlink()
    tiny.part("anything", write)
    assert len(writes) == 3
    assert {f.name for f in weights.parent.parent.iterdir()} == {"anything", "anything.lock"}  # nothing half-written


@pytest.mark.slow
def test_other_shipped_networks_are_another_folder(tmp_path, monkeypatch):
    before = tiny.part("pairs")
    shutil.copytree(tiny.FILES, tmp_path / "files")
    monkeypatch.setattr(tiny, "FILES", tmp_path / "files")
    (tmp_path / "files" / "tiny.safetensors").write_bytes(b"others")
    assert tiny.part("pairs") != before


@pytest.mark.slow
def test_a_short_build_makes_working_files(tmp_path, monkeypatch, capsys):
    """Its judge is right more often than by chance. Its denoisers know a drawing from noise."""
    files, steps = tmp_path / "files", {"vae": 60, "unet": 40, "flow": 40, "clip": 20, "judge": 60}
    tiny_build.build(files, steps, count=512, samples=4)
    note = json.loads((files / "embedded.json").read_text())
    assert note["steps"] == steps
    monkeypatch.setattr(tiny, "FILES", files)
    assert min(tiny.judge_accuracy(200).values()) > 0.4
    pixels = tiny.drawings(64, seed=7, sketches=0.5)[0]
    for name in EMBEDDED:
        model = load_model(name)
        assert tiny.networks_digest(model.networks()) == note["models"][name]
        mean, _ = model.encode_images(((pixels + 1) * 127.5).to(torch.uint8)[:, None])
        latents = model.scale_latents(mean[:, 0])
        decoded = model.decode(latents)
        assert ((decoded * 2 - 1) - pixels).square().mean() < 0.7 * pixels.var()
        cond = model.conditioning(model.encode_prompts(["a red star"] * 64), torch.zeros(64, 1, 6))
        t = torch.full((64,), 500) if name == "tiny" else torch.full((64,), 0.5)
        noise = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            err = denoising_error(model.predict, model.denoiser, model.process, latents, noise, t, cond)
        assert err.mean() < 0.8 * (noise if name == "tiny" else noise - latents).square().mean()
    assert Clip("tiny").embed(["a"]).isfinite().all()


def test_the_embedded_clip_takes_any_text_and_any_image():
    clip = Clip("tiny")
    pictures = [
        read_image(row["jpg_0"]).resize(size)
        for row, size in zip(tiny.pair_rows(3), ((300, 200), (1, 1), (40, 90)))
    ]
    pixels = torch.stack(
        [torch.stack([clip.transform(data.middle_square(picture))] * 2) for picture in pictures]
    )
    text, image_w, image_l = clip.embed(["", "“naïve” 🐾 " * 300, "a red circle"], pixels).unbind(1)
    weights = cross_pair_weights(text, image_w, image_l, 0.5)
    assert weights.shape == (3, 3) and torch.isfinite(weights).all()
    assert not clip.embed(["a"])[:, 1:].any()


def test_the_tokenizer_is_clips():
    """transformers' tokenizer over open_clip's vocabulary gives open_clip's tokens."""
    import open_clip

    texts = ["a red circle on a blue background", "Café, 3 dogs!", "", "word " * 100]
    ours = clip_tokenizer(77)(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    for mine, theirs in zip(ours, open_clip.SimpleTokenizer()(texts)):
        length = int((theirs != 0).sum())  # open_clip pads with 0
        assert torch.equal(mine[:length], theirs[:length])


def test_measure_asks_for_held_out_prompts_with_fixed_noise():
    pipe = load_model("tiny").pipe
    asked = []

    class Pipe:
        def __call__(self, prompts, **options):
            asked.append(prompts)
            return pipe(prompts, **options)

    first, second = tiny.measure(Pipe(), n=4, steps=2), tiny.measure(Pipe(), n=4, steps=2)
    assert first == second and set(first) == {"style", "shape"}
    assert asked[0] == [tiny.caption(scene) for scene in tiny.HELD_OUT[:4]]


@pytest.mark.slow
def test_the_command_judges_diffusers_folders_and_lora_weights(tmp_path, monkeypatch, capsys):
    """Every model gets a line. An adapter is put on the base model."""
    model = load_model("tiny")
    add_lora(model, 2, seed=0)
    for name, parameter in model.denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    save_model(model, tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    seen = {}

    def measure(pipe):
        seen[len(seen)] = pipe.unet
        return {"style": 0.971, "shape": 1.0}

    monkeypatch.setattr(tiny, "measure", measure)
    monkeypatch.setattr(tiny, "judge_accuracy", lambda: {"style": 1.0, "shape": 0.995})
    base = str(tiny.part("pipeline"))
    tiny.main([base, str(tmp_path / "lora")])
    accuracy, *lines = capsys.readouterr().out.splitlines()
    assert accuracy == (
        "the judge is right on 100.0% (style) and 99.5% (shape) of 1,000 drawings that it has not seen"
    )
    assert lines == [f"{name}  97% sketches, 100% of the right shape" for name in (base, tmp_path / "lora")]
    inputs = torch.ones(1, 4, 8, 8), torch.tensor(5), torch.ones(1, 16, 64)
    with torch.no_grad():
        plain, adapted = (seen[k](*inputs).sample for k in (0, 1))
        assert torch.allclose(adapted, model.denoiser(*inputs).sample, atol=1e-5)
        assert not torch.allclose(adapted, plain, atol=1e-3)
    tiny.main([])
    assert capsys.readouterr().out.splitlines()[1:] == ["tiny  97% sketches, 100% of the right shape"]
    (tmp_path / "out" / "tiny-rpo").mkdir(parents=True)
    (tmp_path / "lora").rename(tmp_path / "out" / "tiny-rpo" / "model")
    tiny.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "out/tiny-rpo/model  97% sketches, 100% of the right shape" and len(lines) == 3
    with pytest.raises(SystemExit, match="tiny.py: nowhere: there is no such folder"):
        tiny.main(["nowhere"])


@torch.no_grad()
def test_one_token_stands_for_many_alike():
    """The transformer predicts the same with 256 zeros behind a prompt, as in its pipeline, and with one for all."""
    model = load_model("tiny-flow")
    encoders = [model.pipe.text_encoder, model.pipe.text_encoder_2]
    ids = model.pipe.tokenizer(["a red star", ""], padding="max_length", return_tensors="pt").input_ids
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([200.0, 800.0])
    cond = tiny_build.encode_without_t5(encoders, ids)
    with tiny_build.AlikeTokens(256):
        short = model.denoiser(x, timestep=t, **cond, return_dict=False)[0]
    embeds = model.encode_prompts(["a red star", ""])
    torch.testing.assert_close(embeds["prompt_embeds"][:, :17], cond["encoder_hidden_states"], rtol=0, atol=1e-6)
    cond = model.conditioning(embeds, torch.zeros(2, 1, 6))
    whole = model.predict(model.denoiser, x, t / 1000, cond)
    assert cond["encoder_hidden_states"].shape == (2, 16 + 256, 64)
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-5)
    another = model.denoiser(x, timestep=t, **tiny_build.encode_without_t5(encoders, ids), return_dict=False)[0]
    assert (another - whole).abs().max() > 1e-4


@pytest.mark.slow
def test_the_flow_model_trains_and_is_evaluated_like_any_other(tmp_path, few_pairs, quick_models, monkeypatch, capsys):
    """An adapter finds its base. Images of both are compared."""
    monkeypatch.chdir(tmp_path)
    few = f"--model tiny-flow --data {few_pairs} --batch_size 8 --tau inf"
    train.main(f"{few} --steps 1 --sample_every 1 --sample_steps 1".split())
    asked = []
    monkeypatch.setattr(tiny, "measure", lambda pipe: asked.append(type(pipe)) or {"style": 0, "shape": 0})
    tiny.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "sketches" in line] == ["tiny-flow", "out/tiny-flow-rpo/model"]
    assert {kind.__name__ for kind in asked} == {"StableDiffusion3Pipeline"} and len(asked) == 2
    for options in ("--out base", "--lora out/tiny-flow-rpo/model --out rpo"):
        evaluate.main(f"generate --prompts tiny --limit 2 --steps 1 --model tiny-flow {options}".split())
    evaluate.main("score base rpo --metrics clip".split())
    evaluate.main("compare base rpo".split())
    assert json.loads(Path("report.json").read_text())["results"]


@pytest.mark.slow
@pytest.mark.parametrize("model, loss", [("tiny", "rpo"), ("tiny", "dpo"), ("tiny-flow", "rpo")])
def test_the_default_run_learns_the_preference(tmp_path_factory, monkeypatch, model, loss):
    """The README's first command. The first of these runs starts from an empty cache."""
    cache = tmp_path_factory.getbasetemp() / "whole-run"
    out = tmp_path_factory.mktemp("run") / loss
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}  # another test may run beside it
    began = time.time()
    subprocess.run(
        [sys.executable, "train.py", "--model", model, "--loss", loss, "--out", str(out)],
        check=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    seconds = time.time() - began
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    judge, base = tiny.judge_accuracy(), tiny.measure(tiny.load(model))
    final = tiny.measure(tiny.load(out / "model"))
    print(model, loss, judge, base, final, f"{seconds:.0f} s")
    assert judge["style"] >= 0.98 and judge["shape"] >= 0.98
    assert final["style"] >= 0.8
    assert final["shape"] >= base["shape"] - 0.1


@pytest.mark.slow
def test_pairs_of_the_models_own_images_raise_its_score(tmp_path, tmp_path_factory):
    """Generate, score, pairs, train. The gain is in the embedded CLIP's score, on held-out prompts."""
    cache = tmp_path_factory.getbasetemp() / "whole-run"  # the cache of the default run
    scenes = [scene for scene in tiny.SCENES if scene not in tiny.HELD_OUT][:48]
    (tmp_path / "prompts.txt").write_text("\n".join(map(tiny.caption, scenes)))
    four, pairs, before, after = (str(tmp_path / name) for name in ("four", "pairs", "before", "after"))
    generate = "evaluate.py generate --steps 10 --batch_size 32"
    commands = [
        f"{generate} --prompts {tmp_path / 'prompts.txt'} --per_prompt 4 --out {four}",
        f"evaluate.py score {four} --metrics clip",
        f"evaluate.py pairs {four} --by clip --min_gap 1 --out {pairs}",
        f"train.py --data {pairs} --sample_every 0 --steps 80 --out {tmp_path / 'run'}",
        f"{generate} --prompts tiny --per_prompt 2 --out {before}",
        f"{generate} --model {tmp_path / 'run' / 'model'} --prompts tiny --per_prompt 2 --out {after}",
        f"evaluate.py score {before} {after} --metrics clip",
        f"evaluate.py compare {before} {after} --out {tmp_path / 'report.html'}",
    ]
    for command in commands:
        environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
        subprocess.run([sys.executable, *command.split()], check=True, env=environment, cwd=Path(__file__).parents[1])
    result = json.loads((tmp_path / "report.json").read_text())["results"][2]
    print(result)
    assert result["n"] == 36 and result["difference"] > 0
