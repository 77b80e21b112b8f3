import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from superoffload import ops


def make_lock(root: Path, name: str, age_s: float) -> Path:
    folder = root / "py311_cpu" / name
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    os.utime(lock, (time.time() - age_s,) * 2)
    return lock


def test_an_abandoned_lock_is_removed(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, "cpu_adam", age_s=1000)
    ops.clear_abandoned_locks(tmp_path)
    assert not lock.exists()


def test_nothing_is_done_without_a_lock(tmp_path: Path) -> None:
    before = time.monotonic()
    ops.clear_abandoned_locks(tmp_path)
    assert time.monotonic() - before < 0.5


def test_the_lock_of_another_extension_is_left_alone(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, "somebody_elses", age_s=1000)
    ops.clear_abandoned_locks(tmp_path)
    assert lock.exists()


def test_a_build_under_way_is_waited_for(tmp_path: Path) -> None:
    lock = make_lock(tmp_path, "cpu_adam", age_s=1000)
    builder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], cwd=lock.parent)
    try:
        threading.Timer(2.0, lock.unlink).start()
        before = time.monotonic()
        ops.clear_abandoned_locks(tmp_path)
        assert time.monotonic() - before > 1.5
    finally:
        builder.kill()
        builder.wait()


def test_a_young_lock_is_given_time(tmp_path: Path) -> None:
    make_lock(tmp_path, "deepspeed_shm_comm", age_s=0)
    before = time.monotonic()
    ops.clear_abandoned_locks(tmp_path, patience_s=1.0)
    assert time.monotonic() - before > 0.9
