"""Evaluate text-to-image models: generate once, score many, compare, and measure alignment with a style.

    python evaluate.py generate --model sd15 --prompts PartiPrompts.tsv --out images/base
    python evaluate.py generate --model out/sd15-rpo/model --prompts PartiPrompts.tsv --out images/rpo
    torchrun --nproc_per_node=8 evaluate.py generate --model sdxl --lora LORA --prompts P --out D
    python evaluate.py score images/base images/rpo --metrics clip,pickscore,hpsv2,imagereward,aesthetic
    python evaluate.py compare images/base images/rpo --out report.html
    python evaluate.py generate --model M --prompts parti=PartiPrompts.tsv hpsv2=hps.json --out images/m
    python evaluate.py pairs images/base images/rpo --by pickscore --min_gap 0.5 --out PAIRS
    python evaluate.py style images/rpo --reference paintings --base images/base

A folder of images is DIR/00000.png ..., and manifest.json, which holds everything that made them; of several sets
of prompts DIR/NAME each, which `score` and `compare` find by DIR. The noise
of a prompt follows from --seed and its place in the list alone, so every model sees the same. `generate`,
killed and given again, goes on; `score` keeps what it has. `compare` holds the others against the first; `pairs`
makes pairs to train on, of the best and the worst image of a prompt in any number of folders.
"""

import common  # first: it notes the launcher, before the imports that take seconds

import argparse
import collections
import csv
import functools
import importlib
import io
import itertools
import json
import math
import re
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from common import InputError, atomic_write, brief, digest, hub_id, keyed_generator
from data import Clip, as_text
from models import EMBEDDED, cast_for_autocast, fuse_lora, load_model
from report import (ImageFolder, comparable_folders, comparable_sets, first_difference, image_sets, open_batches,
                    read_json, refuse_twice, save_png, scored_rows, settings_of, style_table, table, to_pil,
                    writable_file, write_report)
from stats import (cmmd, diversity, frechet, inception, mean_squared_distance, published_cmmd,
                   style_statistics)

PROMPT_COLUMNS = ("prompt", "caption", "text")  # where a prompt may stand
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_prompts(source):
    """The prompts of what `read_prompt_rows` takes."""
    return read_prompt_rows(source)[0]


def read_prompt_rows(source):
    """(prompts, what else their rows hold) of a txt, tsv, csv, json or jsonl file, a hub id or ID:SPLIT, or "tiny".

    Of a row with columns the prompt is prompt, caption or text, the first that is there; the others that are text or
    numbers are kept, as a dict {name: text}. InputError where a file or a prompt is missing.
    """
    path = Path(source).expanduser()
    if source == "tiny":
        path = importlib.import_module("extras.tiny").part("pairs") / "prompts.txt"
    try:
        rows = read_prompt_file(path) if path.exists() else read_hub_prompts(source)
    except Exception as error:
        raise InputError(f"--prompts {source} cannot be read: {brief(error)}")
    prompts = [prompt_of(row) for row in rows]
    if not prompts:
        raise InputError(f"--prompts {source} holds no prompt")
    if "" in prompts:
        number = prompts.index("")
        raise InputError(f"--prompts {source}: row {number + 1} has no prompt: a string, or "
                         f"{' or '.join(PROMPT_COLUMNS)}, that is text and not empty, not "
                         f"{str(rows[number])[:80]!a}")
    return prompts, [other_columns(row) for row in rows]


def read_prompt_file(path):
    """The rows of a file, strings or dicts; of a txt file the lines that are not empty.

    raises  ValueError by the row, where a line has more fields than the header, or a quote that is not closed
    """
    text = path.read_text(encoding="utf-8-sig")
    suffix = path.suffix.lower()
    lines = [line for line in text.split("\n") if line.strip()]
    if suffix == ".txt":
        return lines
    if suffix == ".jsonl":
        return [json.loads(line) for line in lines]
    stream = io.StringIO(text, newline="")
    if suffix in (".csv", ".tsv"):
        dialect = {"strict": True}
        if suffix == ".tsv":  # as PartiPrompts wants it: there quotes belong to the prompt
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        return read_table(csv.DictReader(stream, **dialect), is_quoted=suffix == ".csv")
    if suffix != ".json":
        raise ValueError("it is none of txt, tsv, csv, json, jsonl")
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError("it is no list")
    return rows


