"""Measure copy rates between a CUDA device and host memory: the arena's page-locked regions and torch's pinned memory.

    python tests/benchmarks/pinned_rates.py

The three kinds of memory take turns, round after round. Writes pinned_rates.md and pinned_rates.json. --rehearse runs
without a device, where the copies stay on the host and the rates mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from superoffload.planning.checks.link import TO_DEVICE, TO_HOST, measure

HERE = Path(__file__).resolve().parent


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
    rates, _ = measure(options.numel, options.rounds, "cpu" if options.rehearse else "cuda")
    gb_per_s = {kind: {way: rate / 1e9 for way, rate in ways.items()} for kind, ways in rates.items()}
    found = {
        "machine": "no device (a rehearsal)" if options.rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "numel": options.numel,
        "GB_per_s": gb_per_s,
    }
    lines = [
        "# Copy rates",
        "",
        f"{found['machine']}, torch {found['torch']}; a sub-group of {options.numel:,} elements, fp32 gradients to the "
        f"host, bf16 weights to the device; medians of {options.rounds} interleaved rounds, GB/s.",
        "",
        "| memory | to host | to device |",
        "| --- | --- | --- |",
        *(f"| {kind} | {ways[TO_HOST]:.1f} | {ways[TO_DEVICE]:.1f} |" for kind, ways in gb_per_s.items()),
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "pinned_rates.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.results / "pinned_rates.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
