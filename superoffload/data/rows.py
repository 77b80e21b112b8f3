"""Tokenised rows, and what became of those that are not among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What became of the rows that a data set holds.

    `dropped` have no target token within the length, `truncated` lost their end (dropped ones left out),
    `bad` were skipped, `first_bad` says why the first of them was.
    """

    given: int
    dropped: int
    truncated: int
    bad: int
    first_bad: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedRows:
    """Tokenised rows on disk, memory-mapped.

    `table` is a `datasets.Dataset` of `input_ids` and `labels`; `lengths` and `targets`, int64 `[rows]`, are each
    row's tokens and those of them that are predicted.
    """

    table: Any
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    targets: np.ndarray[Any, np.dtype[np.int64]]
    counts: Counts

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.lengths)

    def read(self, indices: Sequence[int]) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Return `input_ids` and `labels`, int32 `[length]` each, of some rows."""
        if not len(indices):
            return []
        rows = self.table[list(indices)]
        return list(zip(rows["input_ids"], rows["labels"], strict=True))

    def select(self, indices: np.ndarray[Any, np.dtype[np.int64]]) -> "TokenisedRows":
        """Return some of the rows, in the order given."""
        return TokenisedRows(
            table=self.table.select(indices),
            lengths=self.lengths[indices],
            targets=self.targets[indices],
            counts=self.counts,
        )
