"""Encoded pairs train as the pairs themselves; a cache, and the reference's errors, are what they say."""

import functools
import json
import os
import random
import resource
import shutil
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cache
import data
import resume
import tiny
import train
from conftest import launch, log_of

pytestmark = pytest.mark.usefixtures("quick_tiny", "quick_models")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def encode(*options):
    """data.py --out, with a few pairs to a file, so that there are many files."""
    cache.SHARD, cache.BATCH = 5, 2
    try:
        cache.main(["--clip", "tiny", "--device", "cpu", *options])
    finally:
        cache.SHARD, cache.BATCH = 256, 8


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, small_model, few_pairs):
    """encoded(model, *options): a cache of the few pairs; caches are kept."""
    folders = {}

    def encoded(model, *options):
        if (model, options) not in folders:
            folder = tmp_path_factory.mktemp("cache") / "c"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tiny, "STEPS", dict.fromkeys(tiny.STEPS, 2))
                encode("--model", small_model(model), "--data", few_pairs, "--out", str(folder), *options)
            folders[model, options] = folder
        return folders[model, options]

    return encoded


@pytest.fixture
def run(tmp_path, small_model, monkeypatch):
    """run(model, data, *options) -> its folder, all gradients of its first step, all weights of its end."""

    def run(model, pairs, *options, name="run"):
        first, clip = [], torch.nn.utils.clip_grad_norm_

        def clip_and_keep(parameters, limit):
            parameters = list(parameters)
            first.append(torch.cat([p.grad.flatten() for p in parameters])) if not first else None
            return clip(parameters, limit)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_keep)
        out = tmp_path / name
        fixed = "--steps 3 --batch_size 8 --micro_batch 4 --sample_every 0 --clip tiny --device cpu --lr 1e-3"
        fixed = fixed.split()
        train.main(["--model", small_model(model), "--data", str(pairs), "--out", str(out), *fixed, *options])
        (file,) = out.glob("checkpoint-*.pt")
        weights = torch.load(file, weights_only=True)["unet"]
        return out, first[0], torch.cat([value.flatten() for value in weights.values()])

    return run


def lines(out):
    return [{k: v for k, v in line.items() if k != "pairs_per_second"} for line in log_of(out)]


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "lock"}


# Training from it


@pytest.mark.parametrize(
    "model, loss",
    [
        ("sd", "rpo"),
        ("sdxl", "rpo"),
        ("sd", "sft"),
        slow("sd", "dpo"),
        slow("sdxl", "dpo"),
        slow("sdxl", "sft"),
    ],
)
def test_a_cache_trains_as_the_pairs_themselves(run, encoded, few_pairs, model, loss):
    """The VAE's mean, no flip, no crop: the batches of the encoders differ, so to rounding."""
    options = ["--loss", loss, "--vae_sample", "mean"]
    plain, cached = (
        run(model, pairs, *options, name=name) for name, pairs in (("a", few_pairs), ("b", encoded(model)))
    )
    assert (plain[1] - cached[1]).norm() <= 1e-5 * plain[1].norm() > 0
    assert json.loads((cached[0] / "config.json").read_text())["resolution"] == 32
    names = ["rows", "used", "ties", "unlabelled", "unreadable"]
    reports = [json.loads((out / "data.json").read_text()) for out in (plain[0], cached[0])]
    assert reports[0] == reports[1] and [*reports[0]] == names and reports[0]["unreadable"] == [5, 9]


def test_the_posteriors_draw_comes_from_the_cache_too(run, encoded, few_pairs):
    plain, cached = (run("sd", pairs, name=name) for name, pairs in (("a", few_pairs), ("b", encoded("sd"))))
    mean = run("sd", encoded("sd"), "--vae_sample", "mean", name="c")
    assert (plain[1] - cached[1]).norm() <= 1e-5 * plain[1].norm()
    assert (mean[1] - cached[1]).norm() > 1e-5 * mean[1].norm()


