"""Tokenised rows -> the batches of each step, determined by (seed, epoch)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from superoffload.config import DataSettings, TrainingSettings
from superoffload.data import formats, mixture, packing, sources, statistics
from superoffload.data.cache import DatasetSpec, check, join, load_tokenized
from superoffload.data.collate import Batch, Layout, collate, targets_by_source
from superoffload.data.encode import Encoder
from superoffload.data.folders import may_have_configs
from superoffload.data.rows import TokenizedRows
from superoffload.errors import BadRow, UserError
from superoffload.protocols import Tokenizer

ROWS_AT_A_TIME = 1000  # in memory, when all rows are read


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts to answer during a run: their texts, their tokens, and the tokens that end an answer."""

    texts: Sequence[str] = ()
    ids: Sequence[Sequence[int]] = ()
    end_ids: Sequence[int] = ()


def load(tokenizer: Tokenizer, settings: DataSettings, seed: int) -> tuple[TokenizedRows, TokenizedRows | None]:
    """Return the rows to train on, and the held-out rows or None if the settings ask for none.

    Held-out rows are those of `--eval_dataset`, or a percentage of each source drawn with `seed`. Each machine
    tokenises once; see `cache.load_tokenized`. Raises `UserError` if a data set cannot be used.
    """
    specs = _specs(settings, seed)
    held_out = _held_out(settings)
    every = [*specs.values(), *([held_out] if held_out else [])]
    if len(every) > 1:
        for spec in every:  # a mistake in the last one shows before the first one has been tokenised
            check(spec, settings)
    rows = join({label: load_tokenized(spec, tokenizer, settings) for label, spec in specs.items()})
    rows = replace(rows, weights=settings.dataset_weights)
    if held_out is not None:
        return rows, load_tokenized(held_out, tokenizer, settings)
    if settings.eval_percentage:
        return split_off(rows, settings.eval_percentage, seed)
    return rows, None


def _specs(settings: DataSettings, seed: int) -> dict[str, DatasetSpec]:
    """Return the data sets to train on by their labels.

    Of several, those that cannot have configs ignore `--dataset_config`, unless none of them can have any.
    """
    asked = mixture.parse(settings.dataset_name)
    with_configs = [source for source in asked if may_have_configs(source.name)] or asked
    return {
        source.label: DatasetSpec(
            name=source.name,
            split=settings.dataset_split,
            percentage=settings.dataset_percentage,
            share=source.share,
            count=source.count,
            shuffled=settings.shuffle_rows,
            seed=seed,
            config=settings.dataset_config if source in with_configs else None,
        )
        for source in asked
    }


def _held_out(settings: DataSettings) -> DatasetSpec | None:
    if settings.eval_dataset is None:
        return None
    [source] = mixture.parse((settings.eval_dataset,), "eval_dataset")
    if source.share is not None or source.count is not None:
        raise UserError(
            f"--eval_dataset {settings.eval_dataset}: takes no share or number of rows; "
            f"--eval_split {settings.eval_split}[:500] takes 500 rows"
        )
    return DatasetSpec(name=source.name, split=settings.eval_split, flag="eval_dataset", config=settings.eval_config)


def tokenize_prompts(texts: Sequence[str], tokenizer: Tokenizer, settings: DataSettings) -> Prompts:
    """Tokenise prompts as they are in the rows of the training data, of which the first source decides the format.

    The tokens that end an answer are there without prompts too. Raises `UserError` as `load` does.
    """
    kind = kind_of_rows(settings)
    encoder = Encoder(tokenizer, settings)
    ids = []
    for text in texts:
        try:
            ids.append(encoder.prompt_ids(text, kind))
        except BadRow as error:
            raise UserError(f"--sample_prompts: {text!r}: {error}") from error
    return Prompts(texts=texts, ids=ids, end_ids=encoder.end_ids(kind))


def kind_of_rows(settings: DataSettings) -> type[formats.Conversation]:
    """Return what the rows of the first source are read as: the first one that is not malformed decides.

    Raises `UserError` as `load` does.
    """
    first, *_ = _specs(settings, seed=0).values()
    rows = sources.open_rows(first.name, first.split, first.flag, first.config)
    shape = formats.detect(sources.columns_of(rows), settings.dataset_format, settings.columns, first.name)
    for row in rows:
        try:
            return type(formats.read(sources.parse(row, rows.features), shape))
        except BadRow:
            continue
    return formats.Pair


