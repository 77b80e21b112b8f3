"""Rows of a known shape -> a prompt and the answer to learn; pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superoffload.errors import UserError

TEMPLATE_VERSION = 1
REQUIRED_COLUMNS = ("instruction", "output")


@dataclass(frozen=True, slots=True)
class Example:
    """One row: the text that is given and the text to learn."""

    prompt: str
    answer: str


def check_columns(columns: Sequence[str], name: str) -> None:
    """Raise `UserError` unless the rows have the columns of Alpaca; `input` may be absent."""
    missing = [column for column in REQUIRED_COLUMNS if column not in columns]
    if missing:
        raise UserError(
            f"--dataset_name {name}: no column {' and no column '.join(missing)}; "
            f"its columns are {', '.join(columns) or '(none)'}"
        )


def example(row: Mapping[str, Any], number: int) -> Example:
    """Fill Alpaca's template with a row.

    The text is upstream's: instruction, input where there is one, and response under `###` headings.
    Raises `UserError` naming the row where a value is not text.
    """
    texts = {column: row.get(column) for column in ("instruction", "input", "output")}
    for column, text in texts.items():
        if not isinstance(text, str) and not (column == "input" and text is None):
            raise UserError(f"row {number} of the data set: {column} is {type(text).__name__}, not text")
    prompt = f"### Instruction:\n{texts['instruction']}\n\n"
    if texts["input"] and texts["input"].strip():
        prompt += f"### Input:\n{texts['input']}\n\n"
    return Example(prompt=prompt + "### Response:\n", answer=str(texts["output"]))
