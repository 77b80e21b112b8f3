"""Tokenised rows, and how many rows of the data set are not among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """How many rows the data set holds, and what became of them.

    `dropped` rows have no target token within the maximum length; `truncated` rows were shortened to it and kept;
    `bad` rows are malformed and were skipped; `first_bad` says what is wrong with the first of them. Over all rows,
    `empty_answers` say nothing and are not trained on, `untrained_turns` are answers that rows keep out of the loss
    themselves, and `dropped_fields` are those that the chat template does not write.
    """

    given: int
    dropped: int
    truncated: int
    bad: int
    first_bad: str = ""
    empty_answers: int = 0
    untrained_turns: int = 0
    dropped_fields: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRows:
    """Tokenised rows on disk, memory-mapped.

    `table` is a `datasets.Dataset` of `input_ids` and `labels`. `lengths` and `targets`, int64 `[rows]`, count the
    tokens and the target tokens of each row.
    """

    table: Any
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    targets: np.ndarray[Any, np.dtype[np.int64]]
    counts: RowCounts

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def read(self, indices: Sequence[int]) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Return `input_ids` and `labels`, int32 `[length]` each, of the rows at `indices`."""
        if not len(indices):
            return []
        rows = self.table[list(indices)]
        return list(zip(rows["input_ids"], rows["labels"], strict=True))

    def select(self, indices: np.ndarray[Any, np.dtype[np.int64]]) -> "TokenizedRows":
        """Return the rows at `indices`, in that order."""
        return TokenizedRows(
            table=self.table.select(indices),
            lengths=self.lengths[indices],
            targets=self.targets[indices],
            counts=self.counts,
        )
