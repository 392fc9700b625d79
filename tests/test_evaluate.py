"""Evaluation: what makes two folders of images comparable, and that no prompt ever meets another's image."""

import csv
import functools
import html
import io
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import distributed
import evaluate
import page
import report
from common import InputError
from extras import style, tiny
from loading import load_model
from models import StableDiffusion, cast_for_autocast
from evaluate import read_prompt_rows, read_prompts
from small_runs import BROWSER, launch
from pictures import read_image
from extras.scored_pairs import ranked_pairs
from extras.style import frechet
from stats import rate_interval

pytestmark = pytest.mark.usefixtures("quick_models")
PROMPTS = ["a red fox", "a blue bird on a branch", "a red fox", 'the words "G I G G L E"', "snow"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return str(file)


@pytest.fixture
def generate(tmp_path, small_model, prompts):
    """generate(name, *options, model="sd"): two steps on a small model into a folder of that name."""

    def generate(name, *options, model="sd"):
        out = tmp_path / name
        argv = ["generate", "--model", small_model(model), "--prompts", prompts, "--out", str(out)]
        evaluate.main([*argv, "--steps", "2", "--batch_size", "2", *options])
        return out

    return generate


def pixels(folder):
    return {file.name: np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def same(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


# Prompts


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "a cat\n\n  two dogs \r\n"),
        ("p.tsv", "Prompt\tCategory\tChallenge\tNote\na cat\tA\tB\tC\ntwo dogs\tA\tB\t\n"),
        ("p.csv", '\ufeffid,caption\n1,a cat\n2,"two dogs"\n'),
        ("p.json", '["a cat", "two dogs"]'),
        ("p.json", '[{"id": 7, "Prompt": "a cat"}, {"prompt": "two dogs", "text": "x"}]'),
        ("p.jsonl", '{"prompt": "a cat"}\n"two dogs"\n\n'),
    ],
)
def test_the_formats_of_prompts(tmp_path, name, text):
    """What PartiPrompts, HPDv2, DrawBench and people's own lists come as."""
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(str(tmp_path / name)) == ["a cat", "two dogs"]


def test_tab_separated_prompts_keep_their_quotes(tmp_path):
    """A prompt of PartiPrompts begins with one; csv's default quoting would drop it, and swallow lines."""
    (tmp_path / "p.tsv").write_text('Prompt\tCategory\n"G I G G L E" painted\tx\n"Hi\ty\nend\tz\n')
    assert read_prompts(str(tmp_path / "p.tsv")) == ['"G I G G L E" painted', '"Hi', "end"]


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.json", "[]", "holds no prompt"),
        ("p.json", "[1]", "row 1 has no prompt"),
        ("p.json", '{"prompts": ["a cat"]}', "cannot be read: the JSON is neither a list nor"),
        ("p.csv", "id,words\n1,x\n", "row 1 has no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', "row 2 has no prompt"),
        ("p.jsonl", "{", "cannot be read"),
        ("p.docx", "x", "the suffix must be txt"),
        (None, "", "cannot be read: there is no such file or folder"),
    ],
)
def test_bad_prompts_are_refused_in_one_line(tmp_path, name, text, complaint):
    """An empty prompt would be drawn, scored and averaged without a word."""
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=complaint) as refusal:
        read_prompts(str(tmp_path / (name or "no such file.txt")))
    assert "\n" not in str(refusal.value)


PUBLISHED = {  # how the files of the named sets begin, and what is read
    "PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\na bond\tAbstract\tBasic\t\n",
    "anime.json": '["a girl"]', "concept-art.json": '["a ship"]', "paintings.json": '["a pond"]', "photo.json": '["a bus"]',
    "papv2.json": '[{"prompt": "a moon", "raw_image_path": "x.png"}]',
    "dpg_bench.csv": "item_id,text,keywords,proposition_id\n7,a barn,,1\n7,a barn,,2\n8,a lake,,1\n"}
SETS = {
    "parti": [("a bond", {"Category": "Abstract", "Challenge": "Basic", "Note": ""})],
    "hpdv2": [("a girl", {"style": "anime"}), ("a ship", {"style": "concept-art"}), ("a pond", {"style": "paintings"}),
              ("a bus", {"style": "photo"})],
    "pickapic_test": [("a moon", {})],
    "dpg": [("a barn", {"item_id": "7"}), ("a lake", {"item_id": "8"})],
}


