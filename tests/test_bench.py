"""The benchmark runs, and it counts what it says that it counts."""

import concurrent.futures
import itertools
import os
import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import encode
from extras import bench
from loading import add_lora
from small_runs import forks, fresh

@pytest.mark.slow
def test_arithmetic_is_counted_without_computing(small_model, few_pairs, monkeypatch):
    """The FLOPs of a pair are those of a real forward and backward, without what fused attention computes twice."""
    argv = ["--model", small_model("sdxl"), "--data", few_pairs, "--device", "cpu"]
    counted = bench.arithmetic(argv)
    model = fresh(small_model("sdxl"))
    model.denoiser.requires_grad_(True)
    batch = data.collate([data.ImagePairs(few_pairs, 32)[0]])
    cond = model.conditioning(model.encode_prompts(batch["prompt"]), batch["time_ids"])
    mean, _ = model.encode_images(batch["pixels"])                                      # [1, 2, C, h, w]
    x_t, t = mean.flatten(0, 1), batch["time_ids"][0, :, 0].long()
    with FlopCounterMode(display=False) as both, sdpa_kernel(SDPBackend.MATH):
        model.predict(model.denoiser, x_t, t, cond).sum().backward()
    assert counted.resolution == 32 and counted.policy == both.get_total_flops()
    assert counted.matmul_per_second > 0
    assert 2 * counted.reference < counted.policy < 3 * counted.reference  # the first input takes no gradient
    monkeypatch.setattr(bench, "measure_matmul", lambda device, dtype: None)
    adapter = bench.arithmetic([*argv, "--lora_rank", "2"])
    assert counted.policy / 3 < adapter.policy < counted.policy  # frozen weights take none


def test_a_matmul_of_n_by_n_is_two_n_cubed_flops(monkeypatch):
    monkeypatch.setattr(bench.time, "time", itertools.count().__next__)  # each matmul takes a second
    assert bench.measure_matmul(torch.device("cpu"), torch.float32) == 2 * 1024**3


@pytest.mark.slow
def test_the_peers_step_has_the_loss_of_two_equal_networks_at_first(small_model, few_pairs, monkeypatch):
    """It is log 2, for an adapter and for the whole network, because policy and reference get the same inputs."""
    losses, peers_loss = [], bench.peers_loss

    def noted(trainer, batch):
        loss = peers_loss(trainer, batch)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(bench, "peers_loss", noted)
    monkeypatch.setattr(bench, "STEPS", 3)
    for kind, rank in (("sd", "0"), ("sdxl", "2")):
        argv = ["--model", small_model(kind), "--data", few_pairs, "--device", "cpu", "--loss", "dpo"]
        argv += ["--lora_rank", rank, "--batch_size", "4", "--lr", "1e-3"]
        losses.clear()
        row = bench.peers(argv, 2)
        assert len(losses) == 6 and losses[:2] == pytest.approx([0.693147] * 2, abs=1e-5)
        assert losses[2:] != pytest.approx([0.693147] * 4, abs=1e-3)  # the second step's networks differ
        assert row.pairs_per_second > 0 and row.gib > 0


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_what_a_forward_keeps_grows_by_the_pair(small_model, lora_rank):
    """Every pair adds the same bytes, and far fewer with gradient checkpointing."""
    kept = {}
    for checkpointing in (False, True):
        model = fresh(small_model("sdxl"))
        model.denoiser.requires_grad_(lora_rank == 0)
        if lora_rank:
            add_lora(model, lora_rank, 0)
        if checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        one, two, three = (bench.saved_bytes(model, 32, pairs) for pairs in (1, 2, 3))
        assert three - two == two - one > 0
        kept[checkpointing] = two - one
    assert kept[True] < kept[False] / 3


def test_what_a_forward_keeps_is_what_it_keeps(small_model):
    """The counted bytes are those of real tensors."""
    model = fresh(small_model("sd"))
    model.denoiser.requires_grad_(True)
    weights = {param.data_ptr() for param in model.denoiser.parameters()}
    kept, inputs = {}, bench.example_inputs(model, 32, 2)

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with bench.autocast_of_a_gpu(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.predict(model.denoiser, *inputs)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    untrained = fresh(small_model("sd"))
    untrained.denoiser.requires_grad_(True)
    assert bench.saved_bytes(untrained, 32, 2) == real


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in bench.COUNTED if row[0] in ("sd15", "sd3.5-medium", "flux2-klein")])
def test_the_guides_table_of_sizes_is_what_is_counted(row):
    assert bench.count(*row) in (Path(bench.__file__).parent.parent / "GUIDE.md").read_text()


def test_every_counted_row_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(bench, "count", lambda *row: f"counted {row}")
    bench.main(["--count"])
    assert [line for line in capsys.readouterr().out.splitlines() if "counted" in line] == [f"counted {row}" for row in bench.COUNTED]


def test_encode_takes_what_the_run_takes(small_model, few_pairs):
    """That holds for flags that a preset sets, too: train.py refuses a cache that was made with others."""
    argv = ["--model", small_model("sd"), "--data", few_pairs, "--device", "cpu", "--random_flip"]
    words = bench.encode_options(bench.train_args(argv))
    args = encode.encode_args([*words, "--data", few_pairs, "--out", "cache"])
    assert (args.model, args.device, args.random_flip, args.random_crop) == (argv[1], "cpu", True, False)
    assert args.precision == "fp32" and args.seed == 0


def test_a_mistyped_option_ends_in_one_line():
    with pytest.raises(SystemExit, match="^bench.py: .*--stepps"):
        bench.main(["--stepps", "3"])


def test_a_row_is_a_process_of_its_own():
    assert bench.alone(os.getpid) != os.getpid()


def alone_quickly(function, *args):
    """`bench.alone` in a process that has imported torch already."""
    with concurrent.futures.ProcessPoolExecutor(1, forks) as process:
        return process.submit(function, *args).result()


@pytest.mark.slow
def test_every_row_is_measured(small_model, few_pairs, capsys, monkeypatch):
    monkeypatch.setattr(bench, "alone", alone_quickly)
    options = "--clip tiny --device cpu --lora_rank 2 --batch_size 4 --micro_batch 2".split()
    bench.main(["--model", small_model("sd"), "--data", few_pairs, *options])
    rows = re.findall(
        r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+)% \|$", capsys.readouterr().out, re.MULTILINE
    )
    assert len(rows) == 7 and all(float(speed) > 0 for _, speed, *_ in rows)
    assert {row[0]: row[2] for row in rows}["diffusers' way"] == "1.00"
