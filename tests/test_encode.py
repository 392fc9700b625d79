"""Encoded pairs train as the pairs themselves; a cache, and the reference's errors, are what they say."""

import errno
import functools
import json
import math
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import datasets
import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import data
import distributed
import encode
import loading
import loss
import models
import options
import run as run_room
import sources
import train
from common import InputError
from data import ImagePairs
from encode import EncodedPairs
from extras import tiny
from options import encode_args, train_args
from pictures import Unreadable
from reference import ReferenceErrors
from small_runs import fresh, launch, log_of

pytestmark = pytest.mark.usefixtures("quick_models")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def write_cache(model, pairs, out, *options):
    """Runs encode.py with a few pairs per file, so that there are many files."""
    encode.SHARD, encode.BATCH = 5, 2
    argv = ["--model", model, "--data", str(pairs), "--out", str(out), "--clip", "tiny", "--device", "cpu"]
    try:
        encode.main([*argv, *options])
    finally:
        encode.SHARD, encode.BATCH = 256, 8


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, small_model, few_pairs):
    """encoded(model, *options): a cache of the few pairs; caches are kept."""
    folders = {}

    def encoded(model, *options):
        if (model, options) not in folders:
            folder = tmp_path_factory.mktemp("cache") / "c"
            write_cache(small_model(model), few_pairs, folder, *options)
            folders[model, options] = folder
        return folders[model, options]

    return encoded


@pytest.fixture
def run(tmp_path, small_model, monkeypatch):
    """run(model, data, *options) -> its folder, all gradients of its first step, all its final weights."""

    tiny.part("clip")  # before the patch below: its training clips gradients, too

    def run(model, pairs, *options, name="run"):
        first, clip = [], torch.nn.utils.clip_grad_norm_

        def clip_and_keep(params, limit):
            params = list(params)
            if not first:
                first.append(torch.cat([param.grad.flatten() for param in params]))
            return clip(params, limit)

        out = tmp_path / name
        fixed = "--steps 3 --batch_size 8 --micro_batch 8 --sample_every 0 --clip tiny --device cpu --lr 1e-3"
        argv = ["--model", small_model(model), "--data", str(pairs), "--out", str(out), *fixed.split(), *options]
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_keep)
            train.main(argv)
        (file,) = out.glob("checkpoint-*.pt")
        weights = torch.load(file, weights_only=True)["weights"]
        return out, first[0], torch.cat([value.flatten() for value in weights.values()])

    return run


@pytest.fixture
def argv(tmp_path):
    """argv(model, data): a command of train.py that takes one step, if it is not refused."""
    fixed = "--steps 1 --batch_size 8 --micro_batch 4 --sample_every 0 --device cpu --out".split()
    return lambda model, pairs: ["--model", model, "--data", str(pairs), *fixed, str(tmp_path / "out")]


def lines(out):
    return [{k: v for k, v in line.items() if k != "pairs_per_second"} for line in log_of(out)]


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "lock"}


def parquet(file, rows, **options):
    datasets.Dataset.from_list(rows).to_parquet(file, **options)
    return file


# Training from a cache


RUNS = [("sdxl", "rpo")]
RUNS += [slow("sd", "sft"), slow("sd", "rpo"), slow("sd", "dpo"), slow("sdxl", "dpo"), slow("sdxl", "sft")]


@pytest.mark.parametrize("model, loss", RUNS)
def test_a_cache_trains_as_the_pairs_themselves(run, encoded, few_pairs, model, loss):
    """With the VAE's mean, no flip and no crop they agree to rounding, because the batches of the encoders differ.

    Rounding moves an image's gradient by 1e-6. A preference gradient is the difference of two that are ten times as
    large, so it moves by more.
    """
    options = ["--loss", loss, "--vae_sample", "mean"]
    plain = run(model, few_pairs, *options, name="plain")
    cached = run(model, encoded(model), *options, name="cached")
    tolerance = 1e-5 if loss == "sft" else 5e-5
    assert (plain[1] - cached[1]).norm() <= tolerance * plain[1].norm() > 0
    assert json.loads((cached[0] / "config.json").read_text())["resolution"] == 32
    names = ["rows", "used", "ties", "unlabelled", "unreadable", "left_out"]
    reports = [json.loads((out / "data.json").read_text()) for out in (plain[0], cached[0])]
    assert reports[0] == reports[1] and [*reports[0]] == names
    assert reports[0]["unreadable"] == {"no image": [5], "not a picture": [9]}


def test_the_posteriors_draw_comes_from_the_cache_too(run, encoded, few_pairs):
    plain, cached = run("sd", few_pairs, name="plain"), run("sd", encoded("sd"), name="cached")
    mean = run("sd", encoded("sd"), "--vae_sample", "mean", name="mean")
    assert (plain[1] - cached[1]).norm() <= 1e-5 * plain[1].norm()
    assert (mean[1] - cached[1]).norm() > 1e-5 * mean[1].norm()


def test_a_cache_streams_the_same_pairs_in_the_same_order(encoded, few_pairs):
    """Epochs, replaced rows, dropped prompts, sizes and crops agree; a process of the loader reads the same."""
    plain = ImagePairs(few_pairs, 32, seed=3, prompt_dropout=0.5)
    cached = EncodedPairs(encoded("sdxl"), seed=3, prompt_dropout=0.5)
    for position in range(2 * len(plain) + 3):
        a, b = plain[position], cached[position]
        assert all(a[name] == b[name] for name in ("row", "prompt", "caption", "unreadable"))
        assert torch.equal(a["time_ids"], b["time_ids"])
        # SDXL: a dropped prompt is zeros
        assert b["prompt_embeds"].any() == b["pooled_prompt_embeds"].any() == bool(a["prompt"])
    plain.scan()
    assert plain.report() == cached.report()
    batches = [[0, 1], [2]]
    loaded = torch.utils.data.DataLoader(cached, batch_sampler=batches, num_workers=1, collate_fn=data.collate)
    means = torch.cat([batch["mean"] for batch in loaded])
    assert torch.equal(means, torch.stack([cached[k]["mean"] for k in range(3)]))


