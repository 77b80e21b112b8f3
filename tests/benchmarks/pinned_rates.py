"""Measure copy rates between a CUDA device and host memory: the arena's page-locked regions and torch's pinned memory.

    python tests/benchmarks/pinned_rates.py

The three kinds of memory take turns, round after round. Writes pinned_rates.md and pinned_rates.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from superoffload.offload.shared.state import Arena, ArenaLayout, SubGroupShape
from superoffload.offload.trainer.pinning import page_lock, page_unlock

HERE = Path(__file__).resolve().parent


def buffers(numel: int) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], Arena, list[int]]:
    """Return fp32 gradients and bf16 weights of `numel` elements in each kind of memory, the arena and its locks."""
    shape = SubGroupShape(numel=numel, master=torch.float32, moments=torch.float32, weights=torch.bfloat16)
    arena, descriptor = Arena.create(ArenaLayout.plan({0: shape}))
    os.close(descriptor)
    locked = page_lock(arena.transferred(), "cuda")
    ours = arena.sub_groups[0]
    kinds = {
        "arena, page-locked in place": (ours.gradients, ours.staging),
        "torch.empty(pin_memory=True)": (
            torch.empty(numel, pin_memory=True),
            torch.empty(numel, dtype=torch.bfloat16, pin_memory=True),
        ),
        "pageable": (torch.zeros(numel), torch.zeros(numel, dtype=torch.bfloat16)),
    }
    return kinds, arena, locked


def time_s(copy: Callable[[], Any]) -> float:
    """Return the device time of a copy in seconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    copy()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def measure(numel: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median rates in GB/s, by kind of memory and direction."""
    kinds, arena, locked = buffers(numel)
    gradients = torch.randn(numel, device="cuda")
    weights = torch.empty(numel, dtype=torch.bfloat16, device="cuda")
    rates: dict[str, dict[str, list[float]]] = {kind: {"to host": [], "to device": []} for kind in kinds}
    for number in range(rounds + 1):  # the first warms up
        for kind, (host_gradients, host_weights) in kinds.items():
            down = time_s(partial(host_gradients.copy_, gradients, non_blocking=True))
            up = time_s(partial(weights.copy_, host_weights, non_blocking=True))
            if number:
                rates[kind]["to host"].append(gradients.nbytes / down / 1e9)
                rates[kind]["to device"].append(weights.nbytes / up / 1e9)
    page_unlock(locked, torch.cuda.synchronize)
    arena.release()
    return {kind: {way: statistics.median(values) for way, values in ways.items()} for kind, ways in rates.items()}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=400_000_000, help="elements of the sub-group")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("pinned_rates.py needs a CUDA device")
    found = {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "numel": options.numel,
        "GB_per_s": measure(options.numel, options.rounds),
    }
    lines = [
        "# Copy rates",
        "",
        f"{found['machine']}, torch {found['torch']}; a sub-group of {options.numel:,} elements, fp32 gradients to the "
        f"host, bf16 weights to the device; medians of {options.rounds} interleaved rounds, GB/s.",
        "",
        "| memory | to host | to device |",
        "| --- | --- | --- |",
        *(f"| {kind} | {ways['to host']:.1f} | {ways['to device']:.1f} |" for kind, ways in found["GB_per_s"].items()),
    ]
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "pinned_rates.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (results / "pinned_rates.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