def split_off(rows: TokenizedRows, percentage: float, seed: int) -> tuple[TokenizedRows, TokenizedRows]:
    """Split the rows of each source into rows to train on and at least one held-out row.

    The number of rows of each data set and the seed determine the parts, and not which of these rows are dropped: with
    another `--max_length`, no held-out row becomes one to train on. The pieces of one row stay together. Raises
    `UserError` if no row would be left in one of the parts.
    """
    # A separate random stream, so that the held-out rows do not depend on the same numbers as the order of epoch 0.
    rng = np.random.default_rng([seed, 2**32])
    held_out = np.zeros(len(rows), dtype=np.bool_)
    first = first_number = 0
    for label, size in _sizes(rows).items():
        of_source = slice(first, first + size)
        numbers = rows.numbers[of_source] - first_number
        given = (rows.sources[label] if rows.sources else rows.counts).given
        drawn = np.argsort(rng.permutation(given))[numbers]  # when each row is drawn
        held_out[of_source] = drawn < max(1, round(given * percentage / 100))
        of = f" of {label}" if label else ""
        if held_out[of_source].all():
            raise UserError(
                f"--eval_percentage {percentage:g}: none of the {len(np.unique(numbers))} rows{of} would be left to "
                "train on"
            )
        if not held_out[of_source].any():  # others in their place would be rows that another run trains on
            raise UserError(
                f"--eval_percentage {percentage:g}: each of the rows{of} that it draws is dropped, as one longer than "
                "--max_length can be; use larger values"
            )
        first, first_number = first + size, first_number + given
    to_train_on = rows.select(np.flatnonzero(~held_out))
    return to_train_on, replace(rows, weights=()).select(np.flatnonzero(held_out))


def _sizes(rows: TokenizedRows) -> dict[str, int]:
    """Return the number of rows of each source by its label, which is empty if there is one source."""
    if not rows.sources:
        return {"": len(rows)}
    counts = np.bincount(rows.source_of_row, minlength=len(rows.sources))
    return dict(zip(rows.sources, counts.tolist(), strict=True))


