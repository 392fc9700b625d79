"""What a training step costs: variants of one run side by side, each in its own process (memory: CUDA, Linux).

    python bench.py                                        the embedded task, on this machine
    python bench.py --model sd15 --data my_pairs           options of train.py, given to every variant

A group that one forward holds takes one pass; a larger one takes two, the first of which has no gradients and
keeps errors alone: a fourth more of the UNet's arithmetic (policy and reference forward, and the two forwards'
worth of a backward, are four; a second forward makes five), and the memory of one micro-batch.
"""

import concurrent.futures
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
from pathlib import Path

import torch

import train


def memory(peak=False):
    """MiB in use, or at most since the last call for what is in use: the GPU's, else (Linux) the process's."""
    if torch.cuda.is_available():
        used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return used / 2**20
    used = re.search(r"VmHWM:\s+(\d+)" if peak else r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    return int(used) / 2**10


def measure(argv):
    """{"pairs_per_second": median of all steps but the first, "memory": MiB that the first took at most}."""
    error, clip_grad_norm_, used = train.denoising_error, torch.nn.utils.clip_grad_norm_, []

    def before(*inputs):  # the first forward
        used.append(memory()) if not used else None
        return error(*inputs)

    def after(*some):  # all backwards of the first step
        used.append(memory(peak=True)) if len(used) == 1 else None
        return clip_grad_norm_(*some)

    train.denoising_error, torch.nn.utils.clip_grad_norm_ = before, after
    with tempfile.TemporaryDirectory() as out:
        train.main([*argv, "--sample_every", "0", "--save_every", "0", "--out", out])
        log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {"pairs_per_second": statistics.median(record["pairs_per_second"] for record in log[1:]),
            "memory": used[1] - used[0]}


if __name__ == "__main__":
    options = ["--batch_size", "64", "--micro_batch", "8", "--steps", "8", *sys.argv[1:]]
    args = train.get_args(options)
    if args.loss != "rpo":
        sys.exit(f"bench.py: --loss {args.loss} has no groups; take rpo")
    groups = {"one pass": args.micro_batch, "two passes": args.batch_size}
    rows = {}
    for name, group in groups.items():
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows[name] = process.submit(measure, [*options, "--group_size", str(group)]).result()
    print(f"\n{args.model}, {args.device}, {args.precision}, {args.batch_size} pairs a step, {args.micro_batch} a "
          "forward\n")
    print("| group | pairs per second | step, relative | MiB of a step |\n|---|---|---|---|")
    base = rows["one pass"]["pairs_per_second"]
    for name, row in rows.items():
        print(f"| {groups[name]}, {name} | {row['pairs_per_second']:.2f} | {base / row['pairs_per_second']:.2f} "
              f"| {row['memory']:.0f} |")
