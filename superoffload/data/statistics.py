"""Statistics of a tokenised data set, and how they are printed; pure."""

from dataclasses import dataclass

import numpy as np

from superoffload.data import packing
from superoffload.data.rows import RowCounts, TokenizedRows

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BARS = 10
BAR_WIDTH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The figures of a data set; `lines` shows what each means."""

    counts: RowCounts
    rows: int
    tokens: int
    target_tokens: int
    percentiles: tuple[int, ...]
    histogram: tuple[tuple[int, int], ...]
    longest: int
    packs: int
    fill: float
    packed: bool
    steps_per_epoch: int

    def short(self) -> str:
        """Return the figures in one line, for the log."""
        counts = self.counts
        packs = f"{self.packs:,} packs {self.fill:.1%} full" if self.packed else "not packed"
        left_out = "".join(f", {value} {name}" for name, value in self._left_out().items())
        return (
            f"Data: {self.rows:,} rows, {self.tokens:,} tokens ({self._target_fraction():.1%} targets), "
            f"median length {self.percentiles[PERCENTILES.index(50)]}, longest {self.longest} | "
            f"{counts.truncated:,} truncated, {counts.dropped:,} dropped, {counts.bad:,} malformed{left_out} | "
            f"{packs} | {self.steps_per_epoch:,} steps per epoch"
        )

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

    def lines(self) -> list[str]:
        """Return all figures, one per line, with a histogram of the lengths."""
        counts = self.counts
        figures = {
            "rows": f"{self.rows:,} of {counts.given:,}",
            "truncated": f"{counts.truncated:,} (the start of the answer is kept)",
            "dropped": f"{counts.dropped:,} (no target token within the maximum length)",
            "malformed": f"{counts.bad:,}" + (f" (skipped; first: {counts.first_bad})" if counts.bad else ""),
            **self._left_out(),
            "tokens": f"{self.tokens:,}",
            "target tokens": f"{self.target_tokens:,} ({self._target_fraction():.1%})",
            "packs": f"{self.packs:,}, {self.fill:.2%} full" if self.packed else "none (rows are not packed)",
            "steps per epoch": f"{self.steps_per_epoch:,}",
        }
        result = [f"{name:<16} {value}" for name, value in figures.items()]
        pairs = zip(PERCENTILES, self.percentiles, strict=True)
        result.append("length           " + "  ".join(f"p{p} {value}" for p, value in pairs) + f"  max {self.longest}")
        most = max((count for _, count in self.histogram), default=1)
        for upper, count in self.histogram:
            bar = "#" * round(BAR_WIDTH * count / most) or ("." if count else "")
            result.append(f"  up to {upper:>7,}  {bar:<{BAR_WIDTH}} {count:,}")
        return result


def describe(rows: TokenizedRows, packs: packing.Packs, capacity: int, steps: int) -> Statistics:
    """Return the statistics of rows and their packs of `capacity` tokens, which is 0 if rows are not packed."""
    lengths = rows.lengths
    longest = int(lengths.max())
    width = -(-longest // BARS)
    edges = [width * (bar + 1) for bar in range(BARS)]
    counted = np.bincount((lengths - 1) // width, minlength=BARS)
    return Statistics(
        counts=rows.counts,
        rows=len(rows),
        tokens=int(lengths.sum()),
        target_tokens=int(rows.targets.sum()),
        percentiles=tuple(int(value) for value in np.percentile(lengths, PERCENTILES)),
        histogram=tuple(zip(edges, counted.tolist(), strict=True)),
        longest=longest,
        packs=len(packs),
        fill=packing.fill(lengths, packs, capacity) if capacity else 0.0,
        packed=capacity > 0,
        steps_per_epoch=steps,
    )