class Batches:
    """The micro-batches of each optimizer step on this rank.

    Rows are put into packs once, by their lengths alone. For each epoch, (seed, epoch) determines the order of the
    packs and which of the rows of equal length goes into which pack. Rows therefore share a pack with different rows
    in each epoch, but every epoch has the same number of packs and steps, which is known at the start. An epoch can
    be entered at any pack at the cost of one sort, so a run may be resumed with another number of packs per step.

    If the rows have weights, (seed, epoch) also determines which rows an epoch holds: as many as there are rows,
    drawn from the sources in proportion to the weights, with replacement. Each epoch then has packs of its own, and
    their number and that of the steps can differ slightly between epochs.

    Each step takes the next `packs_per_step` packs. The last step of an epoch takes the
    packs that are left, spread over ranks and micro-batches, and is filled with rows that hold no targets. Every
    row of an epoch appears once in it, and every rank runs the same number of micro-batches.
    """

    def __init__(
        self, rows: TokenizedRows, layout: Layout, training: TrainingSettings, *, rank: int, world_size: int
    ) -> None:
        self._rows = rows
        self.layout = layout
        self._training = training
        # The ranks that share a row get the same rows: they count as one rank, and each cuts out its part.
        self._rank, self._part = divmod(rank, layout.parts)
        self._world_size = world_size // layout.parts
        sizes = _sizes(rows)
        self._per_epoch = (
            mixture.rows_per_epoch(list(sizes.values()), rows.weights, list(sizes)) if rows.weights else None
        )
        self._latest: tuple[int, packing.Indices, packing.Packs] | None = None
        self._packs_in: dict[int, int] = {}
        self._start = (0, 0, 0)
        self._total_steps: int | None = None
        self.packs = self._epoch(0)[1]

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the labels of the sources; none if there is one source."""
        return tuple(self._rows.sources)

    @property
    def longest(self) -> int:
        """Return the most tokens that a row of a batch may hold: a whole pack, or the longest row of the data."""
        if self.layout.packs or self.layout.full_length:
            return self.layout.max_length
        return int(self._rows.lengths.max())

    def _epoch(self, epoch: int) -> tuple[packing.Indices, packing.Packs]:
        """Return the rows of an epoch and the packs of their lengths; the latest ones are kept."""
        if self._latest is not None and (self._per_epoch is None or self._latest[0] == epoch):
            return self._latest[1:]
        rows = np.arange(len(self._rows))
        if self._per_epoch is not None:
            of_row = self._rows.source_of_row if self._rows.sources else np.zeros_like(rows)
            rows = mixture.draw(of_row, self._per_epoch, self._training.seed, epoch)
        lengths = self._rows.lengths[rows]
        packs = packing.pack(lengths, self.layout.max_length) if self.layout.packs else packing.one_per_row(len(rows))
        self._latest = (epoch, rows, packs)
        return rows, packs

    @property
    def packs_per_step(self) -> int:
        """Return the number of packs of one optimizer step, over all ranks; ranks that share a row count as one."""
        return self._training.batch_size * self._training.gradient_accumulation_steps * self._world_size

    def packs_in(self, epoch: int) -> int:
        """Return the number of packs of an epoch; only with weights do epochs differ."""
        known = epoch if self._per_epoch is not None else 0
        if known not in self._packs_in:
            self._packs_in[known] = len(self._epoch(known)[1])
        return self._packs_in[known]

    def steps_in(self, epoch: int, start_pack: int = 0) -> int:
        """Return the number of optimizer steps of an epoch from a pack on; the last step may be incomplete."""
        return -(-max(0, self.packs_in(epoch) - start_pack) // self.packs_per_step)

    def start_at(self, step: int, epoch: int, start_pack: int) -> None:
        """Begin after `step` steps, with pack `start_pack` of an epoch; the run's number of steps follows from that."""
        self._start, self._total_steps = (step, epoch, start_pack), None

    def extent(self) -> dict[str, Any]:
        """Return the numbers of rows, tokens and packs; a resumed run compares them to detect a changed data set."""
        extent: dict[str, Any] = {
            "rows": len(self._rows), "tokens": int(self._rows.lengths.sum()), "packs": len(self.packs)
        }  # fmt: skip
        if self.sources:
            extent["sources"] = {
                label: {"rows": len(part), "tokens": int(part.lengths.sum())}
                for label, part in self._rows.by_source().items()
            }
        return extent

    @property
    def total_steps(self) -> int:
        """Return the number of optimizer steps of the whole run, which is the length of the schedule."""
        if self._total_steps is None:
            self._total_steps = self._count_steps()
        return self._total_steps

    def _count_steps(self) -> int:
        most = self._training.max_steps or math.inf
        steps, first, start_pack = self._start
        for epoch in range(first, self._training.num_train_epochs):
            if steps >= most:
                break
            steps += self.steps_in(epoch, start_pack if epoch == first else 0)
        return int(min(steps, most))

    def statistics(self) -> statistics.Statistics:
        """Return the statistics of the rows, and of their packs in the first epoch."""
        rows, packs = self._epoch(0)
        capacity = self.layout.max_length if self.layout.packs else 0
        return statistics.describe(self._rows, rows, packs, capacity, self.steps_in(0))

    def epoch(self, epoch: int, start_pack: int = 0) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step of an epoch, beginning with pack `start_pack` of its order."""
        accumulation = self._training.gradient_accumulation_steps
        rng = np.random.default_rng([self._training.seed, epoch])
        rows, packs = self._epoch(epoch)
        members = rows[packs.rows(self._rows.lengths[rows], rng)]
        order = rng.permutation(len(packs))
        for first in range(start_pack, len(packs), self.packs_per_step):
            # Dealt out one pack at a time, so that an incomplete last step is spread over ranks and micro-batches.
            own = order[first : first + self.packs_per_step][self._rank :: self._world_size]
            yield [self._batch(own[micro::accumulation], members, packs.bounds) for micro in range(accumulation)]

    def largest_id(self) -> int:
        """Return the largest token in this rank's share of all rows, whether or not an epoch draws them."""
        own = range(self._rank, len(self._rows), self._world_size)
        parts = (own[first : first + ROWS_AT_A_TIME] for first in range(0, len(own), ROWS_AT_A_TIME))
        return max((int(ids.max()) for part in parts for ids, _ in self._rows.read(part)), default=0)

    def held_out(self) -> Iterator[Batch]:
        """Yield this rank's batches of one pass in a fixed order, for evaluation; every rank has the same number.

        Summed over all ranks, losses and `target_tokens` cover every row exactly once, for any `world_size`.
        """
        members = self.packs.rows(self._rows.lengths)
        per_batch = self._training.batch_size * self._world_size
        for first in range(0, len(self.packs), per_batch):
            dealt = np.arange(first, min(first + per_batch, len(self.packs)))
            yield self._batch(dealt[self._rank :: self._world_size], members, self.packs.bounds)

    def _batch(self, packs: packing.Indices, members: packing.Indices, bounds: packing.Indices) -> Batch:
        rows = [members[bounds[pack] : bounds[pack + 1]] for pack in packs.tolist()]
        every = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
        documents = iter(self._rows.read(every.tolist()))
        by_source = None
        if self.sources:
            sources, targets = self._rows.source_of_row[every], self._rows.targets[every]
            by_source = targets_by_source(sources, targets, len(self.sources))
        packed = [[next(documents) for _ in pack] for pack in rows]
        batch = collate(packed, self._training.batch_size, self.layout, by_source)
        return batch.part(self._part, self.layout.parts)
