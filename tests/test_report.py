"""What the comparison page promises: nothing but itself, prompts as text, the order a reader asks for."""

import base64
import io
import json
import re
import subprocess
import tempfile
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import page as report
from page import page
from small_runs import BROWSER

PROMPTS = [
    "</script><script>throw 1</script>",
    "\"a\" & 'b' <img src=x onerror=fail>",
    "дом у моря 海辺 🏠",
    "word " * 400,
]
# Of the second folder over the first, exact in binary, with ties.
GAINS = [0.0, 0.5, -0.25, 0.5, -0.25, 0.75, 0.0]
# Before the page's own script: errors are noted. After it: what a reader does, and the rows that then follow.
WATCH = """<script>const errors = []; onerror = (...error) => { errors.push(error.join()) }</script>"""
READ = """<script>
const seen = [...document.querySelectorAll("section")].map(row => +row.dataset.index), orders = [seen]
const choose = (id, option) => {
  const select = document.getElementById(id)
  select.focus(); select.click(); select.value = option
  for (const kind of ["input", "change"]) select.dispatchEvent(new Event(kind, { bubbles: true }))
  orders.push([...document.querySelectorAll("section")].map(row => +row.dataset.index))
}
onload = () => {
  for (const step of STEPS) choose(...step)
  const outline = img => getComputedStyle(img).outlineStyle
  const best = [...document.querySelectorAll("img")].map(img => outline(img) == "solid")
  const count = document.querySelector("#count").textContent
  const note = document.body.appendChild(document.createElement("pre"))
  note.textContent = JSON.stringify({ errors, orders, best, count })
  note.id = "note"
}
</script>"""