@pytest.mark.parametrize("name", SETS)
def test_sets_of_prompts_by_name(tmp_path, monkeypatch, name):
    """Each is downloaded once. Without a network one line names the files to get."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def no_network(url, timeout):
        raise OSError("Network is unreachable")

    def network(url, timeout):
        asked.append(url)
        return io.BytesIO(PUBLISHED[url.rpartition("/")[2]].encode())

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(InputError, match=f"--prompts {name} cannot be read: .*unreachable.* Get https://.*pass the file"):
        read_prompts(name)
    monkeypatch.setattr("urllib.request.urlopen", network)
    assert [*zip(*read_prompt_rows(name))] == [*zip(*read_prompt_rows(name))] == SETS[name]
    assert asked == evaluate.NAMED_PROMPTS[name]
    (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the suffix must be txt"):  # a file of that name counts
        read_prompts(name)


def test_drawbench_by_name_is_the_hubs(monkeypatch):
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train"])
    rows = datasets.Dataset.from_dict({"Prompts": ["a red car"], "Category": ["Colors"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("sayakpaul/drawbench", "train"): rows}[name, split])
    assert read_prompt_rows("drawbench") == (["a red car"], [{"Category": "Colors"}])


def test_named_sets_need_no_other_name(tmp_path):
    """Two of them beside each other, and beside one with a name of its own."""
    sets = evaluate.prompt_sets(["parti", "dpg", "mine=p.txt"], tmp_path)
    assert sets == {tmp_path / "parti": "parti", tmp_path / "dpg": "dpg", tmp_path / "mine": "p.txt"}
    assert evaluate.prompt_sets(["parti"], tmp_path) == {tmp_path: "parti"}


def test_prompts_of_the_hub(monkeypatch):
    """ID:SPLIT; with several splits, the one to take must be said. Images are not read, classes by their names."""
    features = {"Prompt": "large_string", "image": "binary", "score": "float64", "kind": None}
    features = {name: datasets.Value(kind) for name, kind in features.items() if kind}
    features["kind"] = datasets.ClassLabel(names=["pets", "wild"])
    columns = {"Prompt": ["a cat", "two dogs"], "image": [b"", b""], "score": [0.5, 1.5], "kind": [1, 0]}
    rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("a/b", "test"): rows}[name, split])
    prompts, others = read_prompt_rows("a/b:test")
    assert prompts == ["a cat", "two dogs"]
    assert others == [{"score": "0.5", "kind": "wild"}, {"score": "1.5", "kind": "pets"}]
    for source in ("a/b", "a/b:dev"):
        with pytest.raises(InputError, match="a/b has the splits train, test; give a/b:SPLIT"):
            read_prompts(source)


# Generate


def test_an_image_is_a_function_of_seed_and_place(generate):
    """So that all models see the same noise, and a part of the prompts gives a part of the images."""
    whole, part = (
        generate("whole", "--batch_size", "1"),
        generate("part", "--batch_size", "1", "--limit", "2"),
    )
    one, other = pixels(whole), pixels(part)
    assert len(one) == 5 and len(other) == 2 and all((one[name] == other[name]).all() for name in other)
    assert not (one["00000.png"] == one["00002.png"]).all(), "equal prompts at two places, one noise"
    assert not same(one, pixels(generate("seed", "--batch_size", "1", "--seed", "1")))
    manifest = json.loads((whole / "manifest.json").read_text())
    assert [image["prompt"] for image in manifest["images"]] == PROMPTS
    assert manifest["settings"]["scheduler"]["class"] == "PNDMScheduler"
    assert manifest["settings"]["resolution"] == 32 and manifest["settings"]["guidance"] == 3.0


def test_the_manifests_seed_reproduces_an_image_with_diffusers_alone(generate, small_model):
    """Whoever has the manifest needs nothing of ours."""
    from diffusers import StableDiffusionPipeline

    out = generate("images", "--batch_size", "1")
    manifest = json.loads((out / "manifest.json").read_text())
    entry = manifest["images"][1]
    pipe = StableDiffusionPipeline.from_pretrained(small_model("sd"))
    noise = torch.Generator().manual_seed(entry["seed"])
    guidance = manifest["settings"]["guidance"]
    (image,) = pipe(entry["prompt"], num_inference_steps=2, guidance_scale=guidance, generator=noise).images
    assert np.abs(np.array(image).astype(int) - pixels(out)["00001.png"]).max() <= 1  # of 255


def test_generate_goes_on_and_leaves_what_is_there(generate):
    """The same bytes as unbroken; images that are whole are not drawn again."""
    out = generate("images")
    before, kept = pixels(out), (out / "00004.png").stat().st_mtime_ns
    (out / "00001.png").unlink()
    (out / "00003.part").write_bytes(b"half of an image")
    generate("images")
    assert same(before, pixels(out)) and (out / "00004.png").stat().st_mtime_ns == kept


def killed(argv, after):
    save, saved = evaluate.save_png, []

    def save_and(*some):
        saved.append(save(*some))
        if len(saved) == after:
            os._exit(9)

    evaluate.save_png = save_and
    evaluate.main(argv)


def test_a_killed_generate_goes_on(tmp_path, generate, small_model, prompts):
    """Killed between two images of a batch, it ends in the same images."""
    argv = ["generate", "--model", small_model("sd"), "--prompts", prompts, "--out", str(tmp_path / "images")]
    argv += ["--steps", "2", "--batch_size", "2"]
    ((status, text),) = launch(tmp_path / "text", 1, killed, argv, 3)
    assert status == 9 and len(pixels(tmp_path / "images")) == 3, text
    assert same(pixels(generate("images")), pixels(generate("unbroken")))


def test_processes_share_the_prompts_and_make_the_same_images(tmp_path, generate, small_model, prompts):
    """torchrun is for speed alone."""
    argv = ["generate", "--model", small_model("sd"), "--prompts", prompts, "--out", str(tmp_path / "two")]
    for status, text in launch(
        tmp_path / "text", 2, evaluate.main, [*argv, "--steps", "2", "--batch_size", "2"]
    ):
        assert status == 0, text
    assert same(pixels(tmp_path / "two"), pixels(generate("one")))


def test_a_prompt_is_drawn_by_one_process(tmp_path, monkeypatch):
    """All batches are drawn, none of them twice, and a batch whose files are there is not drawn again."""
    monkeypatch.setattr(distributed, "wait_for_all", lambda: None)
    (tmp_path / "2").touch()
    (tmp_path / "3").touch()
    drawn = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "torchrun_env", lambda: (rank, rank, 3))
        drawn += distributed.pending_batches(9, 2, lambda i: [tmp_path / str(i)], "images")
    assert sorted(drawn, key=min) == [range(0, 2), range(4, 6), range(6, 8), range(8, 9)]


def test_images_of_another_model_or_setting_are_not_mixed_in(generate, small_model, tmp_path):
    """A model that was trained on under the same name is another one."""
    generate("images")
    with pytest.raises(SystemExit, match="holds other images: steps is 2 in one and 3 in the other"):
        generate("images", "--steps", "3")
    with pytest.raises(SystemExit, match="holds other images: guidance is 3.0"):
        generate("images", "--guidance", "0")
    copy = tmp_path / "copy"
    shutil.copytree(small_model("sd"), copy)
    unet = load_model(str(copy)).denoiser
    unet.conv_out.bias.data += 0.1
    unet.save_pretrained(copy / "unet")
    with pytest.raises(SystemExit, match="holds other images: weights is"):
        generate("images", "--model", str(copy))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(SystemExit, match="holds something else"):
        generate("mine")


def test_a_prompt_of_400_words_is_cut_and_said(tmp_path, generate, capsys):
    """The text encoder reads 77 tokens; the manifest says which prompts it did not read to the end."""
    file = tmp_path / "long.txt"
    file.write_text("short\n" + "word " * 400)
    out = generate("images", "--prompts", str(file))
    assert "1 prompts have more than the 77 tokens" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["prompts"]["cut"] == [1]


def test_lora_weights_change_the_images_unless_they_are_zero(tmp_path, generate, small_model):
    """Weights as `save_lora_weights` writes them, on SDXL's format; at zero the base model is what is left."""
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    for name, scale in (("zero", 0.0), ("lora", 1.0)):
        torch.manual_seed(0)
        pipe = load_model(small_model("sdxl")).pipe
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        for key, parameter in pipe.unet.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=scale)
        layers = get_peft_model_state_dict(pipe.unet)
        StableDiffusionXLPipeline.save_lora_weights(tmp_path / name, unet_lora_layers=layers)
    base, zero, lora = (
        pixels(generate(f"images {name}", *(["--lora", str(tmp_path / name)] if name else []), model="sdxl"))
        for name in ("", "zero", "lora")
    )
    assert same(base, zero) and not same(base, lora)
    (tmp_path / "stranger").mkdir()
    strange = {"base_model.model.conv.lora_A.weight": torch.ones(2, 2)}
    save_file(strange, tmp_path / "stranger" / "pytorch_lora_weights.safetensors")
    for name in ("nowhere", "stranger"):  # the second is one that diffusers would pass over in silence
        with pytest.raises(SystemExit, match=f"LoRA weights .*{name} cannot be loaded"):
            generate("none", "--lora", str(tmp_path / name), model="sdxl")


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_bf16_draws_what_autocast_draws(small_model, model):
    """Weights are cast once instead of in every forward: the same numbers."""
    images = []
    for light in (False, True):
        sampled = load_model(small_model(model))
        if light:
            cast_for_autocast(sampled.denoiser, torch.bfloat16)
        noise = [torch.Generator().manual_seed(0)]
        images.append(sampled.sample(["a cat"], noise, 2, 3.0, torch.bfloat16))
    assert torch.equal(*images)


def test_an_image_that_is_not_finite_is_not_saved_as_black(generate, monkeypatch):
    """fp16 overflows in some VAEs, and black images score like any others."""
    monkeypatch.setattr(StableDiffusion, "decode", lambda model, latents: torch.full((2, 3, 8, 8), float("nan")))
    with pytest.raises(SystemExit, match="not finite"):
        generate("images")


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--scheduler", "UNet2DModel"], "--scheduler UNet2DModel is none of .*DDIMScheduler"),
        (["--resolution", "30"], "--resolution 30: this model needs a multiple of 4"),
        (["--device", "tpu"], "--device tpu is not there; this machine has .*cpu"),
        (["--sed", "1"], "unrecognized arguments: --sed"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path, generate, options, complaint):
    """Before anything is drawn. The folder is not claimed by the failure."""
    with pytest.raises(SystemExit, match=complaint):
        generate("images", *options)
    assert not [*tmp_path.glob("images/*")]


