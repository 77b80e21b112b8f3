"""Tokenised rows, and how many rows of the data set are not among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """How many rows the data set holds, and what became of them.

    `dropped` rows have no target token within the maximum length; `truncated` rows were shortened to it and kept;
    `split` rows became `pieces` that were kept, and `dropped_pieces` that have no target token; `too_long` rows were
    left out for their length; `lost_tokens` are the tokens of all these rows that are in no row that was kept. `bad`
    rows are malformed and were skipped; `first_bad` says what is wrong with the first of them. Over all rows,
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
    split: int = 0
    pieces: int = 0
    dropped_pieces: int = 0
    too_long: int = 0
    lost_tokens: int = 0

    @classmethod
    def total(cls, counts: Mapping[str, "RowCounts"]) -> "RowCounts":
        """Return the sums of the counts of sources, given by label; of texts, the first, after its source's label."""
        values: dict[str, Any] = {}
        for part in fields(cls):
            found = {label: getattr(one, part.name) for label, one in counts.items()}
            texts = [f"{label}: {text}" for label, text in found.items() if isinstance(text, str) and text]
            values[part.name] = (texts or [""])[0] if part.type is str else sum(found.values())
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRows:
    """Tokenised rows on disk, memory-mapped.

    `table` is a `datasets.Dataset` of `input_ids` and `labels`. `lengths` and `targets`, int64 `[rows]`, count the
    tokens and the target tokens of each row. A piece of a longer row is a row here. `numbers`, int64 `[rows]`, says
    from which row of the data set each is; `pieces`, int64 `[rows]`, numbers the pieces of one, from 1, and is 0 for a
    row that was not split.

    If the rows come from several sources, `sources` holds the counts of each by its label, and `source_of_row`, int64
    `[rows]`, numbers in that order where each row is from; else both are empty. `weights`, one per source or none, are
    the proportions in which epochs draw rows from the sources.
    """

    table: Any
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    targets: np.ndarray[Any, np.dtype[np.int64]]
    numbers: np.ndarray[Any, np.dtype[np.int64]]
    pieces: np.ndarray[Any, np.dtype[np.int64]]
    counts: RowCounts
    sources: Mapping[str, RowCounts] = field(default_factory=dict)
    source_of_row: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    weights: tuple[float, ...] = ()

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
        return replace(
            self,
            table=self.table.select(indices),
            lengths=self.lengths[indices],
            targets=self.targets[indices],
            numbers=self.numbers[indices],
            pieces=self.pieces[indices],
            source_of_row=self.source_of_row[indices] if self.sources else self.source_of_row,
        )

    def by_source(self) -> "dict[str, TokenizedRows]":
        """Return the rows of each source by its label, in order; if there is one source, its label is empty."""
        if not self.sources:
            return {"": self}
        result = {}
        for index, (label, counts) in enumerate(self.sources.items()):
            part = self.select(np.flatnonzero(self.source_of_row == index))
            result[label] = replace(part, counts=counts, sources={}, source_of_row=part.source_of_row[:0], weights=())
        return result