def rows_of(size):
    """Three folders: by pickscore the second gains GAINS on the first; by clip the third loses them."""
    noise, rows = np.random.default_rng(0), []
    for index, gain in enumerate(GAINS):
        images = [Image.fromarray(noise.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(3)]
        scores = {"pickscore": [21.0, 21 + gain, 20.5], "clip": [0.25, 0.25, 0.25 - gain]}
        prompt = PROMPTS[index % len(PROMPTS)]
        rows.append({"index": index, "prompt": prompt, "category": "", "images": images, "scores": scores})
    return rows


def page_of(rows, metrics=("pickscore", "clip"), names=("base", "<b>rpo</b>", "dpo")):
    """The page of rows that hold pictures: these are saved first, as a page is made of files."""
    with tempfile.TemporaryDirectory() as folder:
        on_disk = []
        for row in rows:
            files = [Path(folder, f"{row['index']}-{k}.png") for k in range(len(row["images"]))]
            for file, image in zip(files, row["images"]):
                image.save(file)
            on_disk.append(row | {"images": files})
        return page([*names], [*metrics], on_disk, [{"name": "<i>", "win rate": "0.43"}] if metrics else [])


class Parts(HTMLParser):
    """The tags of a page with their attributes, and the text of its paragraphs."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.prompts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "p":
            self.prompts.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside &= tag != "p"

    def handle_data(self, data):
        if self.inside:
            self.prompts[-1] += data


def test_page_holds_its_prompts_as_text_and_refers_to_nothing_outside():
    """A prompt is any stranger's text, and the page must open anywhere, for good."""
    text = page_of(rows_of((32, 24)))
    parts = Parts(text)
    assert [prompt.partition("\u2002")[2] for prompt in parts.prompts] == [PROMPTS[k % 4] for k in range(7)]
    names = {name for name, _ in parts.tags}
    assert not names & {"link", "iframe", "object", "base"}
    assert [name for name, _ in parts.tags].count("script") == 1
    without_images = re.sub(r"base64,[\w+/=]+", "", text)  # by chance these may hold any four letters
    assert not re.search(r"http|@import|url\(|://", without_images)
    for name, attributes in parts.tags:
        assert not any(key.startswith("on") or key == "href" for key in attributes)
        assert attributes.get("src", "data:").startswith("data:"), name
    assert "&lt;b&gt;rpo" in text and "<b>rpo" not in text and ">&lt;i&gt;</td>" in text


@pytest.mark.parametrize(
    "size, shown", [((32, 24), (256, 192)), ((128, 8), (256, 16)), ((900, 600), (512, 341))]
)
def test_images_decode_back_and_small_ones_exactly(size, shown):
    """The pictures of the embedded task are 32 pixels wide: any loss would be seen."""
    rows = rows_of(size)[:2]
    found = [attributes for tag, attributes in Parts(page_of(rows)).tags if tag == "img" and "src" in attributes]
    assert len(found) == 6
    for attributes, image in zip(found, rows[0]["images"] + rows[1]["images"]):
        bytes_ = base64.b64decode(attributes["src"].partition("base64,")[2], validate=True)
        decoded = Image.open(io.BytesIO(bytes_))
        assert (int(attributes["width"]), int(attributes["height"])) == shown
        if max(size) <= 128:
            assert decoded.format == "PNG" and np.array_equal(decoded, image)
        else:
            assert decoded.format == "JPEG" and decoded.size == size  # whole, for a click


def test_page_without_metrics_or_with_one_folder_has_no_controls():
    """Scores are optional; selects that cannot do anything would mislead."""
    bare = [row | {"scores": {}} for row in rows_of((8, 8))]
    single = [{**row, "images": row["images"][:1], "scores": {"clip": [0.5]}} for row in rows_of((8, 8))]
    for text in (page_of(bare, metrics=()), page_of(single, ["clip"], ["base"])):
        assert ("nav", {"hidden": None}) in Parts(text).tags
    assert ("nav", {}) in Parts(page_of(rows_of((8, 8)))).tags


def browse(folder, text, steps, *options, script=READ):
    """What the browser prints of the page after a reader's steps, pairs of a select's id and an option."""
    folder.mkdir()
    script = script.replace("STEPS", json.dumps(steps))
    (folder / "page.html").write_text(
        text.replace('<meta charset="utf-8">', '<meta charset="utf-8">' + WATCH) + script, encoding="utf-8"
    )
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--virtual-time-budget=2000", "--hide-scrollbars", "--window-size=1100,900", *options]
    command += [(folder / "page.html").as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_sorts_the_rows_without_errors(tmp_path):
    """Only a browser runs the script: orders by the chosen difference, ties by index, back to the prompts."""
    steps = [("order", "descending"), ("order", "ascending"), ("metric", "clip"), ("against", "2")]
    steps += [("order", "index"), ("order", "descending")]
    text = page_of(rows_of((32, 24))[::-1])
    dom = browse(tmp_path / "dom", text, steps, "--dump-dom")
    note = json.loads(re.search(r'<pre id="note">(.*?)</pre>', dom).group(1))
    falling, rising, by_index = [5, 1, 3, 0, 6, 2, 4], [2, 4, 0, 6, 1, 3, 5], [*range(7)]
    mirrored, rising_mirrored = [2, 4, 0, 6, 1, 3, 5], [5, 1, 3, 0, 6, 2, 4]
    assert note["errors"] == []
    # the second folder's clip equals the first's everywhere: all ties, so the order of the prompts
    assert note["orders"] == [by_index, falling, rising, by_index, rising_mirrored, by_index, mirrored]
    assert [int(index) for index in re.findall(r'data-index="(\d+)"', dom)] == mirrored
    assert note["count"] == "7 prompts: 2 better, 3 worse, 2 equal"
    # prompt 2, now first, is won by the third folder, prompt 0 by none, prompt 1 by the two that tie
    assert note["best"][:3] == [False, False, True]
    assert not any(note["best"][6:12])
    assert note["best"][12:15] == [True, True, False]


ACT = """<script>
const seen = () => [...document.querySelectorAll("section:not([hidden])")].map(row => +row.dataset.index)
const set = (id, value) => {
  const control = document.getElementById(id)
  if (control.type == "checkbox") control.checked = value; else control.value = value
  for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind, { bubbles: true }))
}
const press = (key, target = document.body) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }))
const dialog = document.querySelector("dialog"), note = {}
onload = () => {
  set("search", "WORD "); note.search = seen(); set("search", "")
  set("category", "b"); note.category = seen(); set("category", "")
  set("show", "losses"); note.losses = seen()
  set("against", "2"); set("show", "disagree"); note.disagree = seen()
  set("show", "all"); set("against", "1")
  const image = document.querySelector('section[data-index="3"] figure:nth-of-type(2) img')
  image.focus(); note.focused = document.activeElement == image
  press("Enter", image); note.open = dialog.open
  const large = () => dialog.querySelector("img").src
  const all = [...image.closest("section").querySelectorAll("img")].map(other => other.src)
  note.flips = [all.indexOf(large())]
  for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"]) { press(key); note.flips.push(all.indexOf(large())) }
  dialog.close()
  set("blind", true)
  note.blind = [seen(), document.querySelectorAll("section:not([hidden]) figure:not([hidden])").length]
  note.names = getComputedStyle(document.querySelector("#names")).display
  note.sides = []
  for (const key of ["1", "2", "0", "1", "1", "1", "1", "1"]) {
    const [row] = seen().map(index => document.querySelector(`section[data-index="${index}"]`))
    if (row) note.sides.push([...row.querySelectorAll("figure:not([hidden])")].map(figure => +figure.style.order))
    press(key)
  }
  note.votes = [...votes.values()]; note.rest = seen()
  set("against", "2"); note.second = seen()
  note.wide = [innerWidth, document.documentElement.scrollWidth]
  note.header = getComputedStyle(document.querySelector("header")).backgroundColor
  note.errors = errors
  const text = top.document.body.appendChild(document.createElement("pre"))
  text.id = "note"; text.textContent = JSON.stringify(note)
}
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width, dark", [
    (390, True), pytest.param(1100, False, marks=pytest.mark.slow), pytest.param(1100, True, marks=pytest.mark.slow)])
def test_a_browser_finds_enlarges_and_votes(tmp_path, width, dark):
    """By keys: filters, the flip between models, a blind vote whose sides are drawn and whose names are hidden.

    Chromium's windows have 500 pixels at least: the phone is a frame.
    """
    rows = [row | {"category": "ab"[row["index"] % 2]} for row in rows_of((160, 120))]
    names = ("base", "clip=ViT-L-14:/a/long/path/to/some/weights/and/more/of/it.pt", "dpo")
    options = ["--dump-dom", "--window-size=1100,900"] + ["--blink-settings=preferredColorScheme=0"] * dark
    text, script = page_of(rows, names=names), ACT
    if width < 500:
        head = '<meta charset="utf-8">'
        inside = escape(text.replace(head, head + WATCH) + ACT)
        text, script = f'{head}<iframe style="width:{width}px;height:800px;border:0" srcdoc="{inside}"></iframe>', ""
    dom = browse(tmp_path / "dom", text, [], *options, script=script)
    note = json.loads(re.search(r'<pre id="note">(.*?)</pre>', dom).group(1).replace("&amp;", "&"))
    assert note["errors"] == []
    assert note["search"] == [3] and note["category"] == [1, 3, 5]
    assert note["losses"] == [2, 4]  # by pickscore the second folder loses
    assert note["disagree"] == [2, 4]  # the third is lower by pickscore, and higher by clip where the gain is negative
    assert note["focused"] and note["open"] and note["flips"] == [1, 2, 0, 2]
    assert note["blind"] == [[0], 2] and note["names"] == "none"
    assert {tuple(sides) for sides in note["sides"]} == {(1, 2), (2, 1)}  # both come
    assert len(note["votes"]) == 7 and note["rest"] == [] and note["second"] == [0]  # another opponent, all rows again
    for (index, first, other, winner), sides, key in zip(note["votes"], note["sides"], "1201111"):
        left, right = (first, other) if sides == [1, 2] else (other, first)
        assert (first, other) == names[:2] and winner == {"1": left, "2": right, "0": ""}[key], index
    assert note["wide"][0] == width and note["wide"][1] <= width
    assert (note["header"] == "rgb(255, 255, 255)") != dark


def test_a_large_page_shows_the_images_where_they_lie(tmp_path, monkeypatch):
    """Above a limit nothing is copied; links are relative, and quoted; below it nothing is outside."""
    rows = rows_of((160, 120))[:2]
    (tmp_path / "a b").mkdir()
    for row in rows:
        for k, image in enumerate(row["images"]):
            image.save(tmp_path / "a b" / f"{row['index']}-{k}.png")
        row["images"] = [tmp_path / "a b" / f"{row['index']}-{k}.png" for k in range(3)]
    arguments = (["base", "rpo", "dpo"], ["clip"], rows, [])
    whole = page(*arguments, folder=tmp_path / "pages" if report.is_large(rows) else None)
    monkeypatch.setattr(report, "LARGE", 1000)
    assert report.is_large(rows)
    linked = [tags for tag, tags in Parts(page(*arguments, folder=tmp_path / "pages")).tags if "src" in tags]
    assert [tags["src"] for tags in linked] == [f"../a%20b/{i}-{k}.png" for i in (0, 1) for k in range(3)]
    assert all((tags["width"], tags["height"]) == ("160", "120") for tags in linked)
    assert "../" not in re.sub(r"base64,[\w+/=]+", "", whole)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_draws_the_sorted_page(tmp_path):
    """Text in the DOM proves no picture: the best row's image must be in sight, below the header."""
    rows = rows_of((320, 200))
    rows[5]["images"] = [Image.new("RGB", (320, 200), color) for color in ("#e02020", "#20e020", "#2020e0")]
    shot = tmp_path / "shot.png"
    browse(tmp_path / "shot", page_of(rows), [("order", "descending")], f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB"))[:450].reshape(-1, 3).astype(int)
    assert len(np.unique(pixels, axis=0)) > 50
    for color in ((224, 32, 32), (32, 224, 32), (32, 32, 224)):  # JPEG shifts a color a little
        assert (abs(pixels - color).max(1) < 12).sum() > 20_000
