"""Contenders that take turns, and what their figures come to: medians, spreads, bars, result files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield every name once per round, in the opposite order in every second round: A B B A A B."""
    for number in range(rounds):
        yield from reversed(names) if number % 2 else names


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, the lowest and the highest of them, and how many there are."""

    median: float
    lowest: float
    highest: float
    count: int

    def show(self, form: str) -> str:
        """Write the median, and the lowest and highest value, each in a format such as `.2f`."""
        return f"{self.median:{form}} ({self.lowest:{form}} to {self.highest:{form}})"


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratio(first: Sequence[float], second: Sequence[float]) -> Spread:
    """Return the spread of the quotients of what two contenders found in the same rounds."""
    return spread([a / b for a, b in zip(first, second, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """What a measurement has to reach; its median decides. `form` is the format of the figures."""

    what: str
    limit: float
    found: Spread
    at_least: bool = True
    form: str = ".1f"

    @property
    def reached(self) -> bool:
        """Return whether the median is on the right side of the limit."""
        return self.found.median >= self.limit if self.at_least else self.found.median <= self.limit

    def row(self) -> str:
        """Return a row of the table of `bars_table`."""
        limit = f"{'at least' if self.at_least else 'at most'} {self.limit:{self.form}}"
        return f"| {self.what} | {limit} | {self.found.show(self.form)} | {'yes' if self.reached else '**no**'} |"

    def as_dict(self) -> dict[str, Any]:
        """Return what the result file says of the bar."""
        return {**asdict(self), "reached": self.reached}


def bars_table(bars: Sequence[Bar]) -> list[str]:
    """Return the lines of a Markdown table of bars."""
    return [
        "| what | bar | median (lowest to highest) | reached |",
        "| --- | --- | --- | --- |",
        *(b.row() for b in bars),
    ]


def write(folder: Path, name: str, found: dict[str, Any], lines: Sequence[str]) -> None:
    """Write the figures to FOLDER/NAME.json and the lines to FOLDER/NAME.md, and print the lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(lines) + "\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, end="")