def read_table(reader, is_quoted):
    """The rows of a csv.DictReader. ValueError by the row, where a field or a line may have been cut."""
    reader.fieldnames = [str(name).strip() for name in reader.fieldnames or []]
    names = [name.lower() for name in reader.fieldnames]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"its header {names} has an empty name, or one twice")
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row:  # a comma in the prompt, perhaps, which would be cut there
            raise ValueError(f"row {number} has more fields than the header: {row[None]} is left over")
        last = [cell for cell in row.values() if cell is not None][-1]
        is_cut = is_quoted or last.startswith('"')  # a line break in the prompt; PartiPrompts may lack its notes
        if None in row.values() and is_cut:
            raise ValueError(f"row {number} has less fields than the header: it ends with {last!r}")
    return rows


def read_hub_prompts(source):
    """The rows of ID or ID:SPLIT, with their columns of text and numbers: images would take minutes."""
    import datasets

    name, _, split = source.partition(":")
    splits = datasets.get_dataset_split_names(hub_id(name))
    if not split and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits)}; give {name}:SPLIT")
    rows = datasets.load_dataset(name, split=split)
    columns = []
    for name, feature in rows.features.items():
        is_value = isinstance(feature, (datasets.Value, datasets.ClassLabel)) and "binary" not in feature.dtype
        if name.lower() in PROMPT_COLUMNS or is_value:
            columns.append(name)
    rows = rows.select_columns(columns)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):
            names = [feature.names[number] for number in rows[name][:]]
            rows = rows.remove_columns(name).add_column(name, names)
    return list(rows)


def image_files(folder):
    """The pictures of a folder that are not hidden, in the order of their names."""
    return sorted(file for file in Path(folder).glob("*")
                  if file.suffix.lower() in IMAGE_SUFFIXES and not common.is_hidden(file.name))


def prompt_of(row):
    """The prompt of a row, a string or a dict by column; "" where there is none that is text."""
    if isinstance(row, dict):
        row = row.get(prompt_column(row), "")
    return (as_text(row) or "").strip()


def prompt_column(row):
    """The name of the column of a row that holds the prompt, or None."""
    names = {str(name).lower(): name for name in row}
    return next((names[name] for name in PROMPT_COLUMNS if name in names), None)


def other_columns(row):
    """{name: text} of what a row holds beside its prompt; {} of a string."""
    if not isinstance(row, dict):
        return {}
    prompt_name, others = prompt_column(row), {}
    for name, value in row.items():
        is_kept = isinstance(value, (str, int, float)) and as_text(str(value)) is not None
        if is_kept and name != prompt_name:
            others[str(name)] = " ".join(str(value).split())
    return others


# Generate


def weights_digest(model):
    """A digest of all weights of a pipeline: retrained under the same name, it is another model."""
    return digest({name: digest(network) for name, network in model.networks().items()})


def resolution_and_guidance(args, model):
    """--resolution, or the model's own; --guidance, or that of its family, of a toy 3.0."""
    usual = 3.0 if model.is_toy else model.guidance
    resolution = model.resolution(args.resolution, for_training=False)
    return resolution, usual if args.guidance is None else args.guidance


def device_and_dtype(args):
    """(torch.device, dtype) of --device and --precision, or the best there is, for this process."""
    device = common.get_device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    return device, common.DTYPES[precision]


def barrier():
    """Every process of a torchrun waits here for all others, for a day if it must."""
    _, _, world_size = common.torchrun_env()
    if world_size == 1:
        return
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    dist.barrier()


