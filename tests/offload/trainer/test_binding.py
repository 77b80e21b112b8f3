"""Binding applies to every thread, and is undone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from superoffload.offload.trainer.binding import TrainerBinding

pytestmark = pytest.mark.unit


@pytest.fixture
def helper() -> Iterator[int]:
    """Run a second thread; yield its id."""
    ids: list[int] = []
    stop, started = threading.Event(), threading.Event()

    def work() -> None:
        ids.append(threading.get_native_id())
        started.set()
        stop.wait()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    yield ids[0]
    stop.set()
    thread.join()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_engines_share_one_binding(helper: int) -> None:
    before = os.sched_getaffinity(0)
    first = min(before)
    binding = TrainerBinding()
    binding.take((first,))
    binding.take((max(before),))
    assert os.sched_getaffinity(0) == os.sched_getaffinity(helper) == {first}
    assert binding.available() == tuple(sorted(before))
    binding.release()
    assert os.sched_getaffinity(0) == {first}
    binding.release()
    assert os.sched_getaffinity(0) == os.sched_getaffinity(helper) == before
    binding.release()
    assert os.sched_getaffinity(0) == before
