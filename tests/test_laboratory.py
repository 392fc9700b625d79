"""The laboratory: what its regimes hold, that nothing is reported on what chose it, that it goes on."""

import concurrent.futures

import datasets
import pytest

import stats
from extras import laboratory, tiny
from extras.laboratory import Spec

pytestmark = pytest.mark.usefixtures("quick_tiny")


@pytest.mark.slow
def test_the_regimes_hold_what_they_say(tmp_path):
    """256 of the 1,500 pairs; exactly a fifth of the labels swapped; another seed picks others."""
    clean = {row["jpg_0"]: row["label_0"] for row in tiny.pair_rows()}
    shares = {}
    for regime, (n, swapped) in laboratory.REGIMES.items():
        rows = datasets.Dataset.from_parquet(str(laboratory.pairs(regime, 0, tmp_path)))
        assert len(rows) == n and all(row["label_0"] + row["label_1"] == 1 for row in rows)
        shares[regime] = sum(clean[row["jpg_0"]] != row["label_0"] for row in rows) / n
        assert shares[regime] == swapped
    few = [
        {*datasets.Dataset.from_parquet(str(laboratory.pairs("64 pairs", s, tmp_path)))["jpg_0"]}
        for s in (0, 1)
    ]
    assert few[0] != few[1]


def test_no_scene_is_tuned_on_and_reported_or_trained_on():
    """Else the better setting would be the luckier one."""
    tuning, report = ({*laboratory.PROMPTS[half]} for half in ("tuning", "report"))
    assert not tuning & report and tuning | report == {*tiny.HELD_OUT}
    assert laboratory.TUNING_SEED not in laboratory.SEEDS


def test_drawn_sketches_are_at_the_floor_and_plain_drawings_are_not():
    """The style distance sees the style, with the pictures' scenes alike."""
    scenes = laboratory.PROMPTS["report"]
    sketches = laboratory.sketches(scenes, 0)
    reference = laboratory.embed(laboratory.sketches(scenes, 1))
    plain = (tiny.drawings(laboratory.N, 0, sketches=0)[0] + 1) / 2
    distances = [stats.cmmd(laboratory.embed(pictures), reference)[0] for pictures in (sketches, plain)]
    assert abs(distances[0]) < 0.05 * distances[1]


@pytest.mark.slow
def test_a_run_is_measured_once(tmp_path, monkeypatch):
    """From its command to its row; a row that is there is not made again, and only rows and logs stay."""
    monkeypatch.setattr(laboratory, "N", 8)
    spec = Spec("rpo", "64 pairs", 0, "report", {"steps": 1, "beta": 100})
    row = laboratory.run(tmp_path, spec)
    assert row["options"] == {"steps": 1, "beta": 100} and {*laboratory.COLUMNS} < row.keys()
    assert 0 <= row["both"] <= min(row["sketches"], row["shape"]) <= 1
    (log,) = (tmp_path / "runs").glob("*.txt")
    assert "64 rows, 64 pairs used" in log.read_text() and not any(
        path.is_dir() for path in (tmp_path / "runs").iterdir()
    )
    monkeypatch.setattr(laboratory.train, "main", None)
    assert laboratory.run(tmp_path, spec) == row


def test_settings_are_chosen_on_tuning_prompts_and_reported_on_others(tmp_path, monkeypatch, capsys):
    """A stand-in for the runs: beta 2000 is the best on tuning prompts and the worst on the others."""
    made = []

    def run(out, spec):
        good = (spec.options.get("beta") == 2000) == (spec.half == "tuning")
        value = 0.75 if good else 0.5
        columns = {column: value + spec.seed / 100 for column in laboratory.COLUMNS}
        made.append(spec._asdict() | {"seconds": 1.0} | columns)
        return made[-1]

    def threads(processes, context, initializer, arguments):
        return concurrent.futures.ThreadPoolExecutor(1)

    monkeypatch.setattr(laboratory, "run", run)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", threads)
    laboratory.main(["--out", str(tmp_path)])
    reported = [row for row in made if row["half"] == "report" and row["loss"] in ("dpo", "rpo")]
    assert {row["options"]["beta"] for row in reported} == {2000}
    assert {row["seed"] for row in reported} == {*laboratory.SEEDS} and len(reported) == 2 * 3 * len(
        laboratory.REGIMES
    )
    assert all(row["half"] == "tuning" for row in made if len(row["options"]) > 1), (
        "an ablation saw the others"
    )
    text = (tmp_path / "tables.md").read_text()
    assert "| clean | RPO | beta 2000 | 51.0 ± 1.0% |" in text and text in capsys.readouterr().out
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
