"""Folders of images and their scores, read and checked; and what `evaluate.py compare` makes of them."""

import base64
import csv
import functools
import io
import json
import os
import string
import urllib.parse
from html import escape
from pathlib import Path

import numpy as np
import pandas
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm import tqdm

from common import InputError, atomic_write, brief, digest, is_hidden, write_csv
from data import as_text, read_image
from stats import FEW, adjust, compare_scores, rate_interval

NOTE = "diffusion-rpo"  # the key of the PNG text by which an image knows its prompt
LARGE = 30e6  # bytes of images; a page that would hold more shows them where they lie
UNREADABLE = "{} cannot be read: {}; if `generate` made it, remove it and give the same command again"


def read_json(file):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {brief(error)}")


def open_image(file):
    """An upright RGB picture of a file. InputError where it cannot be decoded."""
    try:  # bad bytes raise any error
        return read_image(file.read_bytes())
    except Exception as error:
        raise InputError(UNREADABLE.format(file, brief(error)))


def open_batches(files, batch_size, title):
    """The pictures of files, `batch_size` at a time, with a bar."""
    for start in tqdm(range(0, len(files), batch_size), title, unit="batch"):
        yield [open_image(file) for file in files[start:start + batch_size]]


def to_pil(images):
    """[N, 3, H, W] in [0, 1] -> N PIL pictures; InputError where one is not finite: it would be black."""
    if not images.isfinite().all():
        raise InputError("the model drew an image that is not finite; try --precision fp32")
    pixels = (images * 255).round().byte()
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in pixels]


