import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from superoffload import config
from superoffload.requests import Requests


def make(folder: Path, clock: Any = lambda: 0.0, speaks: bool = True, **values: Any) -> Requests:
    return Requests(config.build({"model_name": "m", "output_dir": str(folder), **values}), speaks, clock)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_vote_to_stop(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with make(tmp_path) as requests:
        assert requests.votes() == (0.0, 0.0)
        os.kill(os.getpid(), number)
        assert requests.votes() == (1.0, 0.0)
        assert requests.stopped_by == signal.Signals(number).name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("seconds_later", "status"), [(1, 7), (10, 128 + signal.SIGTERM)])
def test_a_signal_some_seconds_after_the_first_ends_the_process_at_once(
    seconds_later: int, status: int, tmp_path: Path
) -> None:
    """What follows at once is the same request, passed on by others."""
    code = (
        "import os, signal, sys\n"
        "from superoffload import config\n"
        "from superoffload.requests import Requests\n"
        "now = [0.0]\n"
        f"settings = config.build({{'model_name': 'm', 'output_dir': {str(tmp_path)!r}}})\n"
        "with Requests(settings, True, lambda: now[0]):\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        f"    now[0] += {seconds_later}\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == status


def test_the_file_and_the_clock_ask_for_a_save(tmp_path: Path) -> None:
    now = [0.0]
    requests = make(tmp_path, clock=lambda: now[0], save_minutes=2)
    now[0] = 119.0
    assert requests.votes() == (0.0, 0.0)
    now[0] = 121.0
    assert requests.votes() == (0.0, 1.0)
    requests.saved()
    assert requests.votes() == (0.0, 0.0)
    (tmp_path / "save_now").touch()
    assert requests.votes() == (0.0, 1.0)
    requests.saved()
    assert not (tmp_path / "save_now").exists()
    (tmp_path / "save_now").touch()
    assert make(tmp_path, speaks=False).votes() == (0.0, 0.0)


def test_save_steps(tmp_path: Path) -> None:
    requests = make(tmp_path, save_steps=3)
    assert [requests.wants_save(step, 0.0) for step in (1, 2, 3, 4, 6)] == [False, False, True, False, True]
    assert requests.wants_save(1, votes=1.0)
    assert not make(tmp_path).wants_save(3, 0.0)
