"""Rows of random tokens whose lengths are distributed like those of Alpaca. Pure; NumPy only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from superoffload.data.encode import IGNORED
from superoffload.data.rows import RowCounts, TokenizedRows

# Log-normal distributions with the medians and the means of 999 rows of Alpaca with answers of GPT-4 (alpaca_en_demo),
# in words and punctuation marks, which are about as many as tokens.
TEMPLATE, PROMPT_MEDIAN, PROMPT_SIGMA = 15, 17, 0.65
ANSWER_MEDIAN, ANSWER_SIGMA = 112, 0.85
DESCRIPTION = (
    f"synthetic documents of random tokens: prompts of {TEMPLATE} tokens and a log-normal length (median "
    f"{PROMPT_MEDIAN}, sigma {PROMPT_SIGMA:g}), answers, the targets, of a log-normal length (median {ANSWER_MEDIAN}, "
    f"sigma {ANSWER_SIGMA:g}), as in Alpaca"
)
MEAN = TEMPLATE + PROMPT_MEDIAN * np.exp(PROMPT_SIGMA**2 / 2) + ANSWER_MEDIAN * np.exp(ANSWER_SIGMA**2 / 2)

SPARE = 1.2
"""Packs are never full, and truncated rows are shorter."""
MOST_TOKENS = 1 << 23


@dataclass(frozen=True, slots=True)
class Table:
    """Random rows in memory, read as a `datasets.Dataset` is; the last `targets[i]` tokens of row i are its targets."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    bounds: np.ndarray[Any, np.dtype[np.int64]]
    targets: np.ndarray[Any, np.dtype[np.int64]]

    def __getitem__(self, indices: Sequence[int]) -> dict[str, list[np.ndarray[Any, Any]]]:
        """Return `input_ids` and `labels`, int32 `[length]` each, of some rows."""
        ids = [self.tokens[self.bounds[row] : self.bounds[row + 1]] for row in indices]
        labels = [row.copy() for row in ids]
        for label, index in zip(labels, indices, strict=True):
            label[: len(label) - self.targets[index]] = IGNORED
        return {"input_ids": ids, "labels": labels}


def make(count: int, vocabulary: int, max_length: int, seed: int) -> TokenizedRows:
    """Make rows, the same for the same arguments; longer ones are truncated, as those of a data set are.

    The lengths depend on `count` and `seed` alone, so that configurations with other lengths train on the same rows.
    """
    rng = np.random.default_rng(seed)
    prompts = TEMPLATE + np.rint(rng.lognormal(np.log(PROMPT_MEDIAN), PROMPT_SIGMA, count)).astype(np.int64)
    answers = np.maximum(1, np.rint(rng.lognormal(np.log(ANSWER_MEDIAN), ANSWER_SIGMA, count)).astype(np.int64))
    prompts = np.minimum(prompts, max_length - 1)  # a row without a target is not trained on
    lengths = np.minimum(prompts + answers, max_length)
    targets = lengths - prompts
    bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    tokens = rng.integers(0, vocabulary, int(bounds[-1]), dtype=np.int32)
    counts = RowCounts(given=count, dropped=0, truncated=int((prompts + answers > max_length).sum()), bad=0)
    return TokenizedRows(
        table=Table(tokens, bounds, targets),
        lengths=lengths,
        targets=targets,
        numbers=np.arange(count),
        pieces=np.zeros(count, dtype=np.int64),
        counts=counts,
    )


def enough(packs_per_step: int, max_length: int, steps: int, *, packed: bool) -> int:
    """Return how many rows fill some steps, or if they hold very many tokens, at least two steps."""
    rows_per_pack = max(1.0, max_length / MEAN) if packed else 1.0
    per_step = packs_per_step * rows_per_pack * SPARE
    return int(max(min(per_step * steps, MOST_TOKENS / MEAN), 2 * per_step)) + 1
