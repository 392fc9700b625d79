"""Evaluate text-to-image models: draw images, score them, compare the scores, make pairs, measure a style.

    python evaluate.py generate --model sd15 --prompts PartiPrompts.tsv --out images/base
    python evaluate.py generate --model out/sd15-rpo/model --prompts PartiPrompts.tsv --out images/rpo
    torchrun --nproc_per_node=8 evaluate.py generate --model sdxl --lora LORA --prompts P --out D
    python evaluate.py score images/base images/rpo --metrics clip,pickscore,hpsv2,imagereward,aesthetic
    python evaluate.py compare images/base images/rpo --out report.html
    python evaluate.py generate --model M --prompts parti=PartiPrompts.tsv hpsv2=hps.json --out images/m
    python evaluate.py pairs images/base images/rpo --by pickscore --min_gap 0.5 --out PAIRS
    python evaluate.py style images/rpo --reference paintings --base images/base

A folder of images holds DIR/00000.png, ... and manifest.json, which records everything that made them. For several
sets of prompts the folders are DIR/NAME; `score` and `compare` find them from DIR. The noise of an image depends only
on --seed and the prompt's place in the list, so every model starts from the same noise. If `generate` was killed, the
same command goes on. `score` keeps earlier scores.
"""

import distributed  # first: it notes the launcher, before the imports that take seconds

import argparse
import collections
import functools
import itertools
import json
import math
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from common import DTYPES, InputError, Parser, atomic_write, digest, is_hidden, keyed_generator
from data import Clip
from loading import EMBEDDED, fuse_lora, load_model
from models import cast_for_autocast
from prompts import prompt_sets, read_prompt_rows
from report import (ImageFolder, cells_of, comparable_folders, comparable_scores, comparable_sets,
                    first_difference, image_sets, open_batches, read_json, refuse_twice, save_png, settings_of, table,
                    to_pil, writable_file, write_report)
from stats import (cmmd, diversity, frechet, inception, mean_squared_distance, published_cmmd, ranked_pairs,
                   style_statistics)

STYLE = {  # {heading: how the cell is written from the numbers of a row}
    "images": "{images}{base}", "CMMD": "{cmmd:.3f}", "95%": "{cmmd_95[0]:.3f} to {cmmd_95[1]:.3f}",
    "as published": "{cmmd_published:.3f}", "FID": "{fid:.2f}", "Gram": "{gram:.4g}", "CLIP score": "{clip:.2f}",
    "diversity": "{diversity:.4f}", "N": "{n}"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def image_files(folder):
    """The pictures in a folder, sorted by name, without hidden files."""
    return sorted(file for file in Path(folder).glob("*")
                  if file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(file.name))


def open_folders(paths):
    """The `ImageFolder` of each path, or of each set of prompts in it."""
    return [ImageFolder(folder) for path in paths for folder in image_sets(path).values()]


# Generate


def generate(args):
    """Draw the images that are missing, and write a manifest of how they are made."""
    device, dtype = device_and_dtype(args)
    sets = prompt_sets(args.prompts, args.out)
    # All prompts are read before the model is loaded, so that their faults show at once.
    images = {out: image_entries(args, *read_prompt_rows(source)) for out, source in sets.items()}
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
    if distributed.torchrun_env()[0] == 0:
        write_manifests(args, model, sets, images, device, dtype)
    barrier()

    cast_for_autocast(model.denoiser, dtype)
    model.pipe.to(device)
    for out, entries in images.items():
        draw_images(args, model, out, entries, dtype)


def device_and_dtype(args):
    """(torch.device, dtype) of --device and --precision, for this process."""
    device = distributed.get_device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    return device, DTYPES[precision]


def image_entries(args, prompts, columns):
    """The manifest's list of images: file, index of the prompt, prompt, seed, and its columns if it has any."""
    entries = []
    for i, k in itertools.product(range(len(prompts[:args.limit])), range(args.per_prompt)):
        key = (args.seed, "sample", i, k) if k else (args.seed, "sample", i)  # image 0 is as without --per_prompt
        name = f"{i:05d}-{k}.png" if args.per_prompt > 1 else f"{i:05d}.png"
        entry = {"file": name, "index": i, "prompt": prompts[i], "seed": keyed_generator(*key).initial_seed()}
        if columns[i]:
            entry["columns"] = columns[i]
        entries.append(entry)
    return entries


def resolution_and_guidance(args, model):
    """--resolution and --guidance, or the model's own; a toy model's guidance is 3."""
    own_guidance = 3.0 if model.is_toy else model.guidance
    resolution = model.resolution(args.resolution, for_training=False)
    return resolution, own_guidance if args.guidance is None else args.guidance


def weights_digest(model):
    """A digest of all weights of a pipeline. It tells a model from one that was trained on under the same name."""
    return digest({name: digest(network) for name, network in model.networks().items()})


def write_manifests(args, model, sets, images, device, dtype):
    """Write a manifest into each folder. InputError, before any is written, if one holds other images or files."""
    scheduler = model.pipe.scheduler
    schedule = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
    settings = {"seed": args.seed, "steps": args.steps, "guidance": args.guidance, "resolution": args.resolution,
                "precision": str(dtype).removeprefix("torch."),
                "scheduler": {"class": type(scheduler).__name__} | schedule}
    if args.per_prompt > 1:
        settings["per_prompt"] = args.per_prompt
    shared = {"model": args.model, "lora": args.lora, "weights": weights_digest(model), "toy": model.is_toy,
              "settings": settings, "batch_size": args.batch_size,
              "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
              "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")}}
    tokenizer, most = model.longest_tokenizer()
    manifests = {}
    for out, entries in images.items():
        cut = sorted({entry["index"] for entry in entries if len(tokenizer(entry["prompt"]).input_ids) > most})
        manifest = shared | {"prompts": {"source": sets[out], "cut": cut}, "images": entries}
        manifest = json.loads(json.dumps(manifest, default=str))  # as it will be read back
        manifests[out] = checked_manifest(out, manifest)
        if cut:
            print(f"{len(cut)} prompts have more than the {most} tokens that the model reads and are cut; the first is "
                  f"prompt {cut[0]}")
    for out, manifest in manifests.items():
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "manifest.json", json.dumps(manifest, indent=1))