def pending_batches(n, size, files, name):
    """This process's share of the batches, ranges, of n prompts of which one of files(i) is not there.

    Batches are the same whoever makes them, because a batch's size changes the rounding of its images.
    """
    rank, _, world_size = common.torchrun_env()
    pending = []
    for start in range(0, n, size):
        batch = range(start, min(start + size, n))
        if not all(file.exists() for i in batch for file in files(i)):
            pending.append(batch)
    barrier()  # nobody makes an image before all have looked
    return tqdm(pending[rank::world_size], name, unit="batch", disable=rank > 0)


def make_manifest(args, model, source, prompts, columns, device, dtype):
    """All that makes the images of a source's prompts, as JSON will have it; less the weights."""
    scheduler = model.pipe.scheduler
    tokenizer, most = model.longest_reader()
    lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
    cut = [i for i, length in enumerate(lengths) if length > most]
    entries = []
    for i, prompt in enumerate(prompts):
        for k in range(args.per_prompt):  # the first of several is the one that is drawn alone
            key = (args.seed, "sample", i, k) if k else (args.seed, "sample", i)
            name = f"{i:05d}-{k}.png" if args.per_prompt > 1 else f"{i:05d}.png"
            seed = keyed_generator(*key).initial_seed()
            entry = {"file": name, "index": i, "prompt": prompt, "seed": seed}
            if columns[i]:
                entry["columns"] = columns[i]
            entries.append(entry)
    schedule = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
    settings = {"seed": args.seed, "steps": args.steps, "guidance": args.guidance, "resolution": args.resolution,
                "precision": str(dtype).removeprefix("torch."),
                "scheduler": {"class": type(scheduler).__name__} | schedule}
    if args.per_prompt > 1:
        settings["per_prompt"] = args.per_prompt
    manifest = {
        "model": args.model, "lora": args.lora, "weights": None, "toy": model.is_toy,
        "prompts": {"source": source, "digest": digest(prompts), "count": len(prompts), "cut": cut},
        "settings": settings, "batch_size": args.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "images": entries}
    return json.loads(json.dumps(manifest, default=str))


def check_folder(out, manifest):
    """InputError where a folder holds other images than those of a manifest, or something else."""
    file = out / "manifest.json"
    if image_files(out):
        before = read_json(file)
        settings = settings_of(before) | {"weights": before.get("weights")}
        difference = first_difference(settings, settings_of(manifest) | {"weights": manifest["weights"]})
        if difference:
            raise InputError(f"{out} holds other images: {difference}; give another --out")
        return
    strange = [path.name for path in out.glob("*")
               if path != file and path.suffix != ".part" and not common.is_hidden(path.name)]
    if strange:
        raise InputError(f"{out} holds something else ({min(strange)}); give another --out")


def claim_folder(out, manifest):
    """Writes the manifest of a folder; one that has images keeps its own, with what stands beside the prompts."""
    file = out / "manifest.json"
    if image_files(out):
        manifest = read_json(file) | {"images": manifest["images"]}
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(manifest, indent=1))


def prompt_sets(args):
    """{folder: source} of --prompts: of a source alone --out itself, of NAME=SOURCE a folder in it."""
    (first, *more), sets = args.prompts, {}
    if not more and (Path(first).expanduser().exists() or not re.match(r"[\w.-]+=", first)):
        return {Path(args.out): first}
    if Path(args.out, "manifest.json").exists():
        raise InputError(f"--out {args.out} holds images of one set of prompts; give another for several")
    for text in args.prompts:
        name, equals, source = text.partition("=")
        folder = Path(args.out) / name
        is_new = name.lower() not in (other.name.lower() for other in sets)
        if not equals or not re.fullmatch(r"\w[\w.-]*", name) or not is_new:
            raise InputError(f"--prompts {text}: of several sets each is NAME=SOURCE, with a name of its own")
        sets[folder] = source
    return sets