def test_flips_and_crops_are_those_of_the_first_epoch(encoded, few_pairs, small_model, run):
    folder = encoded("sd", "--random_flip", "--random_crop")
    pairs = ImagePairs(few_pairs, 32, random_flip=True, random_crop=True)
    cached, model = EncodedPairs(folder), fresh(small_model("sd"))
    for position in range(8):
        mean, _ = model.encode_images(pairs[position]["pixels"][None])
        torch.testing.assert_close(cached[position]["mean"], mean[0])
    assert json.loads((run("sd", folder)[0] / "config.json").read_text())["random_flip"] is True


def test_half_and_means_take_less_room_and_say_so(encoded, run):
    """fp16 keeps 11 bits of latents and prompts; CLIP's embeddings and SDXL's sizes stay float32."""
    whole = EncodedPairs(encoded("sdxl"))[0]
    half = EncodedPairs(encoded("sdxl", "--store", "fp16"))[0]
    means = EncodedPairs(encoded("sdxl", "--vae_sample", "mean"))[0]
    for name in ("mean", "std", "prompt_embeds", "pooled_prompt_embeds"):
        assert half[name].dtype == torch.float16
        torch.testing.assert_close(half[name].float(), whole[name], rtol=2**-11, atol=1e-7)
    assert torch.equal(half["time_ids"], whole["time_ids"])
    assert torch.equal(half["clip_embeds"], whole["clip_embeds"])
    assert "std" not in means and torch.equal(means["mean"], whole["mean"])
    out = run("sdxl", encoded("sdxl", "--store", "fp16", "--vae_sample", "mean"))[0]
    assert json.loads((out / "config.json").read_text())["vae_sample"] == "mean"


def test_every_prompt_is_encoded_once(encoded, few_pairs):
    prompts = json.loads((encoded("sd") / "prompts.json").read_text())
    pairs = ImagePairs(few_pairs, 32)
    assert prompts[0] == "" and sorted(prompts[1:]) == sorted({pairs.caption(row) for row in pairs.rows})
    files = sorted(encoded("sd").glob("prompts-*.safetensors"))
    sizes = [len(load_file(file)["prompt_embeds"]) for file in files]
    assert sum(sizes) == len(prompts) and set(sizes[:-1]) == {5} and 0 < sizes[-1] <= 5


def weighted_loss(err_w, err_l, ref_err_w, ref_err_l, beta, pair_weight):
    """Diffusion-DPO with a weight for each pair. It logs their sum, which no other eight pairs have."""
    logits = -beta / 2 * ((err_w - ref_err_w) - (err_l - ref_err_l))
    return -(pair_weight * torch.nn.functional.logsigmoid(logits)).mean(), {"sum": pair_weight.sum()}


@pytest.fixture
def weighted(tmp_path, monkeypatch):
    """weighted("parquet" | "jsonl", numbers): twelve pairs; those with these numbers k have the pair_weight 2^k.

    An image of pair 5 cannot be read.
    """
    for module in (data, options, run_room, train):
        monkeypatch.setattr(module, "COLUMNS", ("pair_weight",))
    monkeypatch.setattr(options, "VECTORS", options.VECTORS | {"pair_weight"})
    monkeypatch.setitem(loss.LOSSES, "weighted", weighted_loss)

    def weighted(kind, numbers):
        rows = tiny.pair_rows(12)
        rows[5]["jpg_0"] = b""
        for k in numbers:
            rows[k]["pair_weight"] = 2.0**k
        if kind == "parquet":
            return parquet(tmp_path / "pairs.parquet", rows)
        lines = []
        for k, row in enumerate(rows):
            for side in (0, 1):
                (tmp_path / f"{k}-{side}.png").write_bytes(row[f"jpg_{side}"])
            chosen = int(row["label_0"] == 0)
            line = {"prompt": row["caption"], "chosen": f"{k}-{chosen}.png", "rejected": f"{k}-{1 - chosen}.png"}
            lines.append(line | {name: row[name] for name in ("pair_weight",) if name in row})
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return tmp_path / "pairs.jsonl"

    return weighted


@pytest.mark.parametrize("kind", [slow("parquet"), "jsonl"])
def test_a_column_of_the_data_reaches_a_loss_that_names_it(run, tmp_path, small_model, weighted, kind):
    """The pairs and a cache of them give each pair its own number."""
    source, cache = weighted(kind, range(12)), tmp_path / "c"
    write_cache(small_model("sd"), source, cache)
    options = "--loss weighted --steps 1 --micro_batch 4".split()
    plain = run("sd", source, *options, name="plain")
    cached = run("sd", cache, *options, name="cached")
    assert (plain[1] - cached[1]).norm() <= 1e-5 * plain[1].norm() > 0
    rows = [int(EncodedPairs(cache)[position]["row"]) for position in range(8)]
    for out in (plain[0], cached[0]):
        assert 2 * log_of(out)[0]["sum"] == sum(2.0**row for row in rows)  # the mean of two micro-batches


ALL_BUT_ROW_3 = [0, 1, 2, *range(4, 12)]


@pytest.mark.parametrize("kind, numbers", [
    ("parquet", []), slow("parquet", ALL_BUT_ROW_3), slow("jsonl", []), ("jsonl", ALL_BUT_ROW_3)])
def test_a_column_is_wanted_only_by_the_loss_that_names_it(run, tmp_path, small_model, weighted, kind, numbers):
    """Data in which all pairs or one pair lack it train with any other loss, and so does their cache."""
    source, cache = weighted(kind, numbers), tmp_path / "c"
    write_cache(small_model("sd"), source, cache)
    for name, pairs in (("plain", source), ("cached", cache)):
        run("sd", pairs, "--loss", "sft", "--steps", "1", name=name)
        lacking = "row 3 of the data has no number there .1 of 12" if numbers else "row 0 .*1[12] of 12"
        with pytest.raises(SystemExit, match=f"^train.py: the loss takes pair_weight, but {lacking}.*$") as refused:
            run("sd", pairs, "--loss", "weighted", name="refused")
        assert "\n" not in str(refused.value) and not (tmp_path / "refused").exists()


