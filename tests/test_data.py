"""What the pair data promise. The data are made here, with the mess of real sets in them."""

import errno
import io
import json
import shutil

import datasets
import numpy as np
import open_clip
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import data
import pictures
from common import InputError, keyed_generator
from data import ImagePairs, collate, cross_pair_weights, crop_and_resize
from loss import dpo_loss, rpo_loss
from pictures import read_image, stored_bytes

WINNER, LOSER = (0, 200, 0), (200, 0, 0)  # green wins over red


def encoded(color=WINNER, size=(40, 30), mode="RGB", kind="PNG", **options):
    return saved(Image.new("RGB", size, color).convert(mode), kind, **options)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rows_of(*labels, changes=None):
    """Pick-a-Pic rows whose label says that the green image wins. `changes` has {number: cells} that differ."""
    rows = []
    for number, label in enumerate(labels):
        first, second = (LOSER, WINNER) if label == 0 else (WINNER, LOSER)
        other = None if label is None else 1 - label
        row = {"caption": f"prompt {number}", "label_0": label, "label_1": other}
        row |= {"jpg_0": encoded(first), "jpg_1": encoded(second)}
        rows.append(row | (changes or {}).get(number, {}))
    return rows


def parquet(folder, rows, name="train-00000.parquet", features=None):
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / name)
    return str(folder)


def is_winner(pixels):
    return (pixels.float().mean(dim=(-1, -2)) - torch.tensor(WINNER)).abs().max() < 6


# Rows and labels


@pytest.mark.parametrize("kind", ["int64", "double"])
def test_the_winner_is_index_0_whatever_the_type_of_the_label(tmp_path, kind):
    rows = rows_of(*([0, 1, 1, 0] if kind == "int64" else [0.0, 1.0, 1.0, 0.0]))
    pairs = ImagePairs(parquet(tmp_path, rows), 16)
    assert pyarrow.parquet.read_schema(tmp_path / "train-00000.parquet").field("label_0").type == kind
    for position in range(4):
        winner, loser = pairs[position]["pixels"]
        assert is_winner(winner) and not is_winner(loser)


def test_ties_and_unlabelled_rows_are_dropped_by_value_and_counted(tmp_path):
    """Diffusion-DPO drops ties only where the data set's name has "pickapic" in it."""
    rows = rows_of(1.0, 0.5, 0.0, None, 0.5, 1.0)
    for row in rows:
        row["has_label"] = int(row is not rows[5])
    pairs = ImagePairs(parquet(tmp_path, rows, name="my-own-set.parquet"), 16)
    assert pairs.report() == {"rows": 6, "used": 2, "ties": 2, "unlabelled": 2, "unreadable": {}, "left_out": {}}
    assert sorted(int(pairs[position]["row"]) for position in range(2)) == [0, 2]


WRONG = [((1.0, 0.7, -1.0), r"2 rows .* row 1 \(0.7, .* row 2 \(-1"), ((1.0, 2.0), "1 rows .* row 1")]


@pytest.mark.parametrize("labels, named", WRONG)
def test_any_other_label_is_refused_with_its_rows(tmp_path, labels, named):
    with pytest.raises(InputError, match=named):
        ImagePairs(parquet(tmp_path, rows_of(*labels)), 16)


def test_labels_that_contradict_each_other_are_refused(tmp_path):
    rows = rows_of(1.0, 1.0)
    rows[1]["label_1"] = 1.0
    with pytest.raises(InputError, match="row 1"):
        ImagePairs(parquet(tmp_path, rows), 16)


def test_a_folder_with_train_files_uses_those_alone(tmp_path):
    parquet(tmp_path, rows_of(1.0, 1.0, 1.0), name="validation-00000.parquet")
    parquet(tmp_path, rows_of(1.0), name="train-00000.parquet")
    assert ImagePairs(str(tmp_path), 16).report()["rows"] == 1
    assert ImagePairs(str(tmp_path / "validation-00000.parquet"), 16).report()["rows"] == 3