def checked_manifest(out, manifest):
    """The manifest to write into a folder. InputError if the folder holds other images or other files.

    A folder with images keeps its manifest; only the columns beside the prompts are the new ones.
    """
    file = out / "manifest.json"
    if image_files(out):
        before = read_json(file)
        before_and_now = [settings_of(some) | {"weights": some.get("weights")} for some in (before, manifest)]
        difference = first_difference(*before_and_now)
        if difference:
            raise InputError(f"{out} holds other images: {difference}; give another --out")
        return before | {"images": manifest["images"]}
    strange = [path.name for path in out.glob("*")
               if path != file and path.suffix != ".part" and not is_hidden(path.name)]
    if strange:
        raise InputError(f"{out} holds something else ({min(strange)}); give another --out")
    return manifest


def barrier():
    """Under torchrun, wait here for all processes, for a day at most."""
    _, _, world_size = distributed.torchrun_env()
    if world_size > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        dist.barrier()


def pending_batches(n, size, files, title):
    """This process's share of the batches, each a range of prompt numbers, that lack one of the files files(i).

    All batches of n prompts are cut alike on any number of processes: the rounding of an image depends on its batch.
    """
    rank, _, world_size = distributed.torchrun_env()
    batches = [range(start, min(start + size, n)) for start in range(0, n, size)]
    pending = [batch for batch in batches if not all(file.exists() for i in batch for file in files(i))]
    barrier()  # all processes look before the first draws
    return tqdm(pending[rank::world_size], title, unit="batch", disable=rank > 0)


def draw_images(args, model, out, entries, dtype):
    """Draw this process's share of the images that a folder lacks."""
    for indices in pending_batches(len(entries), args.batch_size, lambda i: [out / entries[i]["file"]], out.name):
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
    """Score folders: scores.csv has a row per image and a column per scorer; scores.json also says who scored."""
    import scorers  # here, because its libraries take seconds

    device = distributed.get_device(args.device)
    folders = open_folders(args.folders)
    metrics = list(dict.fromkeys(args.metrics.split(",")))
    names = [metric.partition("=")[0] for metric in metrics]
    rows = []
    for metric, name in zip(metrics, names):
        column = metric if metric.startswith("clip=") or names.count(name) > 1 else name
        get_scorer = functools.cache(scorers.get_scorer)  # a new cache frees the last metric's memory
        for folder in folders:
            spec = "clip=tiny" if metric == "clip" and folder.manifest.get("toy") else metric
            _, scorer, identity = get_scorer(spec, device)
            score_missing(folder, column, scorer, identity, args.batch_size)
            scores = [row[column] for row in folder.read_scores()[1]]
            rows.append({"": f"{column} of {folder.path}", "mean": f"{np.mean(scores):.4f}", "n": str(len(scores))})
    print(table(rows))


