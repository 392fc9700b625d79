"""What people met in the field: each test is named after what was lost, and has the right value in it."""

import io
import json
import os
import re
import shutil
from decimal import Decimal
from pathlib import Path

import diffusers
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import common
import data
import encode
import evaluate
import loading
import pictures
import sources
import train
from common import InputError
from extras import prompts as prompts_room
from small_runs import log_of
from test_resume import left

pytestmark = pytest.mark.usefixtures("quick_models")


def saved(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pair(number, **changes):
    """A row in Pick-a-Pic's schema. Each image has its own shade of grey."""
    images = [saved(Image.new("RGB", (32, 32), (8 * number + side,) * 3)) for side in (0, 1)]
    row = {"caption": f"pair {number}", "jpg_0": images[0], "jpg_1": images[1], "label_0": 1.0}
    return row | changes


def parquet(file, *numbers, **columns):
    """A parquet file of some pairs. `columns` replaces or adds columns, as pyarrow arrays."""
    table = pyarrow.Table.from_pylist([pair(number) for number in numbers])
    for name, column in columns.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, column)
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, file)
    return file


def jsonl(file, *numbers):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in numbers:
        row = pair(number)
        for side in (0, 1):
            (file.parent / f"{number}-{side}.png").write_bytes(row[f"jpg_{side}"])
        lines.append({"prompt": row["caption"], "chosen": f"{number}-0.png", "rejected": f"{number}-1.png"})
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def read_by_both(source):
    """The pairs of a source, after a check that train.py and encode.py read the same ones."""
    by_train = data.ImagePairs(str(source), 32)
    by_encode = data.ImagePairs(str(source), 32, source_rows=encode.stream_rows(str(source)))
    assert by_train.report() == by_encode.report() and by_train.digest() == by_encode.digest()
    for position in range(len(by_train)):
        a, b = by_train[position], by_encode[position]
        assert a["caption"] == b["caption"] and torch.equal(a["pixels"], b["pixels"])
    return by_train


def captions(pairs):
    return sorted(pairs.caption(row) for row in pairs.rows)


# 1. What belongs to a data set

