"""Do our scorers give the numbers that others have published? Published pictures, published weights, published values.

    python -m extras.golden                                     all values; pictures and weights are downloaded
    python -m extras.golden --images DIR imagereward=FILE       pictures from a folder, weights from a file

golden.json holds the values. Each names its picture, the picture's sha256, the commit that it is of, and where the value
was published. The exit status is 0 if every value was checked and is within its tolerance, 1 if one is not, and 2 if one
could not be checked because a picture or the weights are missing.
"""

import hashlib
import json
import sys
import urllib.request
from pathlib import Path

import scorers
from common import InputError, Parser, brief, one_line_errors
from distributed import get_device
from pictures import read_image

VALUES = Path(__file__).with_name("golden.json")


def read_picture(entry, picture, folder):
    """The RGB picture of a row of golden.json, out of a folder or from its repository.

    raises  InputError if it cannot be had, or is another one than the published value is of
    """
    name = Path(picture["file"]).name
    url = f"https://raw.githubusercontent.com/{entry['repository']}/{entry['commit']}/{picture['file']}"
    try:
        if folder:
            content = (Path(folder) / name).read_bytes()
        else:
            with urllib.request.urlopen(url, timeout=30) as stream:
                content = stream.read()
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read: {brief(error)}. Get it from {url} and pass its folder as --images")
    if hashlib.sha256(content).hexdigest() != picture["sha256"]:
        raise InputError(f"{name} is another picture than the one that was scored. Get it from {url}")
    return read_image(content)


def check(entry, spec, folder, device):
    """[(picture, prompt, published, ours, is it within tolerance)] of an entry, scored as `spec` says."""
    images = [read_picture(entry, picture, folder) for picture in entry["pictures"]]
    prompts = [picture["prompt"] for picture in entry["pictures"]]
    _, score, _ = scorers.get_scorer(spec, device)
    ours = score(images, prompts)
    if entry["scale"] == "softmax over the rows":
        ours = ours.softmax(0)
    rows = []
    for picture, value in zip(entry["pictures"], ours.tolist()):
        is_within = abs(value - picture["published"]) <= entry["tolerance"]
        rows.append((Path(picture["file"]).name, picture["prompt"], picture["published"], value, is_within))
    return rows


def parse_args(argv=None):
    parser = Parser(prog="golden.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("scorers", nargs="*", metavar="NAME=SOURCE", help="local weights of a scorer, as in evaluate.py")
    parser.add_argument("--images", metavar="DIR", help="the folder of the pictures [they are downloaded]")
    parser.add_argument("--values", metavar="FILE", default=VALUES, type=Path, help="other values in the same form")
    parser.add_argument("--device", help="cuda, mps or cpu [the best there is]")
    return parser.parse_args(argv)


def main(argv=None):
    with one_line_errors("golden.py"):
        args = parse_args(argv)
        entries = json.loads(args.values.read_text(encoding="utf-8"))
        specs = {spec.partition("=")[0]: spec for spec in args.scorers}
        unknown = specs.keys() - {entry["scorer"].partition("=")[0] for entry in entries}
        if unknown:
            raise InputError(f"golden.json has no value of {min(unknown)}")
        device, status = get_device(args.device), 0
        print("| scorer | picture | prompt | published | ours | difference | tolerance | within |\n" + "|---" * 8 + "|")
        for entry in entries:
            name = entry["scorer"].partition("=")[0]
            try:
                rows = check(entry, specs.get(name, entry["scorer"]), args.images, device)
            except InputError as error:
                status = status or 2
                print(f"{name}: not checked: {error}", file=sys.stderr)
                continue
            for picture, prompt, published, ours, is_within in rows:
                status = status if is_within else 1
                print(f"| {name} | {picture} | {prompt} | {published:.4f} | {ours:.4f} | {ours - published:+.4f} | "
                      f"{entry['tolerance']:g} | {'yes' if is_within else 'NO'} |", flush=True)
        sys.exit(status)


if __name__ == "__main__":
    main()
