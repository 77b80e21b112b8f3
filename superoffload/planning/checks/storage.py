"""The disk of the output folder: free space, and how fast it takes a checkpoint."""

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from superoffload.planning.checks.finding import Finding, Surroundings, gb_per_s, size
from superoffload.planning.machine import disk_free_bytes, existing

WRITTEN_BYTES = 128 * 2**20
BLOCK_BYTES = 8 * 2**20
SLOW_BYTES_PER_S = 300e6
CHECKPOINT_BYTES_PER_PARAMETER = 12  # with fp32 optimizer state, see docs/memory.md
LEAST_BYTES = 2**30


def disk(around: Surroundings) -> Iterator[Finding]:
    """Check the folder that the output goes to: writable, space, and the rate of a flushed write."""
    folder = existing(around.output_dir)
    free = disk_free_bytes(folder)
    problem = rate = None
    target = around.output_dir.absolute()
    innermost = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if not os.path.isdir(innermost):
        folder, problem = innermost, "is no folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = "may not be written to"
    elif not around.quick and free > 4 * WRITTEN_BYTES:
        try:
            rate = write_rate(folder)
        except OSError as error:
            problem = f"cannot be written to: {error.strerror}"
        else:
            around.measured["disk_write_bytes_per_s"] = rate
    yield disk_finding(folder, free, rate, problem)


def write_rate(folder: Path, nbytes: int = WRITTEN_BYTES) -> float:
    """Write a file and flush it to the disk; return bytes per second. The file has no name, so it never remains."""
    block = os.urandom(BLOCK_BYTES)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(nbytes // BLOCK_BYTES):
            file.write(block)
        os.fsync(file.fileno())
        return nbytes / (time.perf_counter() - started)


def disk_finding(folder: Path, free_bytes: int, rate: float | None, problem: str | None) -> Finding:
    """Judge the disk: broken if it takes nothing, slow if a checkpoint takes minutes."""
    line = partial(Finding, name="disk", looked_at=str(folder))
    if problem:
        return line(found=problem, verdict="broken", fix="Choose another --output_dir.")
    billions = free_bytes / CHECKPOINT_BYTES_PER_PARAMETER / 1e9
    found = f"{size(free_bytes)} free, enough for a checkpoint of {billions:.1f} billion parameters"
    if free_bytes < LEAST_BYTES:
        return line(
            found=found,
            verdict="broken",
            fix=f"Choose another --output_dir, or free some space:\n$ du -xh {folder} | sort -h | tail",
        )
    if rate is None:
        return line(found=f"{found}; not timed", verdict="good")
    minutes = 8e9 * CHECKPOINT_BYTES_PER_PARAMETER / rate / 60
    slow = rate < SLOW_BYTES_PER_S
    return line(
        found=f"{found}; written at {gb_per_s(rate)}, so a checkpoint of 8 billion takes {minutes:.1f} min",
        verdict="slow" if slow else "good",
        fix="Let --output_dir be on a local disk, or save less often (--save_minutes)." if slow else "",
    )
