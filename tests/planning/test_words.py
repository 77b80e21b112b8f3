"""Numbers and sentences of a plan."""

from dataclasses import replace

import pytest

from superoffload.planning import plan, speed, words
from superoffload.planning.budget.memory import budget
from superoffload.planning.remedies import Capacity, Remedy
from tests.helpers.planning import recipe

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


def test_a_pair_that_is_too_long_for_one_line_takes_two() -> None:
    shape, wanted = recipe("llama-8b")
    need = budget(shape, wanted)
    flags = ("--activation_checkpointing", "--optimizer_state bf16")
    found = plan.make(shape, wanted, Capacity(device=1, host=None), speed.hardware(None, None, 1, None))
    remedies = (Remedy(flags=flags, job=wanted, budget=need),)
    found = replace(found, nearest=None, remedies=remedies, capacity=Capacity(device=2 * need.device_peak, host=None))
    lines = words.lines(found, None, True, None)
    place = lines.index("  --activation_checkpointing")
    second = lines[place + 1]
    assert second.startswith("    and --optimizer_state bf16 ")
    assert second.split()[-3:-1] == [words.gib(need.device_peak), words.gib(need.host_peak)]
    assert lines[place + 2] == "With --optimizer_state bf16, small updates are lost: see docs/memory.md"
