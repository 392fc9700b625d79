"""What people give by mistake ends in one line that names it and the way out; what they may give is taken."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow
import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import data
import encode
import evaluate
import loading
import reference
import sources
import stats
import train
from common import InputError
from extras import prompts as prompts_room
from data import ImagePairs
from small_runs import fresh
from test_field import jsonl, parquet

pytestmark = pytest.mark.usefixtures("quick_models")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 3438167536\n"


def refused(*argv, match):
    """train.py ends in one line that fits, and writes nothing."""
    with pytest.raises(SystemExit, match=match) as ended:
        train.main(["--device", "cpu", "--clip", "tiny", "--out", "out", *map(str, argv)])
    assert "\n" not in str(ended.value) and not Path("out").exists()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Models


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_network_alone_is_no_model(tmp_path, small_model, few_pairs, part):
    shutil.copytree(Path(small_model("sd")) / part, tmp_path / "alone" / part)
    for folder in ("alone", f"alone/{part}"):
        refused("--model", folder, "--data", few_pairs, match="A --model is a whole pipeline.*copy the pipeline, and put the network into")


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "other.safetensors"])
def test_lora_weights_are_no_model(tmp_path, small_model, few_pairs, name):
    save_file({"unet.x.lora.down.weight": torch.zeros(2, 8)}, tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        for config in ([], ["--config", small_model("sd")]) if source.is_file() else ([],):
            refused("--model", source, "--data", few_pairs, *config,
                    match=r"LoRA weights are for --init_lora \(train.py, encode.py\) or --lora \(evaluate.py\)")


def test_a_hub_id_that_was_not_downloaded_says_that_the_hub_is_off(few_pairs):
    refused("--model", "someone/some-model", "--data", few_pairs, match="HF_HUB_OFFLINE is set")
    refused("--data", "someone/some-pairs", match="someone/some-pairs.*Offline")


@pytest.mark.parametrize("variants, wanted", [(["fp16", "non_ema"], None), (["", "fp16"], ""), (["ema"], "ema")])
def test_the_only_variant_is_taken_and_two_are_named(tmp_path, small_model, variants, wanted):
    folder = shutil.copytree(small_model("sd"), tmp_path / "model")
    (plain,) = (folder / "unet").glob("*.safetensors")
    weights = load_file(plain)
    plain.unlink()
    for number, variant in enumerate(variants):
        name = f"diffusion_pytorch_model.{variant}.safetensors" if variant else plain.name
        save_file({key: torch.full_like(value, number) for key, value in weights.items()}, plain.with_name(name))
    if wanted is None:
        with pytest.raises(InputError, match="its unet has the variants fp16, non_ema; keep the files of one"):
            loading.load_model(str(folder))
    else:
        number = variants.index(wanted)
        assert all((value == number).all() for value in loading.load_model(str(folder)).denoiser.parameters())


def test_a_hub_id_with_the_fp16_variant_alone_is_loaded(small_model):
    """The same as a folder of this kind. The hub's cache is that of `from_pretrained`."""
    snapshot = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--someone--half" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    loading.load_model(small_model("sd")).pipe.save_pretrained(snapshot, variant="fp16")
    loaded = loading.load_model("someone/half")
    assert loading.weights_digest(loaded) == loading.weights_digest(loading.load_model(small_model("sd")))


@pytest.mark.parametrize("name, complaint", [
    ("unet.x.hada_w1_a", "LoHa weights"), ("lora_unet_x.lokr_w1", "LoKr weights"),
    ("base_model.model.x.lora_A.weight", "peft's own form"), ("unet.x.dora_scale", "DoRA weights")])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_another_adapter_is_named(tmp_path, small_model, name, complaint, suffix):
    file = tmp_path / f"adapter_model.{suffix}"
    weights = {name: torch.zeros(2, 2)}
    save_file(weights, file) if suffix == "safetensors" else torch.save(weights, file)
    for source in (file, tmp_path):
        with pytest.raises(InputError, match=f"they are (in )?{complaint}"):
            loading.fuse_lora(fresh(small_model("sd")), str(source))


