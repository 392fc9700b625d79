"""Prompt files."""
import csv
import importlib
import io
import json
from pathlib import Path

from common import InputError, brief, hub_id
from sources import as_text

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
