"""The learning rate of each step."""

from typing import Any

import pytest
import torch
import transformers

from superoffload import config
from superoffload.training import schedule
from superoffload.training.schedule import Schedule

pytestmark = pytest.mark.unit

FLOOR = {"cosine_with_min_lr": 0.25}  # needs one


def course(kind: str, total: int, warmup: float, **values: Any) -> list[float]:
    values = {"min_lr_ratio": FLOOR.get(kind, 0.0), **values}
    training = config.TrainingSettings(lr_scheduler=kind, warmup=warmup, **values)
    found = schedule.of(training, total)
    return [found.factor(step) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "cosine_with_min_lr", "wsd", "inverse_sqrt"])
def test_the_warm_up_rises_to_the_peak(kind: str) -> None:
    assert course(kind, 10, 0.4)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert course(kind, 10, 4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_the_course_after_the_warm_up() -> None:
    assert course("constant", 5, 0) == [1.0] * 5
    assert course("linear", 4, 0) == [1.0, 0.75, 0.5, 0.25]
    assert course("cosine", 4, 0) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert course("cosine", 6, 0.3)[2:] == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_odd_lengths() -> None:
    assert course("cosine", 1, 0) == [1.0]
    assert course("cosine", 1, 1) == [1.0]
    assert course("linear", 3, 1) == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert course("wsd", 1, 1) == [1.0]
    assert course("wsd", 2, 100, decay=100) == [0.5, 1.0]
    assert Schedule(kind="cosine", total=5).factor(7) == 0.0


@pytest.mark.parametrize(("asked", "steps"), [(0, 0), (0.011, 2), (1, 100), (2, 2), (99, 99), (100, 100), (5000, 100)])
def test_up_to_1_is_a_fraction_and_above_a_number_of_steps(asked: float, steps: int) -> None:
    assert schedule.number_of_steps(100, asked) == steps


def theirs(make: Any, total: int, **values: Any) -> list[float]:
    """Return the factors of a schedule of transformers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, **values)
    found = []
    for _ in range(total):
        found.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("total", [20, 101])
def test_from_the_peak_on_the_schedules_are_those_of_transformers(total: int, warmup: int) -> None:
    ours = course("cosine_with_min_lr", total, warmup, min_lr_ratio=0.2)
    make: Any = transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup
    other = theirs(make, total, num_warmup_steps=warmup, num_training_steps=total, min_lr_rate=0.2)
    assert ours[warmup:] == pytest.approx(other[warmup:])
    assert min(ours[warmup:]) >= 0.2

    ours = course("wsd", total, warmup, decay=10, min_lr_ratio=0.1)
    make = transformers.get_wsd_schedule
    other = theirs(make, total, num_warmup_steps=warmup, num_decay_steps=10, num_training_steps=total, min_lr_ratio=0.1)
    assert ours[warmup:] == pytest.approx(other[warmup:])
    assert ours[warmup : total - 10] == [1.0] * (total - 10 - warmup)

    ours = course("inverse_sqrt", total, warmup)
    other = theirs(transformers.get_inverse_sqrt_schedule, total, num_warmup_steps=warmup)
    assert ours[warmup:] == pytest.approx(other[warmup:])
    assert ours[: max(0, warmup - 1)] == pytest.approx(other[1:warmup])  # their warm-up starts at 0
