import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from superoffload import ops


def make_lock(root: Path, name: str, age_s: float) -> Path:
    folder = root / "py311_cpu" / name
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    set_age(lock, age_s)
    return lock


def set_age(lock: Path, age_s: float) -> None:
    os.utime(lock, (time.time() - age_s,) * 2)


@pytest.fixture
def on_sleep(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], object]]]:
    """Replace each sleep between two looks at a lock by the next function of the list; all of them must be used."""
    actions: list[Callable[[], object]] = []
    monkeypatch.setattr("superoffload.ops.time.sleep", lambda seconds: actions.pop(0)())
    yield actions
    assert actions == []


@pytest.mark.unit
def test_an_abandoned_lock_is_removed(tmp_path: Path, on_sleep: list[Callable[[], object]]) -> None:
    lock = make_lock(tmp_path, "cpu_adam", age_s=1000)
    on_sleep += [lambda: None]
    ops.clear_abandoned_locks(tmp_path)
    assert not lock.exists()


@pytest.mark.unit
@pytest.mark.usefixtures("on_sleep")
def test_without_a_lock_there_is_no_wait(tmp_path: Path) -> None:
    ops.clear_abandoned_locks(tmp_path)


@pytest.mark.unit
@pytest.mark.usefixtures("on_sleep")
def test_the_lock_of_another_extension_is_left_alone(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, "somebody_elses", age_s=1000)
    ops.clear_abandoned_locks(tmp_path)
    assert lock.exists()


def test_a_running_build_is_waited_for(tmp_path: Path, on_sleep: list[Callable[[], object]]) -> None:
    lock = make_lock(tmp_path, "cpu_adam", age_s=1000)
    wait = [sys.executable, "-c", "input()"]
    with subprocess.Popen(wait, cwd=lock.parent, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL):
        on_sleep += [lambda: None, lambda: None, lock.unlink]  # unlink fails where the lock has been removed
        ops.clear_abandoned_locks(tmp_path)


@pytest.mark.unit
def test_a_young_lock_is_given_time(tmp_path: Path, on_sleep: list[Callable[[], object]]) -> None:
    lock = make_lock(tmp_path, "deepspeed_shm_comm", age_s=0)
    on_sleep += [lambda: set_age(lock, 100), lambda: set_age(lock, 200), lambda: None]
    ops.clear_abandoned_locks(tmp_path, patience_s=150)
    assert not lock.exists()