def test_a_cache_streams_the_same_pairs_in_the_same_order(encoded, few_pairs):
    """Epochs, replacement of unreadable rows, dropped prompts, size and crop; from processes as well."""
    plain = data.PreferencePairs(few_pairs, 32, seed=3, prompt_dropout=0.5)
    cached = cache.CachedPairs(encoded("sdxl"), seed=3, prompt_dropout=0.5)
    for position in range(2 * len(plain) + 3):
        a, b = plain[position], cached[position]
        assert all(a[name] == b[name] for name in ("row", "prompt", "caption", "unreadable"))
        assert torch.equal(a["time_ids"], b["time_ids"])
        assert b["states"].any() == b["pooled"].any() == bool(a["prompt"])  # SDXL: a dropped prompt is zeros
    assert plain.report() == cached.report()
    loaded = torch.utils.data.DataLoader(
        cached, batch_sampler=[[0, 1], [2]], num_workers=1, collate_fn=data.collate
    )
    assert torch.equal(
        torch.cat([batch["mean"] for batch in loaded]), torch.stack([cached[k]["mean"] for k in range(3)])
    )


def test_flips_and_crops_are_those_of_the_first_epoch(encoded, few_pairs, small_model, run):
    folder = encoded("sd", "--random_flip", "--random_crop")
    pairs = data.PreferencePairs(few_pairs, 32, random_flip=True, random_crop=True)
    cached, vae = cache.CachedPairs(folder), data.load_pipeline(small_model("sd")).vae
    for position in range(8):
        mean, _ = data.encode_images(vae, pairs[position]["pixels"][None])
        torch.testing.assert_close(cached[position]["mean"], mean[0])
    assert json.loads((run("sd", folder)[0] / "config.json").read_text())["random_flip"] is True


def test_half_and_means_take_less_room_and_say_so(encoded, run):
    """fp16 keeps 11 bits of latents and states; CLIP's embeddings and SDXL's sizes stay float32."""
    whole, half, means = (
        cache.CachedPairs(encoded("sdxl", *options))
        for options in ((), ("--store", "fp16"), ("--vae_sample", "mean"))
    )
    for name in ("mean", "std", "states", "pooled"):
        assert half[0][name].dtype == torch.float16
        torch.testing.assert_close(half[0][name].float(), whole[0][name], rtol=2**-11, atol=1e-7)
    assert torch.equal(half[0]["time_ids"], whole[0]["time_ids"])
    assert torch.equal(half[0]["embeddings"], whole[0]["embeddings"])
    assert "std" not in means[0] and torch.equal(means[0]["mean"], whole[0]["mean"])
    out = run("sdxl", encoded("sdxl", "--store", "fp16", "--vae_sample", "mean"))[0]
    assert json.loads((out / "config.json").read_text())["vae_sample"] == "mean"


def test_every_prompt_is_encoded_once(encoded, few_pairs):
    prompts = json.loads((encoded("sd") / "prompts.json").read_text())
    pairs = data.PreferencePairs(few_pairs, 32)
    assert prompts[0] == "" and sorted(prompts[1:]) == sorted({pairs.caption(row) for row in pairs.pairs})
    files = sorted(encoded("sd").glob("prompts-*.safetensors"))
    assert [len(load_file(file)["states"]) for file in files] == [5] * (len(prompts) // 5) + [
        len(prompts) % 5
    ] * (len(prompts) % 5 > 0)


# Building it


def encode_as_told(fault, number, argv):
    """data.py --out, killed in the midst of writing its number-th file, or its disk full from there on."""
    written, write = 0, resume.write

    def faulty(file, content, **own):
        nonlocal written
        written += file.suffix == ".safetensors"
        if written == number and fault == "kill":
            file.with_name(f"{file.name}.part").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        if written == number and fault == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        return write(file, content, **own)

    resume.write = faulty
    encode(*argv)


@pytest.mark.parametrize("model", ["sd", slow("sdxl")])
def test_two_processes_write_the_same_files(tmp_path, small_model, few_pairs, encoded, model):
    argv = ["--model", small_model(model), "--data", few_pairs, "--out", str(tmp_path / "c")]
    for status, text in launch(tmp_path / "logs", 2, encode_as_told, None, 0, argv):
        assert status == 0, text
    assert contents(tmp_path / "c") == contents(encoded(model))