# Score and compare


def score(*folders, metrics="clip"):
    evaluate.main(["score", *map(str, folders), "--metrics", metrics, "--batch_size", "2"])
    return [list(csv.DictReader(open(folder / "scores.csv", newline=""))) for folder in folders]


def test_scores_stand_beside_their_own_prompt(generate):
    """Each row is what the scorer says of that image and that prompt alone, whatever the batch."""
    from scorers import get_scorer

    out = generate("images")
    ((rows),) = score(out)
    _, scorer, identity = get_scorer("clip=tiny", "cpu")
    for row, prompt in zip(rows, PROMPTS):
        assert row["prompt"] == prompt
        alone = scorer([read_image((out / row["file"]).read_bytes())], [prompt]).item()
        assert float(row["clip"]) == pytest.approx(alone, rel=1e-5)
    assert json.loads((out / "scores.json").read_text())["scorers"] == {"clip": identity}


def test_a_toy_models_images_are_for_the_toy_clip(generate):
    """So that the embedded task needs no download; a CLIP that is named stands in a column of its own."""
    out = generate("images")
    ((rows),) = score(out, metrics="clip,clip=tiny")
    assert json.loads((out / "scores.json").read_text())["scorers"]["clip"]["source"] == "tiny"
    assert all(row["clip"] == row["clip=tiny"] for row in rows)


def test_what_is_scored_is_not_scored_again_unless_its_images_changed(generate, monkeypatch):
    """A score belongs to the bytes of an image and to the weights of a scorer."""
    import scorers

    calls, get_scorer = [], scorers.get_scorer

    def counting(source, device):
        name, scorer, identity = get_scorer(source, device)
        return name, lambda images, prompts: (calls.append(len(images)), scorer(images, prompts))[1], identity

    monkeypatch.setattr(scorers, "get_scorer", counting)
    out = generate("images")
    (first,) = score(out)
    assert sum(calls) == 5
    assert score(out) == [first] and sum(calls) == 5
    image = Image.open(out / "00003.png")
    evaluate.save_png(image.rotate(180), out / "00003.png")
    (second,) = score(out)
    assert sum(calls) == 6 and [a == b for a, b in zip(first, second)] == [True, True, True, False, True]
    (out / "scores.csv").write_text("an older one")  # the two files are written one after the other
    assert score(out) == [second] and sum(calls) == 6


def test_a_changed_image_costs_no_other_scores(generate):
    """Not those of other scorers, of other images, nor of a scorer that is given twice, of two sources."""
    out = generate("images")
    ((first),) = score(out, metrics="clip,clip=tiny")
    image = Image.open(out / "00003.png")
    evaluate.save_png(image.rotate(180), out / "00003.png")
    ((second),) = score(out)
    assert [row["clip=tiny"] for row in second] == [row["clip=tiny"] * (i != 3) for i, row in enumerate(first)]
    with pytest.raises(SystemExit, match="was not scored by clip=tiny, or its images changed since"):
        evaluate.main(["compare", str(out), str(generate("other")), "--out", str(out.parent / "report.html")])


def test_two_sources_of_a_scorer_stand_side_by_side(generate, monkeypatch):
    """As hpsv2=OLD,hpsv2=NEW; the second one alone was kept."""
    import scorers

    def constant(spec, device):
        name, _, source = spec.partition("=")
        return name, lambda images, prompts: torch.full((len(images),), float(source)), {"source": source}

    monkeypatch.setattr(scorers, "get_scorer", constant)
    ((rows),) = score(generate("images"), metrics="hpsv2=1,hpsv2=2,aesthetic=3,hpsv2=1")
    assert [(row["hpsv2=1"], row["hpsv2=2"], row["aesthetic"]) for row in rows] == [("1.0", "2.0", "3.0")] * 5


def test_a_stop_ends_in_one_line(generate, monkeypatch):
    """Ctrl-C; that what was scored is kept is shown below."""
    out = generate("images")

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "score_missing", stopped)
    with pytest.raises(SystemExit, match="^evaluate.py: stopped; the same command resumes"):
        evaluate.main(["score", str(out), "--metrics", "clip=tiny"])


@pytest.mark.parametrize("fault", ["nan", "stop"])
def test_what_was_scored_before_a_fault_is_kept(generate, monkeypatch, fault):
    """A scorer refuses a score that is not a number, see test_scorers.py; earlier scores stay."""
    import scorers

    scored = []

    def failing(spec, device):
        def scorer(images, prompts):
            scored.extend(prompts)
            if len(scored) == 4:
                raise KeyboardInterrupt if fault == "stop" else InputError("other: not a finite number: nan")
            return torch.ones(len(images))

        return "other", scorer, {"source": "here"}

    monkeypatch.setattr(scorers, "get_scorer", failing)
    out = generate("images")
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        score(out, metrics="other")
    assert fault == "stop" or str(ended.value) == "evaluate.py: other: not a finite number: nan"
    kept = json.loads((out / "scores.json").read_text())["images"]
    assert [row.get("other") for row in kept] == [1.0, 1.0, None, None, None]


def test_a_folder_is_not_compared_with_itself(generate, tmp_path):
    """By two names either: every interval of zero would be in the table."""
    out = generate("images")
    score(out)
    for again in (out, tmp_path / "link"):
        if again != out:
            again.symlink_to(out)
        with pytest.raises(SystemExit, match="is given twice"):
            evaluate.main(["compare", str(out), str(again), "--out", str(tmp_path / "report.html")])


def test_a_model_compared_with_itself_wins_one_half(generate, tmp_path, capsys):
    """Exactly: all ties."""
    one, other = generate("one"), generate("other")
    score(one, other)
    evaluate.main(["compare", str(one), str(other), "--out", str(tmp_path / "report.html")])
    report = json.loads((tmp_path / "report.json").read_text())
    result = report["results"][2]
    assert result["win_rate"] == 0.5 and result["difference"] == 0 and result["win_rate_95"] is None
    assert (result["wins"], result["ties"], result["losses"]) == (0, 4, 0)
    assert result["n"] == 4  # prompts; one is there twice
    assert "0/4/0" in capsys.readouterr().out and "0/4/0" in (tmp_path / "report.html").read_text()


def test_compare_counts_what_the_scores_say(generate, tmp_path):
    """Three folders, each against the first, over the rows of scores.csv."""
    folders = [generate(name, "--guidance", "3") for name in "abc"]
    for folder, angle in zip(folders[1:], (90, 180)):
        for file in folder.glob("*.png"):
            note = json.loads(Image.open(file).text[report.NOTE])
            evaluate.save_png(Image.open(file).rotate(angle), file, note)
    scores = [[float(row["clip"]) for row in rows] for rows in score(*folders)]
    evaluate.main(["compare", *map(str, folders), "--out", str(tmp_path / "report.html")])
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert [row["against"] for row in results] == [None] * 3 + ["a"] * 2
    means = [[(own[0] + own[2]) / 2, own[1], own[3], own[4]] for own in scores]  # two images of one prompt
    for result, own in zip(results, [*means, *means[1:]]):
        assert result["mean"] == pytest.approx(np.mean(own)) and result["median"] == pytest.approx(np.median(own))
        if result["against"]:
            assert result["wins"] == sum(a > b for a, b in zip(own, means[0]))
            assert result["difference"] == pytest.approx(np.mean(own) - np.mean(means[0]))