def save_png(image, file, note=None):
    """A PNG, aside and then renamed, so that it is whole or not there. `note` is kept in it, as text."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(NOTE, json.dumps(note or {}))
    part = file.with_suffix(".part")
    image.save(part, "PNG", pnginfo=info)
    part.replace(file)


def read_note(file):
    """What `save_png` was given with an image; {} of one from elsewhere. Its pixels are not read."""
    try:
        with Image.open(file) as image:
            return json.loads(image.info.get(NOTE, "{}"))
    except Exception as error:
        raise InputError(UNREADABLE.format(file, brief(error)))


def writable_file(path):
    """The path of a file that will be written, its folder made now, not after the work."""
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {file} cannot be written: {brief(error)}")
    return file


class ImageFolder:
    """N images, their manifest and their scores. InputError unless every image is there and its own.

    files, prompts  N paths, N strings
    columns         N dicts {name: text} of what else stood beside a prompt in its file
    """

    def __init__(self, path):
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.exists():
            sets = [folder for folder in image_sets(path) if folder]
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
                raise InputError(f"the prompt of {entry['file']} in {self.path}/manifest.json is no text: "
                                 f"{entry['prompt']!r}")
        missing = [file.name for file in self.files if not file.exists()]
        if missing:
            raise InputError(f"{self.path} lacks {len(missing)} of {len(self.files)} images, the first is "
                             f"{missing[0]}; the same `generate` makes them")
        for file, entry in zip(self.files, entries):
            for key, value in read_note(file).items():
                if entry.get(key) != value:
                    raise InputError(f"{file} was made for the {key} {value!r}, not for {entry.get(key)!r} of the "
                                     "manifest")

    @functools.cached_property
    def unscored_rows(self):
        """What the rows of scores.csv say of their images. It reads every image, once."""
        return [{"file": file.name, "sha256": digest(file.read_bytes()), "prompt": prompt}
                for file, prompt in zip(self.files, self.prompts)]

    def read_scores(self):
        """({scorer: identity}, a row per image), a row with the scores of this very image and prompt, if any."""
        file, keys = self.path / "scores.json", ("file", "sha256", "prompt")
        content = read_json(file) if file.exists() else {"scorers": {}, "images": []}
        try:
            if "images" not in content:  # of the first edition, whose scores stand in scores.csv alone
                content["images"] = self.read_csv(content["scorers"], content["csv"])
            scored = {tuple(row[key] for key in keys): row for row in content["images"]}
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise InputError(f"{file} is damaged ({error!r:.100}); remove it, and `score` makes it anew")
        rows = [scored.get(tuple(row[key] for key in keys), row) for row in self.unscored_rows]
        return content["scorers"], rows

    def read_csv(self, scorers, expected):
        """The rows of scores.csv, if it has the digest that scores.json knows."""
        content = (self.path / "scores.csv").read_bytes()
        if digest(content) != expected:
            return []
        rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
        return [row | {name: float(row[name]) for name in scorers} for row in rows]

    def write_scores(self, column, identity, values):
        """Adds a scorer's scores {number of the image: score} to what is there by now: another may have come by.

        scores.json holds everything and is whole or not there; scores.csv is made of it.
        """
        identities, rows = self.read_scores()
        rows = [dict(row) for row in rows]
        if identities.get(column) != identity:
            for row in rows:
                row.pop(column, None)
        identities = identities | {column: identity}
        for i, value in values.items():
            rows[i][column] = value
        content = {"scorers": identities, "images": rows}
        atomic_write(self.path / "scores.json", json.dumps(content, indent=1, allow_nan=False))
        write_csv(self.path / "scores.csv", [*self.unscored_rows[0], *identities], rows)


def settings_of(manifest):
    """{name: value} of all that must be alike in two manifests for their images to be compared."""
    settings = dict(manifest.get("settings", {}))
    scheduler = settings.pop("scheduler", {})
    settings |= {f"the scheduler's {name}": value for name, value in scheduler.items()}
    for i, image in enumerate(manifest["images"]):
        settings[f"the prompt of image {i}"] = image.get("prompt")
        settings[f"the seed of image {i}"] = image.get("seed")
    return settings | {"the number of images": len(manifest["images"])}


def first_difference(one, other):
    """The first key of two dicts whose values differ, in words, or None."""
    for name in one | other:
        if one.get(name) != other.get(name):
            return f"{name} is {one.get(name)!r} in one and {other.get(name)!r} in the other"


def refuse_twice(folders):
    """InputError where a folder of images stands there twice."""
    places = [folder.path.resolve() for folder in folders]
    for folder, place in zip(folders, places):
        if places.count(place) > 1:
            raise InputError(f"{folder.path} is given twice; a folder is compared with others")


def comparable_folders(paths):
    """The `ImageFolder` of each path. InputError where prompts, seeds or settings differ."""
    folders = [ImageFolder(path) for path in paths]
    refuse_twice(folders)
    settings = settings_of(folders[0].manifest)
    for folder in folders[1:]:
        difference = first_difference(settings, settings_of(folder.manifest))
        if difference:
            raise InputError(f"{folders[0].path} and {folder.path} cannot be compared: {difference}")
    return folders


def scored_rows(folders, names=None):
    """({scorer: identity}, the rows of each folder) of folders that the same scorers have scored, else InputError.

    names  the scorers that are asked for; None: all that have scored any of the folders
    """
    identities, rows = zip(*[folder.read_scores() for folder in folders])
    names = set().union(*identities) if names is None else names
    for folder, scored_by, folder_rows in zip(folders, identities, rows):
        for name in names:
            identity = scored_by.get(name)
            if identity and identities[0].get(name, identity) != identity:
                raise InputError(f"{folder.path} was scored by another {name}: {identity}, not "
                                 f"{identities[0][name]}")
        missing = {name for name in names if not all(name in row for row in folder_rows)}
        if missing:
            raise InputError(f"{folder.path} was not scored by {', '.join(sorted(missing))}, or its images "
                             "changed since; run `score` on it")
    return identities[0], rows


def comparable_scores(folders):
    """({scorer: identity}, {scorer: [F, N] scores}) of F folders. InputError unless all have the same scorers."""
    identities, rows = scored_rows(folders)
    if not identities:
        raise InputError(f"{folders[0].path} has no scores of its images; run `score` on all folders first")
    scores = {}
    for name in identities:
        columns = [[float(row[name]) for row in folder_rows] for folder_rows in rows]
        scores[name] = np.array(columns)
    return identities, scores


def table(rows):
    """Rows of strings, aligned: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def image_sets(path):
    """{name: folder} of the sets of images in a folder, as `generate` makes of several --prompts; else {"": path}."""
    path = Path(path)
    found = [file.parent for file in sorted(path.glob("*/manifest.json"))]
    sets = {folder.name: folder for folder in found if not is_hidden(folder.name)}
    if (path / "manifest.json").exists() or not sets:
        return {"": path}
    return sets


