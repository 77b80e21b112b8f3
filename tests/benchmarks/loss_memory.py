"""Measure the loss kernels: time and peak memory of forward and backward through the output head, in bf16.

    python tests/benchmarks/loss_memory.py
    python tests/benchmarks/loss_memory.py --device cuda --width 4096 --positions 16384     # the 8B recipe's head

Each measurement is a process of its own, and the kernels take turns. `plain` computes the logits of every position,
`targets only` those of target positions, `linear_cross_entropy` is torch's own on target positions, and `chunked` is
the one of `superoffload.model.head`. Writes loss_memory.md and loss_memory.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

KERNELS = ("plain", "targets only", "linear_cross_entropy", "chunked")
GIB = 2**30


def measure(kernel: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run forward and backward several times; return the times and the growth of memory at its peak, in bytes."""
    import resource
    import time

    import psutil
    import torch
    from torch.nn import functional

    from superoffload.data.collate import following
    from superoffload.data.encode import IGNORED
    from superoffload.model.head import summed_loss, token_losses

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = torch.float32 if kernel == "reference" else torch.bfloat16
    # Made in bf16, so that the peak before the measurement is not higher than what is kept.
    place: dict[str, Any] = {"dtype": torch.bfloat16, "device": options.device}
    hidden = torch.empty((1, options.positions, options.width), **place).normal_().to(dtype)
    weight = torch.empty((options.vocabulary, options.width), **place).normal_(0, 0.05).to(dtype)
    labels = torch.randint(options.vocabulary, (1, options.positions), device=options.device)
    labels[:, 1::2] = IGNORED
    hidden.requires_grad_()
    weight.requires_grad_()

    def loss() -> torch.Tensor:
        if kernel == "plain":
            return summed_loss(functional.linear(hidden, weight), labels)
        next_labels = following(labels).flatten()
        positions = (next_labels != IGNORED).nonzero().squeeze(1)
        states, targets = hidden.flatten(0, 1).index_select(0, positions), next_labels[positions]
        if kernel == "chunked":
            return token_losses(states, weight, None, targets).sum()
        if kernel == "linear_cross_entropy":
            return functional.linear_cross_entropy(states, weight, targets, reduction="sum")
        return functional.cross_entropy(functional.linear(states, weight).float(), targets, reduction="sum")

    def peak_bytes() -> int:
        if options.device == "cuda":
            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = torch.cuda.memory_allocated() if options.device == "cuda" else psutil.Process().memory_info().rss
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, value, peak = [], 0.0, 0
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        loss_sum = loss()
        (loss_sum / options.positions).backward()
        peak = peak_bytes()  # waits for the device
        times.append(time.perf_counter() - start)
        value = loss_sum.item()
        hidden.grad = weight.grad = None
    return {"times_s": times[1:], "peak_bytes": peak - before, "loss": value}


def report(found: dict[str, Any]) -> str:
    """Write the measurements as Markdown."""
    lines = [
        "# Loss kernels",
        "",
        f"{found['machine']}. Vocabulary {found['vocabulary']:,}, hidden size {found['width']:,}, "
        f"{found['positions']:,} positions, half of them targets, bf16. Forward and backward from the hidden states to "
        f"the gradients of hidden states and weight: fastest of {found['rounds'] * found['repeats']} times (median), "
        f"and the growth of memory at its peak, which includes the weight's gradient, {found['gradient_gib']:.2f} GiB. "
        f"Threads per process: {found['threads']}. The median includes passes that other programs slowed down.",
        "",
        "| kernel | time | peak memory | distance of the loss from float32 |",
        "| --- | --- | --- | --- |",
    ]
    for kernel, result in found["kernels"].items():
        times, peak = result["times_s"], result["peak_bytes"] / GIB
        lines.append(
            f"| {kernel} | {min(times):.2f} s ({statistics.median(times):.2f} s) | {peak:.2f} GiB | "
            f"{abs(result['loss'] / found['reference'] - 1):.1e} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Run all measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="measured passes of each process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each kernel")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return

    def in_a_process(kernel: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, __file__, "--only", kernel, *sys.argv[1:]], stdout=subprocess.PIPE, text=True, check=True
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))

    import torch

    known = [kernel for kernel in KERNELS if kernel != "linear_cross_entropy" or hasattr(torch.nn.functional, kernel)]
    kernels: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for kernel in known:
            result = in_a_process(kernel)
            before = kernels.get(kernel, {"times_s": [], "peak_bytes": 0})
            result["times_s"] = before["times_s"] + result["times_s"]
            result["peak_bytes"] = max(before["peak_bytes"], result["peak_bytes"])
            kernels[kernel] = result
    found = {
        **{name: getattr(options, name) for name in ("machine", "vocabulary", "width", "positions")},
        **{name: getattr(options, name) for name in ("rounds", "repeats", "threads")},
        "gradient_gib": options.vocabulary * options.width * 2 / GIB,
        "reference": in_a_process("reference")["loss"],
        "kernels": kernels,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "loss_memory.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (options.results / "loss_memory.md").write_text(report(found), encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