def table_of(tmp_path, *argv):
    """The results and the caption of a comparison, and the text of its other formats."""
    evaluate.main(["compare", *map(str, argv), "--out", str(tmp_path / "table.html")])
    content = json.loads((tmp_path / "table.json").read_text())
    texts = {kind: (tmp_path / f"table.{kind}").read_text() for kind in ("md", "csv", "tex", "html")}
    return content["results"], content["caption"], texts


def three_models(tmp_path, sets=("",), n=40):
    """Folders of scored images by three models: m1 is a little better than base, m2 better in half of the prompts."""
    rng, paths = np.random.default_rng(0), []
    for k, name in enumerate(("base", "m_1", "m&2")):
        (tmp_path / name).mkdir()
        paths.append(str(tmp_path / name))
        for set_name in sets:
            base = np.random.default_rng(1).normal(20, 3, size=(2, n))
            gain = [0, 0.1, rng.normal(0, 1, n)][k]
            folder = tmp_path / name / set_name if set_name else tmp_path / name
            if folder.exists():
                folder.rmdir()
            prompts = [f"{set_name} prompt {i}" for i in range(n)]
            scored(folder, prompts, {"s": base[0] + gain, "t": base[1] + gain})
            manifest = json.loads((folder / "manifest.json").read_text())
            for i, entry in enumerate(manifest["images"]):
                entry["columns"] = {"Category": ["Animals", "Outdoor | 50%"][i % 2]}
            (folder / "manifest.json").write_text(json.dumps(manifest))
    return paths


def test_the_table_in_all_formats(tmp_path, capsys):
    """By hand: paired t, Wilson, the exact sign test, Holm over all cells; the formats hold the same cells."""
    paths = three_models(tmp_path)
    results, caption, texts = table_of(tmp_path, *paths)
    compared = [row for row in results if row["against"]]
    assert len(compared) == 4 and "over the 4 comparisons of 20 prompts or more" in caption
    assert ",40,0,0," in texts["csv"]  # whole numbers
    assert all(row["against"] == "base" and row["n"] == 40 for row in compared)
    certain = [row for row in compared if row["images"] == "m_1"]
    for row in certain:
        assert (row["wins"], row["ties"], row["losses"], row["win_rate"]) == (40, 0, 0, 1.0)
        assert row["win_rate_95"] == pytest.approx([0.912, 1], abs=1e-3)  # Wilson's
        assert row["p"] == pytest.approx(2 * 0.5**40) and row["p_holm"] == pytest.approx(4 * row["p"])
        assert row["difference"] == pytest.approx(0.1) and row["difference_95"] == pytest.approx([0.1, 0.1])
    rows = [report.ImageFolder(path).read_scores()[1] for path in (paths[0], paths[2])]
    gains = np.array([b["s"] - a["s"] for a, b in zip(*rows)])
    row = compared[1]
    half = scipy.stats.t.ppf(0.975, 39) * gains.std(ddof=1) / 40**0.5
    assert row["difference_95"] == pytest.approx([gains.mean() - half, gains.mean() + half])
    assert row["p"] == pytest.approx(scipy.stats.binomtest(int((gains > 0).sum()), 40).pvalue)
    out = capsys.readouterr().out
    for text in (out, texts["md"], texts["html"]):
        assert "40/0/0" in text and "91.2% to 100.0%" in text
    assert r"m\_1" in texts["tex"] and r"m\&2" in texts["tex"] and r"91.2\% to 100.0\%" in texts["tex"]
    read = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert len(read) == len(results)
    assert float(read[-1]["difference_95_low"]) == pytest.approx(results[-1]["difference_95"][0])


def test_methods_have_short_names(tmp_path, capsys):
    """A method is named by what tells its path apart, or as the user says. The file keeps the paths."""
    for paths, names in ((["images/base", "images/rpo"], ["base", "rpo"]), (["out/a/images", "out/b/images"], ["a", "b"]),
                         (["x/a/images", "y/a/images", "z"], ["x/a/images", "y/a/images", "z"]), (["out/a"], ["a"])):
        assert report.short_names(paths) == names
    paths = three_models(tmp_path)
    named = [f"Base model={paths[0]}", f"ours={paths[1]}", paths[2]]
    results, caption, texts = table_of(tmp_path, *named, "--against", "ours")
    assert {row["against"] for row in results} == {None, "ours"}
    assert {row["images"] for row in results} == {"Base model", "ours", "m&2"}
    folders = json.loads((tmp_path / "table.json").read_text())["folders"]
    assert folders == {"ours": paths[1], "Base model": paths[0], "m&2": paths[2]}
    assert f"Base model: {paths[0]}" in capsys.readouterr().out and str(tmp_path) not in texts["md"] + texts["tex"]
    with pytest.raises(SystemExit, match="two folders have one name: a, a, m&2. Give each as NAME=DIR"):
        table_of(tmp_path, f"a={paths[0]}", f"a={paths[1]}", paths[2])


def test_the_caption_says_how_the_images_were_made(tmp_path, generate):
    """Steps, scheduler, guidance, size, seed, prompts, how many were cut, and the scorers' weights."""
    (tmp_path / "my_p.txt").write_text("a fox\n" + "word " * 400)
    folders = [generate(name, "--prompts", str(tmp_path / "my_p.txt")) for name in "ab"]
    score(*folders)
    _, caption, texts = table_of(tmp_path, *folders)
    digest = report.ImageFolder(folders[0]).read_scores()[0]["clip"]["digest"]
    assert caption.startswith("2 steps of PNDMScheduler, guidance 3, 32 px, float32, seed 0; 2 prompts of my_p.txt, 1 cut. "
                              f"Scorers: clip (tiny, digest {digest}).")
    assert caption in texts["md"] and caption in html.unescape(texts["html"])
    assert r"my\_p.txt, 1 cut" in texts["tex"] and r"95\% t interval" in texts["tex"]


def test_the_page_draws_the_differences(tmp_path):
    """An interval lies where its numbers say, on one scale for all methods of a scorer; zero is drawn, too."""
    results, _, texts = table_of(tmp_path, *three_models(tmp_path))
    drawings = page.interval_drawings(results)
    assert [drawing["title"] for drawing in drawings] == ["s", "t"]
    for drawing in drawings:
        rows = [row for row in results if row["against"] and row["scorer"] == drawing["title"]]
        for line, row in zip(drawing["lines"], rows, strict=True):
            assert line["label"] == f"{row['images']} \u2212 base" and 0 < line["low"] <= line["mean"] <= line["high"] < 100
            scale = (drawing["lines"][1]["high"] - drawing["zero"]) / rows[1]["difference_95"][1]
            assert line["mean"] - drawing["zero"] == pytest.approx(scale * row["difference"])
            assert line["is_better"] == (row["difference_95"][0] > 0)
    assert texts["html"].count('<div class="line">') == 4 and "<h1>m_1 and m&amp;2 against base</h1>" in texts["html"]