def generate(args):
    """Make the images of all prompts that are not there yet, and their manifest."""
    device, dtype = device_and_dtype(args)
    sets, rows = prompt_sets(args), {}
    for out, source in sets.items():  # what cannot be read is told before the model is loaded
        prompts, columns = read_prompt_rows(source)
        rows[out] = prompts[:args.limit], columns[:args.limit]
    model = load_model(args.model, config=args.config)
    for source in args.lora:
        fuse_lora(model, source)
    if args.scheduler:
        classes = {cls.__name__: cls for cls in model.pipe.scheduler.compatibles}
        if args.scheduler not in classes:
            raise InputError(f"--scheduler {args.scheduler} is none of {', '.join(sorted(classes))}")
        model.pipe.scheduler = classes[args.scheduler].from_config(model.pipe.scheduler.config)
    model.check_scheduler()
    args.resolution, args.guidance = resolution_and_guidance(args, model)
    manifests = {}
    for out, source in sets.items():
        manifests[out] = make_manifest(args, model, source, *rows[out], device, dtype)
    rank, _, _ = common.torchrun_env()
    if rank == 0:
        weights = weights_digest(model)
        for out, manifest in manifests.items():
            manifest["weights"] = weights
            check_folder(out, manifest)
        for out, manifest in manifests.items():
            claim_folder(out, manifest)
            cut = manifest["prompts"]["cut"]
            if cut:
                _, most = model.longest_reader()
                print(f"{len(cut)} prompts have more than the {most} tokens that the model reads and are cut; the first "
                      f"is prompt {cut[0]}")
    barrier()

    cast_for_autocast(model.denoiser, dtype)
    model.pipe.to(device)
    for out, manifest in manifests.items():
        make_images(args, model, out, manifest["images"], dtype)


def make_images(args, model, out, entries, dtype):
    """This process's share of the images that are not in a folder yet."""
    def files(i):
        return [out / entries[i]["file"]]

    for indices in pending_batches(len(entries), args.batch_size, files, out.name):
        batch = [entries[i] for i in indices]
        generators = [torch.Generator().manual_seed(entry["seed"]) for entry in batch]
        prompts = [entry["prompt"] for entry in batch]
        latents = model.sample(prompts, generators, args.steps, args.guidance, dtype, height=args.resolution,
                               width=args.resolution)
        for entry, image in zip(batch, to_pil(model.decode(latents))):
            note = {key: entry[key] for key in ("index", "prompt", "seed")}
            save_png(image, out / entry["file"], note)


# Score and compare


def score(args):
    """Score folders: scores.csv, a row per image, a column per scorer; scores.json, also who scored."""
    import scorers  # here, because its libraries take seconds

    device = common.get_device(args.device)
    folders = open_folders(args.folders)
    lines = [["", "mean", "n"]]
    metrics = list(dict.fromkeys(args.metrics.split(",")))
    names = [metric.partition("=")[0] for metric in metrics]
    for metric in metrics:
        loaded = {}
        for folder in folders:
            spec = "clip=tiny" if metric == "clip" and folder.manifest.get("toy") else metric
            if spec not in loaded:
                loaded[spec] = scorers.get_scorer(spec, device)
            name, scorer, identity = loaded[spec]
            is_one_of_several = metric.startswith("clip=") or names.count(name) > 1
            column = metric if is_one_of_several else name
            score_missing(folder, column, scorer, identity, args.batch_size)
            _, rows = folder.read_scores()
            mean = np.mean([row[column] for row in rows])
            lines.append([f"{column} of {folder.path}", f"{mean:.4f}", str(len(rows))])
    print(table(lines))


def score_missing(folder, column, scorer, identity, batch_size):
    """Scores the images of a folder that this scorer has no score of. What is scored is kept in any case."""
    identities, rows = folder.read_scores()
    is_known = identities.get(column) == identity
    missing = [i for i, row in enumerate(rows) if not is_known or column not in row]
    values, written = {}, time.time()
    batches = [missing[start:start + batch_size] for start in range(0, len(missing), batch_size)]
    opened = open_batches([folder.files[i] for i in missing], batch_size, f"{column} of {folder.path}")
    try:
        for batch, images in zip(batches, opened):
            scores = scorer(images, [folder.prompts[i] for i in batch])
            if scores.shape != (len(batch),):
                raise InputError(f"{column} gave scores {[*scores.shape]} for {len(batch)} images")
            for i, score in zip(batch, scores.tolist()):
                if not math.isfinite(score):
                    raise InputError(f"the {column} of {folder.files[i]} is {score}")
                values[i] = score
            if time.time() - written > 10:
                folder.write_scores(column, identity, values)
                written = time.time()
    finally:
        if values or not missing:  # scores.csv may be gone
            folder.write_scores(column, identity, values)