def test_killed_and_continued_gives_the_same_files(tmp_path, small_model, few_pairs, encoded):
    """In the midst of a file; the files that were whole are not written again."""
    argv = ["--model", small_model("sd"), "--data", few_pairs, "--out", str(tmp_path / "c")]
    before = {}
    for number in (1, 3, 2):
        ((status, _),) = launch(tmp_path / "logs", 1, encode_as_told, "kill", number, argv)
        assert status == -signal.SIGKILL
        now = {file: file.stat().st_mtime_ns for file in (tmp_path / "c").glob("*.safetensors")}
        assert before.items() <= now.items() and len(now) == len(before) + number - 1
        before = now
    with pytest.raises(SystemExit, match="is not finished; the command of data.py that began it goes on"):
        train.main(
            ["--model", small_model("sd"), "--data", str(tmp_path / "c"), "--out", str(tmp_path / "out")]
        )
    ((status, text),) = launch(tmp_path / "logs", 1, encode_as_told, None, 0, argv)
    assert status == 0, text
    assert contents(tmp_path / "c") == contents(encoded("sd"))


def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path, small_model, few_pairs, encoded):
    argv = ["--model", small_model("sd"), "--data", few_pairs, "--out", str(tmp_path / "c")]
    ((status, text),) = launch(tmp_path / "logs", 1, encode_as_told, "disk", 3, argv)
    assert status == 1 and "cannot be written" in text and "with more room the same command goes on" in text
    assert "Traceback" not in text and not [*(tmp_path / "c").glob("*.part")]
    assert len([*(tmp_path / "c").glob("*.safetensors")]) == 2
    ((status, text),) = launch(tmp_path / "logs", 1, encode_as_told, None, 0, argv)
    assert status == 0 and contents(tmp_path / "c") == contents(encoded("sd")), text


def test_parquet_is_streamed_a_row_group_at_a_time(tmp_path, small_model, encoded, monkeypatch, few_pairs):
    """From a hub's filesystem as from a folder: each row group is read once, one is held, no copy is made."""
    import datasets
    import fsspec

    plain = contents(encoded("sd"))
    memory, rows = fsspec.filesystem("memory"), datasets.load_dataset(few_pairs, split="train")
    for k, part in enumerate((rows.select(range(10)), rows.select(range(10, 27)))):
        part.to_parquet(tmp_path / "part", batch_size=4)
        memory.pipe(f"/hub/data/train-{k}.parquet", (tmp_path / "part").read_bytes())

    class Builder:
        class config:
            data_files = {"train": ["memory://hub/data/train-0.parquet", "memory://hub/data/train-1.parquet"]}

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: Builder)
    monkeypatch.setattr(datasets, "load_dataset", None)  # calling it would raise
    streamed = cache.stream("someone/pairs")
    groups, read = streamed.groups, []
    assert [group.row_groups[0].num_rows for group in groups] == [4, 4, 2, 4, 4, 4, 4, 1]

    class Group:
        def __init__(self, number):
            self.number = number

        def to_table(self, columns):
            assert streamed.group == (None, None)  # the one before was let go
            read.append(self.number)
            return groups[self.number].to_table(columns=columns)

    streamed.groups = [Group(number) for number in range(len(groups))]
    assert len(streamed) == 27 and streamed["caption"] == rows["caption"][:]
    for k, row in enumerate(rows):
        assert all(streamed[k][name] == row[name] for name in ("jpg_0", "jpg_1"))
    assert read == [*range(8)]

    monkeypatch.setattr(
        cache,
        "stream",
        lambda source: cache.Streamed([f"/hub/data/train-{k}.parquet" for k in (0, 1)], memory),
    )
    encode("--model", small_model("sd"), "--data", few_pairs, "--out", str(tmp_path / "c"))
    ours = contents(tmp_path / "c")
    assert ours.pop("manifest.json") != plain.pop("manifest.json")  # it names other files
    assert ours == plain


def test_files_that_cannot_be_streamed_are_refused(monkeypatch):
    import datasets

    class Builder:
        class config:
            data_files = {"train": ["hf://datasets/a/b/train.tar"]}

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: Builder)
    with pytest.raises(SystemExit, match="a/b is not kept as parquet"):
        cache.stream("a/b")


