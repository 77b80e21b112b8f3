"""Show rows as the model will see them."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from superoffload.data.encode import IGNORED
from superoffload.data.rows import TokenisedRows

GREEN, DIM, RESET = "\033[32m", "\033[2m", "\033[0m"
MARKS = (">>>", "<<<")


def shown_rows(rows: TokenisedRows, tokenizer: Any, count: int, colours: bool) -> Iterator[str]:
    """Write the first rows as text: target tokens green and the others dim, or targets between `>>>` and `<<<`."""
    for number, (ids, labels) in enumerate(rows.read(range(min(count, len(rows)))), 1):
        targets = int(rows.targets[number - 1])
        yield f"--- row {number}: {len(ids)} tokens, {targets} of them targets ---"
        yield shown(ids.tolist(), labels.tolist(), tokenizer, colours)


def shown(ids: list[int], labels: list[int], tokenizer: Any, colours: bool) -> str:
    """Write one row: its tokens as text, runs of target tokens set apart.

    The first token of a row has nothing before it and is never predicted: it is shown as no target.
    """
    counts = [place > 0 and label != IGNORED for place, label in enumerate(labels)]
    text = ""
    for is_target, run in groupby(zip(ids, counts, strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        if colours:
            text += f"{GREEN if is_target else DIM}{piece}{RESET}"
        else:
            text += f"{MARKS[0]}{piece}{MARKS[1]}" if is_target else piece
    return text
