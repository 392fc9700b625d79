"""Evaluate text-to-image models: generate once, score many, compare, and measure alignment with a style.

    python evaluate.py generate --model sd15 --prompts PartiPrompts.tsv --out images/base
    python evaluate.py generate --model out/sd15-rpo/model --prompts PartiPrompts.tsv --out images/rpo
    torchrun --nproc_per_node=8 evaluate.py generate --model sdxl --lora LORA --prompts P --out D
    python evaluate.py score images/base images/rpo --metrics clip,pickscore,hpsv2,imagereward,aesthetic
    python evaluate.py compare images/base images/rpo --out report.html
    python evaluate.py style images/rpo --reference paintings --base images/base

A folder of images is DIR/00000.png ..., and manifest.json, which holds everything that made them. The noise
of a prompt follows from --seed and its place in the list alone, so every model sees the same. `generate`,
killed and given again, goes on; `score` keeps what it has. `compare` holds the others against the first.
"""

import resume  # first, to know the launcher

import argparse
import csv
import hashlib
import io
import json
import sys
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import data
import scorers
import tiny
from loss import cast_for_autocast
from page import page
from stats import bootstrap, cmmd, diversity, frechet, win_rate

UNREADABLE = "{} cannot be read: {}; if `generate` made it, remove it and give the same command again"
NOTE = "diffusion-rpo"  # the key of the PNG text by which an image knows its prompt
PROMPT = ("prompt", "caption", "text")  # the columns where a prompt may stand


def fail(message):
    sys.exit(f"evaluate.py: {message}")


def digest(content):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def table(rows):
    """Rows of strings, aligned: words to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(n) if k == 0 else cell.rjust(n) for k, (cell, n) in
                               enumerate(zip(row, widths))).rstrip() for row in rows)


# Generate


def read_prompts(source):
    """The prompts of a txt, tsv, csv, json or jsonl file, a hub id or ID:SPLIT, or "tiny": the held-out ones.

    Of a row with columns that is prompt, caption or text. Tab-separated files are read without quoting, as
    PartiPrompts wants it: there quotes belong to the prompt. Empty lines of a txt file are left out.
    SystemExit, in one line, where a file, a column or a prompt is missing.
    """
    import datasets

    if source == "tiny":
        return [tiny.caption(scene) for scene in tiny.HELD_OUT]
    path, (name, _, split) = Path(source).expanduser(), source.partition(":")
    try:
        if not path.exists():
            splits = datasets.get_dataset_split_names(data.hub_id(name))
            if (split or splits[0]) not in splits or not split and len(splits) > 1:
                fail(f"--prompts {name} has the splits {', '.join(splits)}; give {name}:SPLIT")
            rows = datasets.load_dataset(name, split=split or splits[0])
            rows = list(rows.select_columns([c for c in rows.column_names if c.lower() in PROMPT]))
        else:
            text, kind = path.read_text(encoding="utf-8-sig"), path.suffix.lower()
            if kind == ".txt":
                rows = [line for line in text.split("\n") if line.strip()]
            elif kind in (".tsv", ".csv"):
                quoting = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if kind == ".tsv" else {}
                rows = list(csv.DictReader(io.StringIO(text, newline=""), **quoting))
            elif kind == ".jsonl":
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            elif kind == ".json":
                rows = json.loads(text)
                if not isinstance(rows, list):
                    raise ValueError("it is no list")
            else:
                fail(f"--prompts {source} is none of txt, tsv, csv, json, jsonl")
    except Exception as error:
        fail(f"--prompts {source} cannot be read: {data.brief(error)}")
    prompts = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            columns = {str(key).lower(): value for key, value in row.items()}
            row = next((columns[name] for name in PROMPT if columns.get(name)), None)
        if not isinstance(row, str) or not row.strip():
            fail(f"--prompts {source}: row {number} has no prompt: a string, or {' or '.join(PROMPT)}")
        prompts.append(row.strip())
    return prompts or fail(f"--prompts {source} holds no prompt")


def fingerprint(pipe):
    """A digest of all weights of a pipeline: retrained under the same name, it is another model."""
    return digest({name: data.digest(network) for name, network in sorted(pipe.components.items())
                   if isinstance(network, torch.nn.Module)})


def load_model(model, lora=None):
    """The float32 pipeline of a preset's name, folder or hub id, with LoRA weights if given."""
    data.quiet()
    pipe = data.load_pipeline(model)
    if lora:
        try:
            pipe.load_lora_weights(lora)
            if not any(pipe.get_list_adapters().values()):  # diffusers would go on without it
                raise ValueError("none of its keys is of this model")
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        except Exception as error:
            fail(f"--lora {lora} cannot be loaded into {model}: {data.brief(error)}")
    for network in pipe.components.values():
        if isinstance(network, torch.nn.Module):
            network.eval().requires_grad_(False)
    return pipe


