"""The curves of "Is it learning" come from runs of train.py, and the guide's table comes from the committed rows."""

from pathlib import Path

import datasets
import pytest

import common
import options
from extras import hold, learning, tiny

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick_models")


def test_the_guides_table_is_that_of_the_rows():
    rows = learning.read_rows(ROOT / "extras")
    assert learning.table(rows) in (ROOT / "GUIDE.md").read_text()
    assert {(row["beta"], row["lr"], row["swapped"]) for row in rows} == set(learning.settings())
    for setting in learning.settings():
        assert [row["step"] for row in learning.rows_of(rows, setting)] == [*range(10, 121, 10)]


def test_the_guides_table_of_held_winners_is_that_of_the_rows(capsys):
    hold.main(["--rows", str(ROOT / "extras")])
    assert capsys.readouterr().out.strip() in (ROOT / "GUIDE.md").read_text()
    assert [*hold.read_rows(ROOT / "extras" / "hold.csv")] == hold.settings()
    with pytest.raises(SystemExit, match="^hold.py: nowhere/hold.csv: there is no such file of rows"):
        hold.main(["--rows", "nowhere"])


def test_a_command_trains_the_runs_that_its_rows_lack(tmp_path, monkeypatch):
    """Rows that are only shown must be complete."""
    rows, lacking = learning.read_rows(ROOT / "extras"), (1, 1, False)
    kept = [row for row in rows if row not in learning.rows_of(rows, lacking)]
    common.write_csv(tmp_path / "learning.csv", rows[0], kept)
    with pytest.raises(SystemExit, match="learning.csv lacks 1 runs; the command without --rows makes them"):
        learning.main(["--rows", str(tmp_path), "--out", str(tmp_path)])
    monkeypatch.setattr(learning, "measure_run", lambda setting, out: learning.rows_of(rows, setting))
    monkeypatch.setattr(learning, "figure", lambda rows, file: None)
    learning.main(["--out", str(tmp_path)])
    assert sorted(map(str, learning.read_rows(tmp_path))) == sorted(map(str, rows))


@pytest.mark.slow
def test_a_run_that_holds_its_winners_gives_its_row(tmp_path, monkeypatch):
    """The weight reaches the loss, and errors are divided by the reference's."""
    monkeypatch.setitem(options.PRESETS, "tiny-flow", options.PRESETS["tiny-flow"] | {"steps": 120, "batch_size": 1,
                                                                                     "group_size": 1})
    monkeypatch.setattr(tiny, "measure", lambda pipe: {"style": 0.5, "shape": 1.0})
    plain, held = (hold.measure_run(("adapter", weight, 0), tmp_path) for weight in (0.0, 50.0))
    assert held["winner"] < min(plain["winner"], held["loser"]) and (held["sketches"], held["shapes"]) == (0.5, 1.0)
    assert held["sft_weight"] == 50 and not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_swapped_labels_are_the_same_pairs(tmp_path):
    swapped = datasets.load_dataset("parquet", data_dir=learning.swap_labels(tmp_path), split="train")
    plain = datasets.load_dataset("parquet", data_files=str(tiny.part("pairs") / "train.parquet"), split="train")
    assert swapped["jpg_0"][:5] == plain["jpg_0"][:5] and swapped["caption"] == plain["caption"]
    assert all(a + b == 1 for a, b in zip(swapped["label_0"], plain["label_0"], strict=True))


@pytest.mark.slow
def test_a_run_gives_its_rows_and_a_killed_command_goes_on(tmp_path, monkeypatch, capsys):
    """Runs that have their rows are not repeated. The figure and the table need the rows alone."""
    monkeypatch.setitem(options.PRESETS, "tiny", options.PRESETS["tiny"] | {"steps": 10, "batch_size": 8})
    monkeypatch.setattr(learning, "PAIRS", 8)
    monkeypatch.setattr(tiny, "measure", lambda pipe: {"style": 0.5, "shape": 1.0})
    rows = learning.measure_run((10, 1, True), tmp_path)
    assert [row["step"] for row in rows] == [10] and rows[0]["swapped"] == 1 and rows[0]["sketches"] == 0.5
    every = []
    for beta, lr, swapped in learning.settings():
        every += [row | {"beta": beta, "lr": lr, "swapped": float(swapped)} for row in rows]
    common.write_csv(tmp_path / "learning.csv", every[0], every)
    monkeypatch.setattr(learning, "measure_run", None)  # calling it would raise
    learning.main(["--out", str(tmp_path)])
    assert (tmp_path / "learning.png").exists()
    learning.main(["--out", str(tmp_path / "other"), "--rows", str(tmp_path)])
    assert capsys.readouterr().out.count("| beta 500 |") == 2
    with pytest.raises(SystemExit, match="learning.csv cannot be read"):
        learning.main(["--out", str(tmp_path / "other"), "--rows", str(tmp_path / "nowhere")])