def test_columns_of_the_image_type_are_read_too(tmp_path):
    """Sets made with `datasets` hold {"bytes", "path"} where Pick-a-Pic holds bytes."""
    features = {"caption": datasets.Value("string"), "label_0": datasets.Value("int64")}
    features |= {"jpg_0": datasets.Image(), "jpg_1": datasets.Image()}
    cells = {"jpg_0": {"bytes": encoded(LOSER)}, "jpg_1": {"bytes": encoded(WINNER)}}
    source = parquet(tmp_path, [{"caption": "c", "label_0": 0} | cells], features=datasets.Features(features))
    assert is_winner(ImagePairs(source, 16)[0]["pixels"][0])


def test_a_cell_holds_bytes_a_path_or_both(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded())
    cells = [encoded(), str(file), {"bytes": encoded(), "path": None}, {"bytes": None, "path": str(file)}]
    assert [stored_bytes(cell) for cell in cells] == [encoded()] * 4


def test_a_folder_of_ones_own_pairs(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(WINNER))
    (tmp_path / "images" / "b.jpg").write_bytes(encoded(LOSER, kind="JPEG"))
    lines = [
        {"prompt": "mine", "chosen": "images/a.png", "rejected": "images/b.jpg"},
        {"prompt": "gone", "chosen": "images/a.png", "rejected": "images/no.png"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    for source in (tmp_path, tmp_path / "pairs.jsonl"):
        pairs = ImagePairs(str(source), 16)
        pairs.scan()
        assert pairs.report() == {"rows": 2, "used": 1, "ties": 0, "unlabelled": 0, "unreadable": {"no such file": [1]},
                                  "left_out": {}}
        assert pairs[0]["caption"] == "mine" and is_winner(pairs[0]["pixels"][0])


def test_what_cannot_be_used_ends_in_one_line(tmp_path, monkeypatch):
    def no_hub(*_, **__):
        raise ConnectionError("no hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", no_hub)
    with pytest.raises(InputError, match="^--data no/such cannot be read: no hub$"):
        ImagePairs("no/such", 16)
    monkeypatch.undo()
    with pytest.raises(InputError, match="there is no such file or folder"):
        ImagePairs(str(tmp_path / "nosuch"), 16)
    with pytest.raises(InputError, match="holds no parquet file and no .jsonl file"):
        ImagePairs(str(tmp_path), 16)  # an empty folder
    with pytest.raises(InputError, match="holds no usable pair.*'ties': 2"):
        ImagePairs(parquet(tmp_path, rows_of(0.5, 0.5)), 16)
    pages = {k: {"jpg_0": b"<html>"} for k in range(2)}
    with pytest.raises(InputError, match=r"holds no usable pair.*2 that cannot be read \(2 not a picture\)"):
        ImagePairs(parquet(tmp_path, rows_of(1.0, 1.0, changes=pages)), 16).scan()
    for name in ("list", "table"):
        (tmp_path / name).mkdir()
    (tmp_path / "list" / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a.png"}\n')
    with pytest.raises(InputError, match="lacks 'rejected'"):
        ImagePairs(str(tmp_path / "list"), 16)
    with pytest.raises(InputError, match="lacks Pick-a-Pic's columns jpg_1, label_0"):
        ImagePairs(parquet(tmp_path / "table", [{"caption": "c", "jpg_0": b""}]), 16)


@pytest.mark.parametrize("damage", ["cut", "garbled", "empty"])
def test_an_unreadable_shard_is_named(tmp_path, damage):
    """`datasets` says that an error occurred while generating the dataset."""
    for number in range(3):
        parquet(tmp_path, rows_of(*[1.0] * 20), f"train-{number}.parquet")
    whole = (tmp_path / "train-1.parquet").read_bytes()
    garbled = whole[:200] + bytes(byte ^ 255 for byte in whole[200:-2000]) + whole[-2000:]
    damaged = {"cut": whole[: len(whole) // 2], "garbled": garbled, "empty": b""}[damage]
    (tmp_path / "train-1.parquet").write_bytes(damaged)
    with pytest.raises(InputError, match="^--data .*/train-1.parquet cannot be read: [^\n]*$"):
        ImagePairs(str(tmp_path), 32)


def test_lists_have_splits_too(tmp_path):
    for name, lines in (("train-a.jsonl", 1), ("validation.jsonl", 2)):
        line = json.dumps({"prompt": "p", "chosen": "a.png", "rejected": "a.png"})
        (tmp_path / name).write_text("\n".join([line] * lines), encoding="utf-8-sig")
    (tmp_path / "a.png").write_bytes(encoded())
    assert ImagePairs(str(tmp_path), 16).report()["rows"] == 1


def test_captions_that_are_no_strings_are_refused(tmp_path):
    with pytest.raises(InputError, match="caption in .* has the type int64; strings are needed"):
        ImagePairs(parquet(tmp_path, [row | {"caption": 5} for row in rows_of(1.0)]), 16)


def test_labels_that_are_no_numbers_are_refused(tmp_path):
    rows = [row | {"label_0": "first"} for row in rows_of(1.0)]
    with pytest.raises(InputError, match="label_0 in .* has the type string; numbers are needed"):
        ImagePairs(parquet(tmp_path, rows), 16)


def test_further_columns_are_read_from_parquet_and_from_ones_own_lists(tmp_path, monkeypatch):
    """COLUMNS names them, and each pair has its own number in float32."""
    monkeypatch.setattr(data, "COLUMNS", ("pair_weight",))
    rows = rows_of(1.0, 0.5, 0.0, changes={k: {"pair_weight": k + 1} for k in range(3)})
    (tmp_path / "a.png").write_bytes(encoded())
    line = {"prompt": "p", "chosen": "a.png", "rejected": "a.png"}
    lines = [json.dumps(line | {"pair_weight": weight}) for weight in (1, 2.5, 3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / "table").mkdir()
    table = ImagePairs(parquet(tmp_path / "table", rows), 16)
    listed = ImagePairs(str(tmp_path / "pairs.jsonl"), 16)
    for pairs, weights in ((table, {0: 1, 2: 3}), (listed, {0: 1, 1: 2.5, 2: 3})):
        batch = collate([pairs[position] for position in range(len(pairs))])
        assert batch["pair_weight"].dtype == torch.float32
        assert dict(zip(batch["row"].tolist(), batch["pair_weight"].tolist())) == weights
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line | {"pair_weight": "heavy"}))
    with pytest.raises(InputError, match="line 1 of .*pairs.jsonl cannot be read: could not convert .*heavy"):
        ImagePairs(str(tmp_path / "pairs.jsonl"), 16)
    rows[0]["pair_weight"] = rows[1]["pair_weight"] = rows[2]["pair_weight"] = "heavy"
    with pytest.raises(InputError, match="pair_weight in .* has the type string; numbers are needed"):
        ImagePairs(parquet(tmp_path / "table", rows), 16)


@pytest.mark.parametrize("lacking, named", [(range(4), "row 0 .*4 of 4 pairs"), ([2], "row 2 .*1 of 4 pairs")])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_column_is_wanted_only_if_a_loss_names_it(tmp_path, monkeypatch, kind, lacking, named):
    """Then the first row without a number is named, whether all rows lack the column or one does."""
    monkeypatch.setattr(data, "COLUMNS", ("pair_weight",))
    weights = {k: {"pair_weight": float(k)} for k in range(4) if k not in lacking}
    if kind == "parquet":
        source = parquet(tmp_path, [rows_of(1.0)[0] | weights.get(k, {}) for k in range(4)])
    else:
        (tmp_path / "a.png").write_bytes(encoded())
        line = {"prompt": "p", "chosen": "a.png", "rejected": "a.png"}
        source = tmp_path / "pairs.jsonl"
        source.write_text("\n".join(json.dumps(line | weights.get(k, {})) for k in range(4)))
    pairs = ImagePairs(str(source), 16)
    pairs.check_columns([])
    with pytest.raises(InputError, match=f"the loss takes pair_weight, but {named}"):
        pairs.check_columns(["pair_weight"])


def test_a_pair_that_is_dropped_needs_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "COLUMNS", ("pair_weight",))
    rows = rows_of(1.0, 0.5, 0.0, None, changes={k: {"pair_weight": 1.0} for k in (0, 2)})
    ImagePairs(parquet(tmp_path, rows), 16).check_columns(["pair_weight"])


# Images


FORMATS = "RGB JPEG, RGB WEBP, L JPEG, CMYK JPEG, P PNG, RGBA PNG, LA PNG, 1 PNG, RGB GIF, RGB BMP"


@pytest.mark.parametrize("mode, kind", [name.split() for name in FORMATS.split(", ")])
def test_any_format_and_mode_becomes_rgb(mode, kind):
    image = read_image(encoded((0, 0, 0), mode=mode, kind=kind))
    assert image.mode == "RGB" and np.asarray(image).max() <= 6


def test_sixteen_bit_grey_is_scaled_and_transparency_lies_on_white():
    grey = Image.fromarray(np.full((5, 5), 128 * 257, np.uint16))
    assert np.asarray(read_image(saved(grey)))[0, 0].tolist() == [128] * 3
    transparent = Image.new("RGBA", (5, 5), (0, 0, 0, 0))
    assert np.asarray(read_image(saved(transparent)))[0, 0].tolist() == [255] * 3


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[274] = 6  # stored on its side
    assert read_image(encoded(size=(40, 30), kind="JPEG", exif=exif)).size == (30, 40)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="decompression bomb"):
        read_image(encoded(size=(40, 30)))  # above PIL's limit, where PIL itself only warns
    with pytest.raises(Image.DecompressionBombError):
        read_image(encoded(size=(50, 50)))


@pytest.mark.parametrize("size", [(1, 1), (500, 3), (3, 500), (64, 64), (31, 47)])
def test_pixels_are_square_and_time_ids_are_the_images_own(size):
    pixels, time_ids = crop_and_resize(Image.new("RGB", size, WINNER), 32, 0.5, 0.5, False)
    assert pixels.shape == (3, 32, 32) and is_winner(pixels) and time_ids.dtype == torch.float32
    height, width, top, left, *target = time_ids.tolist()
    assert (width, height) == size and target == [32, 32]
    long = round(max(size) * 32 / min(size))  # the long side after scaling
    assert max(top, left) == round(0.5 * (long - 32)) and min(top, left) == 0


def test_a_crop_is_the_resized_image_cut_at_time_ids():
    """Cropping and then scaling gives what scaling and then cropping there gives."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    pixels, time_ids = crop_and_resize(image, 30, 0.5, 0.7, False)
    top, left = map(int, time_ids[2:4])
    whole = np.asarray(image.resize((45, 30), Image.LANCZOS)).astype(float)
    difference = np.abs(pixels.permute(1, 2, 0).numpy() - whole[top : top + 30, left : left + 30])
    assert difference[:, 4:-4].max() < 2.5  # at its edges the cut has no neighbours to look at


def test_the_pair_is_cropped_and_flipped_as_one(tmp_path):
    """Diffusion-DPO draws the flip and the crop of the two images separately."""
    gradient = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8)[None, :, None] * 2, (32, 1, 3)))
    same = {k: {"jpg_0": saved(gradient), "jpg_1": saved(gradient)} for k in range(24)}
    source = parquet(tmp_path, rows_of(*[1.0] * 24, changes=same))
    pairs = ImagePairs(source, 16, random_crop=True, random_flip=True)
    items = [pairs[position] for position in range(24)]
    assert all(torch.equal(*item["pixels"]) and torch.equal(*item["time_ids"]) for item in items)
    flipped = [bool(item["pixels"][0, 0, 0, 0] > item["pixels"][0, 0, 0, -1]) for item in items]
    assert 4 < sum(flipped) < 20 and len({item["time_ids"][0, 3].item() for item in items}) > 12


# The stream


def messy(folder):
    changes = {
        0: {"jpg_0": encoded(size=(7, 90))},
        1: {"jpg_0": b""},
        2: {"caption": None},
        3: {"caption": ""},
        4: {"jpg_1": None},
        5: {"jpg_1": encoded(kind="JPEG", size=(200, 200))[:300]},
        6: {"caption": "long " * 400},
        8: {"jpg_0": b"<html><body>404 Not Found</body></html>"},
    }
    return parquet(folder, rows_of(*[1.0] * 10, changes=changes))


@pytest.mark.parametrize("number", ["EIO", "ESTALE", "ENOTCONN"])
def test_storage_that_is_away_stops_the_run(tmp_path, monkeypatch, number):
    """Its pairs are not unreadable: replacing them would train on others, and encoding would lose them for ever."""
    def read_bytes(path):
        raise OSError(getattr(errno, number), "away", str(path))

    (tmp_path / "a.png").write_bytes(encoded())
    line = json.dumps({"prompt": "one", "chosen": "a.png", "rejected": "a.png"})
    (tmp_path / "train.jsonl").write_text(line)
    pairs = ImagePairs(str(tmp_path), 32)
    monkeypatch.setattr(pictures.Path, "read_bytes", read_bytes)
    for use in (pairs.scan, lambda: pairs[0]):
        with pytest.raises(InputError, match="away.*Once its storage is back, the same command resumes"):
            use()


def test_a_copy_of_the_images_needs_room_before_it_is_made(tmp_path, monkeypatch):
    """Once it is there, it needs none."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "pairs").mkdir()
    parquet(tmp_path / "pairs", rows_of(1))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 100, 0))
        with pytest.raises(InputError, match="a copy of the images takes .* free. Set HF_HOME"):
            ImagePairs(str(tmp_path / "pairs"), 32)
    ImagePairs(str(tmp_path / "pairs"), 32)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 100, 0))
    assert len(ImagePairs(str(tmp_path / "pairs"), 32)) == 1