def test_fals_form_of_flux_weights_is_left_to_diffusers(tmp_path, small_model):
    """Its names begin as peft's do. These two lack most of the layers, so that reading them ends there."""
    file = tmp_path / "fal.safetensors"
    save_file({f"base_model.model.double_blocks.0.img_mod.lin.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"},
              file)
    with pytest.raises(InputError, match="fal.safetensors cannot be loaded") as error:
        loading.fuse_lora(fresh(small_model("flux")), str(file))
    assert "peft's own form" not in str(error.value)


def test_a_hub_id_that_stands_on_an_adapter_that_is_not_here_is_refused(small_model):
    """Alone it would be another model's."""
    snapshot = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--someone--second" / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("b" * 40)
    (snapshot / loading.LOWER_LORA).write_text(json.dumps({"init_lora": "/home/someone/first"}))
    with pytest.raises(InputError, match="LoRA weights /home/someone/first cannot be loaded"):
        loading.fuse_lora(fresh(small_model("sd")), "someone/second")


@pytest.mark.parametrize("source, complaint", [("nowhere", "no such file"), ("some/lora", "pytorch_lora_weights")])
def test_lora_weights_that_are_not_there_are_named(small_model, source, complaint):
    with pytest.raises(InputError, match=f"LoRA weights {source} cannot be loaded.*{complaint}"):
        loading.fuse_lora(fresh(small_model("sd")), source)