def test_any_opponent_or_all(tmp_path):
    """Against another the difference changes its sign; all pairs are every two once."""
    paths = three_models(tmp_path)
    usual, _, _ = table_of(tmp_path, *paths)
    other, _, _ = table_of(tmp_path, *paths, "--against", f"{paths[2]}/../{Path(paths[2]).name}/")
    forward = next(row for row in usual if row["against"] == "base" and row["images"] == "m&2")
    back = next(row for row in other if row["against"] == "m&2" and row["images"] == "base")
    assert forward["difference"] == pytest.approx(-back["difference"]) and forward["wins"] == back["losses"]
    every, caption, _ = table_of(tmp_path, *paths, "--all_pairs")
    found = [(row["images"], row["against"]) for row in every if row["against"] and row["scorer"] == "s"]
    assert found == [("m_1", "base"), ("m&2", "base"), ("m&2", "m_1")]
    assert "over the 6 comparisons" in caption
    with pytest.raises(SystemExit, match="--against nowhere is none of"):
        evaluate.main(["compare", *paths, "--against", "nowhere"])


def test_sets_and_categories_apart(tmp_path):
    """Each set by itself, each category of it too; Holm counts all of them."""
    paths = three_models(tmp_path, sets=("parti", "hps"))
    results, caption, texts = table_of(tmp_path, *paths, "--category", "Category")
    compared = [row for row in results if row["against"]]
    assert {(row["set"], row["category"], row["n"]) for row in compared} == {
        (name, category, n) for name in ("parti", "hps")
        for category, n in (("", 40), ("Animals", 20), ("Outdoor | 50%", 20))}
    assert "over the 24 comparisons" in caption and "Outdoor \\| 50%" in texts["md"]
    assert texts["html"].count("<section") == 80 and "[parti] parti prompt 0" in texts["html"]
    with pytest.raises(SystemExit, match="no prompt has a Style; they have Category"):
        table_of(tmp_path, *paths, "--category", "Style")
    shutil.rmtree(tmp_path / "m_1" / "hps")
    with pytest.raises(SystemExit, match="holds the sets hps, parti, .*m_1 parti; they are compared set by set"):
        table_of(tmp_path, *paths)


def test_categories_that_some_prompts_lack(tmp_path):
    """All prompts are a row, whatever is blank; a set without the column has that row alone; one value is none."""
    paths = three_models(tmp_path, sets=("parti", "hps", "same"), n=40)
    for path in paths:
        for name, values in (("parti", ["", "A", "B"]), ("hps", None), ("same", ["C"])):
            file = tmp_path / path / name / "manifest.json"
            manifest = json.loads(file.read_text())
            for i, entry in enumerate(manifest["images"]):
                entry["columns"] = {"Category": values[i % len(values)]} if values else None
            file.write_text(json.dumps(manifest))
    results, _, _ = table_of(tmp_path, *paths, "--category", "Category")
    found = {(row["set"], row["category"]): row["n"] for row in results}
    assert found == {("hps", ""): 40, ("parti", ""): 40, ("parti", "A"): 13, ("parti", "B"): 13, ("same", ""): 40}
    file = tmp_path / paths[1] / "parti" / "manifest.json"
    file.write_text(file.read_text().replace('"A"', '"Z"'))
    with pytest.raises(SystemExit, match="the Category of image 1 is A and Z in different folders"):
        table_of(tmp_path, *paths, "--category", "Category")


def test_tables_are_not_written_over_scores(tmp_path):
    """scores.html would stand beside scores.json, which is the folder's own."""
    paths = three_models(tmp_path)
    before = (Path(paths[0]) / "scores.json").read_bytes()
    with pytest.raises(SystemExit, match="lies among images"):
        evaluate.main(["compare", *paths, "--out", f"{paths[0]}/scores.html"])
    assert (Path(paths[0]) / "scores.json").read_bytes() == before


def test_chosen_rows_are_a_picture(tmp_path):
    """Each image in its place, small ones enlarged without a loss."""
    paths = three_models(tmp_path)
    evaluate.main(["compare", *paths, "--rows", "7", "2", "--out", str(tmp_path / "t.html")])
    grid = np.array(Image.open(tmp_path / "t.png"))
    assert grid.shape == (24 + 2 * 280, 3 * 256, 3)
    for place, number in enumerate((7, 2)):
        for k, path in enumerate(paths):
            colour = np.array(Image.open(f"{path}/{number:05d}.png"))[0, 0]
            top = 24 + place * 280 + 24
            assert (grid[top : top + 256, k * 256 : (k + 1) * 256] == colour).all()
    with pytest.raises(SystemExit, match="--rows are numbers of the page, from 0 to 39"):
        evaluate.main(["compare", *paths, "--rows", "40", "--out", str(tmp_path / "t.html")])


def test_votes_are_counted_with_their_interval(tmp_path, capsys):
    """Ties are halves; a vote of another page is refused."""
    paths = three_models(tmp_path)
    lines = ["index,first,other,winner"]
    for i in range(30):
        first, other = paths[:2]
        lines.append(f"{i},{first},{other},{[other, other, first, ''][i % 4]}")
    (tmp_path / "votes.csv").write_text("\n".join(lines))
    evaluate.main(["compare", *paths, "--votes", str(tmp_path / "votes.csv"), "--out", str(tmp_path / "t.html")])
    (vote,) = json.loads((tmp_path / "t.json").read_text())["votes"]
    assert (vote["n"], vote["wins"], vote["ties"], vote["losses"]) == (30, 16, 7, 7)
    outcomes = [[1, 1, 0, 0.5][i % 4] for i in range(30)]  # each of another prompt
    assert [vote["win_rate"], *vote["win_rate_95"]] == pytest.approx(rate_interval(outcomes, range(30)))
    assert "votes: m_1 is better than base in " in capsys.readouterr().out
    for wrong in ("0,base,m_1,", "99,{0},{1},", "0,{0},elsewhere,", "0,{0},{1},{2}", "x,{0},{1},"):
        (tmp_path / "votes.csv").write_text("index,first,other,winner\n" + wrong.format(*paths))
        with pytest.raises(SystemExit, match="cannot be read, or is of another page"):
            evaluate.main(["compare", *paths, "--votes", str(tmp_path / "votes.csv"), "--out", f"{tmp_path}/t.html"])


def test_few_prompts_have_counts_alone(tmp_path, capsys):
    results, caption, _ = table_of(tmp_path, *three_models(tmp_path, n=19))
    compared = [row for row in results if row["against"]]
    assert all(row["p"] is row["difference_95"] is row["win_rate_95"] is None for row in compared)
    assert "over the 0 comparisons of 20 prompts or more" in caption
    assert "fewer than 20 prompts there is no interval and no p" in caption and "19/0/0" in capsys.readouterr().out


def test_several_sets_of_prompts(tmp_path, generate, capsys):
    """One command; every set a folder; the columns of a row are kept; score and compare find them by their parent."""
    lines = ["Prompt\tCategory\tChallenge\tNote", "a fox\tAnimals\tBasic\t", "snow\tOutdoor\tStyle\tx", ""]
    (tmp_path / "p.tsv").write_text("\n".join(lines))
    (tmp_path / "q.json").write_text(json.dumps([{"prompt": "rain", "style": "photo", "n": 3}, {"prompt": "sun"}]))
    sets = ["--prompts", f"parti={tmp_path / 'p.tsv'}", f"hps={tmp_path / 'q.json'}"]
    one, other = generate("one", *sets), generate("other", *sets)
    entries = json.loads((one / "parti" / "manifest.json").read_text())["images"]
    assert entries[0]["columns"] == {"Category": "Animals", "Challenge": "Basic", "Note": ""}
    entries = json.loads((one / "hps" / "manifest.json").read_text())["images"]
    assert entries[0]["columns"] == {"style": "photo", "n": "3"} and "columns" not in entries[1]
    alone = generate("alone", "--prompts", str(tmp_path / "q.json"))
    assert same(pixels(alone), pixels(one / "hps"))
    evaluate.main(["score", str(one), str(other), "--metrics", "clip=tiny"])
    results, _, _ = table_of(tmp_path, one, other)
    assert [row["set"] for row in results if row["against"]] == ["hps", "parti"]
    for wrong in (["a=x.txt", "A=y.txt"], ["a=x.txt", "y.txt"], ["../a=x.txt", "b=y.txt"]):
        with pytest.raises(SystemExit, match="of several sets each is NAME=SOURCE"):
            generate("wrong", "--prompts", *wrong)
    with pytest.raises(SystemExit, match="holds images of one set of prompts"):
        generate("alone", *sets)
    with pytest.raises(SystemExit, match="holds sets of images; give one of them: hps, parti"):
        evaluate.main(["style", str(one), "--reference", str(alone)])


