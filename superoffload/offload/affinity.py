"""Which cores belong to whom. Pure: sets of core numbers in, sets of core numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Cores = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Say where a rank runs: its host and the cores its launcher left it."""

    host: str
    cores: Cores


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSplit:
    """Hold the cores of the two sides of one rank. They overlap only where the rank has a single core."""

    trainer: Cores
    optimizer: Cores


def share_of_rank(seats: Sequence[Seat], rank: int) -> Cores:
    """Return the cores that `rank` may use when every rank on its host takes a fair share.

    Ranks that a launcher has already bound to different cores keep them. Ranks of one host with the same
    cores divide them into contiguous runs (neighbouring numbers share caches and memory) whose lengths differ
    by one at most. With fewer cores than ranks, ranks double up.
    """
    mine = seats[rank]
    sharers = [r for r, seat in enumerate(seats) if seat == mine]
    cores, count, place = sorted(mine.cores), len(sharers), sharers.index(rank)
    if len(cores) < count:
        return (cores[place % len(cores)],)
    start, stop = place * len(cores) // count, (place + 1) * len(cores) // count
    return tuple(cores[start:stop])


def split_cores(cores: Cores, optimizer_fraction: float) -> CoreSplit:
    """Give the last `optimizer_fraction` of `cores` to the optimizer, the rest to the trainer.

    Both sides get at least one core; a rank with a single core shares it.
    """
    if not cores:
        raise ValueError("no cores to split")
    if len(cores) == 1:
        return CoreSplit(trainer=cores, optimizer=cores)
    count = min(len(cores) - 1, max(1, round(optimizer_fraction * len(cores))))
    return CoreSplit(trainer=cores[:-count], optimizer=cores[-count:])
