"""The laboratory: its regimes, its engine beside the project's, its choices, its tables, its statistics."""

import json
import math
import random
import re
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import stats
from data import cross_pair_weights
from extras import drawings, laboratory, tiny, vectors
from extras.laboratory import ARMS, STUDIES, TRIED
from loss import dpo_loss, rpo_loss

EXTRAS = Path(laboratory.__file__).parent
REPORT = (EXTRAS / "laboratory.md").read_text()
COLUMNS = {"right": 0.0, "style": 0.5, "content": 0.5, "distance": 1.0}


@pytest.fixture
def few_bases(monkeypatch, tmp_path):
    """Base models for vectors, for three seeds. They have learnt nothing."""
    monkeypatch.setattr(vectors, "SEEDS", [0, 1, 20])
    monkeypatch.setattr(vectors, "BASE_STEPS", 2)
    monkeypatch.setattr(vectors, "STEPS", 6)
    monkeypatch.setattr(vectors, "SFT_STEPS", 3)
    vectors.prepare(tmp_path)
    yield tmp_path
    vectors.base_models.cache_clear()


# Vectors


def test_the_regimes_of_vectors_hold_what_they_say():
    """Style alone differs unless the regime says otherwise. Counted: swapped labels, other contents, 24 pairs."""
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
    """Each run of a batch gets the loss of loss.py: per group of 8 for RPO, on the whole batch for the others."""
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
    """The neighbours of a run do not change it, whatever their rates, betas and seeds."""
    settings = [(1e-3, 8.0, 0), (3e-3, 64.0, 1), (1e-4, 2.0, 20)]
    for name in ("DPO", "RPO tau .5", "SFT, then RPO uniform"):
        together = vectors.run(ARMS[name], "clean", settings, "tuning", few_bases)
        for row, setting in zip(together, settings):
            (alone,) = vectors.run(ARMS[name], "clean", [setting], "tuning", few_bases)
            assert row == pytest.approx(alone, rel=1e-4, abs=1.01 / vectors.SAMPLES)


def test_the_optimizer_is_adam(few_bases):
    """Six steps of one run equal those of torch.optim.Adam with the same warm-up."""
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
    """Wished vectors are nearest. With nuisance set to 0 they are as right, but further off."""
    wished = vectors.draw(vectors.asked("report"), 1.0, torch.Generator().manual_seed(5))
    narrow = wished.clone()
    narrow[:, vectors.CONTENT + 1:] = 0
    plain = vectors.draw(vectors.asked("report"), -1.0, torch.Generator().manual_seed(5))
    good, collapsed, wrong = vectors.measure(torch.stack([wished, narrow, plain]), "report")
    assert good["right"] == collapsed["right"] > 0.95 and wrong["right"] == 0
    assert good["distance"] < 0.1 * collapsed["distance"] and collapsed["distance"] < wrong["distance"]


# Drawings


def test_an_outline_keeps_what_the_caption_names():
    """An outline lies where the filled shape lies, in the shape's color, on the same background."""
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
def test_a_run_of_drawings_is_one_of_train_py(tmp_path, monkeypatch):
    """A whole run, twice with the same result, by three losses, one of them with the term that holds the winner."""
    monkeypatch.setattr(drawings, "STEPS", 2)
    monkeypatch.setattr(drawings, "PAIRS", 32)
    monkeypatch.setattr(drawings, "SAMPLES", 18)
    monkeypatch.setattr(drawings, "TRAINING", {"vae": 40, "unet": 60, "judge": 40})
    drawings.prepare(tmp_path)
    for name in ("SFT", "DPO + SFT .2", "RPO tau .5"):
        rows = [drawings.run(ARMS[name], "30% swapped", [(1e-3, 100.0, 0)], "report", tmp_path) for _ in range(2)]
        assert rows[0] == rows[1] and {*rows[0][0]} == {*COLUMNS}
        assert 0 <= rows[0][0]["right"] <= min(rows[0][0]["style"], rows[0][0]["content"]) <= 1
    (log,) = tmp_path.glob("rpo-*.txt")
    assert "32 rows, 32 pairs used" in log.read_text()


# The experiment


def test_nothing_is_reported_on_what_chose_it():
    """The report has other seeds and other prompts than the tuning. Otherwise the luckiest setting would look best."""
    for study in STUDIES.values():
        assert not {*study.TUNING_SEEDS} & {*study.REPORT_SEEDS}
    train, tuning, report = ({*vectors.HALVES[half].tolist()} for half in ("train", "tuning", "report"))
    assert not tuning & report and not train & (tuning | report)
    tuning, report = ({*drawings.HALVES[half]} for half in ("tuning", "report"))
    assert not tuning & report and tuning | report == {*tiny.HELD_OUT}