def score_missing(folder, column, scorer, identity, batch_size):
    """Score the images of a folder that have no score of this scorer. A fault or a stop keeps what was scored."""
    identities, rows = folder.read_scores()
    is_known = identities.get(column) == identity
    missing = [i for i, row in enumerate(rows) if not is_known or column not in row]
    opened = open_batches([folder.files[i] for i in missing], batch_size, f"{column} of {folder.path}")
    values, written = {}, time.time()
    try:
        for images in opened:
            batch = missing[len(values):len(values) + len(images)]
            scores = scorer(images, [folder.prompts[i] for i in batch])
            values |= zip(batch, scores.tolist())
            if time.time() - written > 10:
                folder.write_scores(column, identity, values)
                written = time.time()
    finally:
        if values or not missing:  # the csv may be missing or old even if no score is
            folder.write_scores(column, identity, values)


def compare(args):
    """Compare scored folders of the same prompts: a table in four formats, and a page with the images."""
    out = writable_file(args.out)
    if out.suffix != ".html":
        raise InputError(f"compare: --out {out} must be an .html file; the tables are written beside it")
    if (out.parent / "manifest.json").exists():
        raise InputError(f"compare: --out {out} lies among images; give a folder of its own")
    paths = [str(Path(path)) for path in args.folders]
    if args.against:
        against = [path for path in paths if Path(path).resolve() == Path(args.against).resolve()]
        if not against:
            raise InputError(f"compare: --against {args.against} is none of {', '.join(paths)}")
        paths.sort(key=lambda path: path not in against)  # it becomes the first
    pairs = [(i, j) for j, i in itertools.combinations(range(len(paths)), 2) if j == 0 or args.all_pairs]
    write_report(out, comparable_sets(paths), paths, pairs, args.category, args.votes, args.rows)


# Pairs from scores


def pairs(args):
    """Make preference pairs, in Pick-a-Pic's schema, of the best and the worst image of each prompt."""
    scorers = args.by.split("+")
    min_gaps = parse_gaps(args.min_gap, scorers)
    out = new_pairs_file(args.out)
    folders = open_folders(args.folders)
    refuse_twice(folders)
    _, scores = comparable_scores(folders, scorers)
    scores = np.stack([np.concatenate([*scores[name].values()]) for name in scorers], 1)    # [all images, S]
    files = [file for folder in folders for file in folder.files]
    images_of_prompt = collections.defaultdict(list)
    for i, prompt in enumerate(prompt for folder in folders for prompt in folder.prompts):
        images_of_prompt[prompt].append(i)

    chosen, faults = [], collections.Counter()
    for prompt, images in images_of_prompt.items():
        if len(images) < 2:
            faults["prompts with one image"] += 1
        for better, worse, fault in ranked_pairs(scores[images], min_gaps, args.all):
            if fault:
                faults[fault] += 1
            else:
                chosen.append((prompt, images[better], images[worse]))
    dropped = "".join(f", {count} {fault}" for fault, count in faults.items())
    if not chosen:
        raise InputError(f"pairs: none is left of {len(images_of_prompt)} prompts{dropped}")
    write_pairs(out, chosen, files, scores, scorers)
    used = len({prompt for prompt, _, _ in chosen})
    print(f"{out}: {len(chosen)} pairs of {used} of {len(images_of_prompt)} prompts{dropped}")


def new_pairs_file(out):
    """The path of the parquet file to write. InputError if it exists, or the folder --out holds anything."""
    is_file = str(out).endswith(".parquet")
    file = writable_file(out if is_file else Path(out) / "train.parquet")
    found = [file] if is_file else sorted(file.parent.glob("[!.]*"))
    if any(path.exists() for path in found):
        raise InputError(f"pairs: --out {out} holds {found[0].name} already; remove it, or give another --out")
    return file


def parse_gaps(text, scorers):
    """The minimum gaps of S scorers, [S] or [1], from G1+G2+... or one number for all."""
    try:
        gaps = np.array(text.split("+"), dtype=float)
    except ValueError:
        gaps = np.array([math.nan])
    if len(gaps) not in (1, len(scorers)) or not np.all((gaps >= 0) & (gaps < math.inf)):
        raise InputError(f"pairs: --min_gap {text} must be a number, or one for each of {'+'.join(scorers)}")
    return gaps


def write_pairs(file, chosen, files, scores, scorers):
    """Write [(prompt, number of the better image, of the worse)] as a parquet file, whole or not at all.

    Beside Pick-a-Pic's columns it has the images' files, their scores, and the winner's lead by each scorer.
    """
    import pyarrow
    import pyarrow.parquet

    part, writer = file.with_suffix(".part"), None
    for start in tqdm(range(0, len(chosen), 64), "pairs", unit="64 pairs"):  # 64 pairs are in memory
        rows = []
        for number, (prompt, better, worse) in enumerate(chosen[start:start + 64], start):
            # The winner's side is random, so that training cannot learn it.
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


