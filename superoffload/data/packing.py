"""Lengths -> packs by best-fit decreasing; pure, NumPy only."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Packs:
    """Which rows share a pack.

    `slots`, int64 `[rows]`, lists the rows pack by pack as places in the order of decreasing length; pack `i`
    holds `slots[bounds[i]:bounds[i + 1]]`, with `bounds` int64 `[packs + 1]`. Places instead of rows, because
    rows of one length can change places without changing any pack's size.
    """

    slots: Indices
    bounds: Indices

    def __len__(self) -> int:
        """Count the packs."""
        return len(self.bounds) - 1

    def rows(self, lengths: Indices, rng: np.random.Generator | None = None) -> Indices:
        """List the rows pack by pack, int64 `[rows]`; `rng` deals rows of the same length anew.

        So each epoch has other rows together at the price of one sort, and always the same number of packs.
        """
        if rng is None:
            order = np.argsort(-lengths, kind="stable")
        else:
            order = np.lexsort((rng.random(len(lengths)), -lengths))
        return np.asarray(order[self.slots], dtype=np.int64)


def pack(lengths: Indices, capacity: int) -> Packs:
    """Put lengths into packs of at most `capacity` tokens by best-fit decreasing.

    The longest first, each into the pack with the least room that still takes it (Johnson 1973, at most
    11/9 of the least number of packs, plus a constant). Packs are kept by their room, and an integer has a bit
    set for each room that some pack has: the lowest set bit from the length on is the best fit, found in a few
    machine words. Raises ValueError for a length below 1 or above `capacity`.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths must be from 1 to {capacity}")
    by_room: dict[int, list[int]] = {}
    rooms = 0
    packs: list[list[int]] = []
    for slot, length in enumerate((-np.sort(-lengths)).tolist()):
        fitting = rooms >> length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + length
            stack = by_room[room]
            number = stack.pop()
            if not stack:
                rooms ^= 1 << room
            packs[number].append(slot)
        else:
            room, number = capacity, len(packs)
            packs.append([slot])
        left = room - length
        if left:
            by_room.setdefault(left, []).append(number)
            rooms |= 1 << left
    sizes = np.fromiter((len(members) for members in packs), dtype=np.int64, count=len(packs))
    slots = np.fromiter((slot for members in packs for slot in members), dtype=np.int64, count=len(lengths))
    return Packs(slots, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]))


def alone(rows: int) -> Packs:
    """Give every row a pack of its own: training without packing."""
    return Packs(np.arange(rows, dtype=np.int64), np.arange(rows + 1, dtype=np.int64))


def fill(lengths: Indices, packs: Packs, capacity: int) -> float:
    """Return the share of the packs' room that tokens take."""
    return float(lengths.sum()) / (len(packs) * capacity) if len(packs) else 0.0
