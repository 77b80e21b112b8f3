"""Lengths -> packs, by best-fit decreasing; pure, NumPy only."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Packs:
    """Which rows share a pack.

    `slots`, int64 `[rows]`, lists the rows pack by pack; each slot is a position in the order of decreasing length.
    Pack `i` holds `slots[bounds[i]:bounds[i + 1]]`, with `bounds` int64 `[packs + 1]`. Slots are positions and not
    rows, because rows of equal length can swap without changing the size of any pack.
    """

    slots: Indices
    bounds: Indices

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self.bounds) - 1

    def rows(self, lengths: Indices, rng: np.random.Generator | None = None) -> Indices:
        """Return the rows pack by pack, int64 `[rows]`; with `rng`, rows of equal length are shuffled.

        Each epoch can thus combine different rows at the cost of one sort, in the same number of packs.
        """
        if rng is None:
            order = np.argsort(-lengths, kind="stable")
        else:
            order = np.lexsort((rng.random(len(lengths)), -lengths))
        return np.asarray(order[self.slots], dtype=np.int64)


def pack(lengths: Indices, capacity: int) -> Packs:
    """Put lengths into packs of at most `capacity` tokens by best-fit decreasing.

    The longest length goes first; each goes into the pack with the least room that fits it (Johnson 1973: at most
    11/9 of the minimum number of packs, plus a constant). Packs are looked up by their room: the best fit is the
    smallest room of any pack that is at least the length. Raises ValueError if a length is below 1 or above
    `capacity`.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths must be from 1 to {capacity}")
    by_room: dict[int, list[int]] = {}
    rooms = _Rooms(capacity)
    packs: list[list[int]] = []
    for slot, length in enumerate((-np.sort(-lengths)).tolist()):
        room = rooms.least(length)
        if room:
            stack = by_room[room]
            number = stack.pop()
            if not stack:
                rooms.remove(room)
            packs[number].append(slot)
        else:
            room, number = capacity, len(packs)
            packs.append([slot])
        left = room - length
        if left:
            by_room.setdefault(left, []).append(number)
            rooms.add(left)
    sizes = np.fromiter((len(members) for members in packs), dtype=np.int64, count=len(packs))
    slots = np.fromiter((slot for members in packs for slot in members), dtype=np.int64, count=len(lengths))
    return Packs(slots, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]))


class _Rooms:
    """A set of rooms from 1 to the capacity: one bit per room, in blocks, and one bit per block that is not empty."""

    BITS = 512  # per block; searching two short integers is faster than one with as many bits as the capacity

    def __init__(self, capacity: int) -> None:
        self._blocks = [0] * (capacity // self.BITS + 1)
        self._filled = 0

    def add(self, room: int) -> None:
        block, bit = divmod(room, self.BITS)
        self._blocks[block] |= 1 << bit
        self._filled |= 1 << block

    def remove(self, room: int) -> None:
        block, bit = divmod(room, self.BITS)
        self._blocks[block] ^= 1 << bit
        if not self._blocks[block]:
            self._filled ^= 1 << block

    def least(self, length: int) -> int:
        """Return the smallest room that is at least `length`, 0 if there is none."""
        block, bit = divmod(length, self.BITS)
        fitting = self._blocks[block] >> bit
        if fitting:
            return length + _lowest_bit(fitting)
        later = self._filled >> (block + 1)
        if not later:
            return 0
        block += 1 + _lowest_bit(later)
        return block * self.BITS + _lowest_bit(self._blocks[block])


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def one_per_row(rows: int) -> Packs:
    """Put every row into a pack of its own, for training without packing."""
    return Packs(np.arange(rows, dtype=np.int64), np.arange(rows + 1, dtype=np.int64))


def fill(lengths: Indices, packs: Packs, capacity: int) -> float:
    """Return the fraction of the packs' capacity that holds tokens, from 0 to 1."""
    return float(lengths.sum()) / (len(packs) * capacity) if len(packs) else 0.0
