"""Measure copy rates between a CUDA device and host memory: the arena's page-locked regions and torch's pinned memory.

    python tests/benchmarks/pinned_rates.py

The three kinds of memory take turns, round after round. Writes pinned_rates.md and pinned_rates.json. --rehearse runs
without a device, where the copies stay on the host and the rates mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from superoffload.offload.shared.state import Arena, ArenaLayout, SubGroupShape
from superoffload.offload.trainer.pinning import page_lock, page_unlock

HERE = Path(__file__).resolve().parent


def buffers(numel: int, device: str) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], Arena, list[int]]:
    """Return fp32 gradients and bf16 weights of `numel` elements in each kind of memory, the arena and its locks."""
    shape = SubGroupShape(numel=numel, master=torch.float32, moments=torch.float32, weights=torch.bfloat16)
    arena, descriptor = Arena.create(ArenaLayout.plan({0: shape}))
    os.close(descriptor)
    locked = page_lock(arena.transferred(), device)
    pinned = device == "cuda"
    ours = arena.sub_groups[0]
    kinds = {
        "arena, page-locked in place": (ours.gradients, ours.staging),
        "torch.empty(pin_memory=True)": (
            torch.empty(numel, pin_memory=pinned),
            torch.empty(numel, dtype=torch.bfloat16, pin_memory=pinned),
        ),
        "pageable": (torch.zeros(numel), torch.zeros(numel, dtype=torch.bfloat16)),
    }
    return kinds, arena, locked


def time_s(copy: Callable[[], Any], device: str) -> float:
    """Return the device time of a copy in seconds."""
    if device == "cpu":
        started = time.perf_counter()
        copy()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    copy()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def measure(numel: int, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Return the median rates in GB/s, by kind of memory and direction."""
    kinds, arena, locked = buffers(numel, device)
    gradients = torch.randn(numel, device=device)
    weights = torch.empty(numel, dtype=torch.bfloat16, device=device)
    rates: dict[str, dict[str, list[float]]] = {kind: {"to host": [], "to device": []} for kind in kinds}
    for number in range(rounds + 1):  # the first warms up
        for kind, (host_gradients, host_weights) in kinds.items():
            down = time_s(partial(host_gradients.copy_, gradients, non_blocking=True), device)
            up = time_s(partial(weights.copy_, host_weights, non_blocking=True), device)
            if number:
                rates[kind]["to host"].append(gradients.nbytes / down / 1e9)
                rates[kind]["to device"].append(weights.nbytes / up / 1e9)
    page_unlock(locked, lambda: torch.cuda.synchronize() if device == "cuda" else None)
    arena.release()
    return {kind: {way: statistics.median(values) for way, values in ways.items()} for kind, ways in rates.items()}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=400_000_000, help="elements of the sub-group")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--rehearse", action="store_true", help="run without a device")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("pinned_rates.py needs a CUDA device")
    found = {
        "machine": "no device (a rehearsal)" if options.rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "numel": options.numel,
        "GB_per_s": measure(options.numel, options.rounds, "cpu" if options.rehearse else "cuda"),
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
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "pinned_rates.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.results / "pinned_rates.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
