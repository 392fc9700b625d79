"""The laboratory: what its regimes hold, that its engine is the project's, that nothing chosen is what is reported."""

import json
import math
import random
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import stats
from data import cross_pair_weights
from extras import drawings, laboratory, tiny, vectors
from extras.laboratory import ARMS, STUDIES, TRIED
from loss import LOSSES, dpo_loss, rpo_loss

EXTRAS = Path(laboratory.__file__).parent
COLUMNS = {"right": 0.0, "style": 0.5, "content": 0.5, "distance": 1.0}


@pytest.fixture
def few_bases(monkeypatch, tmp_path):
    """Base models for vectors that have learnt nothing, for a few seeds."""
    monkeypatch.setattr(vectors, "SEEDS", [0, 1, 20])
    monkeypatch.setattr(vectors, "BASE_STEPS", 2)
    monkeypatch.setattr(vectors, "STEPS", 6)
    monkeypatch.setattr(vectors, "SFT_STEPS", 3)
    vectors.prepare(tmp_path)
    yield tmp_path
    vectors.base_models.cache_clear()


# Vectors


def test_the_regimes_of_vectors_hold_what_they_say():
    """Style alone differs where nothing else is said; the share of swapped labels; 24 pairs, one a prompt."""
    content, style = slice(0, vectors.CONTENT), vectors.CONTENT
    for regime in vectors.REGIMES:
        prompt, winner, loser = vectors.draw_pairs(regime, seed=3)
        alike = (winner[:, content] == loser[:, content]).all(dim=1)
        wins_by_style = winner[:, style] > 0
        assert {*prompt.tolist()} <= {*vectors.HALVES["train"].tolist()}
        assert len(prompt) == len({*prompt.tolist()}) == 24 if regime == "24 pairs" else len(prompt) == 600
        assert wins_by_style.all() == (regime != "30% swapped")
        if regime == "30% swapped":
            assert 0.25 < (~wins_by_style).float().mean() < 0.35
        if regime == "other content":
            assert 0.45 < (loser[:, style] > 0).float().mean() < 0.55 and (alike == (loser[:, style] < 0)).all()
        else:
            assert alike.all() != (regime == "independent") and (loser[:, style] * winner[:, style] < 0).all()


def test_the_losses_of_many_runs_are_those_of_the_project():
    """A batch of runs gives each what loss.py gives it: groups of 8 for RPO, the whole batch for the others."""
    g = torch.Generator().manual_seed(0)
    runs, batch = 3, vectors.BATCH
    errors = {name: torch.rand(runs, batch, generator=g) for name in ("err_w", "err_l", "ref_err_w", "ref_err_l")}
    beta = torch.tensor([1.0, 20.0, 300.0])
    weights = torch.rand(runs, 2, 8, 8, generator=g).softmax(dim=-1)
    dpo = vectors.losses("dpo", {}, errors | {"beta": beta})
    for position in ("outside", "inside"):
        rpo = vectors.losses("rpo", {"tau": 0.5, "weight_position": position},
                             errors | {"beta": beta, "weights": weights})
        for r in range(runs):
            of_run = {name: value[r] for name, value in errors.items()}
            groups = [{name: value[i:i + 8] for name, value in of_run.items()} for i in (0, 8)]
            by_hand = [rpo_loss(**group, beta=beta[r], weights=weights[r, i], weight_position=position)[0]
                       for i, group in enumerate(groups)]
            torch.testing.assert_close(rpo[r], torch.stack(by_hand).mean())
            torch.testing.assert_close(dpo[r], dpo_loss(**of_run, beta=beta[r])[0])


def test_the_weights_of_a_stream_are_those_of_data():
    prompt, winner, loser = vectors.draw_pairs("clean", seed=0)
    batch = vectors.stream("clean", 0, {"tau": 0.5})
    rows = torch.randint(600, (vectors.STEPS, 16), generator=torch.Generator().manual_seed(1000))
    group = rows[5, 8:]
    expected = cross_pair_weights(vectors.PROMPTS[prompt[group]], vectors.similar(winner[group]),
                                  vectors.similar(loser[group]), 0.5)
    torch.testing.assert_close(batch["weights"][5, 1], expected)
    uniform = vectors.stream("clean", 0, {"tau": math.inf})["weights"]
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / 8))


