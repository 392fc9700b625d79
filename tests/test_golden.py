"""Published values of the scorers are checked on stand-ins: the true weights and pictures are not here."""

import hashlib
import json

import pytest
import torch
from PIL import Image

import scorers
from extras import golden


@pytest.fixture
def values(tmp_path):
    """A file of values with two scorers and two pictures in a folder beside it."""
    entries = []
    for name, scale in (("clip", "as scored"), ("aesthetic", "softmax over the rows")):
        pictures = []
        for side in (32, 64):
            file = tmp_path / "pictures" / f"{side}.png"
            file.parent.mkdir(exist_ok=True)
            Image.new("RGB", (side, side)).save(file)
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            pictures.append({"file": f"assets/{file.name}", "sha256": sha256, "prompt": "a", "published": side / 10})
        entries.append({"scorer": name, "source": "README", "repository": "a/b", "commit": "c", "scale": scale,
                        "tolerance": 0.1, "pictures": pictures})
    for picture, share in zip(entries[1]["pictures"], torch.tensor([3.2, 6.4]).softmax(0).tolist()):
        picture["published"] = share
    (tmp_path / "values.json").write_text(json.dumps(entries))
    return tmp_path / "values.json"


@pytest.fixture
def command(values, monkeypatch):
    """command(*options) -> the exit status; the stand-in scorers rate a picture by its width."""
    def get_scorer(spec, device):
        if spec == "clip=missing":
            raise scorers.InputError("clip: missing: no such file; give clip=FILE")
        return spec, lambda images, prompts: torch.tensor([image.width / 10 for image in images]), {}

    monkeypatch.setattr(scorers, "get_scorer", get_scorer)

    def command(*options):
        with pytest.raises(SystemExit) as ended:
            golden.main(["--values", str(values), "--images", str(values.with_name("pictures")), *options])
        return ended.value.code

    return command


def test_values_within_their_tolerance_pass(command, values, capsys):
    """A difference beyond it is said, and the exit status is 1."""
    assert command() == 0
    assert "| clip | 32.png | a | 3.2000 | 3.2000 | +0.0000 | 0.1 | yes |" in capsys.readouterr().out
    entries = json.loads(values.read_text())
    entries[0]["pictures"][1]["published"] = 6.2
    values.write_text(json.dumps(entries))
    assert command() == 1
    assert "| clip | 64.png | a | 6.2000 | 6.4000 | +0.2000 | 0.1 | NO |" in capsys.readouterr().out


def test_what_is_missing_is_named_and_the_others_are_checked(command, values, capsys):
    assert command("clip=missing") == 2
    told = capsys.readouterr()
    assert "clip: not checked: clip: missing: no such file" in told.err and told.out.count("| aesthetic |") == 2
    (values.with_name("pictures") / "64.png").write_bytes(b"another")
    assert command() == 2
    url = "https://raw.githubusercontent.com/a/b/c/assets/64.png"
    assert capsys.readouterr().err.count(f"64.png is another picture than the one that was scored. Get it from {url}") == 2
    (values.with_name("pictures") / "64.png").unlink()
    assert command() == 2 and f"Get it from {url} and pass its folder as --images" in capsys.readouterr().err
    assert command("hpsv2=FILE") == "golden.py: golden.json has no value of hpsv2"


def test_the_published_values_are_whole(monkeypatch):
    """Every value has a scorer of ours, a commit, a digest and a source. A download is checked against the digest."""
    for entry in json.loads(golden.VALUES.read_text()):
        assert entry["scorer"].partition("=")[0] in scorers.SCORERS and entry["source"] and entry["tolerance"] > 0
        assert len(entry["commit"]) == 40 and entry["scale"] in ("as scored", "softmax over the rows")
        assert all(len(picture["sha256"]) == 64 for picture in entry["pictures"])
    asked = []

    class Stream:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self):
            return b"not the picture"

    monkeypatch.setattr(golden.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or Stream())
    with pytest.raises(scorers.InputError, match="1.webp is another picture"):
        golden.read_picture(entry_of("imagereward"), entry_of("imagereward")["pictures"][0], None)
    assert asked == ["https://raw.githubusercontent.com/THUDM/ImageReward/c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb/"
                     "assets/images/1.webp"]


def entry_of(name):
    return next(entry for entry in json.loads(golden.VALUES.read_text()) if entry["scorer"] == name)