def comparable_sets(paths):
    """{name of a set: [the `ImageFolder` of each path]}. InputError where the paths have different sets."""
    of_paths = [image_sets(path) for path in paths]
    for path, sets in zip(paths, of_paths):
        if sets.keys() != of_paths[0].keys():
            raise InputError(f"{paths[0]} holds the sets {', '.join(of_paths[0]) or '(none)'}, {path} "
                             f"{', '.join(sets) or '(none)'}; they are compared set by set")
    return {name: comparable_folders([sets[name] for sets in of_paths]) for name in of_paths[0]}


def summarize(results):
    """The rows of the table as dicts of strings; a folder's own row only where it is held against no other."""
    compared = {(row["set"], row["category"], row["scorer"], row["images"]) for row in results if row["against"]}
    summary = []
    for row in results:
        if row["against"] is None and (row["set"], row["category"], row["scorer"], row["images"]) in compared:
            continue
        cells = {"set": row["set"], "category": row["category"], "scorer": row["scorer"], "method": row["images"],
                 "against": row["against"] or "", "mean": f"{row['mean']:.4f}", "difference": "", "95%": "",
                 "win rate": "", "95% ": "", "wins/ties/losses": "", "p (Holm)": "", "prompts": str(row["n"])}
        if row["against"]:
            cells["difference"] = f"{row['difference']:+.4f}"
            cells["win rate"] = f"{row['win_rate']:.1%}"
            cells["wins/ties/losses"] = f"{row['wins']}/{row['ties']}/{row['losses']}"
            cells["95%"] = cells["95% "] = cells["p (Holm)"] = "-"
            if row["p"] is not None:
                cells["95%"] = "{:+.4f} to {:+.4f}".format(*row["difference_95"])
                cells["95% "] = "{:.1%} to {:.1%}".format(*row["win_rate_95"])
                cells["p (Holm)"] = f"{row['p_holm']:.2g}"
        summary.append(cells)
    empty = {name for name in ("set", "category") if not any(row[name] for row in summary)}
    return [{name: cell for name, cell in row.items() if name not in empty} for row in summary]


def caption_of(results, count):
    """What the table's columns are, in one paragraph."""
    comparisons = sum(bool(row["against"]) for row in results)
    words = "The unit is the prompt: scores of its images are averaged."
    if comparisons:
        words += (" Difference: the mean paired difference with its 95% t interval. Win rate: a tie is one half; "
                  "Wilson's 95% interval.")
    if count:
        words += f" p: exact sign tests without ties, by Holm over the {count} comparisons that have one."
    if count < comparisons:
        words += f" Of fewer than {FEW} prompts there is no interval and no p."
    return words


def write_tables(file, results, summary, caption):
    """Beside `file` the table as .md and .tex, its numbers as .csv."""
    names = [*summary[0]]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in summary:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row.values()) + " |")
    atomic_write(file.with_suffix(".md"), "\n".join([*lines, "", caption, ""]))

    frame = pandas.DataFrame(summary)
    tex = frame.to_latex(index=False, escape=True, caption=caption.replace("%", r"\%"))
    atomic_write(file.with_suffix(".tex"), tex)

    flat = []
    for row in results:
        row = dict(row)
        for name in ("difference_95", "win_rate_95"):
            row[f"{name}_low"], row[f"{name}_high"] = row.pop(name, None) or (None, None)
        flat.append(row)
    write_csv(file.with_suffix(".csv"), dict.fromkeys(name for row in flat for name in row), flat)


