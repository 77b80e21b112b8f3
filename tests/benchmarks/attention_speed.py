"""Compare attention to packs by one call of torch's `varlen_attn` and by one sdpa per document, on a CUDA device.

    python tests/benchmarks/attention_speed.py

First checks that both give the same outputs and gradients, for several sizes of heads, dtypes and windows. Then times
forward and backward of one layer of an 8B Llama on a pack of short documents; the kernels take turns. --rehearse runs
without a device, with a stand-in for torch's kernel. Writes attention_speed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from superoffload.model import attention
from tests.helpers.varlen import reference

HEADS, KV_HEADS, SIZE = 32, 8, 128


def distances() -> dict[str, float]:
    """Return how far the kernels differ, relative to the largest element; the largest over windows."""
    found = {}
    for size in (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float16):
            values = [attention.distance_from_sdpa(size, dtype, window) for window in (None, 2, 7, 1000)]
            found[f"heads of {size}, {str(dtype).removeprefix('torch.')}"] = max(values)
    return found


def times_s(length: int, documents: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Return the times of forward and backward of one layer, by kernel."""
    lengths = [length // documents] * documents
    lengths[0] += length - sum(lengths)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    options = {"document_lengths": lengths, "cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS  # type: ignore[assignment]
    shapes = [(1, heads, length, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    states = [torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for shape in shapes]

    def once(kernel: Callable[..., Any]) -> float:
        wait = torch.cuda.synchronize if device == "cuda" else bool
        wait()
        started = time.perf_counter()
        output, _ = kernel(module, *states, None, **options)
        output.sum().backward()
        wait()
        return time.perf_counter() - started

    kernels = {"varlen_attn": attention.attend_at_once, "one document at a time": attention.attend}
    found: dict[str, list[float]] = {name: [] for name in kernels}
    for number in range(rounds + 2):  # the first two warm up
        for name, kernel in kernels.items():
            elapsed = once(kernel)
            if number > 1:
                found[name].append(elapsed)
    return found


def main() -> None:
    """Compare, measure and write the results; exit with status 1 if the kernels differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens of the pack")
    parser.add_argument("--documents", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rehearse", action="store_true", help="run without a device")
    options = parser.parse_args()
    if options.rehearse:
        attention.varlen_attn = reference
    elif not torch.cuda.is_available():
        sys.exit("attention_speed.py needs a CUDA device")
    if attention.varlen_attn is None:
        sys.exit(f"torch {torch.__version__} has no varlen_attn")
    found: dict[str, Any] = {"tolerance": attention.TRIAL_TOLERANCE, "distances": distances()}
    device = "cpu" if options.rehearse else "cuda"
    times = times_s(options.length, options.documents, options.rounds, device)
    found["times_s"] = {name: statistics.median(values) for name, values in times.items()}
    found |= {"length": options.length, "documents": options.documents, "torch": torch.__version__}
    options.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    (options.results / "attention_speed.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    if not max(found["distances"].values()) <= attention.TRIAL_TOLERANCE:
        sys.exit("varlen_attn differs from sdpa")


if __name__ == "__main__":
    main()
