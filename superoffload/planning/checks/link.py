"""Measure copies between a device and host memory: the arena's page-locked regions, torch's pinned memory, pageable."""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from superoffload.offload.shared.state import Arena, ArenaLayout, SubGroupShape
from superoffload.offload.trainer.pinning import page_lock, page_unlock

ARENA, PINNED, PAGEABLE = "arena, page-locked in place", "torch.empty(pin_memory=True)", "pageable"
TO_HOST, TO_DEVICE = "to host", "to device"


def buffers(numel: int, device: str) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], Arena, list[int]]:
    """Return fp32 gradients and bf16 weights of `numel` elements in each kind of memory, the arena and its locks."""
    shape = SubGroupShape(numel=numel, master=torch.float32, moments=torch.float32, weights=torch.bfloat16)
    arena, descriptor = Arena.create(ArenaLayout.plan({0: shape}))
    os.close(descriptor)
    locked = page_lock(arena.transferred(), device)
    pinned = device == "cuda"
    ours = arena.sub_groups[0]
    kinds = {
        ARENA: (ours.gradients, ours.staging),
        PINNED: (
            torch.empty(numel, pin_memory=pinned),
            torch.empty(numel, dtype=torch.bfloat16, pin_memory=pinned),
        ),
        PAGEABLE: (torch.zeros(numel), torch.zeros(numel, dtype=torch.bfloat16)),
    }
    return kinds, arena, locked


def time_s(work: Callable[[], Any], device: str) -> float:
    """Return the time of some work on a device in seconds."""
    if device == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def measure(numel: int, rounds: int, device: str) -> tuple[dict[str, dict[str, float]], bool]:
    """Return the median rates in bytes per second, by kind of memory and direction, and whether page-locking worked.

    The kinds of memory take turns. `device` is "cuda", or "cpu" to rehearse: the copies then stay on the host.
    """
    kinds, arena, locked = buffers(numel, device)
    gradients = torch.randn(numel, device=device)
    weights = torch.empty(numel, dtype=torch.bfloat16, device=device)
    rates: dict[str, dict[str, list[float]]] = {kind: {TO_HOST: [], TO_DEVICE: []} for kind in kinds}
    for number in range(rounds + 1):  # the first warms up
        for kind, (host_gradients, host_weights) in kinds.items():
            down = time_s(partial(host_gradients.copy_, gradients, non_blocking=True), device)
            up = time_s(partial(weights.copy_, host_weights, non_blocking=True), device)
            if number:
                rates[kind][TO_HOST].append(gradients.nbytes / down)
                rates[kind][TO_DEVICE].append(weights.nbytes / up)
    page_unlock(locked, lambda: torch.cuda.synchronize() if device == "cuda" else None)
    complete = len(locked) == len(arena.transferred()) or device != "cuda"
    kinds.clear()
    arena.release()
    medians = {kind: {way: statistics.median(values) for way, values in ways.items()} for kind, ways in rates.items()}
    return medians, complete
