"""Which process uses which cores. Pure: core numbers in, core numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Cores = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a rank runs: its host, and the cores that its launcher allows."""

    host: str
    cores: Cores


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSplit:
    """The cores of a rank's two processes. They overlap only if the rank has a single core."""

    trainer: Cores
    optimizer: Cores


def share_of_rank(seats: Sequence[Seat], rank: int) -> Cores:
    """Return the cores that `rank` may use when the ranks of its host share them fairly.

    Ranks that a launcher has already bound to different cores keep them. Ranks of one host with the same
    cores divide them into contiguous runs (neighbouring numbers share caches and memory) whose lengths differ
    by at most one. If there are fewer cores than ranks, several ranks share a core.
    """
    own = seats[rank]
    sharers = [r for r, seat in enumerate(seats) if seat == own]
    cores, count, index = sorted(own.cores), len(sharers), sharers.index(rank)
    if len(cores) < count:
        return (cores[index % len(cores)],)
    start, stop = index * len(cores) // count, (index + 1) * len(cores) // count
    return tuple(cores[start:stop])


def split_cores(cores: Cores, optimizer_fraction: float) -> CoreSplit:
    """Give the last `optimizer_fraction` of `cores` to the optimizer process, the rest to the trainer.

    Each process gets at least one core; if there is a single core, they share it. Raises ValueError without cores.
    """
    if not cores:
        raise ValueError("no cores to split")
    if len(cores) == 1:
        return CoreSplit(trainer=cores, optimizer=cores)
    count = min(len(cores) - 1, max(1, round(optimizer_fraction * len(cores))))
    return CoreSplit(trainer=cores[:-count], optimizer=cores[-count:])
