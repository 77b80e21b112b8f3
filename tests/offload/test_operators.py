import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from superoffload.offload import operators
from tests.helpers.ranks import REPOSITORY


def make_lock(root: Path, name: str, age_s: float) -> Path:
    folder = root / name
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
    monkeypatch.setattr("superoffload.offload.operators.time.sleep", lambda seconds: actions.pop(0)())
    yield actions
    assert actions == []


@pytest.mark.unit
def test_the_processor_is_asked_for_once_on_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "operators"))
    asked: list[int] = []

    def ask() -> dict[str, object]:
        asked.append(1)
        return {"arch": "X86_64", "flags": ["avx2"]}

    try:
        for _ in range(3):
            operators.processor.cache_clear()  # as another process
            assert operators.processor(ask) == operators.processor(ask) == {"arch": "X86_64", "flags": ["avx2"]}
        assert asked == [1]
        (file,) = (tmp_path / "operators").iterdir()
        file.write_text("{", encoding="utf-8")
        operators.processor.cache_clear()
        assert operators.processor(ask)["arch"] == "X86_64"
        assert asked == [1, 1]
    finally:
        operators.processor.cache_clear()


@pytest.mark.unit
def test_deepspeed_asks_the_remembered_processor() -> None:
    import cpuinfo

    operators.prepare()
    assert cpuinfo.get_cpu_info is operators.processor


@pytest.mark.unit
def test_an_abandoned_lock_is_removed(tmp_path: Path, on_sleep: list[Callable[[], object]]) -> None:
    lock = make_lock(tmp_path, "cpu_adam", age_s=1000)
    on_sleep += [lambda: None]
    operators.clear_abandoned_locks(tmp_path)
    assert not lock.exists()


@pytest.mark.unit
@pytest.mark.usefixtures("on_sleep")
def test_without_a_lock_there_is_no_wait(tmp_path: Path) -> None:
    operators.clear_abandoned_locks(tmp_path)


@pytest.mark.unit
@pytest.mark.usefixtures("on_sleep")
def test_the_lock_of_another_extension_is_left_alone(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, "somebody_elses", age_s=1000)
    operators.clear_abandoned_locks(tmp_path)
    assert lock.exists()


def test_a_running_build_is_waited_for(tmp_path: Path, on_sleep: list[Callable[[], object]]) -> None:
    lock = make_lock(tmp_path, "cpu_adam", age_s=1000)
    wait = [sys.executable, "-c", "input()"]
    with subprocess.Popen(wait, cwd=lock.parent, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL):
        on_sleep += [lambda: None, lambda: None, lock.unlink]  # unlink fails where the lock has been removed
        operators.clear_abandoned_locks(tmp_path)


def test_a_running_build_is_found_through_a_link(tmp_path: Path, on_sleep: list[Callable[[], object]]) -> None:
    lock = make_lock(tmp_path / "here", "cpu_adam", age_s=1000)
    (tmp_path / "link").symlink_to(tmp_path / "here")
    wait = [sys.executable, "-c", "input()"]
    with subprocess.Popen(wait, cwd=lock.parent, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL):
        on_sleep += [lambda: None, lock.unlink]  # unlink fails where the lock has been removed
        operators.clear_abandoned_locks(tmp_path / "link")


@pytest.mark.unit
def test_a_young_lock_is_given_time(tmp_path: Path, on_sleep: list[Callable[[], object]]) -> None:
    lock = make_lock(tmp_path, "deepspeed_shm_comm", age_s=0)
    on_sleep += [lambda: set_age(lock, 100), lambda: set_age(lock, 200), lambda: None]
    operators.clear_abandoned_locks(tmp_path, patience_s=150)
    assert not lock.exists()


@pytest.mark.unit
@pytest.mark.parametrize("age_s", [0, 10])
def test_a_wait_for_a_rank_that_loads_an_operator_is_no_warning(
    age_s: float, tmp_path: Path, on_sleep: list[Callable[[], object]], caplog: pytest.LogCaptureFixture
) -> None:
    lock = make_lock(tmp_path, "cpu_adam", age_s)
    on_sleep += [lambda: None, lock.unlink]
    with caplog.at_level("WARNING", "superoffload"):
        operators.clear_abandoned_locks(tmp_path)
    assert ["Waiting for another process that compiles" in text for text in caplog.messages] == [True] * (age_s > 0)


@pytest.mark.unit
def test_each_environment_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin")
    operators.prepare()
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert folder.name == operators.environment_key()
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    monkeypatch.setattr(operators, "processor_key", lambda: "another")  # a node with the same home folder
    of_another_node = operators.environment_key()
    monkeypatch.setattr(sys, "prefix", "/another")
    assert len({folder.name, of_another_node, operators.environment_key()}) == 3
    operators.prepare()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(folder)  # a folder that is set stays


@pytest.mark.unit
def test_a_build_is_announced_and_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library = tmp_path / "cpu_adam" / "cpu_adam.so"
    with caplog.at_level("INFO", "superoffload"), operators.compiled("cpu_adam"):
        library.parent.mkdir()
        library.touch()
    assert [m.rsplit(" ", 2)[0] for m in caplog.messages] == [
        "Compiling the operator cpu_adam, which takes about a minute, once",
        "Compiled the operator cpu_adam in",
    ]
    caplog.clear()
    with caplog.at_level("INFO", "superoffload"), operators.compiled("cpu_adam"):
        pass
    assert caplog.messages == []


def test_a_killed_build_stops_neither_the_package_nor_the_tests(tmp_path: Path) -> None:
    """Plant the lock of a killed build, and load the operators as the first thing that a test session does."""
    operators.prepare()
    shutil.copytree(Path(os.environ["TORCH_EXTENSIONS_DIR"]) / operators.FUSED, tmp_path / operators.FUSED)
    lock = tmp_path / operators.FUSED / "lock"
    lock.touch()
    set_age(lock, 2 * operators.PATIENCE_S)
    program = (
        "import logging; logging.basicConfig(); from superoffload.offload.worker import fused; print(fused.build())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY, env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert f"Removing {lock}: the process that created it is gone" in result.stderr
    assert result.stdout.strip() == str(tmp_path / operators.FUSED / f"{operators.FUSED}.so")