def stand_in(best_rate, best_beta):
    """A study in which every arm is best at one setting, by both criteria."""
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
    """All arms get equally many runs. A grid grows at an edge where the best setting lies, and at no other."""
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
    """With one tuning seed of 180 samples, shares are often equal."""
    rows = [dict(zip(laboratory.KEYS, ("one", "DPO", rate, 1.0, 7, "tuning"))) | COLUMNS for rate in (1.0, 2.0, 3.0)]
    assert laboratory.choose(rows, "right") == (1.0, 1.0)
    rows[1]["distance"] = 0.5
    assert laboratory.choose(rows, "right") == laboratory.choose(rows, "distance") == (2.0, 1.0)
    rows[2]["right"] = 0.1
    assert laboratory.choose(rows, "right") == (3.0, 1.0)


def test_what_is_measured_is_not_measured_again(monkeypatch, tmp_path):
    """A killed command resumes with its rows, but not with the rows of other code."""
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
    """By hand: differences of 1, 2 and 6 points give 3 +- 4.303 * 2.646 / sqrt 3. The lower of two rates is chosen."""
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
    """The committed rows give each table of laboratory.md, to the character."""
    of_study = {name: laboratory.read_rows(EXTRAS / f"{name}.csv") for name in STUDIES}
    for title, table in laboratory.tables(of_study).items():
        assert table in REPORT, title
    for name, rows in of_study.items():
        cells = laboratory.Cells(name, rows)
        assert cells.arms == TRIED[name] and cells.regimes == [*STUDIES[name].REGIMES]


def row_of(table, difference):
    """[(mean, low, high, seeds, is_kept)], one per regime, of a row of a table of laboratory.md."""
    _, line = REPORT.split(f"### {table}\n")[1].split(f"| {difference} |", 1)
    row = []
    for cell in line.split("\n")[0].strip(" |").split(" | "):
        mean, low, high, seeds = re.fullmatch(r"\**([-+.\d]+)†?\** \[(.+), (.+)\] (\d+)/\d+", cell).groups()
        row.append((float(mean), float(low), float(high), int(seeds), cell.startswith("**")))
    return row


def test_the_figures_of_the_summary_are_those_of_the_tables():
    """The report begins with ranges, intervals and what Holm keeps; each is computed here from its row."""
    summary = " ".join(REPORT.split("\n## ")[0].split())

    def range_of(cells):
        means = [abs(mean) for mean, *_ in cells]
        return min(means), max(means)

    *uniform, independent = row_of("Vectors, right, chosen by right: against DPO", "RPO uniform - DPO")
    mean, low, high, seeds, is_kept = uniform.pop(2)
    assert f"swapped it is ahead by {mean} [{low}, {high}] (not kept)" in summary and not is_kept
    uniform.append(independent)
    assert all(is_kept and seeds == 16 and mean > 0 for mean, _, _, seeds, is_kept in uniform)
    assert "ahead by {} to {} points in four regimes, on 16 of 16 seeds (kept)".format(*range_of(uniform)) in summary

    asked = "Vectors, right, chosen by right: questions"
    weights = row_of(asked, "RPO tau .5 - RPO uniform")
    assert all(mean < 0 for mean, *_ in weights) and sum(is_kept for *_, is_kept in weights) == 3
    assert "ahead of tau 0.5 by {} to {} points; three of the five".format(*range_of(weights)) in summary
    shuffled = row_of(asked, "RPO uniform - one shuffled loser")
    assert not any(is_kept for *_, is_kept in shuffled) and range_of(shuffled)[1] < 3
    others = row_of(asked, "RPO uniform - DPO + SFT .2") + row_of(asked, "RPO uniform - pointwise")
    assert all(is_kept and mean < 0 for mean, *_, is_kept in others)
    assert "ahead of uniform RPO by {:.0f} to {:.0f} points (kept)".format(*range_of(others)) in summary

    with_term = "Vectors, right, chosen by right: sft_weight"
    gains, between = {}, []
    for held, plain in laboratory.HELD[:9]:
        gains.setdefault(plain, []).extend(row_of(with_term, f"{held} - {plain}"))
    for held, other in laboratory.HELD[9:]:
        between += row_of(with_term, f"{held} - {other}")
    assert all(is_kept for *_, is_kept in gains["DPO"])
    assert "DPO gains {} to {} points (kept in all 15 cells)".format(*range_of(gains["DPO"])) in summary
    of_rpo = gains["RPO uniform"] + gains["RPO tau .5"]
    kept = sum(is_kept for *_, is_kept in of_rpo)
    assert "RPO gains {} to {} points (kept in {} of 30)".format(*range_of(of_rpo), kept) in summary
    kept = [mean for mean, *_, is_kept in between if is_kept]
    assert len(between) == 30 and len(kept) == 4 and sum(mean > 0 for mean in kept) == 2
    assert f"four are kept: two for RPO, by at most {max(kept)} points, and two for DPO" in summary

    (mean, low, high, _, kept), (mean_s, low_s, high_s, _, kept_s) = row_of(
        "Drawings, right, chosen by right: against DPO", "RPO uniform - DPO")
    assert kept and kept_s
    assert (f"Uniform RPO is ahead by {mean} [{low}, {high}] points, and with swapped labels by {mean_s} [{low_s}, {high_s}] "
            "(kept)") in summary
    with_term = "Drawings, right, chosen by right: sft_weight"
    clean, swapped, of_rpo, between = [], [], [], []
    for held, plain in laboratory.HELD[:9]:
        row = row_of(with_term, f"{held} - {plain}")
        if plain == "DPO":
            clean.append(row[0])
            swapped.append(row[1])
        else:
            of_rpo += row
    for held, other in laboratory.HELD[9:]:
        between += row_of(with_term, f"{held} - {other}")
    assert all(is_kept for *_, is_kept in clean) and not any(is_kept for *_, is_kept in swapped + of_rpo)
    assert "DPO gains {} to {} points (kept in 3 of 3)".format(*range_of(clean)) in summary
    kept = [mean for mean, *_, is_kept in between if is_kept]
    assert len(between) == 12 and len(kept) == 1
    assert f"Of 12 differences between RPO and DPO at the same weight one is kept: RPO is behind by {-kept[0]} points" in summary