def test_runs_side_by_side_are_runs_alone(few_bases):
    """A run's neighbours, their rates, betas and seeds, do not reach it."""
    settings = [(1e-3, 8.0, 0), (3e-3, 64.0, 1), (1e-4, 2.0, 20)]
    for name in ("DPO", "RPO tau .5", "SFT, then RPO uniform"):
        together = vectors.run(ARMS[name], "clean", settings, "tuning", few_bases)
        for row, setting in zip(together, settings):
            (alone,) = vectors.run(ARMS[name], "clean", [setting], "tuning", few_bases)
            assert row == pytest.approx(alone, rel=1e-4, abs=1.01 / vectors.SAMPLES)


def test_the_optimizer_is_adam(few_bases):
    """Ten steps of one run against torch.optim.Adam with the same warm-up."""
    start = [param[:1] for param in vectors.base_models(few_bases)]
    batch = {name: value[None] for name, value in vectors.stream("clean", 0, {}).items()}
    ours = vectors.train("sft", {}, start, batch, torch.tensor([1e-3]), torch.tensor([0.0]), steps=6)
    params = [param.clone().requires_grad_() for param in start]
    optimizer = torch.optim.Adam(params)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / vectors.WARMUP
        err = vectors.errors(params, batch["seen"][:, step], batch["eps"][:, step])
        optimizer.zero_grad()
        err[:, :vectors.BATCH].mean().backward()
        optimizer.step()
    for a, b in zip(ours, params):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-6)


def test_the_distance_punishes_lost_diversity():
    """Vectors as wished are nearest; the same with nuisance at 0 are as right, and further off."""
    wished = vectors.draw(vectors.asked("report"), 1.0, torch.Generator().manual_seed(5))
    narrow = wished.clone()
    narrow[:, vectors.CONTENT + 1:] = 0
    plain = vectors.draw(vectors.asked("report"), -1.0, torch.Generator().manual_seed(5))
    good, collapsed, wrong = vectors.measure(torch.stack([wished, narrow, plain]), "report")
    assert good["right"] == collapsed["right"] > 0.95 and wrong["right"] == 0
    assert good["distance"] < 0.1 * collapsed["distance"] and collapsed["distance"] < wrong["distance"]


# Drawings


def test_drawings_lose_what_the_caption_names_no_more_than_what_it_does_not():
    """The outline of a shape is where its filling is, in its color, on its background."""
    for scene in (("star", "red", "white"), ("ring", "blue", "yellow")):
        filled, outline = (drawings.draw(scene, is_outline, random.Random(3)) for is_outline in (False, True))
        boxes = []
        for picture in (filled, outline):
            pixels = torch.from_numpy(np.asarray(picture).astype(int)).flatten(0, 1)
            assert (pixels - torch.tensor(tiny.COLORS[scene[2]])).abs().sum(1).min() == 0  # the background's
            assert (pixels - torch.tensor(tiny.COLORS[scene[1]])).abs().sum(1).min() < 60  # the shape's, smoothed
            is_shape = ((pixels - pixels[0]).abs().sum(1) > 150).view(32, 32)
            ys, xs = is_shape.nonzero(as_tuple=True)
            boxes.append(torch.stack([ys.min(), ys.max(), xs.min(), xs.max()]))
        assert (boxes[0] - boxes[1]).abs().max() <= 2


@pytest.mark.slow
def test_a_run_of_drawings_is_one_of_train_py(quick_tiny, tmp_path, monkeypatch):
    """From its command line to its columns; the same once more; losses that a fork adds run, too."""
    monkeypatch.setitem(LOSSES, "dpo_sft", laboratory.FURTHER_LOSSES["dpo_sft"])
    monkeypatch.setattr(drawings, "STEPS", 2)
    monkeypatch.setattr(drawings, "PAIRS", 32)
    monkeypatch.setattr(drawings, "SAMPLES", 18)
    drawings.prepare(tmp_path)
    for name in ("SFT", "DPO + SFT", "RPO tau .5"):
        rows = [drawings.run(ARMS[name], "30% swapped", [(1e-3, 100.0, 0)], "report", tmp_path) for _ in range(2)]
        assert rows[0] == rows[1] and {*rows[0][0]} == {*COLUMNS}
        assert 0 <= rows[0][0]["right"] <= min(rows[0][0]["style"], rows[0][0]["content"]) <= 1
    (log,) = tmp_path.glob("rpo-*.txt")
    assert "32 rows, 32 pairs used" in log.read_text()


# The experiment


