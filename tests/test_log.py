import os
import pty
import re
import subprocess
import sys
import termios

from tests.helpers.ranks import REPOSITORY

PROGRAM = """
import logging, warnings
from superoffload import log
log.setup("INFO")
log.setup("INFO")
log.logger.info("an info")
log.logger.error("an error")
log.logger.debug("a detail")
logging.getLogger("DeepSpeed").info("a library's info")
with log.progress_bar(10, 4) as bar:
    log.logger.info("above the bar")
    bar.update()
"""


def on_a_pipe(rank: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "RANK": rank}, timeout=60,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "")
    return [line.split(maxsplit=2)[2] for line in result.stderr.splitlines()]  # without date and time


def on_a_terminal(rank: str) -> str:
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=side, cwd=REPOSITORY,
                          env={**os.environ, "RANK": rank}) as process:  # fmt: skip
        os.close(side)
        shown = b""
        while piece := _read(main):
            shown += piece
        assert process.wait(timeout=60) == 0
    os.close(main)
    return shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 2**16)
    except OSError:  # Linux reports a closed other side as an error
        return b""


def test_rank_0_writes_each_line_once_and_no_bar() -> None:
    assert on_a_pipe("0") == ["INFO an info", "ERROR an error", "INFO above the bar"]


def test_another_rank_logs_errors_only() -> None:
    assert on_a_pipe("1") == ["ERROR [rank 1] an error"]


def test_a_terminal_shows_steps_percent_and_time_left_below_the_lines() -> None:
    shown = on_a_terminal("0")
    assert " 40%" in shown
    assert "4/10" in shown
    assert re.search(r"5/10 \[[0-9:]+<", shown)
    assert shown.count("INFO above the bar") == 1
    assert "step" not in on_a_terminal("1")
