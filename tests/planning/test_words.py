"""Numbers and sentences of a plan."""

import pytest

from superoffload.planning import words

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0312, "31 ms"), (1.0, "1.0 s"), (75, "75.0 s"), (89.9, "89.9 s"), (90, "1.5 min"), (3600, "60.0 min"),
        (6000, "1.7 h"), (150 * 3600, "6.2 d"), (200 * 86400, "200 d"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (5e6, "5 million"), (70_553_706_496, "70.6 billion")],
)
def test_counts(number: float, text: str) -> None:
    assert words.count(number) == text
