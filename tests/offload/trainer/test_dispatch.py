"""The dispatcher waits for events on the rank's device, and a decision waits for every gradient."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from superoffload.offload.shared.messages import Reply, Task, TaskKind
from superoffload.offload.trainer.dispatch import EventDispatcher
from tests.helpers.fake_cuda import Accelerator, Event

pytestmark = pytest.mark.unit

DEVICE = 3


class Recorder:
    """Take tasks, and note the events that were done by then."""

    pid = 0

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.sent = threading.Event()

    def send(self, task: Task, relieve: Callable[[], None] | None = None) -> None:
        self.tasks.append(task)
        self.sent.set()

    def receive(self, timeout_s: float, doing: str) -> Reply | None:
        return None


def start(accelerator: Accelerator) -> tuple[EventDispatcher, Recorder]:
    def record_event() -> Event:
        event = accelerator.Event()
        event.record()
        return event

    process = Recorder()
    return EventDispatcher(process, record_event, lambda: accelerator.set_device(DEVICE)), process


def test_the_thread_opens_no_context_on_another_device() -> None:
    accelerator = Accelerator()
    dispatcher, process = start(accelerator)
    dispatcher.send(Task(kind=TaskKind.SPECULATE))
    assert process.sent.wait(10)
    dispatcher.close()
    assert accelerator.contexts == {DEVICE}


def test_a_device_that_cannot_be_set_is_reported() -> None:
    accelerator = Accelerator()

    def fail() -> None:
        raise RuntimeError("CUDA error: invalid device ordinal")

    dispatcher = EventDispatcher(Recorder(), accelerator.Event, fail)
    dispatcher.close()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        dispatcher.settle(lambda: None)


def test_a_speculation_is_sent_after_its_gradients_have_arrived() -> None:
    accelerator = Accelerator(immediate=False)
    dispatcher, process = start(accelerator)
    dispatcher.send(Task(kind=TaskKind.SPECULATE))
    (_, event), *_ = accelerator.calls
    assert not process.sent.wait(0.05)
    event.done.set()
    assert process.sent.wait(10)
    dispatcher.close()


def test_settling_waits_for_every_gradient_speculated_or_not() -> None:
    accelerator = Accelerator()
    dispatcher, _ = start(accelerator)
    dispatcher.settle(lambda: None)
    (recorded, event), (waited, same) = accelerator.calls
    assert (recorded, waited) == ("record", "synchronize") and event is same
    dispatcher.close()