def own_pairs(folder, n=3):
    """A folder with a .jsonl of pairs: picture k against picture 0."""
    for k in range(n + 1):
        tiny.draw(tiny.SCENES[k], k % 2 > 0, random.Random(k)).save(folder / f"{k}.png")
    lines = [{"prompt": f"p{k}", "chosen": f"{k}.png", "rejected": "0.png"} for k in range(1, n + 1)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return lines


def test_pairs_of_a_jsonl_are_encoded_and_told_apart(tmp_path, small_model):
    """Swapped, or with other pictures, they are other pairs; drawn ones are read as well."""
    lines = own_pairs(tmp_path)
    argv = ["--model", small_model("sd"), "--data", str(tmp_path), "--out", str(tmp_path / "c")]
    encode(*argv)
    assert cache.CachedPairs(tmp_path / "c").report()["used"] == 3
    swapped = [line | {"chosen": line["rejected"], "rejected": line["chosen"]} for line in lines]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, swapped)))
    with pytest.raises(SystemExit, match="was begun with pairs"):
        encode(*argv)
    own_pairs(tmp_path)
    encode(*argv)
    tiny.draw(tiny.SCENES[9], True, random.Random(0)).resize((48, 48)).save(tmp_path / "1.png")
    with pytest.raises(SystemExit, match="was begun with pairs"):
        encode(*argv)
    assert len(cache.stream("tiny")) == 1500


def test_rows_without_a_caption_and_files_without_a_pair(tmp_path, small_model):
    """A whole file of unreadable pairs is an empty one; a null caption is the empty prompt."""
    import datasets

    rows = list(tiny.pairs(12))
    for k in range(5, 10):
        rows[k] |= {"jpg_0": b"no image"}
    rows[11] |= {"caption": None}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    encode(
        "--model", small_model("sd"), "--data", str(tmp_path / "train.parquet"), "--out", str(tmp_path / "c")
    )
    plain, cached = (
        data.PreferencePairs(str(tmp_path / "train.parquet"), 32),
        cache.CachedPairs(tmp_path / "c"),
    )
    assert plain.report() == cached.report() and cached.report()["unreadable"] == [5, 6, 7, 8, 9]
    for position in range(12):
        assert plain[position]["row"] == cached[position]["row"]
        assert plain[position]["caption"] == cached[position]["caption"]
    for k in range(12):
        rows[k] |= {"jpg_0": b"no image"}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(SystemExit, match="holds no pair that can be read"):
        encode(
            "--model",
            small_model("sd"),
            "--data",
            str(tmp_path / "none.parquet"),
            "--out",
            str(tmp_path / "n"),
        )


def test_a_row_group_that_cannot_be_read_is_named(tmp_path, small_model, monkeypatch):
    import datasets

    datasets.Dataset.from_list(list(tiny.pairs(12))).to_parquet(tmp_path / "train.parquet", batch_size=6)
    argv = [
        "--model",
        small_model("sd"),
        "--data",
        str(tmp_path / "train.parquet"),
        "--out",
        str(tmp_path / "c"),
    ]
    streamed = cache.stream(argv[3])
    streamed.groups[1] = type("Group", (), {"path": "train.parquet", "to_table": lambda *_, **__: 1 / 0})
    monkeypatch.setattr(cache, "stream", lambda source: streamed)
    with pytest.raises(
        SystemExit, match="row 6 is in train.parquet, which cannot be read: .*the same command goes on"
    ):
        encode(*argv)
    assert [*(tmp_path / "c").glob("pairs-*.safetensors")] == [tmp_path / "c" / "pairs-00000.safetensors"]


# What does not fit


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--resolution", "64"], "--resolution 64: .* was encoded with 32"),
        (["--random_flip"], "--random_flip True: .* was encoded with False"),
        (["--random_crop"], "--random_crop True: .* was encoded with False"),
        (["--clip", "ViT-L-14:openai"], "--clip ViT-L-14:openai: .* was encoded with tiny"),
    ],
)
def test_other_settings_are_refused(encoded, small_model, tmp_path, options, complaint):
    argv = ["--model", small_model("sd"), "--data", str(encoded("sd")), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=complaint):
        train.main([*argv, *options])
    assert not (tmp_path / "out").exists()


def test_a_draw_from_means_alone_is_refused(encoded, small_model):
    with pytest.raises(SystemExit, match="--vae_sample sample: .* was encoded with mean"):
        train.get_args(["--data", str(encoded("sd", "--vae_sample", "mean")), "--vae_sample", "sample"])


