"""Folders of images and their scores, and the tables that `evaluate.py compare` makes from them."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pandas
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from common import InputError, as_text, atomic_write, brief, digest, is_hidden, write_csv
from pictures import read_image
from stats import FEW, categories_of, compare_scores

NOTE = "diffusion-rpo"  # the PNG text field in which an image carries its index, prompt and seed
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SMALL = 128  # pixels; smaller images are shown exactly and enlarged

# Images


def read_json(file):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {brief(error)}")


def read_picture(file, read):
    """`read(file)`. InputError if the file cannot be decoded: damaged bytes raise errors of any type."""
    try:
        return read(file)
    except Exception as error:
        raise InputError(f"{file} cannot be read: {brief(error)}; if `generate` made it, remove it and give the same "
                         "command again")


def open_image(file):
    """The upright RGB picture of a file."""
    return read_picture(file, lambda file: read_image(file.read_bytes()))


def open_batches(files, batch_size, title):
    """Yield the pictures of the files, `batch_size` at a time, under a progress bar."""
    for start in tqdm(range(0, len(files), batch_size), title, unit="batch"):
        yield [open_image(file) for file in files[start:start + batch_size]]


def to_pil(images):
    """[N, 3, H, W] in [0, 1] -> N PIL pictures. InputError if a value is not finite: the picture would be black."""
    if not images.isfinite().all():
        raise InputError("the model drew an image that is not finite; try --precision fp32")
    pixels = (images * 255).round().byte()
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in pixels]


def save_png(image, file, note=None):
    """Write a PNG, whole or not at all, with a dict `note` in its text field NOTE."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(NOTE, json.dumps(note or {}))
    part = file.with_suffix(".part")
    image.save(part, "PNG", pnginfo=info)
    part.replace(file)


def read_note(file):
    """The `note` of `save_png`, {} for images from elsewhere. Pixels are not decoded."""
    with Image.open(file) as image:
        return json.loads(image.info.get(NOTE, "{}"))


def writable_file(path):
    """A path to write to after long work. Its folder is made now, so that a wrong path fails before the work."""
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {file} cannot be written: {brief(error)}")
    return file


# Folders of images


