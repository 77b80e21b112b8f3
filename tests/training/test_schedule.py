"""The learning rate of each step."""

import pytest

from superoffload.training import schedule

pytestmark = pytest.mark.unit


def course(kind: str, total: int, ratio: float) -> list[float]:
    warmup = schedule.warmup_steps(total, ratio)
    return [schedule.factor(kind, step, warmup, total) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_warm_up_rises_to_the_peak(kind: str) -> None:
    assert course(kind, 10, 0.4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_the_course_after_the_warm_up() -> None:
    assert course("constant", 5, 0) == [1.0] * 5
    assert course("linear", 4, 0) == [1.0, 0.75, 0.5, 0.25]
    assert course("cosine", 4, 0) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert course("cosine", 6, 0.3)[2:] == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_odd_lengths() -> None:
    assert course("cosine", 1, 0) == [1.0]
    assert course("cosine", 1, 1) == [1.0]
    assert course("linear", 3, 1) == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert schedule.warmup_steps(100, 0.011) == 2
    assert schedule.factor("cosine", 7, 0, 5) == 0.0