LAYOUTS = {
    "flat": ("train.parquet", "test.parquet"),
    "hub": ("default/train/0000.parquet", "default/validation/0000.parquet"),
    "shards": ("data/train-00000-of-00001.parquet", "data/test_unique-00000-of-00001.parquet"),
    "words": ("training_2.parquet", "my-dev.parquet"),
    "lists": ("train.jsonl", "eval.jsonl"),
    "upper": ("Train/a.parquet", "TEST/a.parquet"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_held_out_pairs_are_not_trained_on(tmp_path, layout):
    ours, theirs = LAYOUTS[layout]
    write = jsonl if ours.endswith("jsonl") else parquet
    write(tmp_path / ours, 0, 1, 2), write(tmp_path / theirs, 3, 4)
    pairs = read_by_both(tmp_path)
    assert captions(pairs) == ["pair 0", "pair 1", "pair 2"]
    assert [*pairs.report()["left_out"]] == [theirs] and f"{theirs} left out" in pairs.summary()
    assert captions(read_by_both(tmp_path / theirs)) == ["pair 3", "pair 4"]  # a file that is named is read
    (tmp_path / ours).unlink()
    with pytest.raises(InputError, match=f"no training split, only .*name the file: --data {tmp_path}/{theirs}"):
        read_by_both(tmp_path)


# What belongs to a source


@pytest.mark.parametrize("write, suffix", [(parquet, ".PARQUET"), (jsonl, ".JSONL"), (jsonl, ".JsonL")])
def test_a_suffix_in_capitals_is_a_suffix(tmp_path, write, suffix):
    """Half of the pairs were passed over without a word, and a list that was named was read as parquet."""
    write(tmp_path / f"part-0{suffix.lower()}", 0, 1), write(tmp_path / f"PART-1{suffix}", 2)
    assert len(read_by_both(tmp_path)) == 3
    assert captions(read_by_both(tmp_path / f"PART-1{suffix}")) == ["pair 2"]


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.json", "data-00000-of-00001.arrow", "0.tar", "pairs.jsonl.gz"])
def test_lists_in_other_formats_are_named(tmp_path, name):
    (tmp_path / name).write_text("[]")
    kind = Path(name).suffix
    with pytest.raises(InputError, match=f"no parquet file and no .jsonl file; 1 {kind} files: neither parquet nor"):
        read_by_both(tmp_path)
    parquet(tmp_path / "a.parquet", 0)
    assert read_by_both(tmp_path).left_out == {f"1 {kind} files": "neither parquet nor .jsonl"}


@pytest.mark.parametrize("name", ["split=train", "trainset", "split=training/label_0=1"])
@pytest.mark.parametrize("other", ["split=test", "testset", "split=validation", "valset/0"])
def test_a_folder_may_name_its_split_as_spark_does(tmp_path, name, other):
    """Held-out rows were trained on."""
    parquet(tmp_path / name / "0.parquet", 0, 1), parquet(tmp_path / other / "0.parquet", 2)
    assert captions(read_by_both(tmp_path)) == ["pair 0", "pair 1"]


@pytest.mark.parametrize("splits, is_refused", [
    (["train", "test"], True), (["train", "val"], True), (["test", "test"], True), (["train", "train"], False),
    (["a", "b"], False), ([None, None], False), ([0, 1], False)])
@pytest.mark.parametrize("kind", ["parquet", "categories", "jsonl"])
def test_a_column_that_names_a_held_out_split_is_refused(tmp_path, splits, is_refused, kind):
    if kind == "jsonl":
        file = jsonl(tmp_path / "pairs.jsonl", 0, 1)
        lines = [json.loads(line) | {"split": split} for line, split in zip(file.read_text().split("\n"), splits)]
        file.write_text("\n".join(map(json.dumps, lines)))
    else:
        column = pyarrow.array(splits, None if 0 in splits else pyarrow.string())
        parquet(tmp_path / "a.parquet", 0, 1, split=column.dictionary_encode() if kind == "categories" else column)
    if is_refused:
        with pytest.raises(InputError, match="has a column split with .*Write the rows of each split into a file"):
            read_by_both(tmp_path)
    else:
        assert len(read_by_both(tmp_path)) == 2


def test_a_runs_own_folder_is_no_data(tmp_path):
    """With --data . the log of the first run was read as pairs by the second."""
    jsonl(tmp_path / "pairs.jsonl", 0, 1)
    run = tmp_path / "out" / "sd-dpo"
    run.mkdir(parents=True)
    for name in ("config.json", "data.json", "log.jsonl"):
        (run / name).write_text("{}")
    pairs = read_by_both(tmp_path)
    assert len(pairs) == 2 and pairs.left_out == {"out/sd-dpo": "a run of train.py"}


@pytest.mark.parametrize("rewritten", [(5, 6), (5,), (5, 6, 7)])
def test_a_file_that_keeps_its_time_is_read_anew(tmp_path, rewritten):
    """rsync -t, tar and cp -p keep it. New captions were trained on with the old pictures."""
    file = tmp_path / "train-1.parquet"
    parquet(tmp_path / "train-0.parquet", 0)
    for numbers in ((1, 2), rewritten, (1, 2)):
        parquet(file, *numbers)
        os.utime(file, (1_600_000_000, 1_600_000_000))
        pairs = read_by_both(tmp_path)
        assert captions(pairs) == [f"pair {number}" for number in (0, *numbers)]
        shades = [np.asarray(pairs.load(row)[0][0])[0, 0, 0] for row in pairs.rows]
        assert shades == [8 * number for number in (0, *numbers)]


@pytest.mark.parametrize("cell", ["path", "struct"])
def test_paths_in_parquet_begin_at_their_file(tmp_path, monkeypatch, cell):
    """Another set's pictures of the same names were used. Absolute paths, and paths as they are written, are found, too."""
    for name, number in (("set", 1), ("elsewhere", 2)):
        jsonl(tmp_path / name / "list.jsonl", number)
        for side in (0, 1):
            (tmp_path / name / f"{number}-{side}.png").rename(tmp_path / name / f"x-{side}.png")
        (tmp_path / name / "list.jsonl").unlink()
    for side in (0, 1):
        shutil.copy(tmp_path / f"elsewhere/x-{side}.png", tmp_path / f"elsewhere/y-{side}.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    written = {"x": "x", "absolute": f"{tmp_path}/elsewhere/x", "as-written": "y"}
    for name, start in written.items():
        columns = {}
        for side in (0, 1):
            path = f"{start}-{side}.png"
            columns[f"jpg_{side}"] = pyarrow.array([{"bytes": None, "path": path} if cell == "struct" else path])
        parquet(tmp_path / "set" / f"{name}.parquet", 0, **columns)
        pairs = read_by_both(tmp_path / "set" / f"{name}.parquet")
        assert np.asarray(pairs.load(0)[0][0])[0, 0, 0] == (8 if name == "x" else 16)


@pytest.mark.parametrize(
    "name", ["contest.parquet", "latest-valide.parquet", "strained/a.parquet", "0.parquet"]
)
def test_a_word_within_a_word_names_no_split(tmp_path, name):
    parquet(tmp_path / name, 0, 1)
    assert len(read_by_both(tmp_path)) == 2


HIDDEN = [
    ".ipynb_checkpoints/pairs-checkpoint.parquet",
    "._pairs.parquet",
    "_temporary/0/pairs.parquet",
    ".git/x.parquet",
]


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("content", ["pairs", "junk"])
def test_hidden_files_are_no_pairs(tmp_path, hidden, content):
    """Pairs were trained on twice, or the whole set refused for a file that holds none."""
    parquet(tmp_path / "pairs.parquet", 0, 1, 2), parquet(tmp_path / hidden, 0, 1, 2)
    if content == "junk":
        (tmp_path / hidden).write_bytes(b"Mac OS X")
    pairs = read_by_both(tmp_path)
    assert len(pairs) == 3 and pairs.left_out == {hidden: "hidden"}


def test_a_file_by_two_names_counts_once(tmp_path):
    """The name in the training split counts. A folder may be named like a file, or be a link."""
    parquet(tmp_path / "pairs" / "train-a.parquet", 0, 1)
    (tmp_path / "pairs" / "a.parquet").symlink_to(tmp_path / "pairs" / "train-a.parquet")
    (tmp_path / "pairs" / "z-train.parquet").symlink_to(tmp_path / "pairs" / "train-a.parquet")
    parquet(tmp_path / "pairs" / "train-c.parquet" / "part-0.parquet", 2)
    parquet(tmp_path / "elsewhere" / "more.parquet", 3)
    (tmp_path / "pairs" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "pairs")
    pairs = read_by_both(tmp_path / "pairs")
    assert captions(pairs) == ["pair 0", "pair 1", "pair 2", "pair 3"]
    assert pairs.left_out == {
        "a.parquet": "not in the train split",
        "z-train.parquet": "another name of a file that is read",
    }


def test_a_shard_that_is_gone_is_named(tmp_path):
    parquet(tmp_path / "train-0.parquet", 0)
    (tmp_path / "train-1.parquet").symlink_to(tmp_path / "unmounted.parquet")
    with pytest.raises(InputError, match="train-1.parquet is a link to a file that is not there"):
        read_by_both(tmp_path)


def test_lists_in_folders_are_one_data_set(tmp_path):
    """Hidden parquet files do not hide them. If there are both kinds, data.json says which one is left out."""
    jsonl(tmp_path / "train" / "pairs.jsonl", 0, 1), jsonl(tmp_path / "test.jsonl", 2)
    jsonl(tmp_path / "more" / "train.jsonl", 3), parquet(tmp_path / "._x.parquet", 4)
    assert captions(read_by_both(tmp_path)) == ["pair 0", "pair 1", "pair 3"]
    parquet(tmp_path / "train.parquet", 5)
    pairs = read_by_both(tmp_path)
    assert captions(pairs) == ["pair 5"] and pairs.left_out["test.jsonl"] == "beside parquet"


def test_a_path_that_looks_like_a_pattern_is_a_path(tmp_path):
    """`datasets` would read the images of run1 for those of run[12]."""
    parquet(tmp_path / "run1" / "a.parquet", 0, 1), parquet(tmp_path / "run[12]" / "a.parquet", 8, 9)
    pairs = read_by_both(tmp_path / "run[12]")
    assert captions(pairs) == ["pair 8", "pair 9"]
    assert {round(float(pairs[k]["pixels"][0].float().mean())) for k in (0, 1)} == {64, 72}


TYPES = {
    "a tie makes pandas write double": {"label_0": pyarrow.array([0.5, 0.0])},
    "float32": {"label_0": pyarrow.array([0, 0.5], pyarrow.float32())},
    "uint8": {"label_0": pyarrow.array([0, 1], pyarrow.uint8())},
    "bool": {"label_0": pyarrow.array([True, False])},
    "decimal": {"label_0": pyarrow.array([Decimal("0.5"), Decimal("1.0")])},
    "no label at all": {"label_0": pyarrow.nulls(2)},
    "large strings": {"caption": pyarrow.array(["pair 2", "pair 3"], pyarrow.large_string())},
    "a category": {"caption": pyarrow.array(["pair 2", "pair 3"]).dictionary_encode()},
    "large binary": {"jpg_0": pyarrow.array([pair(2)["jpg_0"], pair(3)["jpg_0"]], pyarrow.large_binary())},
    "images of datasets": {"jpg_0": pyarrow.array([{"bytes": pair(k)["jpg_0"], "path": None} for k in (2, 3)])},
    "a further column": {"has_label": pyarrow.array([True, False])},
    "images by their paths": {"jpg_0": pyarrow.array([{"path": "a.png"}, {"path": "b.png"}])},
    "no rows": {},
    "another order": {
        "caption": pyarrow.array(["pair 2", "pair 3"]),
        "jpg_1": pyarrow.array([pair(2)["jpg_1"], pair(3)["jpg_1"]]),
    },
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("first", ["a.parquet", "c.parquet"])
def test_shards_of_other_types_are_one_data_set(tmp_path, kind, first):
    """Either shard may come first, and train.py and encode.py read them alike."""
    parquet(tmp_path / first, 0, 1)
    parquet(tmp_path / "b.parquet", 2, 3, **TYPES[kind])
    if kind == "no rows":
        empty = pyarrow.parquet.read_table(tmp_path / "b.parquet").slice(0, 0)
        pyarrow.parquet.write_table(empty, tmp_path / "b.parquet")
        assert captions(read_by_both(tmp_path)) == ["pair 0", "pair 1"]
        return
    if kind == "images by their paths":  # which are not there
        pairs = read_by_both(tmp_path)
        pairs.scan()
        assert pairs.report()["unreadable"] == {"no such file": [0, 1] if first == "c.parquet" else [2, 3]}
        return
    alone = read_by_both(tmp_path / "b.parquet") if kind != "no label at all" else None
    pairs = read_by_both(tmp_path)
    report = pairs.report()
    assert report["rows"] == 4 and {"pair 0", "pair 1"} <= {*captions(pairs)}
    if alone:
        for count in ("used", "ties", "unlabelled"):
            assert report[count] == alone.report()[count] + (2 if count == "used" else 0)
    else:
        assert report["unlabelled"] == 2


def test_a_shard_of_a_type_that_cannot_be_meant_is_named(tmp_path):
    parquet(tmp_path / "a.parquet", 0, 1)
    parquet(tmp_path / "b.parquet", 2, label_0=pyarrow.array(["good"]))
    for read in (sources.read_rows, encode.stream_rows):
        with pytest.raises(InputError, match="label_0 in .*b.parquet has the type string; numbers are needed"):
            read(str(tmp_path))


# 2. Identities


@pytest.fixture
def small_run(tmp_path, small_model, few_pairs):
    """small_run(steps): runs train.py on copies of a model and of pairs under tmp_path, which a test may change."""
    shutil.copytree(small_model("sd"), tmp_path / "model")
    shutil.copytree(few_pairs, tmp_path / "pairs")

    def run(steps, *options, out="out"):
        argv = f"--loss dpo --steps {steps} --batch_size 4 --sample_every 0 --device cpu --lr 1e-4".split()
        paths = [
            "--model",
            str(tmp_path / "model"),
            "--data",
            str(tmp_path / "pairs"),
            "--out",
            str(tmp_path / out),
        ]
        train.main([*paths, *argv, *options])
        return log_of(tmp_path / out)

    return run


def change_weights(file, name):
    weights = load_file(file)
    (name,) = [key for key in weights if key in (name, f"text_model.{name}")]  # transformers 4 has the prefix
    weights[name] = weights[name] + 0.01
    save_file(weights, file, {"format": "pt"})


def changed_row(folder):
    (file,) = folder.glob("*.parquet")
    rows = pyarrow.parquet.read_table(file).to_pylist()
    rows[0]["label_0"], rows[0]["label_1"] = 1 - rows[0]["label_0"], rows[0]["label_0"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


CHANGES = {
    "unet": lambda root: change_weights(
        root / "model/unet/diffusion_pytorch_model.safetensors", "conv_in.bias"
    ),
    "vae": lambda root: change_weights(
        root / "model/vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.bias"
    ),
    "text_encoder": lambda root: change_weights(
        root / "model/text_encoder/model.safetensors", "final_layer_norm.bias"
    ),
    "noise schedule": lambda root: rewrite(
        root / "model/scheduler/scheduler_config.json", '"beta_end": 0.012', '"beta_end": 0.02'
    ),
    "tokenizer": lambda root: another_pad(root / "model"),
    "data": lambda root: changed_row(root / "pairs"),
}


def rewrite(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def another_pad(model):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(model / "tokenizer")


def test_a_run_does_not_go_on_with_another_reference(tmp_path, small_run):
    """The names are the same. From then on the policy was compared with another model, or trained on other pairs."""
    small_run(1)
    _, log = left(tmp_path / "out")
    for what, change in CHANGES.items():
        for part in ("model", "pairs"):
            shutil.copytree(tmp_path / part, tmp_path / "kept" / part)
        change(tmp_path)
        with pytest.raises(SystemExit, match=f"was begun with another {what} "):
            small_run(2)
        for part in ("model", "pairs"):
            shutil.rmtree(tmp_path / part)
            (tmp_path / "kept" / part).rename(tmp_path / part)
    assert left(tmp_path / "out")[1] == log


def test_a_run_that_moved_goes_on(tmp_path, small_run):
    """A checkpoint knows a model and pairs by their content, so they may get other names."""
    small_run(1)
    (tmp_path / "model").rename(tmp_path / "renamed")
    (tmp_path / "pairs").rename(tmp_path / "moved")
    small_run(2, "--model", str(tmp_path / "renamed"), "--data", str(tmp_path / "moved"))
    assert len(log_of(tmp_path / "out")) == 2
    with pytest.raises(SystemExit, match="holds a run with --beta"):
        small_run(3, "--model", str(tmp_path / "renamed"), "--data", str(tmp_path / "moved"), "--beta", "7")


def test_encoded_pairs_of_another_tokenizer_are_not_trained_on(tmp_path, small_run):
    """test_encode.py has the same of another VAE and text encoder."""
    cache = str(tmp_path / "cache")
    encode.main(["--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs"), "--clip", "tiny", "--device",
                 "cpu", "--out", cache])
    small_run(1, "--data", cache)
    CHANGES["tokenizer"](tmp_path)
    with pytest.raises(SystemExit, match="was encoded with the tokenizer of .*, but --model is .* another one"):
        small_run(1, "--data", cache, out="other")


@pytest.mark.parametrize("layout", [
    dict(max_shard_size="300kB"), pytest.param(dict(safe_serialization=False), marks=pytest.mark.slow)])
def test_what_only_moved_goes_on(tmp_path, small_run, monkeypatch, layout):
    """Pairs and model stay the same when files are touched, in another cache, and in another layout of the weights."""
    options = ["--reference_errors", str(tmp_path / "errors")]
    whole = small_run(2, *options, out="whole")
    small_run(1, *options)
    for file in (tmp_path / "pairs").iterdir():
        file.touch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "another cache"))
    loading.load_model(str(tmp_path / "model")).pipe.save_pretrained(tmp_path / "again", **layout)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "again").rename(tmp_path / "model")
    log = small_run(2, *options)
    assert [line["loss"] for line in log] == [line["loss"] for line in whole]


def test_the_same_pairs_elsewhere_are_the_same_pairs(tmp_path):
    parquet(tmp_path / "a" / "train.parquet", 0, 1)
    jsonl(tmp_path / "b" / "pairs.jsonl", 0, 1)
    for name in "ab":
        before = data.ImagePairs(str(tmp_path / name), 32).digest()
        shutil.copytree(tmp_path / name, tmp_path / "copies" / name)
        assert data.ImagePairs(str(tmp_path / "copies" / name), 32).digest() == before
    parquet(tmp_path / "copies" / "a" / "train.parquet", 0, 2)
    (tmp_path / "copies" / "b" / "1-0.png").write_bytes(saved(Image.new("RGB", (40, 40))))
    for name in "ab":
        assert (
            data.ImagePairs(str(tmp_path / "copies" / name), 32).digest()
            != data.ImagePairs(str(tmp_path / name), 32).digest()
        )


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler"])
def test_images_are_not_drawn_with_another_schedule_than_the_manifest_says(tmp_path, small_model, scheduler):
    """The model has zero terminal SNR, and both schedulers ignore the key that says so."""
    shutil.copytree(small_model("sd-v"), tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}
    file.write_text(json.dumps(config))
    argv = [
        "generate",
        "--model",
        str(tmp_path / "model"),
        "--prompts",
        "tiny",
        "--limit",
        "1",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "images"),
    ]
    with pytest.raises(SystemExit, match=f"{scheduler} ignores the model's rescale_betas_zero_snr"):
        evaluate.main([*argv, "--scheduler", scheduler])
    evaluate.main([*argv, "--scheduler", "DDIMScheduler"])
    assert len(list((tmp_path / "images").glob("*.png"))) == 1


# 3. Half understood


PROMPT_FILES = {
    "a comma cuts a prompt": (
        "p.csv",
        "prompt,category\na cat, sitting,animals\n",
        "row 1 has more fields than the header",
    ),
    "in the second row": (
        "p.csv",
        "prompt,category\na cat,animals\na dog, a cat,animals\n",
        "row 2 has more fields",
    ),
    "a quote that is not closed eats the rest": ("p.csv", 'prompt\n"a cat\na dog\n', "unexpected end of data"),
    "a tab cuts a prompt": (
        "p.tsv",
        "Prompt\tCategory\na\tcat\tanimals\n",
        "row 1 has more fields than the header",
    ),
    "a null": ("p.jsonl", '{"prompt": "a"}\n{"prompt": null, "text": "b"}\n', "row 2 has no prompt"),
    "a number": ("p.json", '["a", 7]', "row 2 has no prompt.*not '7'"),
    "half a surrogate pair": ("p.jsonl", '{"prompt": "a \\ud83d"}\n', "row 1 has no prompt"),
    "a line break cuts a prompt": (
        "p.csv",
        "prompt,category\na cat\nsitting,animals\n",
        "row 1 has fewer fields",
    ),
    "a quoted tsv": ("p.tsv", 'Prompt\tCategory\n"two\nlines"\tx\n', "row 1 has fewer fields than the header"),
    "two columns of a name": ("p.csv", "prompt,Prompt\na,b\n", "an empty name, or one twice"),
    "a header that hides the cut": (
        "p.csv",
        "prompt,category,\na cat, sitting,animals\n",
        "an empty name, or one twice",
    ),
    "nothing": ("p.csv", "prompt,category\na cat,animals\n,animals\n", "row 2 has no prompt"),
}


@pytest.mark.parametrize("what", PROMPT_FILES)
def test_prompts_are_not_cut_swallowed_or_made_up(tmp_path, what):
    name, text, complaint = PROMPT_FILES[what]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=complaint):
        prompts_room.read_prompts(str(tmp_path / name))