def test_settings_come_from_the_cache_not_from_the_preset(encoded):
    """sd15's preset has 512 pixels and flips; what the command line does not say is the cache's."""
    args = train.get_args(["--model", "sd15", "--data", str(encoded("sd"))])
    assert (args.resolution, args.random_flip, args.clip, args.vae_sample) == (32, False, "tiny", "sample")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_the_cache_of_another_model_is_refused(tmp_path, small_model, encoded, part):
    kind = "sdxl" if part == "text_encoder_2" else "sd"
    shutil.copytree(small_model(kind), folder := tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors[max(tensors)] += 0.001
    save_file(tensors, file, metadata={"format": "pt"})
    argv = ["--model", str(folder), "--data", str(encoded(kind)), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=f"were encoded by .*, whose {part} is not that of"):
        train.main([*argv, "--device", "cpu"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["pairs-00002.safetensors", slow("prompts-00000.safetensors"), "prompts.json"]
)
@pytest.mark.parametrize("fault, complaint", [("missing", "is missing"), ("truncated", "has .* bytes, not")])
def test_a_damaged_cache_is_refused_and_mended(
    tmp_path, encoded, small_model, few_pairs, name, fault, complaint
):
    shutil.copytree(encoded("sd"), folder := tmp_path / "c")
    file = folder / name
    content = file.read_bytes()
    file.unlink() if fault == "missing" else file.write_bytes(content[:-7])
    argv = ["--model", small_model("sd"), "--data", str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=f"{name} {complaint}.*writes it anew"):
        train.main([*argv, "--device", "cpu"])
    encode("--model", small_model("sd"), "--data", few_pairs, "--out", str(folder))
    assert contents(folder) == contents(encoded("sd"))


def test_a_manifest_of_something_else_makes_no_cache(tmp_path):
    own_pairs(tmp_path)
    (tmp_path / "manifest.json").write_text('{"images": []}')  # as evaluate.py writes
    assert not cache.is_cache(tmp_path) and len(data.PreferencePairs(str(tmp_path), 32)) == 3
    (tmp_path / "manifest.json").write_text('{"encoders": ')
    with pytest.raises(SystemExit, match="manifest.json cannot be read .*writes it anew"):
        train.get_args(["--model", "sd15", "--data", str(tmp_path)])


def test_the_same_weights_in_another_configuration_are_another_model(
    tmp_path, small_model, encoded, run, few_pairs
):
    """Of an activation or a scale no tensor tells."""
    for part, key, value in (("text_encoder", "hidden_act", "gelu"), ("vae", "scaling_factor", 1.0)):
        shutil.copytree(small_model("sd"), folder := tmp_path / part)
        config = json.loads((folder / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config | {key: value}))
        argv = ["--model", str(folder), "--data", str(encoded("sd")), "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit, match=f"whose {part} is not that of"):
            train.main([*argv, "--device", "cpu"])
    file = ["--reference_errors", str(tmp_path / "errors"), "--steps", "1"]
    run("sd", few_pairs, *file)
    with pytest.raises(SystemExit, match="is of a run with vae .*, not"):
        run("sd", few_pairs, *file, "--model", str(tmp_path / "vae"), name="other")


def test_a_cache_needs_room_before_it_is_begun(tmp_path, small_model, few_pairs, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 0, 10**5))
    with pytest.raises(SystemExit, match="needs 0 GB more, 0 are free; --store fp16"):
        encode("--model", small_model("sd"), "--data", few_pairs, "--out", str(tmp_path / "c"))


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--resolution", "64"], "was begun with resolution 32, not 64"),
        (["--store", "fp16"], "was begun with store fp32, not fp16"),
        (["--resolution", "33"], "--resolution 33 is no multiple of 8"),
        (["--resolution", "0"], "--resolution must be at least 1"),
        (["--random_init"], "--random_init knows sd15, sdxl, not"),
        (["--device", "cuda:9"], "--device cuda:9 is not there"),
        (["--data", "no/such"], "no/such cannot be read"),
        (["--dtaa", "x"], "unrecognized arguments"),
    ],
)
def test_bad_input_of_data_py_ends_in_one_line(encoded, small_model, few_pairs, options, complaint):
    with pytest.raises(SystemExit, match=f"data.*{complaint}|model: {complaint}"):
        encode("--model", small_model("sd"), "--data", few_pairs, "--out", str(encoded("sd")), *options)


def test_data_py_keeps_off_other_folders(tmp_path, small_model, few_pairs):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds something else .notes.txt."):
        encode("--model", small_model("sd"), "--data", few_pairs, "--out", str(tmp_path))