def test_every_figure_of_the_findings_stands_in_a_table():
    """Alone or with its interval, in a table of the same study."""
    findings, tables = REPORT.split("\n## What separates")[1].split("\n## Tables")
    tables = re.sub(r"[+*†]", "", tables)
    for study in ("Vectors", "Drawings"):
        prose = re.sub(r"\+|[Tt]au [.\d]+", "", findings.split(f"\n### {study}\n")[1].split("\n### ")[0])
        of_study = "".join(part for part in tables.split("\n### ") if part.startswith(study))
        figures = re.findall(r"-?\d+\.\d+ \[.+?\]", " ".join(prose.split()))
        numbers = re.findall(r"\d+\.\d+", prose)
        assert len(figures) >= 2 and len(numbers) >= 10
        for text in figures:
            assert text in of_study, text
        assert {*numbers} <= {*re.findall(r"\d+\.\d+", of_study)}


# Statistics


def test_holm_by_hand():
    """Four tests: .005 * 4, .01 * 3, .03 * 2, then .04, which may not fall below the one before it."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([0.2]) == [0.2] and stats.holm([]) == []


@pytest.mark.parametrize("n", [2, 8, 16])
def test_the_paired_interval_is_students(n):
    """mean +- t(n - 1) s / sqrt n, and the two-sided p of t, by hand."""
    ours, theirs = torch.randn(2, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).numpy()
    error = (ours - theirs).std(ddof=1) / n ** 0.5
    mean = (ours - theirs).mean()
    half = scipy.stats.t.ppf(0.975, n - 1) * error
    p = 2 * scipy.stats.t.sf(abs(mean) / error, n - 1)
    assert stats.paired_difference(ours, theirs) == pytest.approx((mean, mean - half, mean + half, p))


@pytest.mark.parametrize("n, trials", [(8, 400), pytest.param(8, 2000, marks=pytest.mark.slow),
                                       pytest.param(16, 2000, marks=pytest.mark.slow)])
def test_the_paired_interval_covers_the_difference_in_95_of_100(n, trials):
    """The seeds share three times the spread of the difference. An unpaired interval would always cover it."""
    g = torch.Generator().manual_seed(n)
    covered = 0
    for _ in range(trials):
        shared = 3 * torch.randn(n, generator=g)
        ours = shared + 1 + torch.randn(n, generator=g)
        theirs = shared + torch.randn(n, generator=g)
        _, low, high, p = stats.paired_difference(ours, theirs)
        covered += low <= 1 <= high
        assert (p < 0.05) == (not low <= 0 <= high)
    assert abs(covered / trials - 0.95) < 3 * (0.95 * 0.05 / trials) ** 0.5  # three standard errors


@pytest.mark.parametrize("clear", [0, 5])
def test_holm_errs_in_5_of_100_tables(clear):
    """Ten differences a table, some of them clear. In 5% of tables any of the others seems to be one, too."""
    g = torch.Generator().manual_seed(1)
    wrong, trials = 0, 4000
    for p_values in torch.rand(trials, 10, generator=g, dtype=torch.float64).numpy():
        p_values[:clear] = 1e-6
        adjusted = stats.holm(p_values)
        assert all(p < 0.05 for p in adjusted[:clear])
        wrong += min(adjusted[clear:]) < 0.05
    equal = 10 - clear
    assert abs(wrong / trials - (1 - (1 - 0.05 / equal) ** equal)) < 3 * (0.05 * 0.95 / trials) ** 0.5


def test_a_difference_without_spread_is_a_point_and_one_seed_has_no_interval():
    assert stats.paired_difference([2.0, 3.0], [1.0, 2.0]) == (1.0, 1.0, 1.0, 0.0)
    assert stats.paired_difference([2.0, 3.0], [2.0, 3.0]) == (0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        stats.paired_difference([1.0], [2.0])