def test_a_folder_made_before_learns_what_stands_beside_its_prompts(tmp_path, generate):
    """Its images stay; one of several sets that is another's refuses all before any is claimed."""
    (tmp_path / "q.json").write_text(json.dumps([{"prompt": "rain", "style": "photo", "text": "kept"}]))
    out = generate("out", "--prompts", str(tmp_path / "q.json"))
    file = out / "manifest.json"
    before = json.loads(file.read_text())
    assert before["images"][0].pop("columns") == {"style": "photo", "text": "kept"}
    file.write_text(json.dumps(before))
    generate("out", "--prompts", str(tmp_path / "q.json"))
    assert json.loads(file.read_text())["images"][0]["columns"] == {"style": "photo", "text": "kept"}
    (out.parent / "both").mkdir()
    shutil.copytree(out, out.parent / "both" / "b")
    with pytest.raises(SystemExit, match="holds other images"):
        generate("both", "--prompts", f"a={tmp_path / 'q.json'}", f"b={tmp_path / 'q.json'}", "--seed", "5")
    assert not (out.parent / "both" / "a").exists()


def test_what_cannot_be_compared_is_refused_by_name(generate, tmp_path):
    """Peers compare models at different guidance, or pair prompts by their place in a sorted list."""
    base = generate("base")
    score(base)

    def refused(folder, complaint):
        with pytest.raises(SystemExit, match=complaint):
            evaluate.main(["compare", str(base), str(folder), "--out", str(tmp_path / "report.html")])

    refused(generate("guidance", "--guidance", "5"), "guidance is 3.0 in one and 5.0 in the other")
    refused(generate("seed", "--seed", "1"), "seed is 0 in one and 1 in the other")
    refused(generate("scheduler", "--scheduler", "DDIMScheduler"), "the scheduler's class is 'PNDMScheduler'")
    refused(generate("part", "--limit", "3"), "the prompt of image 3 is 'the words .* and None")
    (tmp_path / "other.txt").write_text("\n".join([*PROMPTS[:4], "rain"]))
    other = generate("prompt", "--prompts", str(tmp_path / "other.txt"))
    refused(other, "the prompt of image 4 is 'snow' in one and 'rain' in the other")
    ours, theirs = pixels(base), pixels(other)  # one noise, two prompts
    assert [(ours[name] == theirs[name]).all() for name in ours] == [True] * 4 + [False]
    unscored = generate("unscored")
    refused(unscored, "unscored was not scored by clip")
    score(unscored)
    identities = json.loads((unscored / "scores.json").read_text())
    identities["scorers"]["clip"]["digest"] = "another"
    (unscored / "scores.json").write_text(json.dumps(identities))
    refused(unscored, "was scored by another clip")


def test_no_score_without_the_right_image(generate, tmp_path):
    """Each would silently hold a prompt against another's image."""
    out = generate("images")

    def refused(complaint):
        with pytest.raises(SystemExit, match=complaint) as refusal:
            score(out)
        assert "\n" not in str(refusal.value)

    first, second = (out / f"0000{k}.png" for k in (0, 1))
    shutil.copy(first, tmp_path / "kept.png")
    shutil.copy(second, first)
    refused("00000.png was made for the index 1, not for 0 of the manifest")
    first.unlink()
    refused("lacks 1 of 5 images, the first is 00000.png")
    first.write_bytes(b"<html>404</html>")
    refused("00000.png cannot be read: .*if `generate` made it, remove it and give the same command again")
    whole = (tmp_path / "kept.png").read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    refused("00000.png cannot be read")
    first.unlink()
    assert len(score(generate("images"))[0]) == 5
    (out / "manifest.json").unlink()
    refused("has no manifest.json, so nobody knows its prompts")


def test_images_from_elsewhere_need_a_small_manifest(tmp_path):
    """File and prompt: other people's samplers can be scored and compared, too."""
    for name in "ab":
        (tmp_path / name).mkdir()
        images = [{"file": f"{k}.png", "prompt": tiny.caption(tiny.SCENES[k])} for k in range(4)]
        for k, image in enumerate(images):
            tiny.draw(tiny.SCENES[k], name == "b", random.Random(k)).save(tmp_path / name / image["file"])
        (tmp_path / name / "manifest.json").write_text(json.dumps({"images": images}))
    assert [len(rows) for rows in score(tmp_path / "a", tmp_path / "b", metrics="clip=tiny")] == [4, 4]
    evaluate.main(
        ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "new" / "r.html")]
    )
    assert (tmp_path / "new" / "r.html").exists() and (tmp_path / "new" / "r.json").exists()
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["images"][0]["prompt"] = "another"
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    before = (tmp_path / "b" / "scores.csv").read_text()
    (rows,) = score(tmp_path / "b", metrics="clip=tiny")
    assert rows[0]["prompt"] == "another" and (tmp_path / "b" / "scores.csv").read_text() != before


# Style


def drawn(folder, n, sketch, seed):
    folder.mkdir()
    rng = random.Random(seed)
    for k in range(n):
        tiny.draw(tiny.SCENES[k], sketch, rng).save(folder / f"{k:05d}.png")
    images = [{"file": f"{k:05d}.png", "prompt": tiny.caption(tiny.SCENES[k])} for k in range(n)]
    (folder / "manifest.json").write_text(json.dumps({"images": images, "toy": True}))
    return folder


def test_style_holds_everything_against_one_half_of_the_reference(tmp_path, capsys):
    """Sketches are as near as the floor, plain drawings are not, and one drawing over and over is caught."""
    reference = drawn(tmp_path / "reference", 60, True, 0)
    styled, base = drawn(tmp_path / "styled", 30, True, 1), drawn(tmp_path / "base", 40, False, 2)
    manifest = json.loads((styled / "manifest.json").read_text())
    base_manifest = manifest | {"images": manifest["images"]}
    (base / "manifest.json").write_text(json.dumps(base_manifest))
    collapsed = tmp_path / "collapsed"
    shutil.copytree(styled, collapsed)
    for file in collapsed.glob("*.png"):
        shutil.copy(styled / "00000.png", file)
    argv = [
        "style",
        str(styled),
        str(collapsed),
        "--base",
        str(base),
        "--reference",
        str(reference),
        "--no-fid",
    ]
    evaluate.main([*argv, "--out", str(tmp_path / "style.json")])
    rows = json.loads((tmp_path / "style.json").read_text())["rows"]
    assert [os.path.basename(row["images"]) for row in rows] == ["styled", "collapsed", "base", "floor"]
    assert {row["n"] for row in rows} == {30} and [row["base"] for row in rows] == [False, False, True, False]
    assert rows[0]["cmmd"] < rows[2]["cmmd"] and rows[3]["clip"] is None
    assert abs(rows[1]["diversity"]) < 1e-6 < rows[0]["diversity"]
    assert rows[3]["cmmd_95"][0] < rows[3]["cmmd"] < rows[3]["cmmd_95"][1]
    assert "no FID" in capsys.readouterr().out