def test_what_is_not_finite_is_not_kept(tmp_path, small_model, few_pairs, monkeypatch):
    """fp16 holds no more than 65504."""
    images = data.encode_images
    monkeypatch.setattr(data, "encode_images", lambda *some: (images(*some)[0] * 1e6, images(*some)[1]))
    argv = ["--model", small_model("sd"), "--data", few_pairs, "--out", str(tmp_path / "c")]
    with pytest.raises(SystemExit, match="pairs-00000.safetensors: mean is not finite; --store fp32"):
        encode(*argv, "--store", "fp16")
    assert not [*(tmp_path / "c").glob("pairs-*")]


def test_a_wrong_label_is_refused_before_anything_is_encoded(tmp_path, small_model):
    import datasets

    rows = list(tiny.pairs(4))
    rows[2] |= {"label_0": 2.0}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SystemExit, match="have a label_0 other than 0, 0.5 or 1.*row 2"):
        encode(
            "--model",
            small_model("sd"),
            "--data",
            str(tmp_path / "train.parquet"),
            "--out",
            str(tmp_path / "c"),
        )


# The reference's errors


@pytest.mark.parametrize(
    "options", [slow([]), slow(["--loss", "dpo"]), ["--lora_rank", "2"], ["--group_size", "8"]]
)
def test_cached_reference_errors_train_to_the_same_bits(run, encoded, tmp_path, monkeypatch, options):
    """At the micro-batch of the run, in one pass and two; the second run finds them all, needs no reference."""
    file = ["--reference_errors", str(tmp_path / "errors")]
    plain, first = (run("sd", encoded("sd"), *options, *more, name=str(len(more))) for more in ([], file))

    def never(*_):
        raise AssertionError("a reference is computed")

    for where, name in ((train, "frozen_reference"), (train, "adapter_off"), (cache.ReferenceErrors, "put")):
        monkeypatch.setattr(where, name, never)
    second = run("sd", encoded("sd"), *options, *file, name="second")
    assert (
        torch.equal(plain[1], first[1])
        and torch.equal(plain[2], first[2])
        and torch.equal(plain[2], second[2])
    )
    assert lines(plain[0]) == lines(first[0]) == lines(second[0])
    assert lines(plain[0])[2]["reward/margin"] != 0


def test_reference_errors_at_another_micro_batch_agree_to_rounding(run, encoded, tmp_path):
    file = ["--reference_errors", str(tmp_path / "errors"), "--loss", "dpo"]
    at_4, at_2 = (run("sd", encoded("sd"), *file, "--micro_batch", n, name=n) for n in ("4", "2"))
    assert (at_4[1] - at_2[1]).norm() <= 1e-5 * at_4[1].norm()


def test_a_sweep_pays_for_the_reference_once(run, encoded, tmp_path, monkeypatch):
    """Loss, beta, tau, group, learning rate and rank are nothing that it sees; more steps are added to it."""
    file = ["--reference_errors", str(tmp_path / "errors")]
    run("sd", encoded("sd"), *file, name="first")
    put, steps = cache.ReferenceErrors.put, []
    monkeypatch.setattr(
        cache.ReferenceErrors, "put", lambda self, step, *some: steps.append(step) or put(self, step, *some)
    )
    other = "--loss dpo --beta 10 --tau 1 --group_size 2 --lr 1e-4 --lora_rank 2 --optimizer sgd".split()
    run("sd", encoded("sd"), *file, *other, name="other")
    assert steps == []
    run("sd", encoded("sd"), *file, "--steps", "5", name="longer")
    assert steps == [3, 4]


@pytest.mark.slow
def test_processes_compute_the_same_reference_errors(run, encoded, small_model, tmp_path):
    file = ["--reference_errors", str(tmp_path / "one")]
    run("sd", encoded("sd"), *file)
    argv = ["--model", small_model("sd"), "--data", str(encoded("sd")), "--out", str(tmp_path / "out")]
    argv += "--steps 3 --batch_size 8 --micro_batch 4 --sample_every 0 --device cpu --lr 1e-3".split()
    for status, text in launch(
        tmp_path / "logs", 2, train.main, [*argv, "--reference_errors", str(tmp_path / "two")]
    ):
        assert status == 0, text
    one, two = (load_file(tmp_path / name)["errors"] for name in ("one", "two"))
    assert one.shape == (3, 8, 2) and torch.equal(one, two)


