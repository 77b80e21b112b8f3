"""Tokenised rows -> the batches of each step, a function of (seed, epoch)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from superoffload.config import DataSettings, TrainingSettings
from superoffload.data import formats, packing, sources, statistics
from superoffload.data.cache import Request, tokenised
from superoffload.data.collate import Batch, Layout, collate
from superoffload.data.encode import Encoder
from superoffload.data.rows import TokenisedRows
from superoffload.errors import UserError


def load(tokenizer: Any, settings: DataSettings, seed: int) -> tuple[TokenisedRows, TokenisedRows | None]:
    """Return the rows to train on and the held-out ones, None where none are asked for.

    Held-out rows are those of `--eval_dataset`, or a share of the data set drawn by `seed`. Each machine
    tokenises once; see `cache.tokenised`. Raises `UserError`.
    """
    request = Request(name=settings.dataset_name, split=settings.dataset_split, percentage=settings.dataset_percentage)
    rows = tokenised(request, tokenizer, settings)
    if settings.eval_dataset is not None:
        held_out = Request(name=settings.eval_dataset, split=settings.eval_split, flag="eval_dataset")
        return rows, tokenised(held_out, tokenizer, settings)
    if settings.eval_percentage:
        return split_off(rows, settings.eval_percentage, seed)
    return rows, None


def prompts(requests: Sequence[str], tokenizer: Any, settings: DataSettings) -> list[list[int]]:
    """Tokenise requests as the prompts of the rows trained on are. Raises `UserError`."""
    if not requests:
        return []
    rows = sources.open_rows(settings.dataset_name, settings.dataset_split, "dataset_name")
    shape = formats.detect(sources.columns_of(rows), settings.dataset_format, settings.columns)
    encoder = Encoder(tokenizer, settings.chat_template, settings.train_on_prompt)
    return [encoder.prompt_ids(request, in_turns=shape.name == "messages") for request in requests]


def split_off(rows: TokenisedRows, percentage: float, seed: int) -> tuple[TokenisedRows, TokenisedRows]:
    """Split rows into those to train on and at least one held-out row, a function of the seed and their number."""
    count = max(1, round(len(rows) * percentage / 100))
    if count >= len(rows):
        raise UserError(f"--eval_percentage {percentage:g}: {len(rows)} rows leave none to train on")
    # A stream of its own: the order of epoch 0 must not tell which rows were held out.
    drawn = np.random.default_rng([seed, 2**32]).permutation(len(rows))
    return rows.select(np.sort(drawn[count:])), rows.select(np.sort(drawn[:count]))


class Batches:
    """The micro-batches of each optimizer step on this rank.

    Rows are put into packs once, by their lengths alone. Which of the rows of one length goes into which pack,
    and the order of the packs, is drawn anew for each epoch from (seed, epoch): rows meet other rows in each
    epoch, and yet every epoch has the same number of packs and steps, known at the start, and can be entered
    at any step at the cost of one sort.

    Each step takes the next `ranks * accumulation * batch_size` packs. The last step of an epoch takes what is
    left, spread over ranks and micro-batches, and is filled up with rows that do not count: every row appears
    once an epoch, and every rank runs the same number of micro-batches.
    """

    def __init__(self, rows: TokenisedRows, how: Layout, training: TrainingSettings, place: tuple[int, int]) -> None:
        """Take the tokenised rows; `place` is this rank and the number of ranks."""
        self._rows = rows
        self._layout = how
        self._training = training
        self._rank, self._ranks = place
        self.packs = packing.pack(rows.lengths, how.max_length) if how.packs else packing.alone(len(rows))

    @property
    def steps_per_epoch(self) -> int:
        """Count the optimizer steps of one pass over the rows."""
        return steps_per_epoch(len(self.packs), self._training, self._ranks)

    def extent(self) -> dict[str, int]:
        """Count rows, tokens and packs: by them a resumed run notices that its data set has changed."""
        return {"rows": len(self._rows), "tokens": int(self._rows.lengths.sum()), "packs": len(self.packs)}

    @property
    def total_steps(self) -> int:
        """Count the optimizer steps of the whole run, which the schedule spans."""
        steps = self._training.num_train_epochs * self.steps_per_epoch
        return min(steps, self._training.max_steps) if self._training.max_steps else steps

    def statistics(self) -> statistics.Statistics:
        """Gather the figures of the rows and their packs."""
        capacity = self._layout.max_length if self._layout.packs else 0
        return statistics.describe(self._rows, self.packs, capacity, self.steps_per_epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yield, for each step of an epoch from step `start` on, this rank's micro-batches."""
        accumulation = self._training.gradient_accumulation_steps
        rng = np.random.default_rng([self._training.seed, epoch])
        members = self.packs.rows(self._rows.lengths, rng)
        order = rng.permutation(len(self.packs))
        per_step = self._training.batch_size * accumulation * self._ranks
        for step in range(start, self.steps_per_epoch):
            # Dealt like cards, so that an incomplete last step is spread over ranks and micro-batches.
            mine = order[step * per_step : (step + 1) * per_step][self._rank :: self._ranks]
            yield [self._batch(mine[micro::accumulation], members) for micro in range(accumulation)]

    def held_out(self) -> Iterator[Batch]:
        """Yield this rank's batches of one pass in a fixed order, for evaluation: as many on every rank.

        Summed over all ranks, losses and `target_tokens` are those of every row once, for any number of ranks.
        """
        members = self.packs.rows(self._rows.lengths)
        per_round = self._training.batch_size * self._ranks
        for first in range(0, len(self.packs), per_round):
            dealt = np.arange(first, min(first + per_round, len(self.packs)))
            yield self._batch(dealt[self._rank :: self._ranks], members)

    def _batch(self, packs: packing.Indices, members: packing.Indices) -> Batch:
        bounds = self.packs.bounds
        rows = [members[bounds[pack] : bounds[pack + 1]] for pack in packs.tolist()]
        documents = iter(self._rows.read(np.concatenate([*rows, np.zeros(0, dtype=np.int64)]).tolist()))
        return collate([[next(documents) for _ in pack] for pack in rows], self._training.batch_size, self._layout)


def steps_per_epoch(packs: int, training: TrainingSettings, ranks: int) -> int:
    """Count the optimizer steps of one pass over packs, the last one perhaps incomplete."""
    return -(-packs // (training.batch_size * training.gradient_accumulation_steps * ranks))
