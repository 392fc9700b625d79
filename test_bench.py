"""The benchmark runs, and counts what it says."""

import re

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import train


def test_arithmetic_is_counted_without_computing(small_model):
    """The FLOPs of a pair are those of a real forward and backward, less what fused attention computes twice."""
    argv = ["--model", small_model("sdxl"), "--data", "tiny", "--device", "cpu"]
    side, both, forward, speed = bench.arithmetic(argv)
    pipe = data.load_pipeline(small_model("sdxl"))
    batch = data.collate([data.PreferencePairs("tiny", 32, scan=None)[0]])
    made = data.encode(pipe, None, batch)
    conditioning = data.condition(made["states"], made["pooled"], batch["time_ids"])
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        latents, steps = made["mean"].flatten(0, 1), batch["time_ids"][0, :, 0].long()
        pipe.unet(latents, steps, **conditioning).sample.sum().backward()
    assert (side, both) == (32, counted.get_total_flops()) and speed > 0
    assert 2 * forward < both < 3 * forward  # the first layer's input takes no gradient
    assert train.get_args(argv).lora_rank == 0
    assert both / 3 < bench.arithmetic([*argv, "--lora_rank", "2"])[1] < both  # frozen weights take none


@pytest.mark.slow
def test_every_row_is_measured(small_model, few_pairs, capsys):
    options = "--clip tiny --device cpu --lora_rank 2 --batch_size 4 --micro_batch 2".split()
    bench.main(["--model", small_model("sd"), "--data", few_pairs, *options])
    rows = re.findall(
        r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+)% \|$", capsys.readouterr().out, re.M
    )
    assert len(rows) == 7 and all(float(speed) > 0 for _, speed, *_ in rows)
    assert dict((row[0], row[2]) for row in rows)["diffusers' way"] == "1.00"