def open_folders(paths):
    """The `ImageFolder` of each path, or of each set of prompts in it."""
    return [ImageFolder(folder) for path in paths for folder in image_sets(path).values()]


def compare(args):
    """Compare scored folders of the same prompts: a table, in four formats, and a page with the images."""
    out = writable_file(args.out)
    if out.suffix != ".html":
        raise InputError(f"compare: --out {out} is for the page, a .html file; the tables stand beside it")
    if (out.parent / "manifest.json").exists():
        raise InputError(f"compare: --out {out} lies among images; give a place of its own")
    paths = [str(Path(path)) for path in args.folders]
    if args.against:
        places = [Path(path).resolve() for path in paths]
        if Path(args.against).resolve() not in places:
            raise InputError(f"compare: --against {args.against} is none of {', '.join(paths)}")
        paths.insert(0, paths.pop(places.index(Path(args.against).resolve())))
    pairs = [(i, 0) for i in range(1, len(paths))]
    if args.all_pairs:
        pairs = [(i, j) for j in range(len(paths)) for i in range(j + 1, len(paths))]
    write_report(out, comparable_sets(paths), paths, pairs, args.category, args.votes, args.rows)


# Pairs out of scores


def pairs(args):
    """Preference pairs, in Pick-a-Pic's schema, of the best and the worst image of each prompt in scored folders."""
    scorers, least = args.by.split("+"), parse_gaps(args.by, args.min_gap)
    out = new_pairs_file(args.out)
    folders = open_folders(args.folders)
    refuse_twice(folders)
    of_prompt, files, counts = {}, [], collections.Counter()
    scores = scores_of(folders, scorers)                                                # [all images, scorers]
    for folder in folders:
        for file, prompt in zip(folder.files, folder.prompts):
            of_prompt.setdefault(prompt, []).append(len(files))
            files.append(file)

    chosen = []
    for prompt, images in of_prompt.items():
        if len(images) < 2:
            counts["prompts with one image"] += 1
        for better, worse, fault in ranked_pairs(scores[images], least, args.all):
            if fault:
                counts[fault] += 1
            else:
                chosen.append((prompt, images[better], images[worse]))
    dropped = "".join(f", {count} {fault}" for fault, count in counts.items())
    if not chosen:
        raise InputError(f"pairs: none is left of {len(of_prompt)} prompts{dropped}")
    write_pairs(out, chosen, files, scores, scorers)
    prompts = {prompt for prompt, _, _ in chosen}
    print(f"{out}: {len(chosen)} pairs of {len(prompts)} of {len(of_prompt)} prompts{dropped}")


def new_pairs_file(out):
    """The path of a parquet file, alone in its folder where --out names a folder. InputError where it is not new."""
    is_file = str(out).endswith(".parquet")
    file = writable_file(out if is_file else Path(out) / "train.parquet")
    there = [file.name] if file.exists() else []
    if not is_file:
        there += [path.name for path in file.parent.glob("*") if not common.is_hidden(path.name)]
    if there:
        raise InputError(f"pairs: --out {out} holds {min(there)} already; remove it, or give another --out")
    return file


