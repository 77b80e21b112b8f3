"""Which process uses which cores. Pure: core numbers in, core numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Cores = tuple[int, ...]
"""Numbers of logical cores."""

Siblings = Mapping[int, Cores]
"""Logical core -> all logical cores of its physical core; a core that is missing has no siblings."""

NO_SIBLINGS: Siblings = {}


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


def parse_list(text: str) -> Cores:
    """Read a kernel's list of cores, such as "0-3,8"."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return tuple(core for first, _, last in ranges for core in range(int(first), int(last or first) + 1))


def share_of_rank(seats: Sequence[Seat], rank: int, siblings: Siblings = NO_SIBLINGS) -> Cores:
    """Return the cores that `rank` may use when the ranks of its host share them fairly.

    Ranks that a launcher has already bound to different cores keep them. Ranks of one host with the same
    cores divide them into contiguous runs (neighbouring numbers share caches and memory) whose lengths differ
    by at most one physical core. If there are fewer physical cores than ranks, the logical ones are divided; if there
    are fewer of those, too, several ranks share a core.
    """
    own = seats[rank]
    sharers = [r for r, seat in enumerate(seats) if seat == own]
    count, index = len(sharers), sharers.index(rank)
    units = _units(own.cores, siblings, count)
    if len(units) < count:
        return units[index % len(units)]
    return _flat(units[index * len(units) // count : (index + 1) * len(units) // count])


def split_cores(cores: Cores, optimizer_fraction: float, siblings: Siblings = NO_SIBLINGS) -> CoreSplit:
    """Give the last `optimizer_fraction` of `cores` to the optimizer process, the rest to the trainer.

    Hyperthreads of one physical core stay together: Adam is limited by memory and vector units, which they share. Each
    process gets at least one physical core, or one logical core if there is a single physical one; if there is a single
    logical core, they share it. Raises ValueError without cores.
    """
    if not cores:
        raise ValueError("no cores to split")
    units = _units(cores, siblings, 2)
    if len(units) == 1:
        return CoreSplit(trainer=cores, optimizer=cores)
    count = min(len(units) - 1, max(1, round(optimizer_fraction * len(units))))
    return CoreSplit(trainer=_flat(units[:-count]), optimizer=_flat(units[-count:]))


def _units(cores: Cores, siblings: Siblings, wanted: int) -> list[Cores]:
    """Group logical cores by physical core, in the order of their lowest numbers; singly if `wanted` are more."""
    physical = sorted({tuple(sorted({*siblings.get(core, ()), core} & set(cores))) for core in cores})
    return physical if len(physical) >= wanted else [(core,) for core in sorted(cores)]


def _flat(units: Sequence[Cores]) -> Cores:
    return tuple(sorted(core for unit in units for core in unit))