def test_reference_errors_of_another_run_are_refused(run, encoded, tmp_path):
    file = ["--reference_errors", str(tmp_path / "errors"), "--steps", "1"]
    run("sd", encoded("sd"), *file)
    others = {
        "--seed 1": "seed 0, not 1",
        "--batch_size 16": "batch_size 8, not 16",
        "--prompt_dropout 0": "prompt_dropout 0.2, not 0.0",
        "--group_noise timestep": "group_noise own, not timestep",
        "--vae_sample mean": "vae_sample sample, not mean",
        "--precision bf16": "precision fp32, not bf16",
    }
    for options, difference in others.items():
        with pytest.raises(SystemExit, match=f"is of a run with {difference}"):
            run("sd", encoded("sd"), *file, *options.split(), name="other")
        assert not (tmp_path / "other").exists()


def test_reference_errors_of_another_model_other_data_or_damaged_are_refused(
    run, encoded, few_pairs, tmp_path
):
    file = ["--reference_errors", str(tmp_path / "errors"), "--steps", "1"]
    run("sd", few_pairs, *file)
    with pytest.raises(SystemExit, match="is of a run with data"):
        run("sd", encoded("sd"), *file, name="other")
    with pytest.raises(SystemExit, match="is of a run with schedule"):
        run("sd-v", few_pairs, *file, name="other")
    (tmp_path / "errors").write_bytes((tmp_path / "errors").read_bytes()[:-5])
    with pytest.raises(SystemExit, match="--reference_errors .* cannot be read"):
        run("sd", few_pairs, *file, name="other")
    with pytest.raises(SystemExit, match="sft has no reference"):
        run("sd", few_pairs, *file, "--loss", "sft", name="other")


def test_reference_errors_go_on_where_they_were(run, encoded, tmp_path, monkeypatch):
    """A run that ends while they are computed leaves those it saved; the next computes the rest alone."""
    file = ["--reference_errors", str(tmp_path / "errors")]
    whole = run("sd", encoded("sd"), "--reference_errors", str(tmp_path / "all"), name="whole")
    put, steps = cache.ReferenceErrors.put, []

    def put_and_fail(self, step, *some):
        steps.append(step)
        self.saved = 0  # seconds: long ago
        if steps == [0, 1]:
            raise KeyboardInterrupt
        put(self, step, *some)

    monkeypatch.setattr(cache.ReferenceErrors, "put", put_and_fail)
    with pytest.raises(KeyboardInterrupt):
        run("sd", encoded("sd"), *file)
    out, _, weights = run("sd", encoded("sd"), *file)
    assert steps == [0, 1, 1, 2] and torch.equal(weights, whole[2])


def test_a_signal_keeps_the_reference_errors_so_far(run, encoded, tmp_path, monkeypatch):
    """Also of a FILE in the run's own folder."""
    put, steps = cache.ReferenceErrors.put, []

    def put_and_signal(self, step, *some):
        steps.append(step)
        put(self, step, *some)
        if steps == [0, 1]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(cache.ReferenceErrors, "put", put_and_signal)
    file = ["--reference_errors", str(tmp_path / "run" / "errors")]
    with pytest.raises(SystemExit, match="saved the reference's errors so far; the same command goes on"):
        run("sd", encoded("sd"), *file)
    _, _, weights = run("sd", encoded("sd"), *file)
    assert steps == [0, 1, 2] and torch.equal(weights, run("sd", encoded("sd"), name="plain")[2])


def test_a_resumed_run_may_take_reference_errors(run, encoded, tmp_path):
    """They are the starting model's, not the half-trained one's."""
    plain = run("sd", encoded("sd"), "--steps", "4", name="plain")
    run("sd", encoded("sd"), "--steps", "2", name="resumed")
    file = ["--reference_errors", str(tmp_path / "errors")]
    resumed = run("sd", encoded("sd"), "--steps", "4", *file, name="resumed")
    assert torch.equal(plain[2], resumed[2]) and lines(plain[0]) == lines(resumed[0])
    with safe_open(tmp_path / "errors", "pt") as kept:
        assert kept.get_tensor("errors").isnan().all(dim=(1, 2)).tolist() == [True, True, False, False]


def test_a_reference_that_is_not_finite_ends_the_run(run, encoded, tmp_path, monkeypatch):
    error = train.denoising_error
    monkeypatch.setattr(train, "denoising_error", lambda *some: error(*some) * float("nan"))
    with pytest.raises(SystemExit, match="the reference's errors of step 0 are not finite"):
        run("sd", encoded("sd"), "--reference_errors", str(tmp_path / "errors"))