def test_a_cache_that_was_begun_with_other_columns_is_refused(tmp_path, small_model, weighted, monkeypatch):
    source = weighted("parquet", range(12))
    write_cache(small_model("sd"), source, tmp_path / "c")
    monkeypatch.setattr(data, "COLUMNS", ())
    with pytest.raises(SystemExit, match="c was begun with columns .'pair_weight'., not ...* Pass another --out"):
        write_cache(small_model("sd"), source, tmp_path / "c")


# Building a cache


def faulty(fault, number, *arguments):
    """Runs encode.py and kills it in the midst of its number-th file, or fills the disk from there on."""
    written, atomic_write = 0, encode.atomic_write

    def faulty_write(file, content, suffix=""):
        nonlocal written
        written += file.suffix == ".safetensors"
        if written == number and fault == "kill":
            file.with_name(f"{file.name}.part").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        if written == number and fault == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        return atomic_write(file, content, suffix)

    encode.atomic_write = faulty_write
    write_cache(*arguments)


@pytest.mark.parametrize("model", ["sd", slow("sdxl")])
def test_two_processes_write_the_same_files(tmp_path, small_model, few_pairs, encoded, model):
    arguments = small_model(model), few_pairs, tmp_path / "c"
    for status, text in launch(tmp_path / "logs", 2, faulty, None, 0, *arguments):
        assert status == 0, text
    assert contents(tmp_path / "c") == contents(encoded(model))


def test_killed_and_continued_gives_the_same_files(tmp_path, small_model, few_pairs, encoded, argv):
    """The kill comes in the midst of a file. Whole files are not written again."""
    cache, before = tmp_path / "c", {}
    arguments = small_model("sd"), few_pairs, cache
    for number in (1, 3, 2):
        ((status, _),) = launch(tmp_path / "logs", 1, faulty, "kill", number, *arguments)
        assert status == -signal.SIGKILL
        now = {file: file.stat().st_mtime_ns for file in cache.glob("*.safetensors")}
        assert before.items() <= now.items() and len(now) == len(before) + number - 1
        before = now
    with pytest.raises(SystemExit, match="is not finished. Run the encode.py command that began it once more"):
        train.main(argv(small_model("sd"), cache))
    ((status, text),) = launch(tmp_path / "logs", 1, faulty, None, 0, *arguments)
    assert status == 0, text
    assert contents(cache) == contents(encoded("sd"))


def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path, small_model, few_pairs, encoded):
    cache = tmp_path / "c"
    arguments = small_model("sd"), few_pairs, cache
    ((status, text),) = launch(tmp_path / "logs", 1, faulty, "disk", 3, *arguments)
    assert status == 1 and "Traceback" not in text
    assert "encode.py: " in text and "cannot be written" in text
    assert "Free some space, then the same command resumes" in text
    assert not [*cache.glob("*.part")] and len([*cache.glob("*.safetensors")]) == 2
    ((status, text),) = launch(tmp_path / "logs", 1, faulty, None, 0, *arguments)
    assert status == 0 and contents(cache) == contents(encoded("sd")), text


def hub_of(files, monkeypatch):
    """Lets every hub id name `files`. A download is an error."""
    class Builder:
        class config:
            data_files = {"train": files}

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: Builder)
    monkeypatch.setattr(datasets, "load_dataset", None)  # calling it would raise


def test_parquet_is_streamed_a_row_group_at_a_time(tmp_path, small_model, encoded, monkeypatch, few_pairs):
    """A hub's filesystem gives what a folder gives. Each row group is read once, and one is held at a time."""
    plain = contents(encoded("sd"))
    memory, rows = fsspec.filesystem("memory"), datasets.load_dataset(few_pairs, split="train")
    names = [f"/hub/data/train-{k}.parquet" for k in (0, 1)]
    for name, numbers in zip(names, (range(10), range(10, 27))):
        rows.select(numbers).to_parquet(tmp_path / "part", batch_size=4)
        memory.pipe(name, (tmp_path / "part").read_bytes())
    hub_of([f"memory:/{name}" for name in names], monkeypatch)
    streamed = encode.stream_rows("someone/pairs")
    images = streamed.images
    groups, read = images.groups, []
    assert [group.row_groups[0].num_rows for group in groups] == [4, 4, 2, 4, 4, 4, 4, 1]

    class Group:
        def __init__(self, number):
            self.number = number

        def to_table(self, columns):
            assert images.number is None and images.table is None  # the group before was freed
            read.append(self.number)
            return groups[self.number].to_table(columns=columns)

    images.groups = [Group(number) for number in range(len(groups))]
    assert streamed.columns["caption"].to_pylist() == rows["caption"][:]
    for k, row in enumerate(rows):
        assert all(images[k][name] == row[name] for name in ("jpg_0", "jpg_1"))
    assert read == [*range(8)]

    images.groups = groups
    monkeypatch.setattr(encode, "stream_rows", lambda source, extra: streamed)
    write_cache(small_model("sd"), few_pairs, tmp_path / "c")
    cache = contents(tmp_path / "c")
    assert cache.pop("manifest.json") != plain.pop("manifest.json")  # it names other files
    assert cache == plain


def test_files_that_cannot_be_streamed_are_refused(monkeypatch):
    hub_of(["hf://datasets/a/b/train.tar"], monkeypatch)
    with pytest.raises(InputError, match="^--data a/b cannot be read: it is not stored as parquet"):
        encode.stream_rows("a/b")