def test_unreadable_pairs_are_replaced_by_the_next_readable_and_listed(tmp_path):
    pairs = ImagePairs(messy(tmp_path), 16)
    assert pairs.report()["unreadable"] == {}  # nothing was decoded yet
    items = [pairs[position] for position in range(10)]
    order = [pairs.row_at(position) for position in range(10)]
    for position, item in enumerate(items):
        skipped = [row for row, _ in item["unreadable"]]
        rows = [order[(position + k) % 10] for k in range(len(skipped) + 1)]
        assert rows == [*skipped, int(item["row"])] and rows[-1] not in (1, 2, 3, 4, 5, 8)
    assert sorted({row for row, _ in collate(items)["unreadable"]}) == [1, 2, 3, 4, 5, 8]
    pairs.scan()
    reasons = {"no image": [1, 4], "no prompt": [2, 3], "Truncated File Read": [5]}
    reasons |= {"not a picture": [8]}
    counts = {"rows": 10, "used": 4, "ties": 0, "unlabelled": 0}
    assert pairs.report() == counts | {"unreadable": reasons, "left_out": {}}
    assert "6 that cannot be read (2 no image, 2 no prompt, 1 Truncated File Read, " in pairs.summary()


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (41, 40), (64, 64)])
def test_clip_sees_what_its_own_crop_keeps(size):
    """We cut the square out before CLIP's transform scales. Without that it would cut out the same square."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.BICUBIC)
    transform = open_clip.image_transform(min(size), is_train=False)
    torch.testing.assert_close(transform(data.middle_square(image)), transform(image))


def test_a_crop_is_counted_from_the_top_and_from_the_left():
    wide, tall = Image.new("RGB", (48, 16)), Image.new("RGB", (16, 48))
    for image, y, x, expected in ((wide, 1, 0, [0, 0]), (wide, 0, 1, [0, 32]), (tall, 1, 0, [32, 0]), (tall, 0, 1, [0, 0])):
        _, time_ids = data.crop_and_resize(image, 16, y, x, False)
        assert time_ids[2:4].tolist() == expected


def test_crop_flip_and_prompt_dropout_are_independent_of_each_other(tmp_path):
    """Of 400 items each of the four numbers is above one half in half, and so are any two of them together in a quarter."""
    halves = Image.new("RGB", (32, 16), "black")
    halves.paste("white", (0, 0, 8, 16))  # the crop is seen in the mean, the flip in the place of white
    image = saved(halves)
    source = parquet(tmp_path, rows_of(*[1.0] * 10, changes={n: {"jpg_0": image, "jpg_1": image} for n in range(10)}))
    pairs = ImagePairs(source, 16, random_flip=True, random_crop=True, prompt_dropout=0.5)
    items = [pairs[position] for position in range(400)]
    is_dropped = np.array([item["prompt"] == "" for item in items])
    left = np.array([int(item["time_ids"][0, 3]) for item in items])
    augmented = [data.augmentation(0, position // 10, int(item["row"])) for position, item in enumerate(items)]
    is_flipped = np.array([flip < 0.5 for _, _, flip, _ in augmented])
    whitest = np.array([item["pixels"][0, 0].float().mean(0).argmax().item() for item in items])
    seen = np.array([item["pixels"].max() > 127 for item in items])
    assert ((whitest > 0) == is_flipped)[seen & (left > 0) & (left < 16)].mean() > 0.9  # the flip that is drawn is done
    for one, other in ((is_dropped, is_flipped), (is_dropped, left > 8), (is_flipped, left > 8)):
        assert abs(one.mean() - 0.5) < 0.1 and abs((one & other).mean() - 0.25) < 0.08


def test_the_stream_starts_anywhere_and_is_the_same_for_every_reader(tmp_path):
    """Resume, workers and ranks rest on this: an item is a function of (seed, position)."""

    def make(seed=0):
        return ImagePairs(source, 16, seed=seed, random_crop=True, random_flip=True, prompt_dropout=0.5)

    source = messy(tmp_path)
    forward, backward = make(), make()
    items = [forward[position] for position in range(30)]
    for position in reversed(range(30)):
        again = backward[position]
        assert again["row"] == items[position]["row"] and again["prompt"] == items[position]["prompt"]
        assert torch.equal(again["pixels"], items[position]["pixels"])
    epochs = [[int(item["row"]) for item in items[k : k + 10]] for k in (0, 10, 20)]
    assert len({tuple(epoch) for epoch in epochs}) == 3  # every epoch is shuffled anew
    other = make(seed=1)
    assert [int(other[position]["row"]) for position in range(10)] != epochs[0]


def test_every_readable_pair_is_seen_once_an_epoch(tmp_path):
    pairs = ImagePairs(parquet(tmp_path, rows_of(*[1.0] * 7)), 16)
    for epoch in range(3):
        assert sorted(int(pairs[epoch * 7 + k]["row"]) for k in range(7)) == list(range(7))


def test_prompt_dropout_strikes_its_share_and_keeps_the_caption(tmp_path):
    """The caption stays, for the cross-pair weights; a pair has one prompt, so it is dropped for both."""
    pairs = ImagePairs(parquet(tmp_path, rows_of(*[1.0] * 10)), 16, prompt_dropout=0.3)
    items = [pairs[position] for position in range(300)]
    assert 60 < sum(item["prompt"] == "" for item in items) < 120
    assert all(item["caption"].startswith("prompt ") for item in items)


def test_a_batch_has_the_shapes_it_declares(tmp_path):
    pairs = ImagePairs(messy(tmp_path), 16, clip_transform=lambda image: torch.zeros(3, 8, 8))
    batch = collate([pairs[position] for position in range(5)])
    assert batch["pixels"].shape == (5, 2, 3, 16, 16) and batch["pixels"].dtype == torch.uint8
    assert batch["time_ids"].shape == (5, 2, 6) and batch["clip_pixels"].shape == (5, 2, 3, 8, 8)
    assert all(isinstance(caption, str) for caption in batch["prompt"] + batch["caption"])
    assert batch["row"].shape == (5,) and batch["row"].dtype == torch.int64


# Cross-pair weights


def embeddings(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 6, generator=generator) for _ in range(3)]


def test_weights_by_hand():
    text, image_w, image_l = embeddings(2)
    cosine = torch.nn.functional.cosine_similarity
    weights = cross_pair_weights(text, image_w, image_l, 0.3)
    for i in range(2):
        of_text = 1 - cosine(text[i], text)
        of_images = 1 - cosine(image_w[i], image_l)
        expected = torch.softmax(-(of_text + of_images) / 2 / 0.3, dim=0)
        torch.testing.assert_close(weights[i], expected)


@pytest.mark.parametrize("similarity", ["text", "image", "both"])
def test_rows_sum_to_one_and_length_does_not_matter(similarity):
    text, image_w, image_l = embeddings()
    weights = cross_pair_weights(text, image_w, image_l, 0.2, similarity)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))
    longer = cross_pair_weights(3 * text, 5 * image_w, 7 * image_l, 0.2, similarity)
    torch.testing.assert_close(weights, longer)


def test_the_limits_of_tau():
    text, image_w, image_l = embeddings()
    close, uniform = torch.testing.assert_close, torch.full((4, 4), 0.25)
    close(cross_pair_weights(text, None, None, 1e-4, "text"), torch.eye(4))  # DPO's pairs alone
    close(cross_pair_weights(text, image_w, image_l, 1e6), uniform, rtol=0, atol=1e-5)
    equal = [embeds[:1].expand(4, -1) for embeds in (text, image_w, image_l)]
    close(cross_pair_weights(*equal, 0.1), uniform)  # equal prompts and images: 1 / B


def test_tau_inf_is_the_limit_of_a_large_one_and_reads_no_embedding():
    weights = cross_pair_weights(None, None, None, float("inf"), image_ids=torch.arange(8).view(4, 2))
    assert torch.equal(weights, torch.full((4, 4), 0.25))
    torch.testing.assert_close(weights, cross_pair_weights(*embeddings(), 1e6), rtol=0, atol=1e-5)


def test_distinct_prompts_are_dpo_at_a_small_tau_and_not_at_one_half():
    """CLIP gives prompts a cosine of about 0.35. At 0.01 a winner's own loser then has all the weight."""
    common = torch.ones(8, 1) * 0.35**0.5
    text = torch.cat([common, torch.eye(8) * 0.65**0.5], dim=1)
    weights = cross_pair_weights(text, None, None, 0.01, "text")
    torch.testing.assert_close(weights, torch.eye(8), rtol=0, atol=1e-6)
    inputs = [torch.rand(8, generator=torch.Generator().manual_seed(k)).requires_grad_(k < 2) for k in range(4)]
    rpo, dpo = rpo_loss(*inputs, 5000, weights)[0], dpo_loss(*inputs, 5000)[0]
    torch.testing.assert_close(rpo, dpo, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(rpo, inputs[:2]), torch.autograd.grad(dpo, inputs[:2])):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert cross_pair_weights(text, None, None, 0.5, "text").diagonal().max() < 0.9