def side_and_guidance(args, pipe):
    """--resolution, or the model's own; --guidance, or that of its kind: 7.5, for SDXL 5.0, for a toy 3.0."""
    if args.resolution and args.resolution % pipe.vae_scale_factor:
        fail(f"--resolution {args.resolution} is no multiple of {pipe.vae_scale_factor}, as this model needs")
    usual = 3.0 if data.is_toy(pipe) else 5.0 if "text_encoder_2" in pipe.components else 7.5
    return args.resolution or data.own_side(pipe), usual if args.guidance is None else args.guidance


def to_pil(images):
    """[N, 3, H, W] in [0, 1] -> N PIL pictures; SystemExit where one is not finite: it would be black."""
    if not images.isfinite().all():
        fail("the model drew an image that is not finite; try --precision fp32")
    return [Image.fromarray(image) for image in
            (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()]


def save_png(image, file, note=None):
    """A PNG, aside and then renamed: it is whole or not there. `note` is kept in it, as text."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(NOTE, json.dumps(note or {}))
    image.save(part := file.with_suffix(".part"), "PNG", pnginfo=info)
    part.replace(file)


def place(args):
    """(torch device, dtype) of --device and --precision, or the best there is, for this process."""
    device = data.own_device(data.find_device(args.device, fail))
    precision = getattr(args, "precision", None) or ("bf16" if device.type == "cuda" else "fp32")
    return device, data.DTYPES[precision]


def meet():
    """Every process of a torchrun waits here for all others, for a day if it must."""
    if data.torchrun()[2] > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        dist.barrier()


def still_to_make(n, size, files, name):
    """This process's share of the batches, ranges, of n prompts of which one of files(i) is not there.

    Batches are the same whoever makes them, because a batch's size changes the rounding of its images.
    """
    rank, _, world = data.torchrun()
    batches = [range(i, min(i + size, n)) for i in range(0, n, size)]
    batches = [batch for batch in batches if not all(file.exists() for i in batch for file in files(i))]
    meet()  # nobody makes an image before all have looked
    return tqdm(batches[rank::world], name, unit="batch", disable=rank > 0)


def generate(args):
    """Make the images of all prompts that are not there yet, and their manifest."""
    (device, dtype), rank, out = place(args), data.torchrun()[0], Path(args.out)
    prompts = read_prompts(args.prompts)[:args.limit]
    pipe = load_model(args.model, args.lora)
    if args.scheduler:
        kinds = {kind.__name__: kind for kind in pipe.scheduler.compatibles}
        if args.scheduler not in kinds:
            fail(f"--scheduler {args.scheduler} is none of {', '.join(sorted(kinds))}")
        pipe.scheduler = kinds[args.scheduler].from_config(pipe.scheduler.config)
    side, guidance = side_and_guidance(args, pipe)
    limit = pipe.tokenizer.model_max_length
    cut = [i for i, ids in enumerate(pipe.tokenizer(prompts).input_ids) if len(ids) > limit]
    entries = [{"file": f"{i:05d}.png", "index": i, "prompt": prompt,
                "seed": data.keyed_generator(args.seed, "sample", i).initial_seed()}
               for i, prompt in enumerate(prompts)]
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_"}
    manifest = {
        "model": args.model, "lora": args.lora, "weights": fingerprint(pipe) if rank == 0 else None,
        "toy": data.is_toy(pipe),
        "prompts": {"source": args.prompts, "digest": digest(prompts), "count": len(prompts), "cut": cut},
        "settings": {"seed": args.seed, "steps": args.steps, "guidance": guidance, "resolution": side,
                     "precision": str(dtype).removeprefix("torch."),
                     "scheduler": {"class": type(pipe.scheduler).__name__} | scheduler},
        "batch_size": args.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "images": entries}
    manifest = json.loads(json.dumps(manifest, default=str))
    if rank == 0:
        if not any(out.glob("*.png")):
            there = {file.name for file in out.glob("*") if file.suffix != ".part"}
            if strange := there - {"manifest.json"}:
                fail(f"{out} holds something else ({min(strange)}); give another --out")
            out.mkdir(parents=True, exist_ok=True)
            resume.write(out / "manifest.json", json.dumps(manifest, indent=1))
        elif difference := differs(read_json(out / "manifest.json"), manifest, also=["weights"]):
            fail(f"{out} holds other images: {difference}; give another --out")
        if cut:
            print(f"{len(cut)} prompts have more than the {limit} tokens that the model reads and are cut; "
                  f"the first is that of {cut[0]:05d}.png")
    meet()

    cast_for_autocast(pipe.unet, dtype)
    pipe.to(device)
    for some in still_to_make(len(entries), args.batch_size, lambda i: [out / entries[i]["file"]], "images"):
        batch = [entries[i] for i in some]
        noise = [torch.Generator().manual_seed(entry["seed"]) for entry in batch]
        latents = data.sample(pipe, [entry["prompt"] for entry in batch], noise, args.steps, guidance, dtype,
                              height=side, width=side)
        for entry, image in zip(batch, to_pil(data.decode_images(pipe.vae, latents))):
            save_png(image, out / entry["file"], {key: entry[key] for key in ("index", "prompt", "seed")})


def read_json(file):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        fail(f"{file} cannot be read: {data.brief(error)}")


def differs(one, other, also=()):
    """What must be alike in two manifests to compare their images and is not, in words, or None."""
    def flat(manifest):
        settings, images = dict(manifest.get("settings", {})), manifest["images"]
        scheduler = settings.pop("scheduler", {})
        return ({key: manifest.get(key) for key in also} | settings
                | {f"the scheduler's {key}": value for key, value in scheduler.items()}
                | {f"the {key} of image {k}": image.get(key) for k, image in enumerate(images)
                   for key in ("prompt", "seed")} | {"the number of images": len(images)})

    a, b = flat(one), flat(other)
    return next((f"{key} is {a.get(key)!r} in one and {b.get(key)!r} in the other" for key in a | b
                 if a.get(key) != b.get(key)), None)


def place_for(file):
    """The path of a file that will be written, its folder made now, not after the work."""
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {file} cannot be written: {data.brief(error)}")
    return Path(file)


def alike(folders):
    """(manifest of the first, image paths of each) of folders; SystemExit where they cannot be compared."""
    manifests, files = zip(*map(read_folder, folders))
    for folder, manifest in zip(folders, manifests):
        if difference := differs(manifests[0], manifest):
            fail(f"{folders[0]} and {folder} cannot be compared: {difference}")
    return manifests[0], files


# Score


def read_folder(folder):
    """(manifest, list of image paths) of a folder; SystemExit unless every image is there and its own."""
    folder = Path(folder)
    if not (folder / "manifest.json").exists():
        fail(f"{folder} has no manifest.json, so nobody knows its prompts. `generate` writes one; for images "
             'from elsewhere write {"images": [{"file": ..., "prompt": ...}, ...]}')
    manifest = read_json(folder / "manifest.json")
    try:
        entries = [(folder / entry["file"], entry["prompt"]) for entry in manifest["images"]]
        assert entries, "no images"
    except (AssertionError, KeyError, TypeError) as error:
        fail(f"{folder}/manifest.json is not a manifest: {error!r}")
    if missing := [file.name for file, _ in entries if not file.exists()]:
        fail(f"{folder} lacks {len(missing)} of {len(entries)} images, the first is {missing[0]}; the same "
             "`generate` makes them")
    for (file, _), entry in zip(entries, manifest["images"]):
        try:
            with Image.open(file) as image:  # the pixels are not read yet
                note = json.loads(image.info.get(NOTE, "{}"))
        except Exception as error:
            fail(UNREADABLE.format(file, data.brief(error)))
        for key, value in note.items():
            if entry.get(key) != value:
                fail(f"{file} was made for the {key} {value!r}, not for {entry.get(key)!r} of the manifest")
    return manifest, [file for file, _ in entries]


def open_image(file):
    try:
        return data.read_image(str(file))
    except Exception as error:
        fail(UNREADABLE.format(file, data.brief(error)))


def unscored(manifest, files):
    """What a row of scores.csv says of its image: file, digest and prompt. It reads every image."""
    return [{"file": file.name, "sha256": digest(file.read_bytes()), "prompt": entry["prompt"]}
            for file, entry in zip(files, manifest["images"])]


def read_scores(folder, rows):
    """({scorer: identity}, a row of scores.csv per image), without scores of other images than `rows`."""
    if (folder / "scores.json").exists():
        text, who = (folder / "scores.csv").read_bytes(), read_json(folder / "scores.json")
        known = [*csv.DictReader(io.StringIO(text.decode(), newline=""))]
        if who["csv"] == digest(text) and [{key: row[key] for key in rows[0]} for row in known] == rows:
            return who["scorers"], known
    return {}, rows


def score(args):
    """Score folders: scores.csv, a row per image and a column per scorer, and scores.json, who scored."""
    folders = [(Path(folder), *read_folder(folder)) for folder in args.folders]
    folders = [(folder, manifest, files, unscored(manifest, files)) for folder, manifest, files in folders]
    device, lines = place(args)[0], [["", "mean", "n"]]
    for metric in args.metrics.split(","):
        loaded = {}
        for folder, manifest, files, images in folders:
            source = "clip=tiny" if metric == "clip" and manifest.get("toy") else metric
            if source not in loaded:
                loaded[source] = scorers.get_scorer(source, device)
            name, scorer, identity = loaded[source]
            name = metric if metric.startswith("clip=") else name  # several may stand side by side
            if read_scores(folder, images)[0].get(name) != identity:
                prompts, values = [image["prompt"] for image in images], []
                starts = range(0, len(files), args.batch_size)
                for i in tqdm(starts, f"{name} of {folder}", unit="batch"):
                    pictures = [open_image(file) for file in files[i:i + args.batch_size]]
                    values += scorer(pictures, prompts[i:i + args.batch_size]).tolist()
                identities, rows = read_scores(folder, images)  # another scorer may have come by
                identities[name] = identity
                columns, stream = ["file", "sha256", "prompt", *identities], io.StringIO(newline="")
                writer = csv.DictWriter(stream, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(row | {name: repr(value)} for row, value in zip(rows, values))
                resume.write(folder / "scores.csv", stream.getvalue())
                who = {"csv": digest(stream.getvalue().encode()), "scorers": identities}
                resume.write(folder / "scores.json", json.dumps(who, indent=1))
            rows = read_scores(folder, images)[1]
            mean = np.mean([float(row[name]) for row in rows])
            lines.append([f"{name} of {folder}", f"{mean:.4f}", str(len(rows))])
    print(table(lines))


# Compare


def compare(args):
    """Compare scored folders of the same prompts: a table, a json file, and a page with the images."""
    folders, out = [Path(folder) for folder in args.folders], place_for(args.out)
    if out.suffix == ".json":
        fail(f"compare: --out {out} is for the page; the json file stands beside it")
    manifest, files = alike(folders)
    identities, rows = zip(*(read_scores(folder, unscored(manifest, some))
                             for folder, some in zip(folders, files)))
    for folder, others in zip(folders, identities):
        for name, identity in identities[0].items():
            if name in others and others[name] != identity:
                fail(f"{folder} was scored by another {name}: {others[name]}, not {identity}")
        if missing := set().union(*identities) - others.keys():
            fail(f"{folder} was not scored by {', '.join(sorted(missing))}, or its images changed since; run "
                 "`score` on it")
    if not identities[0]:
        fail(f"{folders[0]} has no scores of its images; run `score` on all folders first")
    prompts, results, by = [entry["prompt"] for entry in manifest["images"]], [], {}
    for name in identities[0]:
        by[name] = np.array([[float(row[name]) for row in some] for some in rows])     # [folders, N]
        for folder, own in zip(folders, by[name]):
            rate, wins, ties, losses = win_rate(own, by[name][0])
            outcome = (own > by[name][0]) + (own == by[name][0]) / 2
            results.append({"images": str(folder), "scorer": name, "n": len(own), "mean": own.mean(),
                            "mean_95": bootstrap(own, prompts), "median": np.median(own), "win_rate": rate,
                            "win_rate_95": bootstrap(outcome, prompts), "wins": wins, "ties": ties,
                            "losses": losses})
    summary = [{"": row["images"], "scorer": row["scorer"], "mean": f"{row['mean']:.4f}",
                "95%": "{:.4f} to {:.4f}".format(*row["mean_95"]), "median": f"{row['median']:.4f}",
                "win rate": f"{row['win_rate']:.1%}", "95% ": "{:.1%} to {:.1%}".format(*row["win_rate_95"]),
                "wins/ties/losses": "{wins}/{ties}/{losses}".format(**row), "n": str(row["n"])}
               for row in results]
    print(table([[*summary[0]], *([*row.values()] for row in summary)]))
    print(f"win rate: against {folders[0]}, a tie counts one half; 95%: bootstrap over the prompts")
    report = {"scorers": identities[0], "results": results}
    resume.write(out.with_suffix(".json"), json.dumps(report, indent=1))
    resume.write(out, page([*map(str, folders)], [*by], [
        {"index": k, "prompt": prompt, "images": [some[k] for some in files],
         "scores": {name: values[:, k].tolist() for name, values in by.items()}}
        for k, prompt in enumerate(prompts)], summary))


# Style


def inception(device):
    """FID's features, by torch-fidelity: a function from PIL pictures to [N, 2048]; None if not installed."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except Exception as error:
        fail(f"style: the network of FID cannot be loaded ({data.brief(error)}); give --no-fid")
    return lambda images: torch.cat([network(  # one by one, because a reference may hold any sizes
        torch.tensor(np.array(image)).permute(2, 0, 1)[None].to(device))[0].cpu() for image in images])


def style(args):
    """Measure alignment with a style: CMMD (and FID) to a reference, and the guards against a collapse.

    The reference is split at random in two: everything is held against its first half, and its second is the
    floor, what a perfect model would reach. All sets have one size N, the smallest there is.
    """
    device, folders = place(args)[0], [*args.folders, *([args.base] if args.base else [])]
    manifest, files = alike(folders)
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    found = sorted(file for file in Path(args.reference).glob("*") if file.suffix.lower() in kinds)
    n = min(len(found) // 2, len(files[0]))
    if n < 2:
        fail(f"--reference {args.reference} holds {len(found)} images, {folders[0]} {len(files[0])}; needed "
             "are 4 and 2")
    out = place_for(args.out) if args.out else None
    rng = np.random.default_rng(args.seed)
    found = [found[i] for i in rng.permutation(len(found))]
    chosen = sorted(rng.permutation(len(files[0]))[:n])  # not the first: lists of prompts are sorted by kind
    files = [[some[i] for i in chosen] for some in files]
    spec = args.clip or ("tiny" if manifest.get("toy") else "ViT-L-14-336-quickgelu:openai")
    clip, fid = data.Clip(spec, device), inception(device) if args.fid else None
    prompts, rows = [manifest["images"][i]["prompt"] for i in chosen], []
    text = torch.cat([clip.embed_texts(prompts[i:i + args.batch_size])
                      for i in range(0, n, args.batch_size)]).cpu()
    for name, some in [("reference", found[:n]), *zip(folders, files), ("floor", found[n:])]:
        embeddings, deep = [], []
        for i in tqdm(range(0, n, args.batch_size), f"embedding {name}", unit="batch"):
            images = [open_image(file) for file in some[i:min(i + args.batch_size, n)]]
            pixels = torch.stack([clip.transform(image) for image in images])           # [B, 3, h, w]
            embeddings.append(clip.embed_images(pixels).cpu())
            deep += [fid(images)] if fid else []
        x, deep = torch.cat(embeddings), torch.cat(deep) if fid else None
        if name == "reference":
            reference, deep_reference = x, deep
            continue
        value, interval = cmmd(x, reference, draws=1000, seed=args.seed)
        rows.append({
            "images": str(name), "base": name == args.base, "n": n, "cmmd": value, "cmmd_95": interval,
            "fid": frechet(deep, deep_reference) if fid else None, "diversity": diversity(x),
            "clip": None if name == "floor" else 100 * F.cosine_similarity(x, text).mean().item()})
    print(table([["", "CMMD", "95%", "FID", "CLIP score", "diversity", "N"]] + [
        [row["images"] + " (base)" * row["base"], f"{row['cmmd']:.3f}",
         "{:.3f} to {:.3f}".format(*row["cmmd_95"]), f"{row['fid']:.2f}" if fid else "-",
         f"{row['clip']:.2f}" if row["clip"] else "-", f"{row['diversity']:.4f}", str(n)] for row in rows]))
    print(f"lower CMMD and FID: nearer to {args.reference}; floor: its one half against the other. CLIP "
          f"score (to the prompt) and diversity fall where a model collapses. By {spec}"
          + (", FID by torch-fidelity" if fid else "; no FID: --no-fid, or torch-fidelity is not installed"))
    if out:
        report = {"clip": spec, "reference": args.reference, "rows": rows}
        resume.write(out, json.dumps(report, indent=1))


def main(argv=None):
    p = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = p.add_subparsers(dest="command", required=True)
    p.error = fail

    def shape(prog):
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=110)

    def command(function):
        words = function.__doc__
        sub = commands.add_parser(function.__name__, help=words.splitlines()[0], description=words,
                                  allow_abbrev=False, formatter_class=shape)
        sub.error = lambda message: fail(f"{function.__name__}: {message}")
        sub.set_defaults(function=function)
        if function is not compare:
            sub.add_argument("--device", help="cuda, mps or cpu [the best there is]")
            sub.add_argument("--batch_size", type=int, default=8, help="images at once [%(default)s]")
        return sub.add_argument

    add = command(generate)
    add("--model", default="tiny", help="tiny, sd15, sdxl, or a diffusers folder or hub id [%(default)s]")
    add("--lora", metavar="LORA", help="LoRA weights for it: a folder, file or hub id")
    add("--prompts", help="a txt, tsv, csv, json or jsonl file, ID or ID:SPLIT of the hub, or tiny")
    add("--out", metavar="DIR", required=True)
    add("--limit", type=int, metavar="N", help="the first N prompts alone")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=50, help="denoising steps [%(default)s]")
    add("--guidance", type=float, help="classifier-free guidance [7.5; SDXL 5.0; a toy model 3.0]")
    add("--scheduler", metavar="CLASS", help="a scheduler of diffusers [the model's own]")
    add("--resolution", type=int, help="side of the images, pixels [the model's own]")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="of UNet and text [bf16 on cuda, else fp32]")
    add = command(score)
    add("folders", nargs="+", metavar="DIR")
    add("--metrics", default="clip", metavar="A,B=SOURCE", help="of clip, pickscore, hpsv2, hpsv2.0, "
        "imagereward, aesthetic; SOURCE is a local file or folder, of clip ARCH:WEIGHTS [%(default)s]")
    add = command(compare)
    add("folders", nargs="+", metavar="DIR")
    add("--out", metavar="PAGE.html", default="report.html", help="and PAGE.json [%(default)s]")
    add = command(style)
    add("folders", nargs="+", metavar="DIR")
    add("--reference", metavar="DIR", required=True, help="images in the style that were not trained on")
    add("--base", metavar="DIR", help="images of the model before alignment")
    add("--clip", metavar="ARCH:WEIGHTS", help="[ViT-L-14-336-quickgelu:openai, CMMD's; for a toy tiny]")
    add("--fid", action=argparse.BooleanOptionalAction, default=True, help="if torch-fidelity is installed")
    add("--seed", type=int, default=0, help="of the split of the reference and of the bootstrap")
    add("--out", metavar="FILE.json", help="the table's numbers")
    args = p.parse_args(argv)
    if args.command == "generate":
        if not args.prompts and args.model != "tiny":
            fail("generate: --prompts is needed: a txt, tsv, csv, json or jsonl file, a hub id, or tiny")
        args.prompts = args.prompts or "tiny"
        for name in ("steps", "limit", "resolution"):
            if (value := getattr(args, name)) is not None and value < 1:
                fail(f"generate: --{name} must be at least 1, not {value}")
    elif data.torchrun()[2] > 1:
        fail(f"{args.command} takes one process; only generate runs under torchrun")
    if getattr(args, "batch_size", 1) < 1:
        fail(f"--batch_size must be at least 1, not {args.batch_size}")
    resume.end_with_launcher()
    args.function(args)


if __name__ == "__main__":
    main()