def own_pairs(folder, n=3):
    """A folder with a .jsonl of pairs: picture k against picture 0."""
    for k in range(n + 1):
        tiny.draw(tiny.SCENES[k], k % 2 > 0, random.Random(k)).save(folder / f"{k}.png")
    lines = [{"prompt": f"p{k}", "chosen": f"{k}.png", "rejected": "0.png"} for k in range(1, n + 1)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return lines


def test_pairs_of_a_jsonl_are_encoded_and_told_apart(tmp_path, small_model):
    """Swapped pairs, or pairs with other pictures, are other pairs. The embedded task's pairs are read as well."""
    lines = own_pairs(tmp_path)
    arguments = small_model("sd"), tmp_path, tmp_path / "c"
    write_cache(*arguments)
    assert EncodedPairs(tmp_path / "c").report()["used"] == 3
    swapped = [line | {"chosen": line["rejected"], "rejected": line["chosen"]} for line in lines]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, swapped)))
    with pytest.raises(SystemExit, match="was begun with pairs"):
        write_cache(*arguments)
    own_pairs(tmp_path)
    write_cache(*arguments)
    tiny.draw(tiny.SCENES[9], True, random.Random(0)).resize((48, 48)).save(tmp_path / "1.png")
    with pytest.raises(SystemExit, match="was begun with pairs"):
        write_cache(*arguments)
    assert len(encode.stream_rows(sources.find_source("tiny")).columns) == 1500


def test_rows_without_a_caption_and_files_without_a_pair(tmp_path, small_model):
    """A file whose pairs are all unreadable is empty. A pair whose caption is null is not used."""
    rows = tiny.pair_rows(12)
    for k in range(5, 10):
        rows[k] |= {"jpg_0": b"no image"}
    rows[11] |= {"caption": None}
    source = parquet(tmp_path / "train.parquet", rows)
    write_cache(small_model("sd"), source, tmp_path / "c")
    plain, cached = ImagePairs(str(source), 32), EncodedPairs(tmp_path / "c")
    plain.scan()
    assert plain.report() == cached.report()
    reasons = {"not a picture": [5, 6, 7, 8, 9], "no prompt": [11]}
    assert cached.report()["unreadable"] == reasons
    for position in range(12):
        assert plain[position]["row"] == cached[position]["row"]
        assert plain[position]["caption"] == cached[position]["caption"]
    for row in rows:
        row |= {"jpg_0": b"no image"}
    source = parquet(tmp_path / "none.parquet", rows)
    with pytest.raises(SystemExit, match="holds no pair that can be read"):
        write_cache(small_model("sd"), source, tmp_path / "n")


def test_a_row_group_that_cannot_be_read_is_named(tmp_path, small_model, monkeypatch):
    class Damaged:
        path = "train.parquet"

        def to_table(self, columns):
            raise OSError("no bytes")

    source = parquet(tmp_path / "train.parquet", tiny.pair_rows(12), batch_size=6)
    streamed = encode.stream_rows(str(source))
    streamed.images.images.groups[1] = Damaged()
    monkeypatch.setattr(encode, "stream_rows", lambda source, extra: streamed)
    complaint = "row 6 is in train.parquet, which cannot be read: no bytes.*the same command resumes"
    with pytest.raises(SystemExit, match=complaint):
        write_cache(small_model("sd"), source, tmp_path / "c")
    assert [*(tmp_path / "c").glob("pairs-*.safetensors")] == [tmp_path / "c" / "pairs-00000.safetensors"]


def test_the_defaults_are_the_presets_and_what_was_taken_is_printed(tmp_path, small_model, few_pairs, capsys):
    """A cache of sd15's pairs is mirrored as a run of sd15 would mirror them."""
    command = ["--model", "sd15", "--out", str(tmp_path / "x"), "--device", "cpu"]
    args, trained = encode_args(command), train_args(["--model", "sd15", "--device", "cpu"])
    assert args.random_flip is True and args.resolution == 512
    for name in encode.SETTINGS:
        if name != "store":
            assert getattr(args, name) == getattr(trained, name), name
    assert encode_args([*command, "--no-random_flip"]).random_flip is False
    assert encode_args(["--model", "sdxl", *command[2:]]).resolution == 1024
    write_cache(small_model("sd"), few_pairs, tmp_path / "c", "--random_crop")
    program, _, printed = capsys.readouterr().out.splitlines()[0].partition(": ")
    taken = json.loads(printed)
    assert program == "encode.py" and taken["random_crop"] is True and taken["random_flip"] is False
    assert taken["store"] == "fp32" and taken["data"] == few_pairs


# What does not fit


OTHER_SETTINGS = {
    "--resolution 64": "--resolution 64: .* was encoded with 32",
    "--random_flip": "--random_flip True: .* was encoded with False",
    "--random_crop": "--random_crop True: .* was encoded with False",
    "--clip ViT-L-14:openai": "--clip ViT-L-14:openai: .* was encoded with tiny",
}


@pytest.mark.parametrize("options, complaint", OTHER_SETTINGS.items())
def test_other_settings_are_refused(encoded, small_model, tmp_path, argv, options, complaint):
    with pytest.raises(SystemExit, match=f"^train.py: {complaint}"):
        train.main(argv(small_model("sd"), encoded("sd")) + options.split())
    assert not (tmp_path / "out").exists()


def test_a_draw_from_means_alone_is_refused(encoded):
    with pytest.raises(InputError, match="--vae_sample sample: .* was encoded with mean"):
        train_args(["--data", str(encoded("sd", "--vae_sample", "mean")), "--vae_sample", "sample"])


