"""The report of what a card reaches: rows as soon as they are known, and real steps of train.py."""

import json

import pytest
import torch

import loading
import run as run_room
import train
from extras import bench, card
from small_runs import log_of

TRAINING = {"pairs_per_second": 2.0, "seconds": 4.0, "least": 3.0, "most": 5.0, "start_seconds": 1.0, "gib": 1.0,
            "tflop_per_pair": 0.1, "peak_tflops": 1.0, "share_of_peak": 0.2, "margin": 0.0}


def test_a_report_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    """A row that fails says why, the next ones run, and the same command asks for the missing ones alone."""
    asked = []

    def alone(function, name, more):
        asked.append(name)
        if "compile" in name:
            raise RuntimeError("the compiler broke")
        if len(asked) == 3:
            raise KeyboardInterrupt  # cut
        return TRAINING

    monkeypatch.setattr(bench, "alone", alone)
    file = tmp_path / "card.jsonl"
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--report", str(file), "--rows", "sd15, all"])
    assert asked == ["sd15, all weights, DPO", "sd15, all weights, DPO, compile", "sd15, all weights, RPO, groups of 8"]
    first, second = [json.loads(line) for line in file.read_text().splitlines()]
    assert first["pairs_per_second"] == 2 and first["torch"] == torch.__version__
    assert "the compiler broke" in second["failed"]
    bench.main(["--report", str(file), "--rows", "sd15, all"])
    assert asked[3:] == [name for name in card.ROWS if "sd15, all" in name][1:]  # the one that failed again, too
    table = file.with_suffix(".md").read_text()
    assert "|sd15, all weights, DPO|2.00|4.000 (3.000, 5.000)|1.0|0.1|20.0%|0|1.0|" in table
    assert "|sd15, all weights, DPO, compile|the compiler broke|" in table and table in capsys.readouterr().out
    bench.main(["--report", str(tmp_path / "none.jsonl"), "--minutes", "0"])
    assert not (tmp_path / "none.jsonl").exists()
    with pytest.raises(SystemExit, match="^bench.py: no row has one of these words in its name: sd16"):
        bench.main(["--report", str(file), "--rows", "sd16"])


def test_rows_of_another_card_are_another_cards(tmp_path, monkeypatch):
    """They stay in the file, in a table of their own, and this card's rows are measured."""
    monkeypatch.setattr(bench, "alone", lambda function, name, more: TRAINING)
    file = tmp_path / "card.jsonl"
    other = TRAINING | {"row": "sd15, all weights, DPO", "card": "A100", "torch": "2", "diffusers": "1", "date": "today"}
    file.write_text(json.dumps(other) + "\n")
    bench.main(["--report", str(file), "--rows", "sd15, all weights, DPO"])
    assert file.with_suffix(".md").read_text().count("|sd15, all weights, DPO|2.00") == 2
    assert "A100, torch 2, diffusers 1, today\n\n|row|" in file.with_suffix(".md").read_text()


def test_a_row_that_lacks_memory_tries_half_the_micro_batch(monkeypatch):
    """The next row of the same model and weights begins where the last one fitted."""
    asked = []

    def alone(function, name, more):
        asked.append(more)
        if int(more.split()[-1]) > 4:
            raise RuntimeError("CUDA out of memory")
        return TRAINING

    monkeypatch.setattr(bench, "alone", alone)
    fitted = {}
    for name in ("sd15, all weights, DPO", "sd15, all weights, DPO, compile"):
        assert card.measure_within_memory(name, fitted) == TRAINING
    assert asked == [f"--micro_batch {size}" for size in (16, 8, 4, 4)]
    monkeypatch.setattr(bench, "alone", lambda *_: alone("", "", "8"))
    with pytest.raises(RuntimeError, match="out of memory"):
        card.measure_within_memory("flux-dev, LoRA 32, DPO", {})


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "sd15, LoRA 16, DPO", "sd15, all weights, RPO, groups of 8", "sd15, LoRA 16, DPO, pairs",
    "sd15, all weights, DPO, reference's errors cached", "sdxl, LoRA 16, DPO", "sd3.5-medium, LoRA 32, DPO",
    "flux-dev, LoRA 32, DPO"])
