import logging
from pathlib import Path

import pytest

from superoffload.planning.memory_watch import MemoryWatch, level

pytestmark = pytest.mark.unit


def fill(root: Path, used_percent: int) -> None:
    (root / "proc").mkdir(exist_ok=True)
    available = (100 - used_percent) * 2**20
    (root / "proc/meminfo").write_text(f"MemTotal: {100 * 2**20} kB\nMemAvailable: {available} kB\n")


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("superoffload"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_levels() -> None:
    assert [level(used) for used in (0.0, 0.89, 0.90, 0.94, 0.95, 1.0)] == [0, 0, 1, 1, 2, 2]


def test_each_level_is_one_warning(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, 50)
    watch = MemoryWatch(tmp_path)
    counts = []
    for used in (50, 89, 91, 92, 60, 93, 96, 50, 99):
        fill(tmp_path, used)
        watch.check()
        counts.append(len(messages.records))
    assert counts == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert messages.messages[0].startswith("Host memory: 91.0 of 100.0 GiB are in use")
    assert {record.levelname for record in messages.records} == {"WARNING"}


def test_a_jump_over_both_levels_is_one_warning(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, 97)
    watch = MemoryWatch(tmp_path)
    watch.check()
    watch.check()
    assert len(messages.records) == 1


def test_the_limit_of_a_cgroup_counts(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, 50)
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "proc/self/mountinfo").write_text("30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    folder = tmp_path / "sys/fs/cgroup/job"
    folder.mkdir(parents=True)
    for name, content in (("memory.max", 10 * 2**30), ("memory.current", int(9.2 * 2**30))):
        (folder / name).write_text(f"{content}\n")
    (folder / "memory.stat").write_text("inactive_file 0\nactive_file 0\n")
    MemoryWatch(tmp_path).check()
    assert messages.messages[0].startswith("Host memory: 9.2 of 10.0 GiB are in use")


def test_one_rank_of_a_machine_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, 99)
    monkeypatch.setenv("LOCAL_RANK", "1")
    MemoryWatch(tmp_path).check()
    assert messages.records == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "4")  # of another machine: its log shows errors only
    MemoryWatch(tmp_path).check()
    assert [record.levelname for record in messages.records] == ["ERROR"]


def test_a_machine_that_cannot_be_looked_at_is_not_watched(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    MemoryWatch(tmp_path).check()
    assert messages.records == []


def test_this_machine_can_be_looked_at() -> None:
    watch = MemoryWatch()
    watch.check()
    assert watch._warned < 2 or level(0.0) == 0