def test_settings_come_from_the_cache_not_from_the_preset(encoded):
    """sd15's preset has 512 pixels and flips, but the cache decides what the command line does not say."""
    args = train_args(["--model", "sd15", "--data", str(encoded("sd"))])
    assert (args.resolution, args.random_flip, args.clip, args.vae_sample) == (32, False, "tiny", "sample")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_the_cache_of_another_model_is_refused(tmp_path, small_model, encoded, argv, part):
    kind = "sdxl" if part == "text_encoder_2" else "sd"
    folder = tmp_path / "model"
    shutil.copytree(small_model(kind), folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors[max(tensors)] += 0.001
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=f"was encoded with the {part} of .*, but --model is .* another one"):
        train.main(argv(str(folder), encoded(kind)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pairs-00002.safetensors", slow("prompts-00000.safetensors"), "prompts.json"])
@pytest.mark.parametrize("fault, complaint", [("missing", "is missing"), ("truncated", "has .* bytes, not")])
def test_a_damaged_cache_is_refused_and_mended(
    tmp_path, encoded, small_model, few_pairs, argv, name, fault, complaint
):
    cache = tmp_path / "c"
    shutil.copytree(encoded("sd"), cache)
    file = cache / name
    content = file.read_bytes()
    file.unlink()
    if fault == "truncated":
        file.write_bytes(content[:-7])
    with pytest.raises(SystemExit, match=f"{name} {complaint}.*it writes the file anew"):
        train.main(argv(small_model("sd"), cache))
    write_cache(small_model("sd"), few_pairs, cache)
    assert contents(cache) == contents(encoded("sd"))


def test_a_manifest_of_something_else_makes_no_cache(tmp_path):
    own_pairs(tmp_path)
    (tmp_path / "manifest.json").write_text('{"images": []}')  # as evaluate.py writes
    assert not common.is_cache(tmp_path) and len(ImagePairs(str(tmp_path), 32)) == 3
    (tmp_path / "manifest.json").write_text('{"encoders": ')
    with pytest.raises(InputError, match="manifest.json cannot be read .*it writes the manifest anew"):
        train_args(["--model", "sd15", "--data", str(tmp_path)])


def test_the_same_weights_in_another_configuration_are_another_model(
    tmp_path, small_model, encoded, run, few_pairs, argv
):
    """No tensor tells an activation or a scale."""
    for part, key, value in (("text_encoder", "hidden_act", "gelu"), ("vae", "scaling_factor", 1.0)):
        shutil.copytree(small_model("sd"), tmp_path / part)
        file = tmp_path / part / part / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(SystemExit, match=f"was encoded with the {part} of .*, but --model is .* another one"):
            train.main(argv(str(tmp_path / part), encoded("sd")))
    file = ["--reference_errors", str(tmp_path / "errors"), "--steps", "1"]
    run("sd", few_pairs, *file)
    with pytest.raises(SystemExit, match="belongs to a run with vae .*, not"):
        run("sd", few_pairs, *file, "--model", str(tmp_path / "vae"), name="other")


def test_storage_that_goes_away_leaves_no_file_without_pairs(tmp_path, small_model, monkeypatch):
    """Such files would count as done. Once the storage is back, the same command makes the cache that it would have made."""
    rows = tiny.pair_rows(12)
    (tmp_path / "pairs").mkdir()
    with open(tmp_path / "pairs" / "train.jsonl", "w", encoding="utf-8") as lines_of_pairs:
        for k, row in enumerate(rows):
            line = {"prompt": row["caption"], "chosen": f"{k}/0.png", "rejected": f"{k}/1.png"}
            (tmp_path / "pairs" / str(k)).mkdir()
            for side in (0, 1):
                (tmp_path / "pairs" / str(k) / f"{side}.png").write_bytes(row[f"jpg_{side}"])
            lines_of_pairs.write(json.dumps(line) + "\n")
    write_cache(small_model("sd"), tmp_path / "pairs", tmp_path / "whole")
    read_bytes, reads = Path.read_bytes, []

    def read_what_is_there(path):
        reads.extend([path] * (path.suffix == ".png"))
        if path.suffix == ".png" and len(reads) > reads_before:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return read_bytes(path)

    for reads_before, files in ((20, 2), (17, 1)):  # it goes between two files, then within the second, of 5 pairs each
        reads.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", read_what_is_there)
            with pytest.raises(SystemExit, match="cannot be read any more. Is the storage gone"):
                write_cache(small_model("sd"), tmp_path / "pairs", tmp_path / f"c{files}", "--workers", "1")
        assert len([*(tmp_path / f"c{files}").glob("pairs-*.safetensors")]) == files
        write_cache(small_model("sd"), tmp_path / "pairs", tmp_path / f"c{files}")
        assert contents(tmp_path / f"c{files}") == contents(tmp_path / "whole")


def test_a_cache_needs_room_before_it_is_begun(tmp_path, small_model, few_pairs, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 0, 10**5))
    with pytest.raises(SystemExit, match="needs 0 GB more, but 0 GB are free. --store fp16"):
        write_cache(small_model("sd"), few_pairs, tmp_path / "c")


BAD_INPUT = {
    "--resolution 64": ".* was begun with resolution 32, not 64",
    "--store fp16": ".* was begun with store fp32, not fp16",
    "--resolution 33": "--resolution 33: this model needs a multiple of 8",
    "--resolution 0": "argument --resolution: 0 is out of range",
    "--random_init": f"--random_init knows {', '.join(loading.HUB_IDS)}, not",
    "--device cuda:9": "--device cuda:9 is not there",
    "--data no/such": "--data no/such cannot be read",
    "--dtaa x": "unrecognized arguments",
}


@pytest.mark.parametrize("options, complaint", BAD_INPUT.items())
def test_bad_input_of_encode_py_ends_in_one_line(encoded, small_model, few_pairs, options, complaint):
    with pytest.raises(SystemExit, match=f"^encode.py: {complaint}.*$") as refused:
        write_cache(small_model("sd"), few_pairs, encoded("sd"), *options.split())
    assert "\n" not in str(refused.value)


def test_encode_py_keeps_off_other_folders(tmp_path, small_model, few_pairs):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds something else .notes.txt."):
        write_cache(small_model("sd"), few_pairs, tmp_path)


def test_what_is_not_finite_is_not_kept(tmp_path, small_model, few_pairs, monkeypatch):
    """fp16 holds no more than 65504."""
    encode_images = models.StableDiffusion.encode_images

    def huge_images(model, pixels):
        mean, std = encode_images(model, pixels)
        return mean * 1e6, std

    monkeypatch.setattr(models.StableDiffusion, "encode_images", huge_images)
    with pytest.raises(SystemExit, match="pairs-00000.safetensors: mean is not finite; --store fp32"):
        write_cache(small_model("sd"), few_pairs, tmp_path / "c", "--store", "fp16")
    assert not [*(tmp_path / "c").glob("pairs-*")]


def test_a_wrong_label_is_refused_before_anything_is_encoded(tmp_path, small_model):
    rows = tiny.pair_rows(4)
    rows[2] |= {"label_0": 2.0}
    source = parquet(tmp_path / "train.parquet", rows)
    with pytest.raises(SystemExit, match="have a label_0 other than 0, 0.5 or 1.*row 2"):
        write_cache(small_model("sd"), source, tmp_path / "c")
    assert not (tmp_path / "c").exists()


# The VAE's precision


def test_a_vae_in_bf16_is_the_same_to_its_precision(small_model, few_pairs):
    """bf16 has 8 bits. The decoder stays in float32, and so does the default on a CPU."""
    assert train_args(["--model", "sd15"]).vae_precision == "fp32" or torch.cuda.is_available()
    pixels = torch.stack([ImagePairs(few_pairs, 32)[k]["pixels"] for k in range(4)])
    exact, half = fresh(small_model("sdxl")), fresh(small_model("sdxl"))
    half.vae_dtype = torch.bfloat16
    for one, other in zip(exact.encode_images(pixels), half.encode_images(pixels)):
        assert other.dtype == torch.float32 and not torch.equal(one, other)
        assert (one - other).abs().max() < 0.03 * one.abs().max()
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(exact.decode(latents), half.decode(latents))


@pytest.mark.slow
def test_a_cache_decides_in_what_the_vae_encoded(tmp_path, run, encoded, few_pairs):
    """A cache in bf16 gives the errors of the pairs in bf16. Another precision, or a file of its errors, is refused."""
    cache, file = encoded("sd", "--vae_precision", "bf16"), str(tmp_path / "errors")
    options = ["--vae_sample", "mean"]
    cached, _, _ = run("sd", cache, *options, "--reference_errors", file, name="cached")
    pairs, _, _ = run("sd", few_pairs, *options, "--vae_precision", "bf16", name="pairs")
    exact, _, _ = run("sd", few_pairs, *options, name="exact")
    errors = [log_of(out)[0]["mse/ref_w"] for out in (cached, pairs, exact)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6) and errors[0] != pytest.approx(errors[2], rel=1e-6)
    assert json.loads((cached / "config.json").read_text())["vae_precision"] == "bf16"
    with pytest.raises(SystemExit, match="--vae_precision fp32: .* was encoded with bf16"):
        run("sd", cache, "--vae_precision", "fp32", name="other")
    with pytest.raises(SystemExit, match="belongs to a run with"):
        run("sd", few_pairs, *options, "--reference_errors", file, name="refused")


def test_a_cache_goes_on_in_the_vae_precision_that_it_was_begun_with(encoded, small_model, few_pairs):
    """Left out, the option means fp32 on a CPU. The files of one cache must not differ in it."""
    cache = encoded("sd", "--vae_precision", "bf16")
    with pytest.raises(SystemExit, match=f"^encode.py: {cache} was begun with vae_precision bf16, not fp32"):
        write_cache(small_model("sd"), few_pairs, cache)


# The reference's errors


class Puts:
    """Observes ReferenceErrors.put: `steps` of its calls, and before(errors), after() around each of them."""

    def __init__(self, monkeypatch, before=None, after=None):
        self.steps, put = [], ReferenceErrors.put

        def observed(errors, step, *values):
            self.steps.append(step)
            if before:
                before(errors)
            put(errors, step, *values)
            if after:
                after()

        monkeypatch.setattr(ReferenceErrors, "put", observed)


def never(*_):
    raise AssertionError("a reference is computed")


METHODS = [slow([]), slow(["--loss", "dpo"]), ["--lora_rank", "2"],
           ["--group_size", "8", "--sft_weight", "0.2"]]


@pytest.mark.parametrize("options", METHODS)
def test_cached_reference_errors_train_to_the_same_bits(run, encoded, tmp_path, monkeypatch, options):
    """This holds at the same micro-batch, in one pass and in two. The second run finds all and needs no reference."""
    file = ["--reference_errors", str(tmp_path / "errors")]
    plain = run("sd", encoded("sd"), *options, name="plain")
    first = run("sd", encoded("sd"), *options, *file, name="first")
    for where, name in ((train, "frozen_reference"), (train, "disabled_adapter"), (ReferenceErrors, "put")):
        monkeypatch.setattr(where, name, never)
    second = run("sd", encoded("sd"), *options, *file, name="second")
    assert torch.equal(plain[1], first[1]) and torch.equal(plain[2], first[2])
    assert torch.equal(plain[2], second[2])
    assert lines(plain[0]) == lines(first[0]) == lines(second[0])
    assert lines(plain[0])[2]["reward/margin"] != 0


def test_no_loader_is_left_when_a_run_ends(run, encoded, tmp_path, monkeypatch):
    """The readers of the reference's errors would idle beside the training, and each keep its memory."""
    monkeypatch.setattr(distributed, "UNFINISHED", [])
    run("sd", encoded("sd"), "--reference_errors", str(tmp_path / "errors"), "--workers", "1", "--steps", "1")
    assert distributed.UNFINISHED == []


def test_reference_errors_at_another_micro_batch_agree_to_rounding(run, encoded, tmp_path):
    file = ["--reference_errors", str(tmp_path / "errors"), "--loss", "dpo"]
    at_4 = run("sd", encoded("sd"), *file, "--micro_batch", "4", name="4")
    at_2 = run("sd", encoded("sd"), *file, "--micro_batch", "2", name="2")
    assert (at_4[1] - at_2[1]).norm() <= 1e-5 * at_4[1].norm()


def test_a_sweep_pays_for_the_reference_once(run, encoded, tmp_path, monkeypatch):
    """The reference sees no loss, beta, tau, group, learning rate or rank. A longer run adds its steps to the file."""
    file = ["--reference_errors", str(tmp_path / "errors")]
    run("sd", encoded("sd"), *file, name="first")
    puts = Puts(monkeypatch)
    other = "--loss dpo --beta 10 --group_size 2 --lr 1e-4 --lora_rank 2 --optimizer sgd".split()
    run("sd", encoded("sd"), *file, *other, name="other")
    assert puts.steps == []
    run("sd", encoded("sd"), *file, "--steps", "5", "--tau", "1", name="longer")
    assert puts.steps == [3, 4]


def test_a_pair_that_can_be_read_only_once_costs_one_step_of_reference_errors(run, few_pairs, tmp_path, monkeypatch):
    """Its replacement's errors fit no step. They are removed, and the same command computes these again and no others."""
    file, gone = ["--reference_errors", str(tmp_path / "errors")], []
    plain = run("sd", few_pairs, name="plain")
    complete, load = ReferenceErrors.complete, ImagePairs.load

    def load_what_is_there(pairs, row):
        if row in gone:
            raise Unreadable("no such file")
        return load(pairs, row)

    def complete_without_one(errors, stream, *inputs):
        gone.append(stream.pairs.row_at(9))
        complete(errors, stream, *inputs)
        stream.pairs.unreadable.clear()
        gone.clear()

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="at step 1, position 1, it drew row .* The same command"):
        patch.setattr(ImagePairs, "load", load_what_is_there)
        patch.setattr(ReferenceErrors, "complete", complete_without_one)
        run("sd", few_pairs, *file, name="out")
    puts = Puts(monkeypatch)
    again = run("sd", few_pairs, *file, name="out")
    assert puts.steps == [1] and torch.equal(plain[2], again[2]) and lines(plain[0]) == lines(again[0])