def test_nothing_is_reported_on_what_chose_it():
    """Else the better setting would be the luckier one: other seeds and other prompts."""
    for study in STUDIES.values():
        assert not {*study.TUNING_SEEDS} & {*study.REPORT_SEEDS}
    train, tuning, report = ({*vectors.HALVES[half].tolist()} for half in ("train", "tuning", "report"))
    assert not tuning & report and not train & (tuning | report)
    tuning, report = ({*drawings.HALVES[half]} for half in ("tuning", "report"))
    assert not tuning & report and tuning | report == {*tiny.HELD_OUT}


def stand_in(best_rate, best_beta):
    """A study whose arms are all the best at one setting, by both criteria."""
    made = []

    def run(arm, regime, lot, half, out):
        made.extend((arm.loss, *setting, half) for setting in lot)
        columns = []
        for rate, beta, seed in lot:
            miss = abs(math.log(rate / best_rate)) + (abs(math.log(beta / best_beta)) if beta else 0)
            columns.append(COLUMNS | {"right": 1 / (1 + miss) + seed / 1e3, "distance": miss + seed / 1e3})
        return columns

    study = types.SimpleNamespace(
        RATES=(1e-4, 2e-4), BETAS=(1.0, 2.0, 4.0), SFT_RATES=tuple(1e-4 * 2 ** k for k in range(6)), FURTHER=1,
        TUNING_SEEDS=(7, 8), REPORT_SEEDS=(0, 1, 2), CHOSEN_BY=("right", "distance"), SIDE_BY_SIDE=4, REGIMES=("one",),
        run=run, prepare=lambda out: None, __file__=__file__)
    return study, made


def test_every_arm_is_tuned_alike_and_the_grid_grows_once(monkeypatch, tmp_path):
    """As many runs each; beyond an edge at which the best lies, not beyond one at which it does not."""
    for study in STUDIES.values():
        assert len(study.SFT_RATES) == len(study.RATES) * len(study.BETAS)
    study, made = stand_in(best_rate=8e-4, best_beta=2.0)
    monkeypatch.setitem(STUDIES, "vectors", study)
    rows = laboratory.run_cell("vectors", "DPO", "one", tmp_path)
    tuned = {(row["rate"], row["beta"]) for row in rows if row["half"] == "tuning"}
    assert tuned == {(rate, beta) for rate in (1e-4, 2e-4, 4e-4) for beta in (1.0, 2.0, 4.0)}  # 8e-4 would be twice
    cells = laboratory.Cells("vectors", rows)
    assert cells.setting("DPO", "one", "right") == (4e-4, 2.0)
    assert cells.edges("DPO", "one", "right") == ["lr at the edge"]
    assert {(row["rate"], row["beta"], row["seed"]) for row in rows if row["half"] == "report"} == {
        (4e-4, 2.0, seed) for seed in (0, 1, 2)}
    inner, _ = stand_in(best_rate=4e-4, best_beta=1.0)
    monkeypatch.setitem(STUDIES, "vectors", inner)
    rows = laboratory.run_cell("vectors", "SFT", "one", tmp_path / "sft")
    assert len([row for row in rows if row["half"] == "tuning"]) == 6 * 2
    assert laboratory.Cells("vectors", rows).edges("SFT", "one", "right") == []


def test_of_equal_settings_the_nearest_is_chosen_then_the_first():
    """One tuning seed of 180 samples gives equal shares often enough."""
    rows = [dict(zip(laboratory.KEYS, ("one", "DPO", rate, 1.0, 7, "tuning"))) | COLUMNS for rate in (1.0, 2.0, 3.0)]
    assert laboratory.choose(rows, "right") == (1.0, 1.0)
    rows[1]["distance"] = 0.5
    assert laboratory.choose(rows, "right") == laboratory.choose(rows, "distance") == (2.0, 1.0)
    rows[2]["right"] = 0.1
    assert laboratory.choose(rows, "right") == (3.0, 1.0)


def test_what_is_measured_is_not_measured_again(monkeypatch, tmp_path):
    """Killed, the same command goes on; but not with rows of other code."""
    study, made = stand_in(best_rate=1e-4, best_beta=2.0)
    monkeypatch.setitem(STUDIES, "vectors", study)
    rows = laboratory.run_cell("vectors", "DPO", "one", tmp_path)
    n = len(made)
    assert laboratory.run_cell("vectors", "DPO", "one", tmp_path) == rows and len(made) == n
    monkeypatch.setattr(laboratory, "digest", lambda content, digest=laboratory.digest: digest(content)[::-1])
    laboratory.run_cell("vectors", "DPO", "one", tmp_path)
    assert len(made) == 2 * n