GOOD_FILES = {
    "p.csv": 'prompt,category\n"a cat, sitting",animals\n"two\nlines",x\n"he said ""hi""",y\n',
    "p.tsv": 'Prompt\tCategory\na "cat", sitting\tanimals\n',
    "p.jsonl": '{"caption": "a cat"}\n\n{"caption": "\\ud83d\\ude00"}\n',
    "p.txt": "\ufeffa cat, sitting\r\n\r\na dog\r\n",
}


def test_good_prompts_are_read_as_they_are(tmp_path):
    expected = {
        "p.csv": ["a cat, sitting", "two\nlines", 'he said "hi"'],
        "p.tsv": ['a "cat", sitting'],
        "p.jsonl": ["a cat", "\U0001f600"],
        "p.txt": ["a cat, sitting", "a dog"],
    }
    for name, text in GOOD_FILES.items():
        (tmp_path / name).write_bytes(text.encode())
        assert prompts_room.read_prompts(str(tmp_path / name)) == expected[name]


@pytest.mark.parametrize("prompt", [None, 7, "a \ud83d", ["a"]])
def test_images_are_not_scored_against_what_is_no_prompt(tmp_path, prompt):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "manifest.json").write_text(
        json.dumps({"toy": True, "images": [{"file": "a.png", "prompt": prompt}]})
    )
    with pytest.raises(SystemExit, match="the prompt of a.png in .* is no text"):
        evaluate.main(["score", str(tmp_path)])