def test_fid_is_the_frechet_distance_of_torch_fidelitys_features(tmp_path, monkeypatch):
    """At the N of all other columns, images of any size one by one; its network is stubbed, as it is downloaded."""
    def features(images):
        return torch.stack([torch.tensor(np.array(image).mean((0, 1))) for image in images])

    monkeypatch.setattr(style, "inception", lambda device: features)
    reference, styled = drawn(tmp_path / "reference", 20, True, 0), drawn(tmp_path / "styled", 10, True, 1)
    argv = ["style", str(styled), "--reference", str(reference), "--out", str(tmp_path / "style.json")]
    evaluate.main(argv)
    rows = json.loads((tmp_path / "style.json").read_text())["rows"]
    order = np.random.default_rng(0).permutation(20)
    half, other = ([Image.open(reference / f"{i:05d}.png") for i in k] for k in (order[:10], order[10:]))
    own = [Image.open(file) for file in sorted(styled.glob("*.png"))]
    assert rows[0]["fid"] == pytest.approx(frechet(features(own), features(half)))
    assert rows[1]["fid"] == pytest.approx(frechet(features(other), features(half)))


def test_gram_is_gatys_style_loss_of_every_image_to_every_reference(tmp_path, monkeypatch):
    """Computed here by its definition, pair by pair; on random weights, as torchvision downloads the real ones."""
    import torchvision

    torch.manual_seed(0)
    channels = [width if width == "M" else width // 16 for width in torchvision.models.vgg.cfgs["E"]]
    layers = torchvision.models.vgg.make_layers(channels)
    vgg = torch.nn.ModuleDict({"features": layers.eval()})  # thin, and without a classifier
    monkeypatch.setattr(torchvision.models, "vgg19", lambda weights: vgg)
    reference, styled = drawn(tmp_path / "reference", 4, True, 0), drawn(tmp_path / "styled", 2, False, 1)
    argv = ["style", str(styled), "--reference", str(reference), "--no-fid", "--batch_size", "1"]
    evaluate.main([*argv, "--gram", "--out", str(tmp_path / "style.json")])
    row, floor = json.loads((tmp_path / "style.json").read_text())["rows"]
    order = np.random.default_rng(0).permutation(4)
    half, other = ([reference / f"{i:05d}.png" for i in k] for k in (order[:2], order[2:]))

    @functools.cache
    def grams(file):
        x = torchvision.models.VGG19_Weights.DEFAULT.transforms()(Image.open(file))[None]
        matrices, rectified = [], 0
        for layer in vgg.features:
            x = layer(x)
            if isinstance(layer, torch.nn.Conv2d):
                rectified += 1
            elif isinstance(layer, torch.nn.ReLU) and rectified in (1, 3, 5, 9, 13):  # relu1_1, 2_1, 3_1, 4_1, 5_1
                n, m = x.shape[1], x[0, 0].numel()
                matrices.append((x[0].flatten(1) @ x[0].flatten(1).T, n, m))
        return matrices

    def style_loss(a, b):
        losses = [(g - h).square().sum() / (4 * n**2 * m**2) for (g, n, m), (h, _, _) in zip(grams(a), grams(b))]
        assert len(losses) == 5
        return sum(losses).item() / 5

    for files, got in ((sorted(styled.glob("*.png")), row["gram"]), (other, floor["gram"])):
        expected = np.mean([style_loss(a, b) for a in files for b in half])
        assert got == pytest.approx(expected, rel=1e-4)


def test_a_reference_that_is_too_small_or_missing_is_refused(tmp_path):
    """Two halves of at least two images."""
    styled, reference = drawn(tmp_path / "styled", 4, True, 1), drawn(tmp_path / "reference", 3, True, 0)
    with pytest.raises(SystemExit, match="holds 3 images"):
        evaluate.main(["style", str(styled), "--reference", str(reference), "--no-fid"])
    with pytest.raises(SystemExit, match="holds 0 images"):
        evaluate.main(["style", str(styled), "--reference", str(tmp_path / "nowhere"), "--no-fid"])


# Pairs out of scores


def scored(folder, prompts, scores, identity=None):
    """A folder of small pictures with given scores {scorer: a number per prompt}."""
    folder.mkdir()
    entries = []
    for i, prompt in enumerate(prompts):
        shade = (37 * i + len(folder.name) * 11 + ord(folder.name[0])) % 256
        Image.new("RGB", (32, 32), (shade, i, 0)).save(folder / f"{i:05d}.png")
        entries.append({"file": f"{i:05d}.png", "prompt": prompt})
    (folder / "manifest.json").write_text(json.dumps({"images": entries}))
    images = report.ImageFolder(folder)
    for name, values in scores.items():
        images.write_scores(name, identity or {"source": name}, dict(enumerate(values)))
    return str(folder)


def read_pairs(file):
    return datasets.load_dataset("parquet", data_files=str(file), split="train").to_list()


def test_the_best_stands_against_the_worst(tmp_path, capsys):
    """Over all folders, by hand; the winner is on either side; the pictures are the files themselves."""
    prompts = [f"prompt {k}" for k in range(12)]
    a = scored(tmp_path / "a", prompts, {"s": [1.0] * 12})
    b = scored(tmp_path / "b", prompts, {"s": [2.0] * 10 + [1.0, 0.5]})
    c = scored(tmp_path / "c", prompts[:5], {"s": [1.5, 0.0, 3.0, 1.5, 1.2]})
    evaluate.main(["pairs", a, b, c, "--by", "s", "--out", str(tmp_path / "out")])
    rows = read_pairs(tmp_path / "out" / "train.parquet")
    assert "11 pairs of 11 of 12 prompts, 1 ties" in capsys.readouterr().out
    found = {}
    for row in rows:
        sides = ("0", "1") if row["label_0"] == 1 else ("1", "0")
        assert row["label_0"] + row["label_1"] == 1 and row["has_label"]
        better, worse = (Path(row[f"file_{side}"]) for side in sides)
        assert row[f"jpg_{sides[0]}"] == better.read_bytes() and row[f"jpg_{sides[1]}"] == worse.read_bytes()
        assert row["s_gap"] == row[f"s_{sides[0]}"] - row[f"s_{sides[1]}"] > 0
        found[row["caption"]] = (better.parent.name, worse.parent.name)
    expected = {f"prompt {k}": ("b", "a") for k in range(10)} | {"prompt 1": ("b", "c"), "prompt 2": ("c", "a")}
    assert found == expected | {"prompt 11": ("a", "b")}
    assert {row["label_0"] for row in rows} == {0.0, 1.0}
    pairs = data.ImagePairs(str(tmp_path / "out"), 32)  # as train.py reads them
    assert len(pairs) == 11
    for row in pairs.rows:
        (winner, _), _ = pairs.load(row)
        file = rows[row]["file_0" if rows[row]["label_0"] == 1 else "file_1"]
        assert np.array_equal(np.array(winner), np.array(Image.open(file)))


@pytest.mark.parametrize(
    "scores, least, every, expected",
    [
        ([[1.0], [3.0], [2.0]], [0.0], False, [(1, 0, None)]),
        ([[1.0], [3.0], [2.0]], [0.0], True, [(1, 2, None), (1, 0, None), (2, 0, None)]),
        ([[1.0], [3.0], [2.0]], [1.5], True, [(1, 2, "near-ties"), (1, 0, None), (2, 0, "near-ties")]),
        ([[1.0], [1.0]], [0.0], False, [(0, 1, "ties")]),
        ([[1.0], [1.4]], [0.5], False, [(1, 0, "near-ties")]),
        ([[1.0], [1.5]], [0.5], False, [(1, 0, None)]),  # at least so much
        ([[1.0, 5.0], [2.0, 4.0]], [0.0, 0.0], False, [(0, 1, "without a majority")]),
        ([[1.0, 5.0], [2.0, 6.0]], [0.0, 0.0], False, [(1, 0, None)]),
        ([[1.0, 5.0], [2.0, 5.1]], [0.0, 1.0], False, [(1, 0, "near-ties")]),  # one of two is no majority
        ([[1.0, 5.0, 1.0], [2.0, 4.0, 2.0]], [0.0, 0.0, 0.0], False, [(1, 0, None)]),
        ([[7.0]], [0.0], False, []),
    ],
)
def test_a_majority_of_scorers_prefers(scores, least, every, expected):
    assert ranked_pairs(np.array(scores), np.array(least), every) == expected


def test_scorers_with_gaps_of_their_own(tmp_path, capsys):
    prompts = ["one", "two", "three", "four"]
    a = scored(tmp_path / "a", prompts, {"s": [0, 0, 0, 0], "t": [0, 0, 0, 0]})
    b = scored(tmp_path / "b", prompts, {"s": [1, 1, 1, -1], "t": [0.2, 0.4, -0.4, -0.4]})
    evaluate.main(["pairs", a, b, "--by", "s+t", "--min_gap", "1+0.3", "--out", str(tmp_path / "p.parquet")])
    rows = read_pairs(tmp_path / "p.parquet")
    assert [row["caption"] for row in rows] == ["two", "four"]
    assert "1 near-ties, 1 without a majority" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds p.parquet already"):
        evaluate.main(["pairs", a, b, "--by", "s", "--out", str(tmp_path / "p.parquet")])


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--by", "u"], "was not scored by u"),
        (["--by", "s", "--min_gap", "x"], "must be a number"),
        (["--by", "s", "--min_gap=-1"], "must be a number"),
        (["--by", "s+t", "--min_gap", "1+2+3"], "one for each of s"),
        (["--by", "s", "--min_gap", "99"], "none is left of 2 prompts, 2 near-ties"),
    ],
)
def test_pairs_that_cannot_be_made_are_refused(tmp_path, options, complaint):
    a = scored(tmp_path / "a", ["one", "two"], {"s": [1, 2], "t": [1, 2]})
    b = scored(tmp_path / "b", ["one", "two"], {"s": [2, 1], "t": [2, 2]})
    with pytest.raises(SystemExit, match=complaint):
        evaluate.main(["pairs", a, b, *options, "--out", str(tmp_path / "p.parquet")])
    assert not (tmp_path / "p.parquet").exists()