@pytest.mark.parametrize("tau", [0.01, 0.5, float("inf")])
def test_an_image_never_stands_against_itself(tau):
    """Pair 0 is A over B, pair 1 C over A, pair 2 D over D. The rest of a row keeps its proportions."""
    image_ids = torch.tensor([[1, 2], [3, 1], [4, 4], [5, 6]])
    plain = cross_pair_weights(*embeddings(), tau, image_ids=torch.arange(8).view(4, 2))
    weights = cross_pair_weights(*embeddings(), tau, image_ids=image_ids)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))
    is_same = torch.zeros(4, 4, dtype=torch.bool)
    is_same[0, 1] = is_same[2, 2] = True
    assert not weights[is_same].any()
    left = plain.double().masked_fill(is_same, 0)
    if tau > 0.01:  # where nothing underflows
        torch.testing.assert_close(weights.double(), left / left.sum(dim=1, keepdim=True))
    assert torch.equal(weights[[1, 3]], plain[[1, 3]])


def test_a_row_with_nothing_left_takes_its_own_loser():
    image_ids = torch.tensor([[1, 1], [2, 1]])
    weights = cross_pair_weights(*embeddings(2), 0.5, image_ids=image_ids)
    assert torch.equal(weights[0], torch.tensor([1.0, 0.0])) and weights[1].min() > 0


def test_image_ids_are_those_of_the_stored_bytes(tmp_path):
    """The winner comes first. The same file has the same id in every pair."""
    batch = collate([ImagePairs(parquet(tmp_path, rows_of(1.0, 0.0)), 16)[position] for position in range(2)])
    ids = batch["image_ids"]
    assert ids.dtype == torch.int64 and torch.equal(ids[0], ids[1]) and ids[0, 0] != ids[0, 1]


def test_half_precision_embeddings_do_not_collapse():
    """In bf16 the distance of near-duplicates, 2e-4, would be 0."""
    text = torch.eye(2, 6) * 0.02 + torch.ones(2, 6)
    weights = cross_pair_weights(text.bfloat16(), None, None, 1e-4, "text")
    assert weights.dtype == torch.float32 and weights[0, 0] > 0.6


def test_random_draws_are_functions_of_their_key():
    def draw(*key):
        return tuple(torch.randn(8, generator=keyed_generator(*key)).tolist())

    keys = [(0, "noise", 3, 5), (0, "noise", 5, 3), (0, "vae", 3, 5), (1, "noise", 3, 5), (0, "noise", 35)]
    assert draw(*keys[0]) == draw(*keys[0]) and len({draw(*key) for key in keys}) == 5
