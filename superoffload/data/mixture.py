"""Several sources: what each name asks for, what each is called, and which rows an epoch draws from them."""

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from superoffload.data.packing import Indices
from superoffload.errors import UserError

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
DRAWN_ROWS = 2  # in the seeds of random streams, so that each purpose has a stream of its own


@dataclass(frozen=True, slots=True)
class Source:
    """One of the data sets to train on.

    `name` is the hub id, folder or file to open, `label` a short name that no other source has. Of the rows, `share`
    takes a fraction and `count` a number; at most one of them is given.
    """

    name: str
    label: str = ""
    share: float | None = None
    count: int | None = None


def parse(texts: Sequence[str], flag: str = "dataset_name") -> list[Source]:
    """Read the values of a flag: `NAME`, `NAME:SHARE` or `NAME#COUNT` each.

    A file or folder whose whole name is the text is taken as it is. Raises `UserError` if a share or number is out of
    range, or if two values name the same source.
    """
    sources = [_parse(text, flag) for text in texts]
    places = [_place(source.name) for source in sources]
    for position, place in enumerate(places):
        if place in places[:position]:
            raise UserError(
                f"--{flag} {texts[position]}: the same data set as {texts[places.index(place)]}; name it once, and use "
                "--dataset_weights to draw more of its rows"
            )
    labels = _labels(places)
    return [
        Source(source.name, label, source.share, source.count) for source, label in zip(sources, labels, strict=True)
    ]


def name_of(text: str) -> str:
    """Return a value of the flag without its share or number of rows; whole if it would be refused today."""
    try:
        return _parse(text, "dataset_name").name
    except UserError:
        return text


def _parse(text: str, flag: str) -> Source:
    if _exists(text):
        return Source(text)
    name, mark, number = text.rpartition("#")
    if mark and (NUMBER.fullmatch(number) or _exists(name)):
        if not re.fullmatch(r"\d+", number) or int(number) == 0:
            raise UserError(f"--{flag} {text}: after # comes the number of rows to take, a whole number above 0")
        if _is_share(name.rpartition(":")[2]) and not _exists(name):
            raise UserError(f"--{flag} {text}: takes either a share or a number of rows, not both")
        return Source(name, count=int(number))
    name, mark, number = text.rpartition(":")
    if mark and (NUMBER.fullmatch(number) or os.path.isfile(os.path.expanduser(name))):
        if not _is_share(number):
            raise UserError(
                f"--{flag} {text}: after : comes the share of the rows to take, above 0 and at most 1; "
                f"{name}#500 takes 500 rows"
            )
        return Source(name, share=float(number))
    return Source(text)


def _is_share(text: str) -> bool:
    return bool(NUMBER.fullmatch(text)) and 0 < float(text) <= 1


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))


def _place(name: str) -> str:
    """Return what identifies a source: the absolute path of a file or folder, the name of a data set on the hub."""
    return os.path.realpath(os.path.expanduser(name)) if _exists(name) else name


def _labels(places: Sequence[str]) -> list[str]:
    """Return the shortest names that differ: the last part without its ending, then with it, then more parts."""
    choices = [_label_choices(place) for place in places]
    level = [0] * len(places)
    while True:
        labels = [choices[i][min(level[i], len(choices[i]) - 1)] for i in range(len(places))]
        clashing = [i for i, label in enumerate(labels) if labels.count(label) > 1]
        if not clashing:
            return labels
        for i in clashing:
            level[i] += 1


def _label_choices(place: str) -> list[str]:
    parts = [part for part in PurePosixPath(place).parts if part != "/"] or [place]
    last = parts[-1]
    stem = PurePosixPath(last).stem if os.path.isfile(place) else last.partition(":")[0]
    return [stem or last, last, *("/".join(parts[-count:]) for count in range(2, len(parts) + 1)), place]


def rows_per_epoch(sizes: Sequence[int], weights: Sequence[float], labels: Sequence[str]) -> Indices:
    """Return how many rows of each source an epoch draws, int64 `[sources]`.

    An epoch has as many rows as all sources together, divided in proportion to the weights (the rows that rounding
    down leaves go to the largest remainders). Raises `UserError` if a source would get none.
    """
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * sum(sizes)
    counts = np.floor(shares).astype(np.int64)
    left = sum(sizes) - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:left]] += 1
    for label, count in zip(labels, counts.tolist(), strict=True):
        if not count:
            raise UserError(
                f"--dataset_weights {' '.join(f'{weight:g}' for weight in weights)}: an epoch of {sum(sizes)} rows "
                f"would hold none of {label}; give it more weight, or leave it out"
            )
    return np.asarray(counts, dtype=np.int64)


def draw(source_of_row: Indices, counts: Indices, seed: int, epoch: int) -> Indices:
    """Draw the rows of an epoch, with replacement: `counts[i]` rows of source `i`; int64 `[sum of counts]`."""
    rng = np.random.default_rng([seed, epoch, DRAWN_ROWS])
    drawn = []
    for source, count in enumerate(counts.tolist()):
        rows = np.flatnonzero(source_of_row == source)
        drawn.append(rows[rng.integers(len(rows), size=count)])
    return np.concatenate(drawn)