def categories_of(folders, column):
    """[N] what stands in a column beside each prompt, "" where nothing does. InputError where folders differ."""
    categories = []
    for i, of_folders in enumerate(zip(*(folder.columns for folder in folders))):
        values = {columns[column] for columns in of_folders if columns.get(column)}
        if len(values) > 1:
            raise InputError(f"the {column} of image {i} is {' and '.join(sorted(values))} in different folders")
        categories.append(min(values, default=""))
    return categories


def compare_sets(sets, names, pairs, column=None):
    """(numbers of all comparisons, {scorer: identity}, rows of the page) of {set: [F folders]}.

    names   of the folders, the same in all sets
    pairs   [(i, j)]: folder i is held against folder j
    column  of the prompts' file: the prompts of each of its values are compared by themselves, too
    """
    results, rows, all_identities, found = [], [], None, set()
    for set_name, folders in sets.items():
        identities, scores = comparable_scores(folders)
        all_identities = all_identities or identities
        if identities != all_identities:
            raise InputError(f"{folders[0].path} was not scored by the same scorers as the other sets; run `score` on "
                             "all of them with the same --metrics")
        prompts = folders[0].prompts
        categories = categories_of(folders, column) if column else [""] * len(prompts)
        found |= {*categories} - {""}
        parts = ["", *sorted({*categories} - {""})]
        if len({*categories}) == 1:  # of all prompts the same: nothing apart
            parts = [""]
        for part in parts:
            chosen = [i for i, category in enumerate(categories) if part in ("", category)]
            of_part = {scorer: values[:, chosen] for scorer, values in scores.items()}
            for result in compare_scores(names, of_part, [prompts[i] for i in chosen], pairs):
                results.append({"set": set_name, "category": part} | result)
        for i, prompt in enumerate(prompts):
            rows.append({
                "index": len(rows), "prompt": f"[{set_name}] {prompt}" if set_name else prompt,
                "category": categories[i], "images": [folder.files[i] for folder in folders],
                "scores": {scorer: values[:, i].tolist() for scorer, values in scores.items()}})
    if column and not found:
        columns = {name for folders in sets.values() for beside in folders[0].columns for name in beside}
        raise InputError(f"no prompt has a {column}; they have {', '.join(sorted(columns)) or 'no columns'}")
    return results, all_identities, rows


def count_votes(file, names, rows):
    """What people preferred, by a csv that the page exported: dicts of numbers, one for each two folders that met.

    names, rows  of the page that was voted on. InputError where the file is of another comparison.
    """
    try:
        votes = list(csv.DictReader(io.StringIO(Path(file).read_text(), newline="")))
        outcomes = {}
        for vote in votes:
            first, other, winner = vote["first"], vote["other"], vote["winner"]
            if {first, other} - {*names} or winner not in (first, other, ""):
                raise ValueError(f"a vote is of {first} and {other}, not of {', '.join(names)}")
            outcome = 0.5 if winner == "" else float(winner == other)
            outcomes.setdefault((other, first), []).append((outcome, rows[int(vote["index"])]["prompt"]))
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"--votes {file} cannot be read, or is of another page: {brief(error)}")
    counted = []
    for (other, first), of_pair in outcomes.items():
        values = [outcome for outcome, _ in of_pair]
        rate, low, high = rate_interval(values, [prompt for _, prompt in of_pair])
        counted.append({"images": other, "against": first, "n": len(values), "win_rate": rate,
                        "win_rate_95": (low, high), "wins": values.count(1), "ties": values.count(0.5),
                        "losses": values.count(0)})
    return counted


