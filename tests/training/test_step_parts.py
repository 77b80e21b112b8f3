"""Where the time of a step goes."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from superoffload.training.step_parts import StepParts

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the clock by one that is set by hand."""
    hands = SimpleNamespace(now=100.0)
    monkeypatch.setattr("superoffload.distributed.time.perf_counter", lambda: hands.now)
    return hands


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(2, 2)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


def engine(uploaded_s: float = 0.0) -> Any:
    statistics = SimpleNamespace(upload_s=uploaded_s)
    return SimpleNamespace(module=Model(), optimizer=SimpleNamespace(statistics=statistics))


def step(parts: StepParts, clock: Any, model_engine: Any) -> None:
    def batches() -> Iterator[int]:
        clock.now += 1
        yield 0

    clock.now += 50  # a log line, which is in no part
    for _ in parts.waiting_for(batches()):
        clock.now += 2
        if model_engine is not None:
            model_engine.module.head(torch.zeros(2))
        clock.now += 4
        parts.mark("loss")
        clock.now += 8
        parts.mark("backward")
        clock.now += 16
        if model_engine is not None:
            model_engine.optimizer.statistics.upload_s += 6
        parts.mark("optimizer")
        parts.end_step()


def test_parts_are_means_over_steps_and_uploads_are_taken_out_of_the_optimizer(clock: Any) -> None:
    model_engine = engine(uploaded_s=1000.0)
    parts = StepParts(model_engine)
    parts.start()
    for _ in range(3):
        step(parts, clock, model_engine)
    found = parts.take()
    assert found == {"data": 1, "forward": 2, "loss": 4, "backward": 8, "optimizer": 10, "upload": 6}
    assert parts.take() == {}
    step(parts, clock, model_engine)
    assert parts.take()["backward"] == 8


def test_without_a_head_the_loss_is_in_forward(clock: Any) -> None:
    parts = StepParts()
    parts.start()
    step(parts, clock, None)
    assert parts.take() == {"data": 1, "forward": 6, "backward": 8, "optimizer": 16}


def test_an_evaluation_is_in_no_part(clock: Any) -> None:
    model_engine = engine()
    parts = StepParts(model_engine)
    parts.start()
    model_engine.module.eval()
    clock.now += 5
    model_engine.module.head(torch.zeros(2))
    model_engine.module.train()
    parts.start()
    step(parts, clock, model_engine)
    assert parts.take()["forward"] == 2