def style(args):
    """Measure how close images are to a style: CMMD, FID and Gram distance to a reference.

    The reference is split at random. Every set of images is compared with the first half; comparing the second half
    with it gives the floor, which a perfect model would reach. All sets have the same size N, the largest possible.
    """
    device = distributed.get_device(args.device)
    paths = args.folders + ([args.base] if args.base else [])
    folders = comparable_folders(paths)
    first = folders[0]
    is_toy = first.manifest.get("toy")
    reference = image_files(args.reference)
    n = min(len(reference) // 2, len(first.files))
    if n < 2:
        raise InputError(f"--reference {args.reference} holds {len(reference)} images, {first.path} "
                         f"{len(first.files)}; at least 4 and 2 are needed")
    out = writable_file(args.out) if args.out else None

    # The choice is random because lists of prompts are sorted by kind.
    rng = np.random.default_rng(args.seed)
    reference = [reference[i] for i in rng.permutation(len(reference))]
    chosen = sorted(rng.permutation(len(first.files))[:n])
    sets = [(path, [folder.files[i] for i in chosen]) for path, folder in zip(paths, folders)]
    sets.append(("floor", reference[n:2 * n]))

    spec = args.clip or ("tiny" if is_toy else "ViT-L-14-336-quickgelu:openai")
    clip = Clip(spec, device)
    fid = inception(device) if args.fid else None
    gram = style_statistics(device) if args.gram or (args.gram is None and not is_toy) else None
    measure = functools.partial(embed, clip=clip, fid=fid, gram=gram, batch_size=args.batch_size)
    prompts = [first.prompts[i] for i in chosen]
    text = torch.cat([clip.embed_texts(prompts[i:i + args.batch_size]).cpu() for i in range(0, n, args.batch_size)])
    target, target_features, target_moments = measure("reference", reference[:n])
    rows = []
    for name, files in sets:
        x, features, moments = measure(name, files)
        value, interval = cmmd(x, target, draws=1000, seed=args.seed)
        rows.append({
            "images": name, "base": name == args.base, "n": n, "cmmd": value, "cmmd_95": interval,
            "cmmd_published": published_cmmd(x, target),
            "fid": frechet(features, target_features) if fid else None, "diversity": diversity(x),
            "gram": mean_squared_distance(moments, target_moments) if gram else None,
            "clip": None if name == "floor" else 100 * F.cosine_similarity(x, text).mean().item()})

    print(table([cells_of(row | {"base": " (base)" * row["base"]}, STYLE) for row in rows]))
    fid_by = "FID by torch-fidelity" if fid else "no FID: --no-fid, or torch-fidelity is not installed"
    gram_by = "Gram by torchvision's VGG-19, all images against all" if gram else "no Gram: --gram"
    print(f"Lower CMMD, FID and Gram mean closer to {args.reference}; the floor compares its two halves. CMMD is "
          "unbiased: compare with papers only as published, at their number of images. CLIP score (with the prompt) "
          f"and diversity fall if a model collapses. CLIP is {spec}; {fid_by}; {gram_by}.")
    if out:
        numbers = {"clip": spec, "reference": args.reference, "rows": rows}
        atomic_write(out, json.dumps(numbers, indent=1))


def embed(title, files, clip, fid, gram, batch_size):
    """(CLIP embeddings [N, E], FID's features [N, 2048], moments of the Gram vectors) of N images.

    The moments are the vectors' mean [D] and mean squared norm. Features and moments are None without `fid`, `gram`.
    """
    embeddings, features, total, squares = [], [], 0, 0
    for images in open_batches(files, batch_size, f"embedding {title}"):
        pixels = torch.stack([clip.transform(image) for image in images])               # [B, 3, h, w]
        embeddings.append(clip.embed_images(pixels).cpu())
        if fid:
            features.append(fid(images))
        if gram:  # only moments are kept: an image has D = 610,000 values
            vectors = gram(images).double()                                             # [B, D]
            total = total + vectors.sum(0)
            squares = squares + vectors.square().sum()
    moments = (total / len(files), squares / len(files)) if gram else None
    return torch.cat(embeddings), torch.cat(features) if fid else None, moments


def parse_args(argv=None):
    """The options of a command, and its function. InputError if an option is wrong."""
    parser = Parser("evaluate.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=110)

    def command(function):
        sub = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0], allow_abbrev=False,
                                  description=function.__doc__, formatter_class=formatter)
        sub.error = lambda message: parser.error(f"{function.__name__}: {message}")
        sub.set_defaults(function=function)
        if function not in (compare, pairs):
            sub.add_argument("--device", help="cuda, mps or cpu [the best there is]")
            sub.add_argument("--batch_size", type=int, default=8, help="images at a time [%(default)s]")
        if function is not generate:
            sub.add_argument("folders", nargs="+", metavar="DIR", help="a folder of images that generate made")
        return sub.add_argument

    add = command(generate)
    add("--model", default="tiny", help="a preset's name, a folder, a hub id or a .safetensors file [%(default)s]")
    add("--lora", nargs="+", default=[], metavar="LORA", help="LoRA weights to fuse, in order: folders, files, hub ids")
    add("--config", metavar="DIR", help="a diffusers folder that describes a --model in one .safetensors file")
    add("--prompts", nargs="+", metavar="[NAME=]SOURCE", help="a txt, tsv, csv, json or jsonl file, ID or ID:SPLIT on "
        "the hub, or tiny; several sets have a NAME each and go to OUT/NAME [tiny for a tiny model]")
    add("--out", metavar="DIR", required=True, help="folder for the images and manifest.json")
    add("--limit", type=int, metavar="N", help="draw only the first N prompts [all]")
    add("--per_prompt", type=int, default=1, metavar="K", help="images per prompt, each from its own noise [1]")
    add("--seed", type=int, default=0, help="seed of the noise [%(default)s]")
    add("--steps", type=int, default=50, help="number of denoising steps [%(default)s]")
    add("--guidance", type=float, help="classifier-free guidance scale [7.5; SDXL 5.0; a toy model 3.0]")
    add("--scheduler", metavar="CLASS", help="a scheduler class of diffusers [the model's own]")
    add("--resolution", type=int, help="side of the images in pixels [the model's own]")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="precision of sampling [bf16 on cuda, else fp32]")
    add = command(score)
    add("--metrics", default="clip", metavar="A,B=SOURCE", help="scorers: clip, pickscore, hpsv2, hpsv2.0, "
        "imagereward, aesthetic; SOURCE is a local file or folder, for clip ARCH:WEIGHTS [%(default)s]")
    add = command(compare)
    add("--out", metavar="PAGE.html", default="report.html", help="the page; tables go beside it [%(default)s]")
    add("--against", metavar="DIR", help="compare the others with this folder [the first]")
    add("--all_pairs", action="store_true", help="compare every two folders")
    add("--rows", type=int, nargs="+", default=[], metavar="N", help="draw these rows of the page as PAGE.png, too")
    add("--votes", metavar="CSV", help="count the votes that the page's blind vote exported")
    add("--category", metavar="COLUMN", help="also compare each category, a value of this column of the prompts' file")
    add = command(pairs)
    add("--by", required=True, metavar="A[+B...]", help="scorers; with several the majority decides")
    add("--min_gap", default="0", metavar="G[+H...]", help="drop near-ties, whose scores differ by less [%(default)s]")
    add("--all", action="store_true", help="pair every two images of a prompt, not only the best and the worst")
    add("--out", required=True, metavar="PAIRS", help="a .parquet file, or a new folder for one")
    add = command(style)
    add("--reference", metavar="DIR", required=True, help="images in the style that training did not see")
    add("--base", metavar="DIR", help="images of the model before training")
    add("--clip", metavar="ARCH:WEIGHTS", help="CLIP for CMMD [ViT-L-14-336-quickgelu:openai; for a toy model tiny]")
    add("--fid", action=argparse.BooleanOptionalAction, default=True, help="FID, if torch-fidelity is installed [yes]")
    add("--gram", action=argparse.BooleanOptionalAction, help="distance of VGG-19's Gram matrices [yes; toy model no]")
    add("--seed", type=int, default=0, help="seed of the reference's split and of the bootstrap [%(default)s]")
    add("--out", metavar="FILE.json", help="write the table's numbers to this file")

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
    with distributed.one_line_errors("evaluate.py", "A smaller --batch_size may go on"):
        args = parse_args(argv)
        _, _, world_size = distributed.torchrun_env()
        if world_size > 1 and args.command != "generate":
            raise InputError(f"{args.command} takes one process; only generate runs under torchrun")
        distributed.end_with_launcher()
        try:
            args.function(args)
        except KeyboardInterrupt:
            raise InputError("stopped; what is done is kept, and the same command goes on")


if __name__ == "__main__":
    main()