def test_a_second_run_that_differs_is_told(monkeypatch, tmp_path, capsys):
    study, _ = stand_in(best_rate=1e-4, best_beta=2.0)
    monkeypatch.setitem(STUDIES, "vectors", study)
    laboratory.run_cell("vectors", "DPO", "one", tmp_path)
    laboratory.check_again(tmp_path, 9, ["vectors"])
    assert "NOT" not in capsys.readouterr().out
    file = next((laboratory.folder_of("vectors", tmp_path) / "rows").glob("*.json"))
    rows = json.loads(file.read_text())
    rows[0]["right"] += 1e-4
    file.write_text(json.dumps(rows))
    laboratory.check_again(tmp_path, 9, ["vectors"])
    assert capsys.readouterr().out.count("NOT the same") == 1


def test_the_tables_say_what_the_rows_say(monkeypatch, tmp_path):
    """By hand: three seeds at differences of 1, 2 and 6 points: 3 +- 4.303 * 2.646 / sqrt 3; the lower lr of two."""
    rows = []
    for arm, values in (("base", (0.1, 0.1, 0.1)), ("ideal", (1, 1, 1)), ("DPO", (0.5, 0.6, 0.7)),
                        ("RPO uniform", (0.51, 0.62, 0.76))):
        for half, rate in (("tuning", 1e-4), ("tuning", 2e-4), ("report", 1e-4)):
            for seed, value in enumerate(values):
                right = value if rate == 1e-4 else value - 0.05
                rows.append({"regime": "clean", "arm": arm, "rate": rate, "beta": 8.0, "seed": seed, "half": half}
                            | COLUMNS | {"right": right})
    for row in rows:
        if row["arm"] in laboratory.FRAME:
            row["rate"] = row["beta"] = 0.0
    laboratory.write_rows(tmp_path / "vectors.csv", rows)
    cells = laboratory.Cells("vectors", laboratory.read_rows(tmp_path / "vectors.csv"))
    table = laboratory.against_dpo(cells, "right")
    assert "| RPO uniform - DPO | +3.0† [-3.6, +9.6] 3/3 |" in table and "| DPO | 60.0 ± 10.0 |" in table


def test_the_tables_of_the_report_are_those_of_the_committed_rows():
    """Each table of laboratory.md, to the character, is what the rows beside it give."""
    of_study = {name: laboratory.read_rows(EXTRAS / f"{name}.csv") for name in STUDIES}
    report = (EXTRAS / "laboratory.md").read_text()
    for title, table in laboratory.tables(of_study).items():
        assert table in report, title
    for name, rows in of_study.items():
        cells = laboratory.Cells(name, rows)
        assert cells.arms == TRIED[name] and cells.regimes == [*STUDIES[name].REGIMES]


# Statistics


def test_holm_by_hand():
    """Of 4 tests: .005 * 4, .01 * 3, then .03 * 2, and .04 not below the one before it."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([0.2]) == [0.2] and stats.holm([]) == []


@pytest.mark.parametrize("n", [8, 16])
def test_the_paired_interval_covers_the_difference_in_95_of_100(n):
    """Simulated: seeds that share three times the spread of what differs; unpaired it would cover all."""
    g = torch.Generator().manual_seed(n)
    covered, trials = 0, 2000
    for _ in range(trials):
        shared = 3 * torch.randn(n, generator=g)
        ours = shared + 1 + torch.randn(n, generator=g)
        theirs = shared + torch.randn(n, generator=g)
        _, low, high, p = stats.paired_difference(ours, theirs)
        covered += low <= 1 <= high
        assert (p < 0.05) == (not low <= 0 <= high)
    assert abs(covered / trials - 0.95) < 0.0147  # three standard errors


def test_holm_errs_in_5_of_100_tables():
    """Ten equal arms a table: the share of tables in which any seems to differ."""
    g = torch.Generator().manual_seed(1)
    wrong, trials = 0, 400
    for _ in range(trials):
        ours, theirs = torch.randn(2, 10, 8, generator=g)
        p_values = [stats.paired_difference(a, b)[3] for a, b in zip(ours, theirs)]
        wrong += min(stats.holm(p_values)) < 0.05
    assert wrong / trials < 0.05 + 0.0327  # three standard errors


def test_a_difference_without_spread_is_a_point_and_one_seed_has_no_interval():
    assert stats.paired_difference([2.0, 3.0], [1.0, 2.0]) == (1.0, 1.0, 1.0, 0.0)
    assert stats.paired_difference([2.0, 3.0], [2.0, 3.0]) == (0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        stats.paired_difference([1.0], [2.0])
