"""Rows of prompts and answers, malformed rows, and the tokenised rows that a file of them becomes."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pytest

from superoffload.config import DataSettings
from superoffload.data.cache import DatasetSpec, load_tokenized
from superoffload.data.rows import TokenizedRows
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer

RawRow = Mapping[str, Any] | bytes

# Malformed rows, and what the error says about each.
BAD_ROWS: list[tuple[RawRow, str]] = [
    ({"prompt": 3, "completion": "a"}, "prompt is int"),
    ({"prompt": "q"}, "completion is missing"),
    (b'{"prompt": "q", "comple', "broken JSON"),
    (b'{"prompt": "q", "completion": "\xff"}', "invalid UTF-8"),
]


class WriteJsonLines(Protocol):
    """Write rows, given as records or as raw bytes, to a file of JSON lines; return the file's name."""

    def __call__(self, rows: Sequence[RawRow], name: str = "rows.jsonl") -> str: ...


def pairs(count: int = 6, answer: str = "yes") -> list[dict[str, str]]:
    """Make rows of the format prompt_completion."""
    return [{"prompt": f"question {n}", "completion": answer} for n in range(count)]


def load(name: str, tokenizer: Tokenizer, **settings: Any) -> TokenizedRows:
    """Tokenise a file of rows."""
    return load_tokenized(DatasetSpec(name=name, split="train"), tokenizer, DataSettings(**settings))


def check_bad_row_is_named_or_skipped(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, bad: RawRow, reason: str, num_proc: int
) -> None:
    """Assert that a malformed row is named in an error, or counted with `skip_bad_rows`."""
    name = jsonl([*pairs(4), bad, *pairs(2)])
    with pytest.raises(UserError, match=f"--dataset_name .*: row 5: {reason}.*--skip_bad_rows"):
        load(name, tokenizer, num_proc=num_proc)
    skipped = load(name, tokenizer, skip_bad_rows=True, num_proc=num_proc)
    assert (skipped.counts.bad, len(skipped), skipped.counts.dropped) == (1, 6, 0)
    assert skipped.counts.first_bad.startswith(f"row 5: {reason}")