def test_a_training_row_is_a_run_of_train_py(tmp_path, monkeypatch, name):
    """It begins with no margin, and its share of the peak is the counted arithmetic over the measured time."""
    for changed in ("peak_flops", "Output", "EncodedPairs", "is_cache", "load_model", "open_parts", "check_cache"):
        monkeypatch.setattr(run_room, changed, getattr(run_room, changed))  # so that it is given back
    monkeypatch.setattr(card.Recorder, "profile", None)
    monkeypatch.setattr(card, "MEASURED", 3)
    batch = 8 if "RPO" in name else 2
    monkeypatch.setitem(card.ROWS, name, f"{card.ROWS[name]} --batch_size {batch} --micro_batch 2")
    profile = str(tmp_path / "profile.txt") if "RPO" in name else None
    row = card.measure_row(name, "", profile)
    assert row["margin"] == 0 and 0 < row["least"] <= row["seconds"] <= row["most"] and row["gib"] > 0
    assert row["pairs_per_second"] == pytest.approx(batch / row["seconds"])
    reached = row["pairs_per_second"] * row["tflop_per_pair"]
    assert row["share_of_peak"] == pytest.approx(reached / row["peak_tflops"])
    if not profile:
        return
    lines = (tmp_path / "profile.txt").read_text().splitlines()
    shares = [float(line.split("%")[0]) for line in lines[1:]]
    assert len(lines) == 11 + len(card.KINDS) and shares[:10] == sorted(shares[:10], reverse=True)
    assert any(float(line.split("%")[0]) > 5 for line in lines if "matrix products" in line)


def test_the_encoders_row_counts_images_and_prompts(monkeypatch):
    """Eight of each in every call."""
    seconds = iter([2.0, 4.0])
    monkeypatch.setattr(card, "median_seconds", lambda device, function: function() and next(seconds))
    row = card.encoders_row("sd15", "fp32")
    assert (row["images_per_second"], row["prompts_per_second"]) == (4, 2)


def test_the_log_says_the_share_of_the_peak(small_model, few_pairs, tmp_path, monkeypatch):
    """It is the policy's forward and backward and the reference's forward, counted, at the pairs a second of a step."""
    monkeypatch.setattr(run_room, "peak_flops", lambda device: 1e12)
    counted = run_room.count_flops(*pair_of(small_model("sd")))
    for loss, flops in (("dpo", sum(counted)), ("sft", counted[0] / 2)):  # SFT takes the winner alone, and no reference
        argv = ["--model", small_model("sd"), "--data", few_pairs, "--loss", loss, "--steps", "1", "--device", "cpu"]
        train.main([*argv, "--batch_size", "2", "--sample_every", "0", "--clip", "tiny", "--out", str(tmp_path / loss)])
        for line in log_of(tmp_path / loss):
            assert line["flops_utilisation"] == pytest.approx(line["pairs_per_second"] * flops / 1e12)


def pair_of(folder):
    """A model, and the inputs of `predict` for one pair."""
    model = loading.load_model(folder)
    model.denoiser.requires_grad_(True)
    return model, *bench.example_inputs(model, 32, 1)


def test_a_cards_peak_is_found_by_its_name(monkeypatch):
    """The more special name counts: an H100 on PCIe reaches less. Another card's name may begin with a known one."""
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
                       ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("Tesla T4", None),
                       ("NVIDIA A10", 125e12), ("NVIDIA A10G", None), ("NVIDIA RTX A1000", None), ("NVIDIA GH200", None),
                       ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert run_room.peak_flops(torch.device("cuda")) == peak
    assert run_room.peak_flops(torch.device("cpu")) is None
