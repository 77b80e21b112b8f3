"""A library's error as one line."""

import pytest

from superoffload.errors import first_line

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one line"), "one line"),
        (OSError("\n\n  first \nsecond"), "first"),
        (RuntimeError("windows\r\nnext"), "windows"),
        (KeyError("missing"), "'missing'"),
        (FileNotFoundError(2, "No such file", "x.json"), "[Errno 2] No such file: 'x.json'"),
        (AssertionError(), "AssertionError"),
        (MemoryError(" \n "), "MemoryError"),
    ],
)
def test_the_first_line_with_text_or_else_the_type(error: BaseException, line: str) -> None:
    assert first_line(error) == line