def save_grid(file, names, rows, side=256):
    """Rows of the page as one PNG for a paper: a column for each folder under its name, the prompts over the rows."""
    font = ImageFont.load_default(14)
    grid = Image.new("RGB", (side * len(names), 24 + (side + 24) * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for k, name in enumerate(names):
        draw.text((k * side + 4, 4), Path(name).name, "black", font)
    for place, row in enumerate(rows):
        top = 24 + place * (side + 24)
        draw.text((4, top + 4), row["prompt"], "black", font)
        for k, image in enumerate(row["images"]):
            picture = open_image(image)
            sampling = Image.NEAREST if max(picture.size) <= 128 else Image.LANCZOS
            grid.paste(ImageOps.contain(picture, (side, side), sampling), (k * side, top + 24))
    save_png(grid, file)


def write_report(file, sets, names, pairs, category=None, votes=None, chosen=()):
    """Prints the table of {set: folders}; writes `file`, the page, and beside it .json, .csv, .md and .tex.

    chosen  numbers of rows of the page, to be drawn as .png, too
    """
    results, identities, rows = compare_sets(sets, names, pairs, category)
    if any(not 0 <= number < len(rows) for number in chosen):
        raise InputError(f"--rows are numbers of the page, from 0 to {len(rows) - 1}")
    counted = count_votes(votes, names, rows) if votes else []
    caption = caption_of(results, adjust(results))
    summary = summarize(results)
    print(table([[*summary[0]], *([*row.values()] for row in summary)]))
    print(caption)
    for vote in counted:
        print("votes: {images} is better than {against} in {win_rate:.1%} ({low:.1%} to {high:.1%}) of {n}, "
              "{wins}/{ties}/{losses}".format(low=vote["win_rate_95"][0], high=vote["win_rate_95"][1], **vote))
    numbers = {"scorers": identities, "caption": caption, "results": results, "votes": counted}
    atomic_write(file.with_suffix(".json"), json.dumps(numbers, indent=1))
    write_tables(file, results, summary, caption)
    folder = file.parent if is_large(rows) else None
    atomic_write(file, page(names, list(identities), rows, summary, caption, folder))
    if chosen:
        save_grid(file.with_suffix(".png"), names, [rows[number] for number in chosen])
    if folder:
        print(f"{file} shows the images where they lie: it is to stay there, with them")


def style_table(rows):
    """The rows of `evaluate.py style`, aligned."""
    lines = [["", "CMMD", "95%", "as published", "FID", "Gram", "CLIP score", "diversity", "N"]]
    for row in rows:
        name = f"{row['images']} (base)" if row["base"] else row["images"]
        interval = "{:.3f} to {:.3f}".format(*row["cmmd_95"]) if row["cmmd_95"] else "-"
        published = f"{row['cmmd_published']:.3f}"
        fid = "-" if row["fid"] is None else f"{row['fid']:.2f}"
        gram = "-" if row["gram"] is None else f"{row['gram']:.4g}"
        clip = "-" if row["clip"] is None else f"{row['clip']:.2f}"
        cmmd, diversity = f"{row['cmmd']:.3f}", f"{row['diversity']:.4f}"
        lines.append([name, cmmd, interval, published, fid, gram, clip, diversity, str(row["n"])])
    return table(lines)


def page(names, metrics, rows, summary, caption="", folder=None):
    """A HTML page that compares folders of images made from the same prompts: page.html, filled in.

    It holds its images, as JPEGs of 1024 pixels at most, or links to them where these would be too much: see is_large.

    names    N folders; the first is the one that the others are held against
    metrics  names of scores, the higher the better; with none the page shows the images alone
    rows     {"index": number of the prompt, "prompt": str, "images": N pictures or paths,
             "scores": {metric: N finite floats}, "category": str, which may be missing}
    summary  rows of the table on top: dicts of strings, all with the same keys
    folder   where the page will lie, for links to the images; None: it holds them
    """
    template = string.Template(Path(__file__).with_name("page.html").read_text())
    summary_rows = [cells("th", row) for row in summary[:1]]
    summary_rows += [cells("td", row.values()) for row in summary]
    rows = sorted(rows, key=lambda row: row["index"])
    sections = [section(row, names, metrics, folder) for row in rows]
    options = [f'<option value="{k}">{escape(name)}' for k, name in enumerate(names) if k > 0]
    categories = sorted({row.get("category", "") for row in rows} - {""})
    has_controls = metrics and len(names) > 1
    return template.substitute(
        title=escape(" / ".join(names)), n=len(names), first=escape(names[0]),
        folders=json.dumps(names).replace("<", "\\u003c"), names=cells("b", names), metrics=cells("option", metrics),
        others="".join(options), categories=cells("option", categories), no_category="" if categories else "hidden",
        hidden="" if has_controls else "hidden", summary="<tr>".join(summary_rows), caption=escape(caption),
        open="open" if len(summary) <= 20 else "",
        rows="".join(sections))


def is_large(rows):
    """Whether the images of a page, at a quarter of a byte for a pixel, would take more than LARGE bytes."""
    pixels = 0
    for row in rows:
        for image in row["images"]:
            if not isinstance(image, Image.Image):
                with Image.open(image) as image:  # its header alone
                    pixels += image.width * image.height
    return pixels / 4 > LARGE


def cells(tag, values):
    return "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)


def section(row, names, metrics, folder):
    """The HTML of a prompt: its text, and a figure per folder."""
    figures = [figure(row, k, names[k], metrics, folder) for k in range(len(names))]
    scores, category = escape(json.dumps(row["scores"])), escape(row.get("category", ""))
    return (f'<section data-index="{row["index"]}" data-category="{category}" data-scores="{scores}"><div class="grid">'
            f'<p><i>{row["index"]}</i>&ensp;{escape(row["prompt"])}</p>{"".join(figures)}</div></section>\n')


def figure(row, k, name, metrics, folder):
    """The image of folder k with its scores; classes say by which metrics it is the best of its prompt."""
    classes, lines = [], []
    for m, metric in enumerate(metrics):
        scores = row["scores"][metric]
        gap = scores[k] - scores[0]
        is_best = scores[k] == max(scores) and scores[k] > min(scores)
        if is_best:
            classes.append(f"best{m}")
        color = "better" if gap > 0 else "worse" if gap < 0 else ""
        difference = f"{gap:+.4f}" if k > 0 else ""
        star = "★" if is_best else ""
        lines.append(f'<tr class="m{m}"><th>{escape(metric)}<td>{scores[k]:.4f}<td class="{color}">{difference}'
                     f"<td>{star}")
    return (f'<figure class="{" ".join(classes)}">{image_tag(row["images"][k], name, folder)}'
            f'<table>{"".join(lines)}</table></figure>')


def image_tag(image, name, folder=None):
    """A picture as the page shows it: enlarged up to 128 pixels, else at 320 at most, and whole when it is clicked.

    It lies in the page, up to 128 pixels exact, else as a JPEG of 1024 at most; or where it is, seen from `folder`.
    """
    if folder is None:
        image = image.convert("RGB") if isinstance(image, Image.Image) else open_image(Path(image))
        is_small = max(image.size) <= 128
        kind = "png" if is_small else "jpeg"
        image.thumbnail((1024, 1024))
        stream = io.BytesIO()
        image.save(stream, kind, quality=85)
        source, size = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}", image.size
    else:
        source = urllib.parse.quote(os.path.relpath(image, folder))
        with Image.open(image) as picture:
            size = picture.size
        is_small = max(size) <= 128
    scale = 256 // max(size) if is_small else min(1, 320 / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    return (f'<img class="{"small" if is_small else ""}" width="{width}" height="{height}" alt="{escape(name)}" '
            f'tabindex="0" loading="lazy" decoding="async" src="{source}">')
