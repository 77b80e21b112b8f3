"""Rows longer than the maximum length: truncated, split or dropped; pure."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from superoffload.data.encode import Encoded


def fit(row: Encoded, max_length: int, long_rows: str) -> list[Encoded]:
    """Return what is trained on of a row, by `--long_rows`: the row itself, its first tokens, or its pieces.

    What has no target, and with `drop` a row that is too long, is there without tokens. A row without any target is
    not split.
    """
    if long_rows == "drop" and len(row.input_ids) > max_length:
        return [_emptied(row)]
    split = long_rows == "split" and row.target_tokens > 0
    pieces = row.pieces(max_length) if split else [row.head(max_length)]
    return [piece if piece.target_tokens else _emptied(piece) for piece in pieces]


def lost_tokens(row: Encoded, pieces: Sequence[Encoded]) -> int:
    """Return how many tokens of a row are in none of its pieces; two that meet share one token."""
    shared = sum(bool(one.input_ids and two.input_ids) for one, two in pairwise(pieces))
    return len(row.input_ids) - sum(len(piece.input_ids) for piece in pieces) + shared


def _emptied(row: Encoded) -> Encoded:
    return replace(row, input_ids=[], labels=[])
