"""Compare attention to packs on the CPU with one sdpa per document, and find where float32 gradients stop paying.

    python tests/benchmarks/attention_cpu.py

Times forward and backward of one layer in bf16; the ways take turns and the fastest round counts, in CPU time and on
the clock. The lengths of documents are those of one batch of Alpaca rows, and of packs that are extreme. Then times
backward for single documents with gradients in bf16 and in float32. Writes attention_cpu.md and attention_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from superoffload.model import attention, flash_cpu
from tests.benchmarks.operators import HEAD_SIZE, LENGTHS

WAYS = ("one sdpa per document", "attend")
LONGEST = (16, 48, 96, 160, 256, 384, 512, 1024)
Times = dict[str, float]


def once(lengths: tuple[int, ...], heads: int) -> Times:
    """Return the times of one layer, forward and backward."""
    shape = (1, sum(lengths), heads, HEAD_SIZE)
    states = [torch.randn(shape).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]
    slope = torch.randn(shape).bfloat16()
    times: Times = {}
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    output, _ = attention.attend(torch.nn.Module(), *states, None, document_lengths=lengths)
    times["forward_cpu_s"] = time.process_time() - cpu_s
    output.backward(slope)  # type: ignore[no-untyped-call]
    times["cpu_s"], times["wall_s"] = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return times | {"backward_cpu_s": times["cpu_s"] - times["forward_cpu_s"]}


def fastest(rounds: int, ways: dict[str, Callable[[], Times]]) -> dict[str, Times]:
    """Let the ways take turns; return the smallest of each time by way. The first round warms up."""
    found: dict[str, list[Times]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            times = way()
            if number:
                found[name].append(times)
    return {name: {key: min(one[key] for one in all_) for key in all_[0]} for name, all_ in found.items()}


def compare(lengths: tuple[int, ...], heads: int, rounds: int) -> dict[str, Times]:
    """Return the times of both ways for documents of these lengths."""
    suits = flash_cpu.suits

    def by_sdpa() -> Times:
        flash_cpu.suits = lambda *_: False
        try:
            return once(lengths, heads)
        finally:
            flash_cpu.suits = suits

    return fastest(rounds, dict(zip(WAYS, (by_sdpa, lambda: once(lengths, heads)), strict=True)))


def crossover(length: int, heads: int, rounds: int) -> dict[str, Times]:
    """Return the times of one document with gradients in bf16 and in float32."""
    limit = flash_cpu.FLOAT32_LENGTH

    def with_limit(value: int) -> Times:
        flash_cpu.FLOAT32_LENGTH = value
        try:
            return once((length,), heads)
        finally:
            flash_cpu.FLOAT32_LENGTH = limit

    return fastest(rounds, {"bf16": lambda: with_limit(0), "float32": lambda: with_limit(length)})


def report(found: dict[str, Any]) -> str:
    """Write the measurements as Markdown."""
    lines = [
        "# Attention on the CPU",
        "",
        f"{found['machine']}, torch {found['torch']}. One layer of {found['heads']} heads of {HEAD_SIZE}, bf16; "
        "CPU time, the fastest round.",
        "",
        "| documents | way | forward | backward | together | on the clock |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {case} | {way} | "
            + " | ".join(f"{times[key] * 1e3:.1f} ms" for key in ("forward_cpu_s", "backward_cpu_s", "cpu_s", "wall_s"))
            + " |"
            for case, ways in found["cases"].items()
            for way, times in ways.items()
        ),
        "",
        "| one document of | backward in bf16 | in float32 |",
        "| --- | --- | --- |",
        *(
            f"| {length} | " + " | ".join(f"{one['backward_cpu_s'] * 1e3:.2f} ms" for one in ways.values()) + " |"
            for length, ways in found["lengths"].items()
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--positions", type=int, default=2048, help="of the extreme packs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    total = options.positions
    cases = {
        "Alpaca": LENGTHS,
        "16 tokens": (16,) * (total // 16),
        "512 tokens": (512,) * max(1, total // 512),
        "one document": (total,),
    }
    found = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {options.threads} threads",
        "torch": torch.__version__,
        "heads": options.heads,
        "cases": {name: compare(lengths, options.heads, options.rounds) for name, lengths in cases.items()},
        "lengths": {length: crossover(length, options.heads, options.rounds) for length in LONGEST if length <= total},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "attention_cpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.results / "attention_cpu.md").write_text(report(found), encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
