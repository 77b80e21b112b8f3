"""Show rows as the model sees them."""

import re
from collections.abc import Iterator
from itertools import groupby

from superoffload.data.encode import IGNORED
from superoffload.data.rows import TokenizedRows
from superoffload.protocols import Tokenizer

GREEN, DIM, RESET = "\033[32m", "\033[2m", "\033[0m"
MARKS = ("\u27e6", "\u27e7")  # white square brackets
# A mark in the data, or backslashes before one or before the end of a piece, where a mark may follow.
ESCAPED = re.compile(rf"\\+(?=[{MARKS[0]}{MARKS[1]}]|\Z)|[{MARKS[0]}{MARKS[1]}]")


def shown_rows(rows: TokenizedRows, tokenizer: Tokenizer, count: int, colours: bool) -> Iterator[str]:
    """Yield the first `count` rows as text, each after a heading line; see `shown` for how targets are marked."""
    for index, (ids, labels) in enumerate(rows.read(range(min(count, len(rows))))):
        piece = f", piece {rows.pieces[index]} of a longer row" if rows.pieces[index] else ""
        yield f"--- row {index + 1}{piece}: {len(ids)} tokens, {rows.targets[index]} targets ---"
        yield shown(ids.tolist(), labels.tolist(), tokenizer, colours)


def shown(ids: list[int], labels: list[int], tokenizer: Tokenizer, colours: bool) -> str:
    """Write the tokens of one row as text: targets green and the rest dim, or targets between white square brackets.

    Such a bracket in the text itself has a backslash before it, and so has a backslash before any of the brackets.
    The first token of a row is never predicted, because no token precedes it, so it is not shown as a target.
    """
    targets = [position > 0 and label != IGNORED for position, label in enumerate(labels)]
    text = ""
    for is_target, run in groupby(zip(ids, targets, strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        if colours:
            text += f"{GREEN if is_target else DIM}{piece}{RESET}"
        else:
            piece = ESCAPED.sub(_escape, piece)
            text += f"{MARKS[0]}{piece}{MARKS[1]}" if is_target else piece
    return text


def _escape(found: re.Match[str]) -> str:
    return found.group() * 2 if found.group().startswith("\\") else "\\" + found.group()
