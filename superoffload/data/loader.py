"""Tokenised rows -> the batches of each step, determined by (seed, epoch)."""

from collections.abc import Iterator, Sequence

import numpy as np

from superoffload.config import DataSettings, TrainingSettings
from superoffload.data import formats, packing, sources, statistics
from superoffload.data.cache import DatasetSpec, load_tokenized
from superoffload.data.collate import Batch, Layout, collate
from superoffload.data.encode import Encoder
from superoffload.data.rows import TokenizedRows
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer


def load(tokenizer: Tokenizer, settings: DataSettings, seed: int) -> tuple[TokenizedRows, TokenizedRows | None]:
    """Return the rows to train on, and the held-out rows or None if the settings ask for none.

    Held-out rows are those of `--eval_dataset`, or a percentage of the data set drawn with `seed`. Each machine
    tokenises once; see `cache.load_tokenized`. Raises `UserError` if a data set cannot be used.
    """
    spec = DatasetSpec(name=settings.dataset_name, split=settings.dataset_split, percentage=settings.dataset_percentage)
    rows = load_tokenized(spec, tokenizer, settings)
    if settings.eval_dataset is not None:
        held_out = DatasetSpec(name=settings.eval_dataset, split=settings.eval_split, flag="eval_dataset")
        return rows, load_tokenized(held_out, tokenizer, settings)
    if settings.eval_percentage:
        return split_off(rows, settings.eval_percentage, seed)
    return rows, None


def tokenize_prompts(prompts: Sequence[str], tokenizer: Tokenizer, settings: DataSettings) -> list[list[int]]:
    """Tokenise prompts as they are in the rows of the training data. Raises `UserError` as `load` does."""
    if not prompts:
        return []
    rows = sources.open_rows(settings.dataset_name, settings.dataset_split, "dataset_name")
    shape = formats.detect(sources.columns_of(rows), settings.dataset_format, settings.columns)
    encoder = Encoder(tokenizer, settings)
    kind = {"messages": formats.Chat, "text": formats.Text}.get(shape.name, formats.Pair)
    return [encoder.prompt_ids(prompt, kind) for prompt in prompts]


def split_off(rows: TokenizedRows, percentage: float, seed: int) -> tuple[TokenizedRows, TokenizedRows]:
    """Split rows into rows to train on and at least one held-out row, determined by their number and the seed.

    Raises `UserError` if no row would be left to train on.
    """
    count = max(1, round(len(rows) * percentage / 100))
    if count >= len(rows):
        raise UserError(f"--eval_percentage {percentage:g}: none of the {len(rows)} rows would be left to train on")
    # A separate random stream, so that the held-out rows do not depend on the same numbers as the order of epoch 0.
    drawn = np.random.default_rng([seed, 2**32]).permutation(len(rows))
    return rows.select(np.sort(drawn[count:])), rows.select(np.sort(drawn[:count]))


class Batches:
    """The micro-batches of each optimizer step on this rank.

    Rows are put into packs once, by their lengths alone. For each epoch, (seed, epoch) determines the order of the
    packs and which of the rows of equal length goes into which pack. Rows therefore share a pack with different rows
    in each epoch, but every epoch has the same number of packs and steps, which is known at the start. An epoch can
    be entered at any step at the cost of one sort.

    Each step takes the next `world_size * accumulation * batch_size` packs. The last step of an epoch takes the
    packs that are left, spread over ranks and micro-batches, and is filled with rows that hold no targets. Every
    row appears once per epoch, and every rank runs the same number of micro-batches.
    """

    def __init__(
        self, rows: TokenizedRows, layout: Layout, training: TrainingSettings, *, rank: int, world_size: int
    ) -> None:
        self._rows = rows
        self.layout = layout
        self._training = training
        self._rank, self._world_size = rank, world_size
        self.packs = packing.pack(rows.lengths, layout.max_length) if layout.packs else packing.one_per_row(len(rows))

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps of one pass over the rows."""
        return steps_per_epoch(len(self.packs), self._training, self._world_size)

    def extent(self) -> dict[str, int]:
        """Return the numbers of rows, tokens and packs; a resumed run compares them to detect a changed data set."""
        return {"rows": len(self._rows), "tokens": int(self._rows.lengths.sum()), "packs": len(self.packs)}

    @property
    def total_steps(self) -> int:
        """Return the number of optimizer steps of the whole run, which is the length of the schedule."""
        steps = self._training.num_train_epochs * self.steps_per_epoch
        return min(steps, self._training.max_steps) if self._training.max_steps else steps

    def statistics(self) -> statistics.Statistics:
        """Return the statistics of the rows and their packs."""
        capacity = self.layout.max_length if self.layout.packs else 0
        return statistics.describe(self._rows, self.packs, capacity, self.steps_per_epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step of an epoch, beginning with step `start`."""
        accumulation = self._training.gradient_accumulation_steps
        rng = np.random.default_rng([self._training.seed, epoch])
        members = self.packs.rows(self._rows.lengths, rng)
        order = rng.permutation(len(self.packs))
        per_step = self._training.batch_size * accumulation * self._world_size
        for step in range(start, self.steps_per_epoch):
            # Dealt out one pack at a time, so that an incomplete last step is spread over ranks and micro-batches.
            own = order[step * per_step : (step + 1) * per_step][self._rank :: self._world_size]
            yield [self._batch(own[micro::accumulation], members) for micro in range(accumulation)]

    def held_out(self) -> Iterator[Batch]:
        """Yield this rank's batches of one pass in a fixed order, for evaluation; every rank has the same number.

        Summed over all ranks, losses and `target_tokens` cover every row exactly once, for any `world_size`.
        """
        members = self.packs.rows(self._rows.lengths)
        per_batch = self._training.batch_size * self._world_size
        for first in range(0, len(self.packs), per_batch):
            dealt = np.arange(first, min(first + per_batch, len(self.packs)))
            yield self._batch(dealt[self._rank :: self._world_size], members)

    def _batch(self, packs: packing.Indices, members: packing.Indices) -> Batch:
        bounds = self.packs.bounds
        rows = [members[bounds[pack] : bounds[pack + 1]] for pack in packs.tolist()]
        documents = iter(self._rows.read(np.concatenate([*rows, np.zeros(0, dtype=np.int64)]).tolist()))
        return collate([[next(documents) for _ in pack] for pack in rows], self._training.batch_size, self.layout)


def steps_per_epoch(packs: int, training: TrainingSettings, world_size: int) -> int:
    """Return the number of optimizer steps of one pass over the packs; the last step may be incomplete."""
    return -(-packs // (training.batch_size * training.gradient_accumulation_steps * world_size))