def parse_gaps(by, min_gap):
    """[S] least differences of the S scorers of --by, of "G" for all or "G1+G2"."""
    count = len(by.split("+"))
    try:
        gaps = [float(gap) for gap in min_gap.split("+")]
    except ValueError:
        gaps = []
    if len(gaps) not in (1, count) or not all(0 <= gap < math.inf for gap in gaps):
        raise InputError(f"pairs: --min_gap {min_gap} must be a number, or one for each of {by}, joined by +")
    return np.array(gaps * (count // len(gaps)))


def scores_of(folders, scorers):
    """Scores [images of all folders, S]. InputError where one is missing, or is of another scorer elsewhere."""
    _, rows = scored_rows(folders, scorers)
    return np.array([[float(row[name]) for name in scorers] for of_folder in rows for row in of_folder])


def ranked_pairs(scores, least, every=False):
    """(better, worse, fault) of the images of a prompt: the best against the worst by mean rank, or every two.

    A scorer votes for the better of two where its scores differ, by `least` at least; the image with the votes of
    more than half of the scorers is preferred. fault: why there is no preference, or None.

    scores  [n, S] of n images by S scorers; least [S]
    """
    if len(scores) < 2:
        return []
    ranks = scipy.stats.rankdata(scores, axis=0).mean(axis=1)                           # [n], the best is highest
    order = np.argsort(-ranks, kind="stable")
    places = itertools.combinations(order, 2) if every else [(order[0], order[-1])]
    found = []
    for i, j in places:
        difference = scores[i] - scores[j]                                              # [S]
        votes = np.sign(difference) * (np.abs(difference) >= least)                     # [S] of -1, 0, 1
        wins, losses = (votes > 0).sum(), (votes < 0).sum()
        if wins > len(least) / 2:
            found.append((i, j, None))
        elif losses > len(least) / 2:
            found.append((j, i, None))
        elif not difference.any():
            found.append((i, j, "ties"))
        else:
            found.append((i, j, "near-ties" if not (wins and losses) else "without a majority"))
    return found


def write_pairs(file, chosen, files, scores, scorers):
    """A parquet file of (prompt, number of the better image, of the worse one), whole or not there.

    Beside Pick-a-Pic's columns: the files, and of each scorer both scores and by how much the winner's is higher.
    """
    import pyarrow
    import pyarrow.parquet

    part, writer = file.with_suffix(".part"), None
    for start in tqdm(range(0, len(chosen), 64), "pairs", unit="64 pairs"):  # so many in memory
        rows = []
        for number, (prompt, better, worse) in enumerate(chosen[start:start + 64], start):
            # The winner's side is drawn, so that nothing can be learnt from it.
            winner_side = int(torch.randint(2, (), generator=keyed_generator("side", number)))
            sides = (worse, better) if winner_side else (better, worse)
            row = {"caption": prompt, "label_0": 1.0 - winner_side, "label_1": float(winner_side), "has_label": True}
            for side, image in enumerate(sides):
                row |= {f"jpg_{side}": files[image].read_bytes(), f"file_{side}": str(files[image])}
                row |= {f"{name}_{side}": score for name, score in zip(scorers, scores[image])}
            row |= {f"{name}_gap": gap for name, gap in zip(scorers, scores[better] - scores[worse])}
            rows.append(row)
        stored = pyarrow.Table.from_pylist(rows)
        writer = writer or pyarrow.parquet.ParquetWriter(part, stored.schema)
        writer.write_table(stored)
    writer.close()
    part.replace(file)


# Style


def embed(files, clip, fid, gram, batch_size, title):
    """Of N images: [N, E] CLIP embeddings; [N, 2048] features of FID; mean and mean squared norm of Gram matrices.

    The latter two are None without `fid` and `gram`.
    """
    embeddings, features, total, squares = [], [], 0, 0
    for images in open_batches(files, batch_size, title):
        pixels = torch.stack([clip.transform(image) for image in images])               # [B, 3, h, w]
        embeddings.append(clip.embed_images(pixels).cpu())
        if fid:
            features.append(fid(images))
        if gram:  # a mean alone: an image has 610,000 of these values
            vectors = gram(images).double()                                             # [B, D]
            total = total + vectors.sum(0)
            squares = squares + vectors.square().sum()
    moments = (total / len(files), squares / len(files)) if gram else None
    return torch.cat(embeddings), torch.cat(features) if fid else None, moments


def style(args):
    """Measure alignment with a style: CMMD, FID and Gram matrices' distance to a reference, and guards.

    The reference is split at random in two: everything is held against its first half, and its second is the
    floor, what a perfect model would reach. All sets have one size N, the smallest there is.
    """
    device = common.get_device(args.device)
    paths = args.folders + ([args.base] if args.base else [])
    folders = comparable_folders(paths)
    first = folders[0]
    reference = image_files(args.reference)
    n = min(len(reference) // 2, len(first.files))
    if n < 2:
        raise InputError(f"--reference {args.reference} holds {len(reference)} images, {first.path} "
                         f"{len(first.files)}; needed are 4 and 2")
    out = writable_file(args.out) if args.out else None

    # A random choice, not the first n: lists of prompts are sorted by kind.
    rng = np.random.default_rng(args.seed)
    reference = [reference[i] for i in rng.permutation(len(reference))]
    chosen = sorted(rng.permutation(len(first.files))[:n])
    prompts = [first.prompts[i] for i in chosen]
    sets = [(path, [folder.files[i] for i in chosen]) for path, folder in zip(paths, folders)]
    sets.append(("floor", reference[n:2 * n]))

    spec = args.clip or ("tiny" if first.manifest.get("toy") else "ViT-L-14-336-quickgelu:openai")
    clip = Clip(spec, device)
    fid = inception(device) if args.fid else None
    use_gram = not first.manifest.get("toy") if args.gram is None else args.gram
    gram = style_statistics(device) if use_gram else None
    batches = [prompts[i:i + args.batch_size] for i in range(0, n, args.batch_size)]
    text = torch.cat([clip.embed_texts(batch).cpu() for batch in batches])              # [N, E]
    target, target_features, target_moments = embed(reference[:n], clip, fid, gram, args.batch_size,
                                                    "embedding reference")
    rows = []
    for name, files in sets:
        x, features, moments = embed(files, clip, fid, gram, args.batch_size, f"embedding {name}")
        value, interval = cmmd(x, target, draws=1000, seed=args.seed)
        clip_score = 100 * F.cosine_similarity(x, text).mean().item()
        rows.append({
            "images": name, "base": name == args.base, "n": n, "cmmd": value, "cmmd_95": interval,
            "cmmd_published": published_cmmd(x, target),
            "fid": frechet(features, target_features) if fid else None, "diversity": diversity(x),
            "gram": mean_squared_distance(moments, target_moments) if gram else None,
            "clip": None if name == "floor" else clip_score})

    print(style_table(rows))
    fid_by = "FID by torch-fidelity" if fid else "no FID: --no-fid, or torch-fidelity is not installed"
    gram_by = "Gram by torchvision's VGG-19, all images against all" if gram else "no Gram: --gram"
    print(f"lower CMMD, FID and Gram: nearer to {args.reference}; floor: its one half against the other. CMMD is "
          f"unbiased, as published it is not: compare with papers by that alone, at their number of images. CLIP "
          f"score (to the prompt) and diversity fall where a model collapses. By {spec}; {fid_by}; {gram_by}")
    if out:
        numbers = {"clip": spec, "reference": args.reference, "rows": rows}
        atomic_write(out, json.dumps(numbers, indent=1))


def parse_args(argv=None):
    """The options of a command, and its function. InputError on any that will not do."""
    parser = common.Parser("evaluate.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=110)

    def command(function):
        sub = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0], allow_abbrev=False,
                                  description=function.__doc__, formatter_class=formatter)
        sub.error = lambda message: parser.error(f"{function.__name__}: {message}")
        sub.set_defaults(function=function)
        if function not in (compare, pairs):
            sub.add_argument("--device", help="cuda, mps or cpu [the best there is]")
            sub.add_argument("--batch_size", type=int, default=8, help="images at once [%(default)s]")
        if function is not generate:
            sub.add_argument("folders", nargs="+", metavar="DIR")
        return sub.add_argument

    add = command(generate)
    add("--model", default="tiny", help="what train.py takes: a preset's name, a folder, a hub id or a .safetensors "
        "[%(default)s]")
    add("--lora", nargs="+", default=[], metavar="LORA", help="LoRA weights for it, one on top of the other: "
        "folders, files or hub ids")
    add("--config", metavar="DIR", help="a diffusers folder that describes a --model in one .safetensors file")
    add("--prompts", nargs="+", metavar="[NAME=]SOURCE", help="a txt, tsv, csv, json or jsonl file, ID or ID:SPLIT of "
        "the hub, or tiny; of several sets each by its name, into OUT/NAME")
    add("--out", metavar="DIR", required=True)
    add("--limit", type=int, metavar="N", help="the first N prompts alone")
    add("--per_prompt", type=int, default=1, metavar="K", help="images of each prompt, each of its own noise [1]")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=50, help="denoising steps [%(default)s]")
    add("--guidance", type=float, help="classifier-free guidance [7.5; SDXL 5.0; a toy model 3.0]")
    add("--scheduler", metavar="CLASS", help="a scheduler of diffusers [the model's own]")
    add("--resolution", type=int, help="side of the images, pixels [the model's own]")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="of UNet and text [bf16 on cuda, else fp32]")
    add = command(score)
    add("--metrics", default="clip", metavar="A,B=SOURCE", help="of clip, pickscore, hpsv2, hpsv2.0, "
        "imagereward, aesthetic; SOURCE is a local file or folder, of clip ARCH:WEIGHTS [%(default)s]")
    add = command(compare)
    add("--out", metavar="PAGE.html", default="report.html", help="and PAGE.json, .csv, .md, .tex [%(default)s]")
    add("--against", metavar="DIR", help="the one of the folders that the others are held against [the first]")
    add("--all_pairs", action="store_true", help="every two folders against each other")
    add("--rows", type=int, nargs="+", default=[], metavar="N", help="rows of the page by their numbers, as PAGE.png")
    add("--votes", metavar="CSV", help="what the page's blind vote exported: counted, with its interval")
    add("--category", metavar="COLUMN", help="of the prompts' file, as Category of PartiPrompts: its values apart, too")
    add = command(pairs)
    add("--by", required=True, metavar="A[+B...]", help="scorers, of several the majority")
    add("--min_gap", default="0", metavar="G[+H...]", help="scores that differ by less are near-ties and dropped "
        "[%(default)s]")
    add("--all", action="store_true", help="every two images of a prompt, not the best and the worst alone")
    add("--out", required=True, metavar="PAIRS", help="a .parquet file, or a folder for one")
    add = command(style)
    add("--reference", metavar="DIR", required=True, help="images in the style that were not trained on")
    add("--base", metavar="DIR", help="images of the model before alignment")
    add("--clip", metavar="ARCH:WEIGHTS", help="[ViT-L-14-336-quickgelu:openai, CMMD's; for a toy tiny]")
    add("--fid", action=argparse.BooleanOptionalAction, default=True, help="if torch-fidelity is installed")
    add("--gram", action=argparse.BooleanOptionalAction, help="distance of VGG-19's Gram matrices [unless a toy]")
    add("--seed", type=int, default=0, help="of the split of the reference and of the bootstrap")
    add("--out", metavar="FILE.json", help="the table's numbers")

    args = parser.parse_args(argv)
    for name in ("steps", "limit", "per_prompt", "resolution", "batch_size"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"{args.command}: --{name} must be at least 1, not {value}")
    if args.command == "generate" and args.prompts is None:
        if args.model not in EMBEDDED:
            parser.error("generate: --prompts is needed: a txt, tsv, csv, json or jsonl file, a hub id, or tiny")
        args.prompts = ["tiny"]
    return args


def main(argv=None):
    with common.one_line_errors("evaluate.py", "A smaller --batch_size may go on"):
        args = parse_args(argv)
        _, _, world_size = common.torchrun_env()
        if world_size > 1 and args.command != "generate":
            raise InputError(f"{args.command} takes one process; only generate runs under torchrun")
        common.end_with_launcher()
        try:
            args.function(args)
        except KeyboardInterrupt:
            raise InputError("stopped; what is done is kept, and the same command goes on")


if __name__ == "__main__":
    main()