def test_a_caption_that_is_no_utf8_is_listed(tmp_path):
    """Java may write half a surrogate pair."""
    captions = pyarrow.array([b"pair 0", b"a \xed\xa0\xbd"]).view(pyarrow.string())
    parquet(tmp_path / "a.parquet", 0, 1, caption=captions)
    pairs = read_by_both(tmp_path)
    pairs.scan()
    assert pairs.report()["unreadable"] == {"no prompt": [1]}


@pytest.mark.parametrize("prompt", [None, 7, "a \ud83d", "", " \n"])
def test_a_pair_without_a_prompt_is_listed_and_the_rest_trained(tmp_path, prompt):
    jsonl(tmp_path / "pairs.jsonl", 0, 1, 2)
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"prompt": prompt})
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    pairs = data.ImagePairs(str(tmp_path), 32)
    pairs.scan()
    assert pairs.report()["unreadable"] == {"no prompt": [1]}


# 4. Pixels


def gradient(dtype, top):
    return (np.linspace(0, 1, 32 * 32).reshape(32, 32) * top).astype(dtype)


PICTURES = {
    "floating point up to 1": (Image.fromarray(gradient(np.float32, 1)), "TIFF"),
    "floating point up to 255": (Image.fromarray(gradient(np.float32, 255)), "TIFF"),
    "floating point up to 65535": (Image.fromarray(gradient(np.float32, 65535)), "TIFF"),
    "32 bits that hold 8": (Image.fromarray(gradient(np.int32, 255)), "TIFF"),
    "32 bits that hold 16": (Image.fromarray(gradient(np.int32, 65535)), "TIFF"),
    "16 bits": (Image.fromarray(gradient(np.uint16, 65535)), "PNG"),
    "8 bits": (Image.fromarray(gradient(np.uint8, 255)), "PNG"),
    "palette": (Image.fromarray(gradient(np.uint8, 255)).convert("P"), "PNG"),
    "with transparency": (Image.fromarray(gradient(np.uint8, 255)).convert("LA"), "PNG"),
    "floating point that overshoots": (Image.fromarray(gradient(np.float32, 1.004)), "TIFF"),
    "8 bits in floating point that overshoot": (Image.fromarray(gradient(np.float32, 255.6)), "TIFF"),
    "16 bits in a PGM": (Image.fromarray(gradient(np.uint16, 65535)), "PPM"),
    "cmyk": (Image.fromarray(gradient(np.uint8, 255)).convert("RGB").convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("mode", PICTURES)
def test_no_picture_becomes_black_or_white(mode):
    image, kind = PICTURES[mode]
    pixels = np.asarray(pictures.read_image(saved(image, kind)), int)
    assert np.abs(pixels - gradient(float, 255)[:, :, None]).max() <= 2


def test_a_dark_picture_of_16_bits_stays_dark_and_a_transparent_one_white():
    dark = Image.fromarray(np.full((8, 8), 200, np.uint16))
    for kind in ("PNG", "PPM"):
        assert np.asarray(pictures.read_image(saved(dark, kind))).max() == 1
    clear = saved(Image.fromarray(np.full((8, 8), 30000, np.uint16)), transparency=30000)
    assert np.asarray(pictures.read_image(clear)).min() == 255


@pytest.mark.parametrize("value", [float("nan"), -1.0, 8.0, 1e6])
def test_a_picture_of_unknown_scale_is_listed_with_the_reason(tmp_path, value):
    values = gradient(np.float32, 1)
    values[3, 3] = value
    parquet(
        tmp_path / "a.parquet",
        0,
        1,
        jpg_0=pyarrow.array([saved(Image.fromarray(values), "TIFF"), pair(1)["jpg_0"]]),
    )
    pairs = data.ImagePairs(str(tmp_path), 32)
    pairs.scan()
    assert pairs.report()["unreadable"] == {"pixel values of unknown scale": [0]}


def test_a_picture_with_a_long_text_beside_it_is_read():
    """Workflow tools write such texts, compressed or not. PIL gives up over 1 MB."""
    image = Image.fromarray(gradient(np.uint8, 255)).convert("RGB")
    for compressed in (True, False):
        info = PngImagePlugin.PngInfo()
        info.add_text("workflow", "x" * 3_000_000, zip=compressed)
        info.add_itxt("prompt", "y" * 3_000_000, zip=compressed)
        assert pictures.read_image(saved(image, pnginfo=info)).tobytes() == image.tobytes()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!!", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\0\0"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_with_damaged_exif_is_read(exif, kind):
    """A picture that is cut off is not read, whatever its EXIF."""
    content = saved(Image.new("RGB", (40, 30), (200, 0, 0)), kind, exif=exif)
    assert pictures.read_image(content).size == (40, 30)
    with pytest.raises(Exception):
        pictures.read_image(content[: len(content) * 2 // 3])


# 5. Model folders


def copy_of(small_model, folder, kind="sd"):
    shutil.copytree(small_model(kind), folder)
    return folder


@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_model_that_does_not_say_its_size_takes_one(tmp_path, small_model, how):
    folder = copy_of(small_model, tmp_path / "model")
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    config["sample_size"] = None
    if how == "absent":
        del config["sample_size"]
    file.write_text(json.dumps(config))
    model = loading.load_model(str(folder))
    assert model.resolution(64) == 64
    with pytest.raises(InputError, match="pass --resolution"):
        model.resolution()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_folder_with_the_fp16_variant_alone_is_loaded(tmp_path, small_model, kind):
    """Its weights become float32."""
    pipe = loading.load_model(small_model(kind)).pipe
    pipe.to(torch.float16).save_pretrained(tmp_path / "model", variant="fp16")
    assert not (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    model = loading.load_model(str(tmp_path / "model"))
    for name, network in model.networks().items():
        for key, value in network.state_dict().items():
            expected = getattr(pipe, name).state_dict()[key]
            assert value.dtype != torch.float16 and torch.equal(value, expected.to(value.dtype))


def test_a_damaged_file_is_not_replaced_by_its_fp16_variant(tmp_path, small_model):
    """They would be other weights than those that were asked for."""
    folder = copy_of(small_model, tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        loading.load_model(str(folder))


def test_a_model_that_wants_the_guidance_is_refused(tmp_path, small_model):
    """A latent consistency model's UNet would be trained without it."""
    pipe = loading.load_model(small_model("sd")).pipe
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config, time_cond_proj_dim=8)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="takes an embedding of the guidance"):
        loading.load_model(str(tmp_path / "model"))


UNET_NAMES = {  # diffusers' -> the original's, for the small model; replaced in this order
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0": "output_blocks.1.2",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".conv_shortcut.": ".skip_connection.",
}
VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}


def original_names(pipe):
    """The weights of a pipeline under the names of the first Stable Diffusion checkpoints."""
    weights = {}
    for name, value in pipe.unet.state_dict().items():
        is_attention = "attentions" in name  # there norm1 keeps its name
        for old, new in UNET_NAMES.items():
            if name.startswith(old) or old[0] == "." and not is_attention:
                name = name.replace(old, new, 1)
        weights[f"model.diffusion_model.{name}"] = value
    for name, value in pipe.vae.state_dict().items():
        name = re.sub(r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block", name)
        name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
        name = re.sub(r"decoder\.up_blocks\.(\d)\.resnets", lambda m: f"decoder.up.{2 - int(m[1])}.block", name)
        name = re.sub(
            r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{2 - int(m[1])}.upsample", name
        )
        is_attention = "attentions" in name
        for old, new in VAE_NAMES.items():
            name = name.replace(old, new)
        if is_attention and value.dim() == 2:
            value = value[:, :, None, None]  # it is a convolution in the original
        weights[f"first_stage_model.{name}"] = value
    for name, value in pipe.text_encoder.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        weights[f"cond_stage_model.transformer.{name}"] = value
    return {name: value.contiguous() for name, value in weights.items()}


@pytest.fixture
def checkpoint(tmp_path, small_model):
    """A Stable Diffusion 1.x checkpoint in one file, and the pipeline that it holds."""
    pipe = loading.load_model(small_model("sd")).pipe
    save_file(original_names(pipe), tmp_path / "v1.safetensors")
    return tmp_path / "v1.safetensors", pipe


def test_a_checkpoint_in_one_file_is_a_model(tmp_path, checkpoint, small_model, few_pairs):
    """It takes the configuration of a diffusers folder. It trains and leaves a folder."""
    file, pipe = checkpoint
    model = loading.load_model(str(file), config=small_model("sd"))
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(pipe, name).state_dict()
        got = getattr(model.pipe, name).state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got), name
    train.main(
        [
            "--model",
            str(file),
            "--config",
            small_model("sd"),
            "--data",
            few_pairs,
            "--clip",
            "tiny",
            "--steps",
            "1",
            "--batch_size",
            "8",
            "--sample_every",
            "0",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert loading.load_model(str(tmp_path / "out" / "model"))
    evaluate.main(
        [
            "generate",
            "--model",
            str(file),
            "--config",
            small_model("sd"),
            "--prompts",
            "tiny",
            "--limit",
            "1",
            "--steps",
            "1",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "images"),
        ]
    )
    assert (tmp_path / "images" / "00000.png").exists()


def test_a_checkpoint_that_cannot_be_described_or_lacks_a_tensor_is_refused(tmp_path, checkpoint, small_model):
    file, _ = checkpoint
    with pytest.raises(InputError, match=r"Pass its configuration: --config DIR"):
        loading.load_model(str(file))  # the hub is out of reach
    with pytest.raises(InputError, match="--config is for a --model in one file"):
        loading.load_model(small_model("sd"), config=small_model("sd"))
    weights = load_file(file)
    for lacking in (
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.conv_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ):
        save_file({name: value for name, value in weights.items() if name != lacking}, file)
        with pytest.raises(InputError, match="cannot be loaded"):
            loading.load_model(str(file), config=small_model("sd"))
    file.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="v1.safetensors"):
        loading.load_model(str(file), config=small_model("sd"))


# 7. Silent or wrong endings


def test_a_crop_that_cuts_much_away_is_told(tmp_path, small_model, capsys):
    """The square keeps a third of 300 x 100 pixels."""
    wide = pyarrow.array([saved(Image.new("RGB", (300, 100))), pair(1)["jpg_0"]])
    parquet(tmp_path / "a.parquet", 0, 1, jpg_0=wide)
    pairs = data.ImagePairs(str(tmp_path), 32)
    words = data.crop_summary(data.collate([pairs[k] for k in range(2)])["time_ids"])
    told = "the square crop keeps 83% of the first pictures; in 1 of 2 pairs it cuts more than a third off one"
    assert words == told
    argv = ["--model", small_model("sd"), "--data", str(tmp_path), "--device", "cpu", "--clip", "tiny"]
    encode.main([*argv, "--out", str(tmp_path / "cache")])
    assert told in capsys.readouterr().out
    train.main(
        [
            *argv,
            "--loss",
            "dpo",
            "--steps",
            "1",
            "--batch_size",
            "2",
            "--out",
            str(tmp_path / "out"),
            "--sample_every",
            "0",
        ]
    )
    assert told in capsys.readouterr().out


def test_samples_are_there_only_if_they_are_wanted(tmp_path, small_run, capsys):
    """The last line names what there is, the model."""
    small_run(1)
    assert f"the result is {tmp_path}/out/model" in capsys.readouterr().out and not [*tmp_path.glob("out/samples/*")]
    small_run(1, "--sample_every", "1", "--sample_steps", "1", out="other")
    assert (tmp_path / "other" / "samples" / "000001.png").exists()


# Commands


@pytest.mark.parametrize("theirs, ours", [
    ("--learning_rate 1e-5", "--lr"), ("--max_train_steps=100", "--steps"), ("--output_dir x", "--out"),
    ("--train_batch_size 4", "--micro_batch"), ("--resume_from_checkpoint latest", "the same command resumes")])
def test_an_option_of_diffusers_is_answered_with_ours(theirs, ours):
    with pytest.raises(SystemExit, match=f"^train.py: unrecognized arguments: {theirs}. Here .* is .*{ours}") as refused:
        train.main(["--steps", "1", *theirs.split()])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("typed", [["--out=~/run", "--data", "~/pairs"], ["--out", "~/run", "--data=~/pairs"]])
def test_a_tilde_is_the_home_folder_wherever_it_stands(tmp_path, monkeypatch, typed):
    """The shell leaves it in --out=~/run, and a folder of that name was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parquet(tmp_path / "pairs" / "a.parquet", 0)
    args = train.train_args(typed)
    assert args.out == f"{tmp_path}/run" and args.data == f"{tmp_path}/pairs"
    assert train.train_args(["--out", "a~/b"]).out == "a~/b" and train.train_args(["--out=~nobody/x"]).out == "~nobody/x"


@pytest.mark.parametrize("half", ['{"step": 1, "lo', "}", "7", '{"step": 1, "loss": 0.6}{"step": 2'])
def test_half_a_line_of_the_log_is_cut_off(tmp_path, half):
    """It was merged with the next record, and no tool could read the log any more."""
    whole = '{"step": 0, "loss": 0.7}\n'
    (tmp_path / "log.jsonl").write_text(whole + half)
    log = common.Log(tmp_path, 2)
    log.write(2, {"loss": 0.5})
    assert (tmp_path / "log.jsonl").read_text() == whole + '{"step": 2, "loss": 0.5}\n'


# What a file says of itself


@pytest.mark.parametrize("marks, metadata, expected", [
    (["v_pred"], {}, ("v_prediction", False)), (["v_pred", "ztsnr"], {}, ("v_prediction", True)),
    ([], {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
    ([], {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)), ([], {}, ("epsilon", False))])
def test_a_checkpoint_in_one_file_is_trained_as_it_is_marked(checkpoint, small_model, marks, metadata, expected):
    """v-prediction models were trained as epsilon, and nobody knew."""
    file, _ = checkpoint
    save_file(load_file(file) | {mark: torch.zeros(0) for mark in marks}, file, metadata)
    model = loading.load_model(str(file), config=small_model("sd"))
    prediction, is_terminal = expected
    assert model.process.prediction_type == prediction
    assert (model.process.alphas_cumprod[-1] < 1e-6) == is_terminal


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_an_edm_checkpoint_is_refused(checkpoint, small_model, mark):
    file, _ = checkpoint
    save_file(load_file(file) | {mark: torch.ones(4)}, file)
    with pytest.raises(InputError, match="v1.safetensors cannot be loaded: it is marked as an EDM model"):
        loading.load_model(str(file), config=small_model("sd"))


def exchanged(folder, part, network_class, **changes):
    """Exchanges a part of a saved pipeline for a network of another configuration."""
    config = json.loads((folder / part / "config.json").read_text())
    shutil.rmtree(folder / part)
    network_class.from_config(config | changes).save_pretrained(folder / part)


@pytest.mark.parametrize("changes, complaint", [
    ({"in_channels": 9}, "unet and its vae do not fit: in_channels is 9, and 4 is needed"),
    ({"out_channels": 8}, "unet and its vae do not fit: out_channels is 8, and 4 is needed"),
    ({"cross_attention_dim": 48}, "unet and its text encoders do not fit: cross_attention_dim is 48, and 32 is needed")])
def test_parts_that_do_not_fit_are_refused_when_they_are_loaded(tmp_path, small_model, changes, complaint):
    """Inpainting models, and text encoders of another width, ended in a traceback in the first step."""
    shutil.copytree(small_model("sd"), tmp_path / "sd")
    exchanged(tmp_path / "sd", "unet", diffusers.UNet2DConditionModel, **changes)
    with pytest.raises(InputError, match=f"sd cannot be loaded: its {complaint}"):
        loading.load_model(str(tmp_path / "sd"))


def test_a_transformer_of_other_text_encoders_is_refused(tmp_path, small_model):
    shutil.copytree(small_model("flux"), tmp_path / "flux")
    exchanged(tmp_path / "flux", "transformer", diffusers.FluxTransformer2DModel, joint_attention_dim=64)
    with pytest.raises(InputError, match="transformer and its text encoders do not fit: joint_attention_dim is 64"):
        loading.load_model(str(tmp_path / "flux"))


def test_a_vae_of_another_kind_is_refused_by_name(tmp_path, small_model):
    shutil.copytree(small_model("sd"), tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "vae")
    diffusers.AutoencoderTiny().save_pretrained(tmp_path / "sd" / "vae")
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    with pytest.raises(InputError, match="its vae is an AutoencoderTiny; an AutoencoderKL is needed"):
        loading.load_model(str(tmp_path / "sd"))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_tokenizer_without_a_length_takes_its_text_encoders(tmp_path, small_model, kind):
    """It ended in an OverflowError."""
    shutil.copytree(small_model(kind), tmp_path / kind)
    for file in (tmp_path / kind).glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(file.read_text())
        del config["model_max_length"]
        file.write_text(json.dumps(config))
    embeds = loading.load_model(str(tmp_path / kind)).encode_prompts(["a cat " * 99])
    expected = loading.load_model(small_model(kind)).encode_prompts(["a cat " * 99])
    assert all(torch.equal(embeds[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["dora.safetensors", "dora.pt", "dora.ckpt", "pytorch_lora_weights.bin"])
@pytest.mark.parametrize("has_magnitudes", [True, False])
def test_dora_is_refused_in_every_form_of_file(tmp_path, small_model, name, has_magnitudes):
    """Its magnitudes were left out of .pt and .ckpt, and the model began otherwise than it was trained."""
    model = loading.load_model(small_model("sd"))
    generator, weights = torch.Generator().manual_seed(0), {}
    for layer, module in model.denoiser.named_modules():
        if layer.endswith(("to_q", "to_v")):
            key, (outputs, inputs) = f"lora_unet_{layer.replace('.', '_')}", module.weight.shape
            weights[f"{key}.lora_down.weight"] = torch.randn(4, inputs, generator=generator)
            weights[f"{key}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator)
            weights[f"{key}.alpha"] = torch.tensor(4.0)
            if has_magnitudes:
                weights[f"{key}.dora_scale"] = torch.ones(1, inputs)
    file = tmp_path / name
    save_file(weights, file) if file.suffix == ".safetensors" else torch.save(weights, file)
    source = str(tmp_path if name.startswith("pytorch") else file)
    if has_magnitudes:
        with pytest.raises(InputError, match="they are DoRA weights"):
            loading.fuse_lora(model, source)
    else:
        before = model.denoiser.state_dict()["conv_in.weight"].clone()
        loading.fuse_lora(model, source)
        assert torch.equal(before, model.denoiser.state_dict()["conv_in.weight"]) and model.init_lora == source
