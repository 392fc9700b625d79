"""Folders of images and their scores, read and checked; and what `evaluate.py compare` makes of them."""

import base64
import csv
import functools
import io
import json
import string
from html import escape
from pathlib import Path

import numpy as np
import pandas
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from common import InputError, atomic_write, brief, digest
from data import as_text, read_image
from stats import FEW, adjust, compare_scores

NOTE = "diffusion-rpo"  # the key of the PNG text by which an image knows its prompt
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
            raise InputError(f"{path} has no manifest.json, so nobody knows its prompts. `generate` writes one; "
                             'for images from elsewhere write {"images": [{"file": ..., "prompt": ...}, ...]}')
        self.manifest = read_json(file)
        try:
            entries = self.manifest["images"]
            self.files = [self.path / entry["file"] for entry in entries]
            self.prompts = [entry["prompt"] for entry in entries]
            self.columns = [entry.get("columns", {}) for entry in entries]
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
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, [*self.unscored_rows[0], *identities], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.path / "scores.csv", stream.getvalue())


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


def comparable_scores(folders):
    """({scorer: identity}, {scorer: [F, N] scores}) of F folders. InputError unless all have the same scorers."""
    identities, rows = zip(*[folder.read_scores() for folder in folders])
    every_name = set().union(*identities)
    for folder, scored_by, folder_rows in zip(folders, identities, rows):
        for name, identity in scored_by.items():
            if identities[0].get(name, identity) != identity:
                raise InputError(f"{folder.path} was scored by another {name}: {identity}, not "
                                 f"{identities[0][name]}")
        missing = {name for name in every_name if not all(name in row for row in folder_rows)}
        if missing:
            raise InputError(f"{folder.path} was not scored by {', '.join(sorted(missing))}, or its images "
                             "changed since; run `score` on it")
    if not every_name:
        raise InputError(f"{folders[0].path} has no scores of its images; run `score` on all folders first")
    scores = {}
    for name in identities[0]:
        columns = [[float(row[name]) for row in folder_rows] for folder_rows in rows]
        scores[name] = np.array(columns)
    return identities[0], scores


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
    sets = {file.parent.name: file.parent for file in sorted(path.glob("*/manifest.json"))}
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
        cells = {"set": row["set"], "category": row["category"], "scorer": row["scorer"], "": row["images"],
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
    is_few = any(row["against"] and row["p"] is None for row in results)
    few = f" Of fewer than {FEW} prompts there are counts alone." if is_few else ""
    return ("The unit is the prompt: scores of its images are averaged. Difference: the mean paired difference with "
            "its 95% t interval. Win rate: a tie is one half; Wilson's 95% interval. p: exact sign tests without "
            f"ties, by Holm over the {count} comparisons of this table.{few}")


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
            row[f"{name}_low"], row[f"{name}_high"] = row.pop(name, None) or ("", "")
        flat.append(row)
    atomic_write(file.with_suffix(".csv"), pandas.DataFrame(flat).to_csv(index=False, lineterminator="\n"))


def compare_sets(sets, names, pairs, category=None):
    """(numbers of all comparisons, {scorer: identity}, rows of the page) of {set: [F folders]}.

    names     of the folders, the same in all sets
    pairs     [(i, j)]: folder i is held against folder j
    category  a column of the prompts' file: each of its values is compared by itself, too
    """
    results, rows, all_identities = [], [], None
    for set_name, folders in sets.items():
        identities, scores = comparable_scores(folders)
        all_identities = all_identities or identities
        if identities != all_identities:
            raise InputError(f"{folders[0].path} was not scored by the same scorers as the other sets; run `score` on "
                             "all of them with the same --metrics")
        prompts = folders[0].prompts
        parts = {"": np.ones(len(prompts), dtype=bool)}
        if category:
            values = np.array([columns.get(category, "") for columns in folders[0].columns])
            if not any(values):
                raise InputError(f"the prompts of {folders[0].path} have no {category}; they have "
                                 f"{', '.join(sorted(set().union(*folders[0].columns))) or 'no columns'}")
            parts |= {value: values == value for value in sorted(set(values))}
        for value, chosen in parts.items():
            of_part = {scorer: values[:, chosen] for scorer, values in scores.items()}
            chosen_prompts = [prompt for prompt, is_chosen in zip(prompts, chosen) if is_chosen]
            for result in compare_scores(names, of_part, chosen_prompts, pairs):
                results.append({"set": set_name, "category": value} | result)
        for i, prompt in enumerate(prompts):
            row = {"index": len(rows), "prompt": f"[{set_name}] {prompt}" if set_name else prompt}
            row["images"] = [folder.files[i] for folder in folders]
            row["scores"] = {scorer: values[:, i].tolist() for scorer, values in scores.items()}
            rows.append(row)
    return results, all_identities, rows


def write_report(file, sets, names, pairs, category=None):
    """Prints the table of {set: folders}; writes `file`, the page, and beside it .json, .csv, .md and .tex."""
    results, identities, rows = compare_sets(sets, names, pairs, category)
    caption = caption_of(results, adjust(results))
    summary = summarize(results)
    print(table([[*summary[0]], *([*row.values()] for row in summary)]))
    print(caption)
    numbers = {"scorers": identities, "caption": caption, "results": results}
    atomic_write(file.with_suffix(".json"), json.dumps(numbers, indent=1))
    write_tables(file, results, summary, caption)
    atomic_write(file, page(names, list(identities), rows, summary))


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


PAGE = string.Template("""<!doctype html><html lang="en"><meta charset="utf-8"><title>$title</title><style>
:root { color-scheme: light dark; --faint: light-dark(#666, #999);
  --better: light-dark(#0067a8, #62b6ef); --worse: light-dark(#b84a00, #f09a4a) }
body { margin: 0 auto; padding: 1rem; max-width: max(60rem, $n * 21rem); min-width: calc($n * 12rem);
  font: 14px/1.45 system-ui, sans-serif }
header { position: sticky; top: 0; z-index: 1; background: Canvas }
nav { padding: .8rem 0 .4rem } nav > * { margin-right: 1.2rem }
.grid { display: grid; grid-template-columns: repeat($n, minmax(0, 20rem)); gap: .4rem 1rem;
  padding: .5rem 4px; overflow-wrap: anywhere }
header, section { border-bottom: 1px solid light-dark(#ddd, #383a3e) }
section { padding: .2rem 0 .6rem; content-visibility: auto; contain-intrinsic-size: auto 27rem }
p { grid-column: 1 / -1; margin: 0; max-height: 6.6em; overflow-y: auto }
figure { margin: 0 } img { max-width: 100%; height: auto } .small { image-rendering: pixelated }
table { border-spacing: 0; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: 0 1rem 0 0; text-align: left; font-weight: normal } th, figure, i { color: var(--faint) }
.better { color: var(--better) } .worse { color: var(--worse) }
</style><style id="chosen"></style><table>$summary</table>
<header><nav $hidden><label>Metric <select id="metric">$metrics</select></label>
<label>Difference of <select id="against">$others</select> to $first</label>
<label>Order <select id="order"><option value="index">by prompt
<option value="descending">largest first<option value="ascending">smallest first</select></label>
<span id="count"></span></nav><div class="grid">$names</div></header><main>$rows</main><script>
const rows = [...document.querySelectorAll("section")]
const [chosen, metric, against, order, count] = document.querySelectorAll("[id]")
function show() {
  const scores = rows.map(row => JSON.parse(row.dataset.scores)[metric.value])
  const gaps = scores.map(scores => scores[against.value] - scores[0])
  const sign = { index: 0, ascending: 1, descending: -1 }[order.value]
  const places = [...rows.keys()].sort((a, b) => sign * (gaps[a] - gaps[b]))  // stable
  document.querySelector("main").append(...places.map(k => rows[k]))
  count.textContent = rows.length + " prompts: " + gaps.filter(gap => gap > 0).length + " better, " +
    gaps.filter(gap => gap < 0).length + " worse, " + gaps.filter(gap => gap == 0).length + " equal"
  chosen.textContent = ".m" + metric.selectedIndex + " { color: CanvasText } .best" + metric.selectedIndex +
    " img { outline: 3px solid var(--better) }"
}
document.addEventListener("change", show)
if (metric.value && against.value) show()
</script></html>""")


def page(names, metrics, rows, summary):
    """A self-contained HTML page that compares folders of images made from the same prompts.

    names    N folders; the first is the one that the others are held against
    metrics  names of scores, the higher the better; with none the page shows the images alone
    rows     {"index": number of the prompt, "prompt": str, "images": N pictures or paths,
             "scores": {metric: N finite floats}}
    summary  rows of the table on top: dicts of strings, all with the same keys
    """
    summary_rows = [cells("th", row) for row in summary[:1]]
    summary_rows += [cells("td", row.values()) for row in summary]
    rows = sorted(rows, key=lambda row: row["index"])
    sections = [section(row, names, metrics) for row in rows]
    options = [f'<option value="{k}">{escape(name)}' for k, name in enumerate(names) if k > 0]
    has_controls = metrics and len(names) > 1
    return PAGE.substitute(
        title=escape(" / ".join(names)), n=len(names), first=escape(names[0]),
        names=cells("b", names), metrics=cells("option", metrics), others="".join(options),
        hidden="" if has_controls else "hidden", summary="<tr>".join(summary_rows), rows="".join(sections))


def cells(tag, values):
    return "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)


def section(row, names, metrics):
    """The HTML of a prompt: its text, and a figure per folder."""
    figures = [figure(row, k, names[k], metrics) for k in range(len(names))]
    scores = escape(json.dumps(row["scores"]))
    return (f'<section data-index="{row["index"]}" data-scores="{scores}"><div class="grid">'
            f'<p><i>{row["index"]}</i>&ensp;{escape(row["prompt"])}</p>{"".join(figures)}</div></section>\n')


def figure(row, k, name, metrics):
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
    return (f'<figure class="{" ".join(classes)}">{image_tag(row["images"][k], name)}'
            f'<table>{"".join(lines)}</table></figure>')


def image_tag(image, name):
    """The picture itself: up to 128 pixels exact, and shown enlarged, else as a JPEG of 320 at most."""
    image = image.convert("RGB") if isinstance(image, Image.Image) else open_image(Path(image))
    is_small = max(image.size) <= 128
    kind = "png" if is_small else "jpeg"
    image.thumbnail((320, 320))
    stream = io.BytesIO()
    image.save(stream, kind, quality=85)
    content = base64.b64encode(stream.getvalue()).decode()
    scale = 256 // max(image.size) if is_small else 1
    return (f'<img class="{"small" if is_small else ""}" width="{image.width * scale}" '
            f'height="{image.height * scale}" alt="{escape(name)}" loading="lazy" decoding="async" '
            f'src="data:image/{kind};base64,{content}">')
