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
same command resumes. `score` keeps earlier scores.
"""

import distributed  # first: it notes the launcher, before the imports that take seconds

import argparse
import functools
import importlib
import itertools
import json
import re
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from common import DTYPES, InputError, Parser, atomic_write, is_hidden, keyed_generator, one_line_errors
from extras.prompts import NAMED as NAMED_PROMPTS
from extras.prompts import read_prompt_rows, read_prompts  # the second one for those who import this file
from loading import EMBEDDED, fuse_lora, load_model, weights_digest
from models import cast_for_autocast
from page import write_report
from report import (comparable_sets, first_difference, image_files, open_batches, open_folders, read_json, save_png,
                    settings_of, short_names, table, to_pil, writable_file)


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
    args.resolution = model.resolution(args.resolution, for_training=False)
    args.guidance = model.guidance if args.guidance is None else args.guidance
    if distributed.torchrun_env()[0] == 0:
        write_manifests(args, model, sets, images, device, dtype)
    distributed.wait_for_all()

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
        if any("negative_prompt" in entry.get("columns", {}) for entry in entries):
            print("the prompts' column negative_prompt is kept in the manifest, but it is not used")
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


def draw_images(args, model, out, entries, dtype):
    """Draw this process's share of the images that a folder lacks."""
    def files(i):
        return [out / entries[i]["file"]]

    for indices in distributed.pending_batches(len(entries), args.batch_size, files, out.name):
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
            scorer = None  # the one before it lets go of its memory
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
    named = named_folders(args.folders)
    if args.against:
        against = [(name, path) for name, path in named
                   if args.against == name or Path(path).resolve() == Path(args.against).resolve()]
        if not against:
            raise InputError(f"compare: --against {args.against} is none of {', '.join(path for _, path in named)}")
        named.sort(key=lambda folder: folder != against[0])  # it becomes the first
    names, paths = map(list, zip(*named))
    pairs = [(i, j) for j, i in itertools.combinations(range(len(paths)), 2) if j == 0 or args.all_pairs]
    sets = comparable_sets(paths)
    if len(set(names)) < len(names):
        raise InputError(f"compare: two folders have one name: {', '.join(names)}. Give each as NAME=DIR")
    write_report(out, sets, paths, names, pairs, args.category, args.votes, args.rows)


def named_folders(texts):
    """[(name, path)] of compare's folders, each DIR or NAME=DIR. Without NAME it is the part in which the paths differ."""
    names, paths = [], []
    for text in texts:
        is_named = not Path(text).exists() and re.match(r"[^=/]+=", text)
        name, _, path = text.partition("=") if is_named else (None, None, text)
        names.append(name)
        paths.append(str(Path(path)))
    return [(name or short, path) for name, short, path in zip(names, short_names(paths), paths)]


def pairs(args):
    """Make preference pairs, in Pick-a-Pic's schema, of the best and the worst image of each prompt."""
    importlib.import_module("extras.scored_pairs").make_pairs(args)


def style(args):
    """Measure how close images are to a style: CMMD, FID and Gram distance to a reference."""
    importlib.import_module("extras.style").measure_style(args)


# Prompts


def prompt_sets(sources, out):
    """{folder: source} of --prompts: one SOURCE belongs to --out itself, each of several NAME=SOURCE to OUT/NAME."""
    out, first = Path(out), sources[0]
    if len(sources) == 1 and (Path(first).exists() or not re.match(r"[\w.-]+=", first)):
        return {out: first}
    if (out / "manifest.json").exists():
        raise InputError(f"--out {out} holds images of one set of prompts; give another --out for several")
    sets, names = {}, set()
    for text in sources:
        name, _, source = (text, "", text) if text in NAMED_PROMPTS else text.partition("=")
        if not source or not re.fullmatch(r"\w[\w.-]*", name) or name.lower() in names:
            raise InputError(f"--prompts {text}: of several sets each is NAME=SOURCE, with a name of its own")
        sets[out / name] = source
        names.add(name.lower())
    return sets


# Options


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
            sub.add_argument("folders", nargs="+", metavar="DIR", help="a folder of images that generate made" +
                             ("; NAME=DIR gives it a name" if function is compare else ""))
        return sub.add_argument

    add = command(generate)
    add("--model", default="tiny", help="a preset's name, a folder, a hub id or a .safetensors file [%(default)s]")
    add("--lora", nargs="+", default=[], metavar="LORA", help="LoRA weights to fuse, in order: folders, files, hub ids")
    add("--config", metavar="DIR", help="a diffusers folder that describes a --model in one .safetensors file")
    add("--prompts", nargs="+", metavar="[NAME=]SOURCE", help=f"a txt, tsv, csv, json or jsonl file, ID or ID:SPLIT on "
        f"the hub, {', '.join(NAMED_PROMPTS)}, or tiny; several sets have a NAME each and go to OUT/NAME "
        "[tiny for a tiny model]")
    add("--out", metavar="DIR", required=True, help="folder for the images and manifest.json")
    add("--limit", type=int, metavar="N", help="draw only the first N prompts [all]")
    add("--per_prompt", type=int, default=1, metavar="K", help="images per prompt, each from its own noise [1]")
    add("--seed", type=int, default=0, help="seed of the noise [%(default)s]")
    add("--steps", type=int, default=50, help="number of denoising steps [%(default)s]")
    add("--guidance", type=float, help="classifier-free guidance scale [the model's own]")
    add("--scheduler", metavar="CLASS", help="a scheduler class of diffusers [the model's own]")
    add("--resolution", type=int, help="side of the images in pixels [the model's own]")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="precision of sampling [bf16 on cuda, else fp32]")
    add = command(score)
    add("--metrics", default="clip", metavar="A,B=SOURCE", help="scorers: clip, pickscore, hpsv2, hpsv2.0, "
        "imagereward, aesthetic, hpsv3; SOURCE is a local file or folder, for clip ARCH:WEIGHTS [%(default)s]")
    add = command(compare)
    add("--out", metavar="PAGE.html", default="report.html", help="the page; tables go beside it [%(default)s]")
    add("--against", metavar="DIR", help="compare the others with this folder [the first]")
    add("--all_pairs", action="store_true", help="compare every two folders")
    add("--rows", type=int, nargs="+", default=[], metavar="N", help="draw these rows of the page as PAGE.png, too")
    add("--votes", metavar="CSV", help="count the votes that the page's blind vote exported")
    add("--category", metavar="COLUMN", help="also compare each category, a value of this column of the prompts' file")
    for function, module in ((pairs, "scored_pairs"), (style, "style")):
        importlib.import_module(f"extras.{module}").add_options(command(function))

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
    with one_line_errors("evaluate.py", "A smaller --batch_size may go on"):
        args = parse_args(argv)
        _, _, world_size = distributed.torchrun_env()
        if world_size > 1 and args.command != "generate":
            raise InputError(f"{args.command} takes one process; only generate runs under torchrun")
        distributed.end_with_launcher()
        try:
            args.function(args)
        except KeyboardInterrupt:
            raise InputError("stopped; the same command resumes, and images and scores are kept")


if __name__ == "__main__":
    main()
