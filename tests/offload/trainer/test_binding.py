"""Binding applies to every thread, and is undone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from superoffload.offload.trainer.binding import TrainerBinding, read_siblings

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


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_torch_uses_as_many_threads_as_there_are_cores_while_bound() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        binding = TrainerBinding()
        binding.take((min(os.sched_getaffinity(0)),))
        assert torch.get_num_threads() == 1
        binding.release()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_siblings_are_read_as_linux_lists_them(tmp_path: Path) -> None:
    for core, text in {0: "0,4\n", 4: "0,4\n", 1: "1-2\n", 2: "1-2\n"}.items():
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text)
    assert read_siblings((0, 1, 2, 4), tmp_path) == {0: (0, 4), 1: (1, 2), 2: (1, 2), 4: (0, 4)}
    assert read_siblings((0, 3), tmp_path) == {}
