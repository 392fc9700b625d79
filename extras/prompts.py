"""Lists of prompts: files in the forms that people publish, and data sets of the hub."""

import csv
import importlib
import io
import json
import os
import urllib.request
from pathlib import Path

from common import InputError, as_text, atomic_write, brief, cache_folder, hub_id, read_text

COLUMNS = ("prompt", "prompts", "caption", "text")  # the first of these that a row has holds its prompt
GITHUB = "https://raw.githubusercontent.com"
HPDV2 = "https://huggingface.co/datasets/zhwang/HPDv2/resolve/main/benchmark"
NAMED = {  # sets that people report on: their published files, or ID:SPLIT on the hub
    "parti": [f"{GITHUB}/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/PartiPrompts.tsv"],
    "hpdv2": [f"{HPDV2}/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")],
    "drawbench": ["sayakpaul/drawbench:train"],
    "pickapic_test": [f"{GITHUB}/AIDC-AI/Diffusion-SDPO/1c83c650fccbe7c1262e0b098401490162c7348d/prompts/papv2.json"],
    "dpg": [f"{GITHUB}/TencentQQGYLab/ELLA/3c228f1dc6c4d3cad0a47493816151a419f14db3/dpg_bench/dpg_bench.csv"],
}


def read_prompts(source):
    """The prompts of a source, a list of strings; see `read_prompt_rows`."""
    prompts, _ = read_prompt_rows(source)
    return prompts


def read_prompt_rows(source):
    """Read prompts, and what else the rows of their table say.

    source   a txt, tsv, csv, json or jsonl file, a name in NAMED, a dataset of the hub as ID or ID:SPLIT, or "tiny"
    returns  N prompts, and N dicts {column: text} of the other columns with text or numbers
    raises   InputError if the source cannot be read or a row has no prompt
    """
    path = Path(source)
    if source == "tiny":
        path = importlib.import_module("extras.tiny").part("pairs") / "prompts.txt"
    try:
        if source in NAMED and not path.is_file():
            rows = read_named(source)
        else:
            rows = read_prompt_file(path) if path.exists() else read_hub_prompts(source)
    except Exception as error:  # many libraries read here, each with its own errors
        way_out = f". Get {' and '.join(NAMED[source])} elsewhere and pass the file" if source in NAMED else ""
        raise InputError(f"--prompts {source} cannot be read: {brief(error)}{way_out}")
    prompts, columns = [], []
    for number, row in enumerate(rows, 1):
        prompt, others = split_row(row)
        if not prompt:
            raise InputError(f"--prompts {source}: row {number} has no prompt. A prompt is a text that is not empty, "
                             f"alone or in the column {', '.join(COLUMNS)}; it is not {str(row)[:80]!a}")
        prompts.append(prompt)
        columns.append(others)
    if not prompts:
        raise InputError(f"--prompts {source} holds no prompt")
    return prompts, columns


def split_row(row):
    """(prompt, {column: text} of the other columns) of a row: a string or a dict. The prompt is "" if it has none."""
    columns = dict(row) if isinstance(row, dict) else {"prompt": row}
    names = {str(name).lower(): name for name in columns}
    name_of_prompt = next((names[name] for name in COLUMNS if name in names), None)
    prompt = as_text(columns.pop(name_of_prompt, None)) or ""
    others = {}
    for name, value in columns.items():
        if isinstance(value, (str, int, float)) and as_text(str(value)) is not None:
            others[str(name)] = " ".join(str(value).split())
    return prompt.strip(), others


def read_prompt_file(path):
    """The rows of a file, strings or dicts. ValueError if the format is unknown or a row was cut."""
    text = read_text(path)
    suffix = path.suffix.lower()
    lines = [line for line in text.split("\n") if line.strip()]
    if suffix == ".txt":
        return lines
    if suffix == ".jsonl":
        return [json.loads(line) for line in lines]
    if suffix == ".json":
        rows = json.loads(text)
        if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):  # MJHQ-30K: {id: row}
            rows = [*rows.values()]
        if not isinstance(rows, list):
            raise ValueError("the JSON is neither a list nor {id: {\"prompt\": ...}, ...}")
        return rows
    stream = io.StringIO(text, newline="")
    if suffix == ".csv":
        return read_table(csv.DictReader(stream, strict=True), is_quoted=True)
    if suffix == ".tsv":  # PartiPrompts' format, in which quotes belong to the prompt
        return read_table(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE), is_quoted=False)
    raise ValueError("the suffix must be txt, tsv, csv, json or jsonl")


def read_table(reader, is_quoted):
    """The rows of a csv.DictReader. ValueError if the header or the number of fields suggests that a prompt was cut."""
    reader.fieldnames = [str(name).strip() for name in reader.fieldnames or []]
    names = [name.lower() for name in reader.fieldnames]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"the header {names} has an empty name, or one twice")
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row:  # there may be a comma in the prompt
            raise ValueError(f"row {number} has more fields than the header: {row[None]} is left over")
        last = [cell for cell in row.values() if cell is not None][-1]
        may_be_cut = is_quoted or last.startswith('"')  # PartiPrompts leaves out empty notes, so a tsv may lack fields
        if None in row.values() and may_be_cut:  # there may be a line break in the prompt
            raise ValueError(f"row {number} has fewer fields than the header: it ends with {last!r}")
    return rows


def read_named(name):
    """The rows of a set in NAMED. Its files are downloaded once; nothing of them is part of this repository."""
    rows = []
    for url in NAMED[name]:
        if not url.startswith("https:"):
            return read_hub_prompts(url)
        file = cache_folder() / "prompts" / name / url.rpartition("/")[2]
        if not file.exists():
            with urllib.request.urlopen(url, timeout=60) as stream:
                content = stream.read()
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, content, suffix=f".{os.getpid()}")  # under torchrun all processes read the prompts
        of_file = read_prompt_file(file)
        if name == "hpdv2":  # lists of strings, one per style
            of_file = [{"prompt": prompt, "style": file.stem} for prompt in of_file]
        elif name == "pickapic_test":  # the other columns are paths of its authors
            of_file = [row["prompt"] for row in of_file]
        elif name == "dpg":  # a row per question on the picture
            texts = {row["item_id"]: row["text"] for row in of_file}
            of_file = [{"prompt": text, "item_id": item} for item, text in texts.items()]
        rows += of_file
    return rows


def read_hub_prompts(source):
    """The rows of a dataset, ID or ID:SPLIT. Only text, numbers and class names are read: images would take minutes."""
    import datasets

    name, _, split = source.partition(":")
    splits = datasets.get_dataset_split_names(hub_id(name))
    if not split and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits)}; give {name}:SPLIT")
    rows = datasets.load_dataset(name, split=split)
    columns, class_names = [], {}
    for column, feature in rows.features.items():
        is_value = isinstance(feature, (datasets.Value, datasets.ClassLabel)) and "binary" not in feature.dtype
        if is_value or column.lower() in COLUMNS:
            columns.append(column)
        if isinstance(feature, datasets.ClassLabel):
            class_names[column] = dict(enumerate(feature.names))
    return [row | {column: names.get(row[column], "") for column, names in class_names.items()}
            for row in rows.select_columns(columns)]