def one_image_loss(err_w, ref_err_w, beta):
    """A loss that takes the winner alone: mean_i -log sigmoid( -beta/2 * D_i^w )."""
    d_w = err_w - ref_err_w
    return -torch.nn.functional.logsigmoid(-beta / 2 * d_w).mean(), {"reward/chosen": (-beta / 2 * d_w).detach().mean()}


def test_errors_that_a_loss_of_one_image_computed_serve_dpo(run, few_pairs, tmp_path, monkeypatch):
    """A file holds both images' errors, whatever loss came first, so DPO's run is the same with and without it."""
    monkeypatch.setitem(loss.LOSSES, "one_image", one_image_loss)
    file = ["--reference_errors", str(tmp_path / "errors")]
    few_pairs = [few_pairs, "--micro_batch", "4"]
    plain = run("sd", *few_pairs, "--loss", "dpo", name="plain")
    first = run("sd", *few_pairs, "--loss", "one_image", *file, name="first")
    errors = load_file(tmp_path / "errors")["errors"]
    assert errors.shape == (3, 8, 2) and (errors[..., 0] != errors[..., 1]).all()
    assert log_of(first[0])[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    puts = Puts(monkeypatch)
    served = run("sd", *few_pairs, "--loss", "dpo", *file, name="served")
    assert puts.steps == [] and lines(plain[0]) == lines(served[0]) and torch.equal(plain[2], served[2])
    start = log_of(served[0])[0]
    assert start["reward/margin"] == 0 and start["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_processes_compute_the_same_reference_errors(run, encoded, small_model, tmp_path, argv):
    run("sd", encoded("sd"), "--reference_errors", str(tmp_path / "one"))
    command = argv(small_model("sd"), encoded("sd")) + ["--reference_errors", str(tmp_path / "two")]
    command += ["--steps", "3", "--lr", "1e-3"]
    for status, text in launch(tmp_path / "logs", 2, train.main, command):
        assert status == 0, text
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one["errors"].shape == (3, 8, 2) and torch.equal(one["errors"], two["errors"])
    assert one["draw_ids"].shape == (3, 8, 3) and torch.equal(one["draw_ids"], two["draw_ids"])


OTHER_RUNS = {
    "--seed 1": "seed 0, not 1",
    "--batch_size 16": "batch_size 8, not 16",
    "--prompt_dropout 0": "prompt_dropout 0.2, not 0.0",
    "--group_noise timestep": "group_noise own, not timestep",
    "--vae_sample mean": "vae_sample sample, not mean",
    "--precision bf16": "precision fp32, not bf16",
}


def test_reference_errors_of_another_run_are_refused(run, encoded, tmp_path):
    file = ["--reference_errors", str(tmp_path / "errors"), "--steps", "1"]
    run("sd", encoded("sd"), *file)
    for other, difference in OTHER_RUNS.items():
        with pytest.raises(SystemExit, match=f"belongs to a run with {difference}"):
            run("sd", encoded("sd"), *file, *other.split(), name="other")
        assert not (tmp_path / "other").exists()


def test_reference_errors_of_another_model_other_data_or_damaged_are_refused(
    run, encoded, few_pairs, tmp_path
):
    file = ["--reference_errors", str(tmp_path / "errors"), "--steps", "1"]
    run("sd", few_pairs, *file)
    with pytest.raises(SystemExit, match="belongs to a run with data"):
        run("sd", encoded("sd"), *file, name="other")
    with pytest.raises(SystemExit, match="belongs to a run with noise schedule"):
        run("sd-v", few_pairs, *file, name="other")
    (tmp_path / "errors").write_bytes((tmp_path / "errors").read_bytes()[:-5])
    with pytest.raises(SystemExit, match="--reference_errors .* cannot be read"):
        run("sd", few_pairs, *file, name="other")
    with pytest.raises(SystemExit, match="sft has no reference"):
        run("sd", few_pairs, *file, "--loss", "sft", name="other")


@pytest.mark.parametrize("content", ["errors without draw_ids", "weights"])
def test_a_file_that_holds_something_else_is_refused_and_kept(run, encoded, tmp_path, content):
    """The user may have mistyped the name of a model. Errors that do not say how they were drawn are refused, too."""
    file = tmp_path / "errors"
    run("sd", encoded("sd"), "--reference_errors", str(file), "--steps", "1")
    with safe_open(file, "pt") as shard:
        identity, errors = shard.metadata()["identity"], shard.get_tensor("errors")
    if content == "weights":
        save_file({"weight": errors}, file, {"format": "pt"})
    else:
        save_file({"errors": errors}, file, {"identity": identity})
    before = file.read_bytes()
    with pytest.raises(SystemExit, match="^train.py: --reference_errors .* cannot be read .*Pass another file"):
        run("sd", encoded("sd"), "--reference_errors", str(file), "--steps", "1", name="other")
    assert file.read_bytes() == before and not (tmp_path / "other").exists()


def logit_normal(process, generator):
    """It takes the place of DDPM.sample_t."""
    share = torch.randn((), generator=generator).sigmoid()
    return (share * len(process.alphas_cumprod)).long()


def test_reference_errors_that_other_code_drew_are_refused_by_step_and_position(
    run, encoded, tmp_path, monkeypatch
):
    """The run's first step differs, so this is found before a network is placed. Nothing is written."""
    file = tmp_path / "errors"
    run("sd", encoded("sd"), "--reference_errors", str(file))
    before, draw_ids = file.read_bytes(), load_file(file)["draw_ids"]
    monkeypatch.setattr(loss.DDPM, "sample_t", logit_normal)
    monkeypatch.setattr(train.Trainer, "place_models", never)
    complaint = "^train.py: --reference_errors .* was computed by other code or on other data"
    with pytest.raises(SystemExit, match=complaint) as refused:
        run("sd", encoded("sd"), "--reference_errors", str(file), "--lr", "1e-4", name="other")
    t = int(draw_ids[0, 0, 1])
    assert f"at step 0, position 0, it drew timestep {t}, not " in str(refused.value)
    assert "noise" not in str(refused.value) and "row" not in str(refused.value)
    assert file.read_bytes() == before and not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["noise", "row"])
def test_what_other_code_draws_later_is_refused_when_it_is_read(run, encoded, tmp_path, monkeypatch, name):
    """Only one position has another noise or another pair: position 5 of step 1, in its second micro-batch."""
    file = ["--reference_errors", str(tmp_path / "errors")]
    run("sd", encoded("sd"), *file)
    get_item = data.Stream.__getitem__

    def other_item(stream, position):
        if position != 13:
            return get_item(stream, position)
        if name == "row":
            item = stream.pairs[position + 1] | stream.draw(position)
        else:
            item = stream.pairs[position] | stream.draw(position)
            item["noise"] = item["noise"] + 1
        draw_id = stream.draw_id(item["row"], item["t"], item["noise"])
        return item | {"draw_id": draw_id, "position": torch.tensor(position)}

    monkeypatch.setattr(data.Stream, "__getitem__", other_item)
    number = {"row": "[0-9]+", "noise": r"-?[0-9]+\.[0-9]{3}"}[name]
    complaint = rf": at step 1, position 5, it drew {name} {number}, not {name} {number}\."
    complaint = {"row": rf"{complaint} .* or the code has changed", "noise": rf"by other code .*{complaint}"}[name]
    with pytest.raises(SystemExit, match=complaint):
        run("sd", encoded("sd"), *file, "--lr", "1e-4", name="other")
    assert len(log_of(tmp_path / "other")) == 1


def test_reference_errors_go_on_where_they_were(run, encoded, tmp_path, monkeypatch):
    """A run that ends while they are computed leaves those that it saved, and the next one computes only the rest."""
    file = ["--reference_errors", str(tmp_path / "errors")]
    whole = run("sd", encoded("sd"), "--reference_errors", str(tmp_path / "all"), name="whole")

    def fail_once(errors):
        errors.saved_at = 0  # seconds: long ago
        if puts.steps == [0, 1]:
            raise KeyboardInterrupt

    puts = Puts(monkeypatch, before=fail_once)
    with pytest.raises(KeyboardInterrupt):
        run("sd", encoded("sd"), *file)
    _, _, weights = run("sd", encoded("sd"), *file)
    assert puts.steps == [0, 1, 1, 2] and torch.equal(weights, whole[2])


@pytest.mark.slow
def test_a_signal_keeps_the_reference_errors_so_far(run, encoded, tmp_path, monkeypatch):
    """The file may lie in the run's own folder."""
    def signal_once():
        if puts.steps == [0, 1]:
            os.kill(os.getpid(), signal.SIGTERM)

    puts = Puts(monkeypatch, after=signal_once)
    file = ["--reference_errors", str(tmp_path / "run" / "errors")]
    with pytest.raises(SystemExit, match="saved the reference's errors so far; the same command resumes"):
        run("sd", encoded("sd"), *file)
    _, _, weights = run("sd", encoded("sd"), *file)
    assert puts.steps == [0, 1, 2] and torch.equal(weights, run("sd", encoded("sd"), name="plain")[2])


def test_a_resumed_run_may_take_reference_errors(run, encoded, tmp_path):
    """They are the starting model's, not the half-trained one's. A shorter run computes what this one left out."""
    plain = run("sd", encoded("sd"), "--steps", "4", name="plain")
    run("sd", encoded("sd"), "--steps", "2", name="resumed")
    file = ["--reference_errors", str(tmp_path / "errors")]
    resumed = run("sd", encoded("sd"), "--steps", "4", *file, name="resumed")
    assert torch.equal(plain[2], resumed[2]) and lines(plain[0]) == lines(resumed[0])
    errors = load_file(tmp_path / "errors")["errors"]
    assert errors.isnan().all(dim=(1, 2)).tolist() == [True, True, False, False]
    run("sd", encoded("sd"), "--steps", "1", *file, name="shorter")
    errors = load_file(tmp_path / "errors")["errors"]
    assert errors.isnan().all(dim=(1, 2)).tolist() == [False, True, False, False]


def test_a_reference_that_is_not_finite_ends_the_run(run, encoded, tmp_path, monkeypatch):
    error = train.denoising_error
    monkeypatch.setattr(train, "denoising_error", lambda *args, **cond: error(*args, **cond) * float("nan"))
    with pytest.raises(SystemExit, match="the reference's errors of step 0 are not finite"):
        run("sd", encoded("sd"), "--reference_errors", str(tmp_path / "errors"))