class ImageFolder:
    """A folder of N images with a manifest.json and, once scored, a scores.json.

    manifest        the content of manifest.json
    files, prompts  N paths, N strings
    columns         N dicts {column: text}: what the prompts' file says beside each prompt
    raises          InputError if an image is missing or was made for another prompt
    """

    def __init__(self, path):
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.exists():
            sets = [name for name in image_sets(path) if name]
            if sets:
                raise InputError(f"{path} holds sets of images; give one of them: {', '.join(sets)}")
            raise InputError(f"{path} has no manifest.json, so nobody knows its prompts. `generate` writes one; "
                             'for images from elsewhere write {"images": [{"file": ..., "prompt": ...}, ...]}')
        self.manifest = read_json(file)
        try:
            entries = self.manifest["images"]
            self.files = [self.path / entry["file"] for entry in entries]
            self.prompts = [entry["prompt"] for entry in entries]
            self.columns = [entry.get("columns") or {} for entry in entries]
        except (KeyError, TypeError) as error:
            raise InputError(f"{file} is not a manifest: {error!r}")
        if not entries:
            raise InputError(f"{file} is not a manifest: it has no images")
        self.check_images(entries)

    def check_images(self, entries):
        for entry in entries:
            if as_text(entry["prompt"]) is None:
                raise InputError(f"the prompt of {entry['file']} in {self.path}/manifest.json is no text")
        missing = [file.name for file in self.files if not file.exists()]
        if missing:
            raise InputError(f"{self.path} lacks {len(missing)} of {len(self.files)} images, the first is "
                             f"{missing[0]}; the same `generate` command makes them")
        for file, entry in zip(self.files, entries):
            for key, value in read_picture(file, read_note).items():
                if entry.get(key) != value:
                    raise InputError(f"{file} was made for the {key} {value!r}, not for {entry.get(key)!r} of the "
                                     "manifest")

    @functools.cached_property
    def unscored_rows(self):
        """N rows of scores.csv without scores. The digests need every image's bytes, so they are computed once."""
        return [{"file": file.name, "sha256": digest(file.read_bytes()), "prompt": prompt}
                for file, prompt in zip(self.files, self.prompts)]

    def read_scores(self):
        """({scorer: identity}, N rows {file, sha256, prompt, scorer: score}); no scores if image or prompt changed."""
        file, keys = self.path / "scores.json", ("file", "sha256", "prompt")
        content = read_json(file) if file.exists() else {"scorers": {}, "images": []}
        try:
            identities = content["scorers"]
            scored = {tuple(row[key] for key in keys): row for row in content["images"]}
        except (KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged ({error!r:.100}); remove it, and `score` makes it anew")
        return identities, [scored.get(tuple(row.values()), row) for row in self.unscored_rows]

    def write_scores(self, column, identity, values):
        """Add one scorer's scores {image number: score} to scores.json and scores.csv, each written whole."""
        identities, rows = self.read_scores()  # again: another process may have added scores by now
        is_same_scorer = identities.get(column) == identity
        identities[column] = identity
        kept = [{name: value for name, value in row.items() if name != column or is_same_scorer} for row in rows]
        for i, value in values.items():
            kept[i][column] = value
        content = {"scorers": identities, "images": kept}
        atomic_write(self.path / "scores.json", json.dumps(content, indent=1, allow_nan=False))
        write_csv(self.path / "scores.csv", [*self.unscored_rows[0], *identities], kept)


def image_sets(path):
    """{name: folder} of the sets in a folder that `generate` made from several --prompts; else {"": path}."""
    path = Path(path)
    found = [file.parent for file in sorted(path.glob("*/manifest.json"))]
    sets = {folder.name: folder for folder in found if not is_hidden(folder.name)}
    if (path / "manifest.json").exists() or not sets:
        return {"": path}
    return sets


def image_files(folder):
    """The pictures in a folder, sorted by name, without hidden files."""
    return sorted(file for file in Path(folder).glob("*")
                  if file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(file.name))


def open_folders(paths):
    """The `ImageFolder` of each path, or of each set of prompts in it."""
    return [ImageFolder(folder) for path in paths for folder in image_sets(path).values()]


def settings_of(manifest):
    """{name: value} of all that must be equal in two manifests before their images may be compared."""
    settings = dict(manifest.get("settings", {}))
    scheduler = settings.pop("scheduler", {})
    settings |= {f"the scheduler's {name}": value for name, value in scheduler.items()}
    for i, image in enumerate(manifest["images"]):
        settings[f"the prompt of image {i}"] = image.get("prompt")
        settings[f"the seed of image {i}"] = image.get("seed")
    return settings | {"the number of images": len(manifest["images"])}


def first_difference(one, other):
    """A sentence on the first key whose values differ in two dicts, or None."""
    for name in one | other:
        if one.get(name) != other.get(name):
            return f"{name} is {one.get(name)!r} in one and {other.get(name)!r} in the other"


def refuse_twice(folders):
    """InputError if a folder, by whatever path, is there twice."""
    places = [folder.path.resolve() for folder in folders]
    for folder, place in zip(folders, places):
        if places.count(place) > 1:
            raise InputError(f"{folder.path} is given twice; a folder is compared with others")


def comparable_folders(paths):
    """The `ImageFolder` of each path. InputError if prompts, seeds or settings differ."""
    folders = [ImageFolder(path) for path in paths]
    refuse_twice(folders)
    settings = settings_of(folders[0].manifest)
    for folder in folders[1:]:
        difference = first_difference(settings, settings_of(folder.manifest))
        if difference:
            raise InputError(f"{folders[0].path} and {folder.path} cannot be compared: {difference}")
    return folders


def comparable_sets(paths):
    """{set: the `ImageFolder` of each path}. InputError if the paths hold different sets."""
    sets_of_paths = [image_sets(path) for path in paths]
    for path, sets in zip(paths, sets_of_paths):
        if sets.keys() != sets_of_paths[0].keys():
            raise InputError(f"{paths[0]} holds the sets {', '.join(sets_of_paths[0]) or '(none)'}, {path} "
                             f"{', '.join(sets) or '(none)'}; they are compared set by set")
    return {name: comparable_folders([sets[name] for sets in sets_of_paths]) for name in sets_of_paths[0]}


def short_names(paths):
    """A name for each path: the parts that tell the paths apart. N distinct strings."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for end in (0, -1):  # first the common beginning goes, then the common end
        while len(parts) > 1 and min(map(len, parts)) > 1 and len({of_path[end] for of_path in parts}) == 1:
            parts = [of_path[1:] if end == 0 else of_path[:-1] for of_path in parts]
    if len(parts) == 1:
        parts = [parts[0][-1:]]
    return ["/".join(of_path) for of_path in parts]


def protocol(sets, identities):
    """What a paper must say of a comparison: how images were drawn, the prompts, the scorers with their weights."""
    text = ""
    for name, folders in sets.items():
        manifest = folders[0].manifest
        settings, source = manifest.get("settings", {}), manifest.get("prompts", {}).get("source")
        text += f"{name}: " if name else ""
        if {"steps", "scheduler", "guidance", "resolution", "precision", "seed"} <= settings.keys():
            text += ("{steps} steps of {scheduler[class]}, guidance {guidance:g}, {resolution} px, {precision}, seed {seed}; "
                     .format(**settings))
        cut = max(len(folder.manifest.get("prompts", {}).get("cut", [])) for folder in folders)
        text += f"{len(set(folders[0].prompts))} prompts{f' of {Path(source).name}' if source else ''}, {cut} cut. "
    scorers = []
    for name, identity in identities.items():
        words = [identity.get("source"), f"digest {identity.get('digest')}", identity.get("note")]
        scorers.append(f"{name} ({', '.join(filter(None, words))})")
    return f"{text}Scorers: {', '.join(scorers)}."


def comparable_scores(folders, scorers=None):
    """({scorer: identity}, {scorer: {folder: [N] scores of its images}}).

    scorers  the names that are needed; None means all that have scored any of the folders
    raises   InputError if an image has no score, or two folders were scored by different weights of one name
    """
    known = [folder.read_scores() for folder in folders]
    scorers = scorers or list(dict.fromkeys(name for identities, _ in known for name in identities))
    if not scorers:
        raise InputError(f"{folders[0].path} has no scores of its images; run `score` on all folders first")
    expected, scores = known[0][0], {name: {} for name in scorers}
    for folder, (identities, rows) in zip(folders, known):
        missing = [name for name in scorers if not all(name in row for row in rows)]
        if missing:
            raise InputError(f"{folder.path} was not scored by {', '.join(missing)}, or its images changed since; run "
                             "`score` on it")
        for name in scorers:
            if identities[name] != expected[name]:
                raise InputError(f"{folder.path} was scored by another {name}: {identities[name]}, not "
                                 f"{expected[name]}")
            scores[name][folder] = np.array([row[name] for row in rows], dtype=float)
    return {name: expected[name] for name in scorers}, scores


# Tables

# {heading: how the cell is written from the numbers of a row}
COMPARISON = {
    "set": "{set}", "category": "{category}", "scorer": "{scorer}", "method": "{images}", "against": "{against}",
    "mean": "{mean:.4f}", "difference": "{difference:+.4f}",
    "difference 95%": "{difference_95[0]:+.4f} to {difference_95[1]:+.4f}",
    "win rate": "{win_rate:.1%}", "win rate 95%": "{win_rate_95[0]:.1%} to {win_rate_95[1]:.1%}",
    "wins/ties/losses": "{wins}/{ties}/{losses}", "p (Holm)": "{p_holm:.2g}", "prompts": "{n}"}
CAPTION = (f"The unit is the prompt: scores of its images are averaged first. Difference: the mean paired difference, "
           f"with its 95% t interval. Win rate: a tie counts one half; with Wilson's 95% interval. p: exact sign tests "
           f"without ties, Holm-corrected over the {{}} comparisons of {FEW} prompts or more. With fewer than {FEW} "
           f"prompts there is no interval and no p.")

TEX = str.maketrans({"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
                    | {letter: f"\\{letter}" for letter in "&%$#_{}"})


def cells_of(numbers, templates):
    """{heading: text} of a row. A cell is empty if a number is missing, and "-" if it is None."""
    cells = {}
    for heading, template in templates.items():
        try:
            cells[heading] = template.format(**numbers)
        except KeyError:
            cells[heading] = ""
        except TypeError:  # None has no digits
            cells[heading] = "-"
    return cells


def table(rows):
    """Dicts of strings, all with the same keys, as aligned lines: the first column to the left."""
    first, *_ = rows[0]
    frame = pandas.DataFrame(rows).set_index(first)
    return frame.rename_axis(index=None, columns=first).to_string()


def summarize(results):
    """The table as dicts of strings: all comparisons, and the means of folders that are compared with no other."""
    compared = {row["images"] for row in results if row["against"]}
    chosen = [row | {"against": row["against"] or ""} for row in results
              if row["against"] or row["images"] not in compared]
    empty = {name for name in ("set", "category") if not any(row[name] for row in chosen)}
    return [cells_of(row, {name: COMPARISON[name] for name in COMPARISON if name not in empty}) for row in chosen]


def write_tables(file, results, summary, caption):
    """Write the table beside `file` as .md and .tex, and its numbers as .csv."""
    lines = [[*summary[0]], ["---"] * len(summary[0])]
    lines += [[cell.replace("|", "\\|") for cell in row.values()] for row in summary]
    markdown = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    atomic_write(file.with_suffix(".md"), f"{markdown}\n{caption}\n")

    frame = pandas.DataFrame(summary)
    tex = frame.to_latex(index=False, escape=True, caption=caption.translate(TEX))
    atomic_write(file.with_suffix(".tex"), tex)

    flat = []
    for row in results:
        row = dict(row)
        for name in ("difference_95", "win_rate_95"):
            row[f"{name}_low"], row[f"{name}_high"] = row.pop(name, None) or (None, None)
        flat.append(row)
    write_csv(file.with_suffix(".csv"), dict.fromkeys(name for row in flat for name in row), flat)


# The comparison


def compare_sets(sets, names, pairs, column=None):
    """Compare F folders of images on each set of prompts, and on each category of a set.

    sets, names  {set: F folders}, and the names of the F folders
    pairs        [(i, j)]: folder i is compared with folder j
    column       the column of the prompts' file that holds the categories
    returns      (results, the numbers of all comparisons; {scorer: identity}; rows of the page)
    """
    identities, scores = comparable_scores([folder for folders in sets.values() for folder in folders])
    results, page_rows = [], []
    for set_name, folders in sets.items():
        prompts, categories = folders[0].prompts, categories_of(folders, column)
        of_set = {scorer: np.array([values[folder] for folder in folders]) for scorer, values in scores.items()}
        parts = sorted({"", *categories}) if len({*categories}) > 1 else [""]  # "" stands for all prompts
        for part in parts:
            chosen = [i for i, category in enumerate(categories) if part in ("", category)]
            of_part = {scorer: values[:, chosen] for scorer, values in of_set.items()}
            for result in compare_scores(names, of_part, [prompts[i] for i in chosen], pairs):
                results.append({"set": set_name, "category": part} | result)
        for i, prompt in enumerate(prompts):
            page_rows.append({
                "index": len(page_rows), "prompt": f"[{set_name}] {prompt}" if set_name else prompt,
                "category": categories[i], "images": [folder.files[i] for folder in folders],
                "scores": {scorer: values[:, i].tolist() for scorer, values in of_set.items()}})
    if column and not any(row["category"] for row in page_rows):
        columns = {name for folders in sets.values() for beside in folders[0].columns for name in beside}
        raise InputError(f"no prompt has a {column}; they have {', '.join(sorted(columns)) or 'no columns'}")
    return results, identities, page_rows
