"""Signals, save_now and the clock."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from superoffload import config
from superoffload.training.run_control import RunControl


def make(folder: Path, clock: Any = lambda: 0.0, is_rank_0: bool = True, **values: Any) -> RunControl:
    return RunControl(config.build({"model_name": "m", "output_dir": str(folder), **values}), is_rank_0, clock)


@pytest.mark.unit
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_vote_to_stop(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with make(tmp_path) as control:
        assert control.votes() == (0.0, 0.0)
        os.kill(os.getpid(), number)
        assert control.votes() == (1.0, 0.0)
        assert control.stopped_by == signal.Signals(number).name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("seconds_later", "status"), [(1, 7), (10, 128 + signal.SIGTERM)])
def test_a_signal_a_few_seconds_after_the_first_ends_the_process(
    seconds_later: int, status: int, tmp_path: Path
) -> None:
    """A signal right after the first is the same stop, forwarded by the launcher or the recipe."""
    code = (
        "import os, signal, sys\n"
        "from superoffload import config\n"
        "from superoffload.training.run_control import RunControl\n"
        "now = [0.0]\n"
        f"settings = config.build({{'model_name': 'm', 'output_dir': {str(tmp_path)!r}}})\n"
        "with RunControl(settings, True, lambda: now[0]):\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        f"    now[0] += {seconds_later}\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == status


@pytest.mark.unit
def test_a_file_that_the_disk_cannot_look_up_is_not_there(tmp_path: Path) -> None:
    """A network file system may fail for a moment, and this is asked at every step."""
    folder = tmp_path / ("x" * 300)
    with pytest.raises(OSError, match="File name too long"):
        os.stat(folder)
    assert make(folder).votes() == (0.0, 0.0)


@pytest.mark.unit
def test_the_file_and_the_clock_ask_for_a_save(tmp_path: Path) -> None:
    now = [0.0]
    control = make(tmp_path, clock=lambda: now[0], save_minutes=2)
    now[0] = 119.0
    assert control.votes() == (0.0, 0.0)
    now[0] = 121.0
    assert control.votes() == (0.0, 1.0)
    control.saved()
    assert control.votes() == (0.0, 0.0)
    (tmp_path / "save_now").touch()
    assert control.votes() == (0.0, 1.0)
    control.saved()
    assert not (tmp_path / "save_now").exists()
    (tmp_path / "save_now").touch()
    assert make(tmp_path, is_rank_0=False).votes() == (0.0, 0.0)


@pytest.mark.unit
def test_save_steps(tmp_path: Path) -> None:
    control = make(tmp_path, save_steps=3)
    assert [control.wants_save(step, 0.0) for step in (1, 2, 3, 4, 6)] == [False, False, True, False, True]
    assert control.wants_save(1, votes=1.0)
    assert not make(tmp_path).wants_save(3, 0.0)
