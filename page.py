"""What `evaluate.py compare` writes: the tables, and a page with the differences, the images and a blind vote."""

import base64
import importlib
import io
import json
import math
import os
import urllib.parse
from pathlib import Path

import jinja2
from PIL import Image

from common import InputError, atomic_write
from report import CAPTION, SMALL, compare_sets, open_image, protocol, summarize, table, write_tables
from stats import adjust, count_votes

LARGE = 30e6  # bytes; a page whose images would take more links to their files


def write_report(file, sets, paths, names, pairs, category=None, votes=None, chosen=()):
    """Print the table; write the page `file`, the table beside it, and the `chosen` rows of the page as a picture."""
    results, identities, rows = compare_sets(sets, names, pairs, category)
    if any(not 0 <= number < len(rows) for number in chosen):
        raise InputError(f"--rows are numbers of the page, from 0 to {len(rows) - 1}")
    counted = count_votes(votes, names, paths, rows) if votes else []
    caption = f"{protocol(sets, identities)} {CAPTION.format(adjust(results))}"
    summary = summarize(results)
    print(table(summary))
    for name, path in zip(names, paths):
        print(f"{name}: {path}")
    print(caption)
    for vote in counted:
        print("votes: {images} is better than {against} in {win_rate:.1%} ({win_rate_95[0]:.1%} to "
              "{win_rate_95[1]:.1%}) of {n}, {wins}/{ties}/{losses}".format(**vote))
    numbers = {"folders": dict(zip(names, paths)), "scorers": identities, "caption": caption, "results": results,
               "votes": counted}
    atomic_write(file.with_suffix(".json"), json.dumps(numbers, indent=1))
    write_tables(file, results, summary, caption)
    folder = file.parent if is_large(rows) else None
    atomic_write(file, page(names, list(identities), rows, summary, caption, folder, results, paths))
    if chosen:
        importlib.import_module("extras.rows").save_rows(file.with_suffix(".png"), names, [rows[i] for i in chosen])
    if folder:
        print(f"{file} links to the images where they are now; do not move it or them")


def page(names, metrics, rows, summary, caption="", folder=None, results=(), paths=None):
    """The HTML page that compares folders of images made from the same prompts: the template page.html, filled in.

    names    N folders; differences are to the first
    metrics  names of scores, higher is better; without any the page shows the images alone
    rows     [{"index": number of the prompt, "prompt": str, "category": str, "images": N files,
             "scores": {metric: N floats}}]
    summary  rows of the table at the top, dicts of strings with the same keys
    folder   where the page will be, if it is to link to the images; None: the page contains them
    results  the numbers of all comparisons, for the drawing of differences
    paths    N texts that the blind vote's csv names the folders by [the names]
    """
    rows = [row | {"images": [shown_image(file, folder) for file in row["images"]]}
            for row in sorted(rows, key=lambda row: row["index"])]
    categories = sorted({row["category"] for row in rows} - {""})
    drawings = interval_drawings(results)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template).render(
        names=names, metrics=metrics, rows=rows, summary=summary, caption=caption, categories=categories,
        paths=paths or names, drawings=drawings, **heading(names, metrics, rows, drawings))


def heading(names, metrics, rows, drawings):
    """{title, lead}: the page's title, and one sentence on what is compared."""
    first, *others = names
    title = f"{listed(others)} against {first}" if others else first
    lead = f"Images of {len({row['prompt'] for row in rows})} prompts by {listed(names)}"
    if metrics and others:
        lead += f", scored by {listed(metrics)}"
    if drawings:
        lead += ". Shown are paired differences with their 95% intervals"
    return {"title": title, "lead": f"{lead}."}


def listed(words):
    """"a", "a and b", "a, b and c"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def interval_drawings(results):
    """The differences over all prompts with their intervals, as the page draws them: a list, one for each set and scorer.

    returns  [{"title", "zero", "lines": [{"label", "low", "mean", "high", "text"}]}], positions in percent of a width
             that all lines of a drawing share
    """
    drawings = {}
    for row in results:
        if row["against"] and not row["category"] and row.get("difference_95"):
            title = " on ".join(filter(None, (row["scorer"], row["set"])))
            drawings.setdefault(title, []).append(row)
    drawn = []
    for title, rows in drawings.items():
        ends = [end for row in rows for end in row["difference_95"]] + [0]
        left, width = min(ends), (max(ends) - min(ends)) or 1

        def place(value):
            return 3 + 94 * (value - left) / width

        lines = []
        for row in rows:
            low, high = row["difference_95"]
            lines.append({"label": f"{row['images']} − {row['against']}", "low": place(low), "high": place(high),
                          "mean": place(row["difference"]), "is_better": low > 0, "is_worse": high < 0,
                          "text": f"{row['difference']:+.3g} [{low:+.3g}, {high:+.3g}]"})
        drawn.append({"title": title, "zero": place(0), "lines": lines})
    return drawn


def shown_image(file, folder):
    """{source, width, height, is_small} of an image of the page. Small ones are enlarged, others fit 512 pixels.

    The source is a link from `folder`; or, without one, the image itself: exact if small, else a JPEG that fits 1024.
    """
    if folder is None:
        image = open_image(file)
        kind = "png" if max(image.size) <= SMALL else "jpeg"
        image.thumbnail((1024, 1024))
        stream, size = io.BytesIO(), image.size
        image.save(stream, kind, quality=85)
        source = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
    else:
        source, size = urllib.parse.quote(os.path.relpath(file, folder)), image_size(file)
    is_small = max(size) <= SMALL
    scale = 256 // max(size) if is_small else min(1, 512 / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    return {"source": source, "width": width, "height": height, "is_small": is_small}


def image_size(file):
    """(width, height) of an image file."""
    with Image.open(file) as image:  # only the header is read
        return image.size


def is_large(rows):
    """Whether the images of a page would take more than LARGE bytes. A JPEG takes about a quarter byte per pixel."""
    return sum(math.prod(image_size(file)) for row in rows for file in row["images"]) / 4 > LARGE