@pytest.mark.parametrize("kind", ["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
def test_samples_have_the_models_own_guidance(tmp_path, small_model, few_pairs, monkeypatch, kind):
    """train.py and evaluate.py take it for a folder, too; that of a toy is 3."""
    argv = ["--model", small_model(kind), "--device", "cpu"]
    evaluate.main(["generate", *argv, "--prompts", "tiny", "--limit", "1", "--steps", "1", "--out", "images"])
    train.main([*argv, *f"--data {few_pairs} --loss sft --steps 1 --batch_size 2 --sample_every 0 --out toy".split()])
    monkeypatch.setattr(train.run, "load_model", lambda *more: large(fresh(*more)))
    train.main([*argv, *f"--data {few_pairs} --loss sft --steps 1 --batch_size 2 --sample_every 0 --out large".split(),
                "--clip", "tiny"])
    manifest, toy, grown = (json.loads(Path(name).read_text()) for name in (
        "images/manifest.json", "toy/config.json", "large/config.json"))
    own = {"sdxl": 5.0, "flux": 3.5}[kind]
    assert (manifest["settings"]["guidance"], toy["guidance"], grown["guidance"]) == (3.0, 3.0, own)


def large(model):
    """With the guidance of a model that is no toy."""
    model.guidance = type(model).guidance
    return model


# Data


def test_a_list_in_another_encoding_is_named(tmp_path):
    """PowerShell's > writes UTF-16; Excel may write Latin-1."""
    text = json.dumps({"prompt": "café", "chosen": "a.png", "rejected": "b.png"}, ensure_ascii=False)
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "pairs.jsonl").write_text(text, encoding=encoding)
        refused("--data", tmp_path / "pairs.jsonl", match="pairs.jsonl cannot be read: it is not UTF-8 .*save it as UTF-8")


def test_one_json_array_is_no_list_of_lines(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps([{"prompt": "a"}], indent=1))
    refused("--data", tmp_path, match="line 1 of .*pairs.jsonl cannot be read.*A line is a JSON object with prompt")


@pytest.mark.parametrize("path", [
    "images\\a.png", "C:\\images\\a.png", "https://example.org/a.png", "file:///a.png", "a%20b.png", "base64",
    "data:image/png;base64,AAAA"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_is_no_path_is_told_in_a_short_line(tmp_path, path, kind):
    path = "A" * 60000 if path == "base64" else path
    if kind == "jsonl":
        (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a fox", "chosen": path, "rejected": path}))
    else:
        cells = {name: pyarrow.array([path]) for name in ("jpg_0", "jpg_1")}
        parquet(tmp_path / "pairs.parquet", 0, **cells)
    pairs = ImagePairs(str(tmp_path), 32)
    with pytest.raises(InputError, match="A path names a file, with / between folders, and is no address") as error:
        pairs.scan()
    assert len(str(error.value)) < 1000


def test_the_line_on_unreadable_pairs_is_short_and_gives_advice_on_paths_alone(tmp_path):
    """Even if a thousand pairs are unreadable."""
    for name, content, is_advised in (("gone", None, True), ("page", "<html>404</html>", False)):
        lines = [json.dumps({"prompt": "a", "chosen": f"{name}.png", "rejected": f"{name}.png"})] * 1000
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        if content:
            (tmp_path / f"{name}.png").write_text(content)
        with pytest.raises(InputError, match="1000 that cannot be read") as error:
            ImagePairs(str(tmp_path), 32).scan()
        assert len(str(error.value)) < 600 and ("A path names a file" in str(error.value)) == is_advised


@pytest.mark.parametrize("name", ["pairs.parquet", "train/a.parquet", "pairs.jsonl"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(POINTER)
    refused("--data", tmp_path, match=f"{name} cannot be read: it is a pointer of git-lfs; fetch the file by")


def test_pictures_that_are_pointers_are_listed_as_such(tmp_path):
    jsonl(tmp_path / "pairs.jsonl", 0, 1)
    (tmp_path / "1-0.png").write_text(POINTER)
    pairs = ImagePairs(str(tmp_path), 32)
    pairs.scan()
    assert pairs.report()["unreadable"] == {"a pointer of git-lfs": [1]}


@pytest.mark.parametrize("read", [sources.read_rows, encode.stream_rows])
@pytest.mark.parametrize("column, values, complaint", [
    ("caption", [["one", "two"]] * 2, "caption in .* has the type list<.*strings are needed"),
    ("caption", [{"en": "one"}] * 2, "caption in .* has the type struct<.*strings are needed"),
    ("split", ["train", "test"], "a column split with test, train"),
    ("split", ["train", "train"], None)])
def test_data_of_the_hub_are_checked_as_files_are(tmp_path, monkeypatch, read, column, values, complaint):
    file = parquet(tmp_path / "pairs.parquet", 0, 1, **{column: pyarrow.array(values)})
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: load("parquet", data_files=str(file), split=split))
    builder = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder("parquet", data_files=str(file)))
    if complaint is None:
        assert read("someone/pairs").columns["caption"].to_pylist() == ["pair 0", "pair 1"]
        return
    with pytest.raises(InputError, match=complaint):
        read("someone/pairs")


# Prompts


@pytest.mark.parametrize("name, text, prompts", [
    ("drawbench.csv", "Prompts,Category\nA red car.,Colors\n", ["A red car."]),
    ("mjhq.json", '{"a1": {"category": "art", "prompt": "a cat"}, "b2": {"category": "art", "prompt": "a dog"}}',
     ["a cat", "a dog"]),
    ("rows.json", '[{"prompt": "a cat"}]', ["a cat"]),
    ("one.json", '{"prompt": "a cat"}', None),
    ("coco.json", '{"images": [{"prompt": "a cat"}]}', None),
    ("words.json", '{"model": "sd15", "seed": "3"}', None)])
def test_published_lists_of_prompts_are_read_and_others_refused(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text)
    if prompts:
        assert prompts_room.read_prompts(tmp_path / name) == prompts
        return
    with pytest.raises(InputError, match="the JSON is neither a list nor"):
        prompts_room.read_prompts(tmp_path / name)


def test_prompts_that_are_a_pointer_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text(POINTER)
    with pytest.raises(InputError, match="p.txt cannot be read: it is a pointer of git-lfs"):
        prompts_room.read_prompts(tmp_path / "p.txt")


def test_prompts_that_are_not_utf8_are_refused(tmp_path):
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "p.csv").write_text("prompt\nun café\n", encoding=encoding)
        with pytest.raises(InputError, match="p.csv cannot be read: it is not UTF-8"):
            prompts_room.read_prompts(tmp_path / "p.csv")


def test_negative_prompts_are_not_used_and_that_is_said(tmp_path, small_model, capsys):
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na fox,blurry\n")
    argv = ["--model", small_model("sd"), "--device", "cpu", "--steps", "1", "--resolution", "32"]
    evaluate.main(["generate", *argv, "--prompts", "p.csv", "--out", "images"])
    assert "negative_prompt is kept in the manifest, but it is not used" in capsys.readouterr().out


# Paths and locks


@pytest.mark.parametrize("option", ["--data", "--model", "--out", "--validate", "--reference_errors", "--init_lora"])
def test_a_name_that_is_too_long_is_one_line(small_model, few_pairs, option):
    argv = {"--model": small_model("sd"), "--data": few_pairs, "--steps": "1"} | {option: "x" * 300}
    refused(*(word for item in argv.items() for word in item), match="^train.py: .*File name too long")


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_the_file_systems_locks_a_folder_still_keeps_others_out(tmp_path, no_locks):
    folder = tmp_path / "run"
    with common.run_folder(folder):
        (folder / "log.jsonl").touch()
        with pytest.raises(InputError, match=f"another live run is writing to {folder}. If there is none, remove"):
            with common.run_folder(folder):
                pass
    with common.run_folder(folder):  # it was released
        pass
    assert (folder / "log.jsonl").exists()
    with common.run_folder(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()


def test_a_killed_run_leaves_no_lock_for_ever(tmp_path, no_locks):
    """The process that held it is dead, so the next one takes it."""
    folder = tmp_path / "run"
    child = os.fork()
    if not child:
        with common.run_folder(folder):
            (folder / "log.jsonl").touch()
            os._exit(0)
    os.waitpid(child, 0)
    with common.run_folder(folder):
        assert (folder / "log.jsonl").exists()


def test_a_data_cache_without_locks_says_where_to_put_it(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    parquet(tmp_path / "a.parquet", 0)
    refused("--data", tmp_path, match="Set HF_HOME to a folder on a file system with locks")


# Draws and intervals


def test_draws_may_differ_by_rounding_alone():
    """torch rounds normal numbers in another way on other processors. Another draw is another run."""
    stream = object.__new__(data.Stream)
    noise = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.stack([stream.draw_id(torch.tensor(7), torch.tensor(t), noise) for t in (0.25, 500.0)])
    rounded = torch.stack([stream.draw_id(torch.tensor(7), torch.tensor(t), noise * (1 + 1e-7)) for t in (0.25, 500.0)])
    reference.check_draws("it was trained", ids, rounded, 3)
    for row, t, factor in ((8, 0.25, 1), (7, 0.2501, 1), (7, 0.25, -1), (7, 0.25, 1.01)):
        other = torch.stack([stream.draw_id(torch.tensor(row), torch.tensor(t), noise * factor), ids[1]])
        with pytest.raises(InputError, match="by other code or on other data: at step 3, position 5, it drew"):
            reference.check_draws("it was trained", ids, other, 3, first=5)
    swapped = stream.draw_id(torch.tensor(7), torch.tensor(0.25), noise.flip(0))
    assert abs(swapped[2] - ids[0, 2]) > 1  # the places of the numbers count, too


@pytest.mark.parametrize("outcomes", [(1, 0, 1), (0.1, 0.2, 0.3), (1, 1, 0)])
def test_where_all_prompts_agree_they_are_the_trials(outcomes):
    """Float rounding decides nothing: with 7 prompts of equal outcomes the interval is Wilson's for 7."""
    prompts = np.repeat(np.arange(7), 3)
    rate, low, high = stats.rate_interval(outcomes * 7, prompts)
    assert (low, high) == pytest.approx(stats.wilson(rate, 7))