def test_pairs_go_to_a_place_of_their_own(tmp_path):
    """Beside other files train.py would read both; a folder that is given twice would count twice."""
    a = scored(tmp_path / "a", ["one"], {"s": [1]})
    b = scored(tmp_path / "b", ["one"], {"s": [2]})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other.parquet").touch()
    with pytest.raises(SystemExit, match="out holds other.parquet already"):
        evaluate.main(["pairs", a, b, "--by", "s", "--out", str(tmp_path / "out")])
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "train.part").touch()  # of a command that was killed
    evaluate.main(["pairs", a, b, "--by", "s", "--out", str(tmp_path / "killed")])
    assert [file.name for file in (tmp_path / "killed").iterdir()] == ["train.parquet"]
    with pytest.raises(SystemExit, match="is given twice"):
        evaluate.main(["pairs", a, b, a, "--by", "s", "--out", str(tmp_path / "new")])


def test_scores_of_another_scorer_do_not_mix(tmp_path):
    a = scored(tmp_path / "a", ["one"], {"s": [1]}, {"source": "here"})
    b = scored(tmp_path / "b", ["one"], {"s": [2]}, {"source": "there"})
    with pytest.raises(SystemExit, match="was scored by another s"):
        evaluate.main(["pairs", a, b, "--by", "s", "--out", str(tmp_path / "p.parquet")])


def test_several_images_of_a_prompt(generate):
    """The first is the one that is drawn alone; all differ; twice the command is the same; and they make pairs."""
    alone, three = generate("alone", "--batch_size", "1"), generate("three", "--per_prompt", "3", "--batch_size", "1")
    one, several = pixels(alone), pixels(three)
    assert sorted(several) == [f"{i:05d}-{k}.png" for i in range(5) for k in range(3)]
    for i in range(5):
        assert np.array_equal(one[f"{i:05d}.png"], several[f"{i:05d}-0.png"])
        assert not np.array_equal(several[f"{i:05d}-0.png"], several[f"{i:05d}-1.png"])
    entries = json.loads((three / "manifest.json").read_text())["images"]
    assert len({entry["seed"] for entry in entries}) == 15
    again = generate("three", "--per_prompt", "3", "--batch_size", "1")
    assert same(pixels(again), several)
    with pytest.raises(SystemExit, match="per_prompt is 3 in one and 2"):
        generate("three", "--per_prompt", "2")
    evaluate.main(["score", str(three), "--metrics", "clip=tiny"])
    out = three.parent / "pairs"
    evaluate.main(["pairs", str(three), "--by", "clip=tiny", "--all", "--out", str(out)])
    rows = read_pairs(out / "train.parquet")
    assert {row["caption"] for row in rows} == set(PROMPTS)
    assert all(row["clip=tiny_gap"] > 0 for row in rows)


# All of it


@pytest.mark.slow
def test_the_embedded_task_end_to_end(tmp_path, monkeypatch, capsys):
    """With nothing but defaults, nothing downloaded; the page is read by a browser where there is one."""
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path / "reference", 16, True, 0)
    for name, guidance in (("a", "3"), ("b", "3"), ("c", "1")):
        evaluate.main(["generate", "--out", name, "--steps", "2", "--limit", "8", "--guidance", guidance])
    evaluate.main(["score", "a", "b"])
    evaluate.main(["compare", "a", "b"])
    result = json.loads((tmp_path / "report.json").read_text())["results"][2]
    assert (result["win_rate"], result["ties"]) == (0.5, 8)
    evaluate.main(
        ["style", "b", "--base", "a", "--reference", "reference", "--no-fid", "--out", "style.json"]
    )
    rows = json.loads((tmp_path / "style.json").read_text())["rows"]
    assert rows[0]["cmmd"] == rows[1]["cmmd"] and rows[2]["images"] == "floor"
    with pytest.raises(SystemExit, match="a and c cannot be compared: guidance is 3.0 in one and 1.0"):
        evaluate.main(["style", "a", "c", "--reference", "reference"])
    if BROWSER:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "report.html").as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
        assert dom.count("<section") == 8 and "8 prompts: 0 better, 0 worse, 8 equal" in dom
