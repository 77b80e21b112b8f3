"""Statistics of a tokenised data set, and how they are printed; pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from superoffload.data import packing
from superoffload.data.rows import RowCounts, TokenizedRows

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BARS = 10
BAR_WIDTH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """The figures of rows, of one source or of all; `lines` shows what each means."""

    counts: RowCounts
    rows: int
    tokens: int
    target_tokens: int
    percentiles: tuple[int, ...]
    histogram: tuple[tuple[int, int], ...]
    longest: int

    def in_short(self) -> str:
        """Return the figures as a part of a line."""
        counts = self.counts
        left_out = "".join(f", {value} {name}" for name, value in self._left_out().items())
        left_out += "".join(f", {name} {value}" for name, value in self._long_rows().items())
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens ({self._target_fraction():.1%} targets), "
            f"median length {self.percentiles[PERCENTILES.index(50)]}, longest {self.longest} | "
            f"{counts.truncated:,} truncated, {counts.dropped:,} dropped, {counts.bad:,} malformed{left_out}"
        )

    def _long_rows(self) -> dict[str, str]:
        """Return what became of rows longer than the maximum length, if there are any that were not truncated."""
        counts = self.counts
        found = {}
        if counts.split:
            without = f", {counts.dropped_pieces:,} without a target dropped" if counts.dropped_pieces else ""
            found["split"] = f"{counts.split:,} into {counts.pieces:,} pieces{without}"
        if counts.too_long:
            found["too long"] = f"{counts.too_long:,} (dropped)"
        return found

    def _left_out(self) -> dict[str, str]:
        """Return what is not trained on within the rows, if there is anything."""
        counts = self.counts
        found = {
            "empty answers": counts.empty_answers,
            "untrained turns": counts.untrained_turns,
            "dropped fields": counts.dropped_fields,
        }
        return {name: f"{value:,}" for name, value in found.items() if value}

    def _target_fraction(self) -> float:
        return self.target_tokens / max(1, self.tokens)

    def figures(self) -> dict[str, str]:
        """Return the figures by name, without the lengths."""
        counts = self.counts
        return {
            "rows": f"{self.rows:,} of {counts.given:,}",
            "truncated": f"{counts.truncated:,} (the start of the answer is kept)",
            "dropped": f"{counts.dropped:,} (no target token within the maximum length)",
            **self._long_rows(),
            "malformed": f"{counts.bad:,}" + (f" (skipped; first: {counts.first_bad})" if counts.bad else ""),
            **self._left_out(),
            "tokens": f"{self.tokens:,}" + (f" ({counts.lost_tokens:,} left out)" if counts.lost_tokens else ""),
            "target tokens": f"{self.target_tokens:,} ({self._target_fraction():.1%})",
        }

    def lines(self) -> list[str]:
        """Return all figures, one per line, with a histogram of the lengths."""
        result = [f"{name:<16} {value}" for name, value in self.figures().items()]
        pairs = zip(PERCENTILES, self.percentiles, strict=True)
        result.append("length           " + "  ".join(f"p{p} {value}" for p, value in pairs) + f"  max {self.longest}")
        most = max((count for _, count in self.histogram), default=1)
        for upper, count in self.histogram:
            bar = "#" * round(BAR_WIDTH * count / most) or ("." if count else "")
            result.append(f"  up to {upper:>7,}  {bar:<{BAR_WIDTH}} {count:,}")
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStatistics(RowStatistics):
    """The figures of one of several sources, and its part in an epoch: its rows, and its fraction of the targets."""

    label: str
    rows_per_epoch: int
    target_share: float

    def short(self) -> str:
        """Return the figures in one line, for the log."""
        return f"  {self.label}: {self.in_short()} | {self._part()}"

    def figures(self) -> dict[str, str]:
        """Return the figures by name, without the lengths."""
        return {**RowStatistics.figures(self), "in an epoch": self._part()}

    def _part(self) -> str:
        rows = "rows and pieces" if self.counts.pieces else "rows"
        return f"{self.rows_per_epoch:,} {rows}, {self.target_share:.1%} of the targets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics(RowStatistics):
    """The figures of a data set: its rows, their packs, and its sources if there are several."""

    packs: int
    fill: float
    packed: bool
    steps_per_epoch: int
    sources: tuple[SourceStatistics, ...] = ()

    def short(self) -> str:
        """Return the figures in one line, for the log."""
        packs = f"{self.packs:,} packs {self.fill:.1%} full" if self.packed else "not packed"
        return f"Data: {self.in_short()} | {packs} | {self.steps_per_epoch:,} steps per epoch"

    def short_lines(self) -> list[str]:
        """Return the figures in one line, and one for each source if there are several."""
        return [self.short(), *(source.short() for source in self.sources)]

    def figures(self) -> dict[str, str]:
        """Return the figures by name, without the lengths."""
        return {
            **RowStatistics.figures(self),
            "packs": f"{self.packs:,}, {self.fill:.2%} full" if self.packed else "none (rows are not packed)",
            "steps per epoch": f"{self.steps_per_epoch:,}",
        }


def describe(
    rows: TokenizedRows, epoch: packing.Indices, packs: packing.Packs, capacity: int, steps: int
) -> Statistics:
    """Return the statistics of rows, and of the packs of `capacity` tokens in an epoch of `steps` steps.

    `epoch`, int64, lists the rows of the epoch. `capacity` is 0 if rows are not packed.
    """
    return Statistics(
        **_figures(rows),
        packs=len(packs),
        fill=packing.fill(rows.lengths[epoch], packs, capacity) if capacity else 0.0,
        packed=capacity > 0,
        steps_per_epoch=steps,
        sources=tuple(_sources(rows, epoch)),
    )


def _sources(rows: TokenizedRows, epoch: packing.Indices) -> Iterator[SourceStatistics]:
    of_row = rows.source_of_row[epoch] if rows.sources else epoch
    targets = rows.targets[epoch]
    for index, (label, part) in enumerate(rows.by_source().items() if rows.sources else ()):
        own = of_row == index
        share = float(targets[own].sum() / max(1, targets.sum()))
        yield SourceStatistics(**_figures(part), label=label, rows_per_epoch=int(own.sum()), target_share=share)


def _figures(rows: TokenizedRows) -> dict[str, Any]:
    """Return the fields of `RowStatistics`."""
    lengths = rows.lengths
    longest = int(lengths.max())
    width = -(-longest // BARS)
    edges = [width * (bar + 1) for bar in range(BARS)]
    counted = np.bincount((lengths - 1) // width, minlength=BARS)
    return {
        "counts": rows.counts,
        "rows": len(np.unique(rows.numbers)),
        "tokens": int(lengths.sum()),
        "target_tokens": int(rows.targets.sum()),
        "percentiles": tuple(int(value) for value in np.percentile(lengths, PERCENTILES)),
        "histogram": tuple(zip(edges, counted.tolist(), strict=True)),
        "longest": longest,
    }
