"""A program whose stderr is a terminal, and what a person sees there.

As a program, this file runs a display: each argument is something that happens, `step`, `warn`, `error` and so on.
"""

from __future__ import annotations

import os
import pty
import signal
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from tests.helpers.forked import Program
from tests.helpers.ranks import environment

ROWS = 40


class Process(Protocol):
    """What Popen and Program have in common."""

    def wait(self, timeout: float, /) -> int:
        """Wait for its end and return its exit status."""

    def kill(self) -> None:
        """Kill it."""


class Terminal:
    """A terminal to which one program writes, and what is on it after the program's end."""

    def __init__(self, columns: int, start: Callable[[str], Process], timeout_s: float = 60, rows: int = ROWS) -> None:
        """Run the program that `start` starts, given the name of the terminal's file, to its end."""
        import pyte

        self.screen = pyte.Screen(max(columns, 120), rows)
        self._stream = pyte.ByteStream(self.screen)
        self._main, side = pty.openpty()
        self.raw = b""
        termios.tcsetwinsize(side, (rows, columns))
        reader = threading.Thread(target=self._read)
        reader.start()
        program = start(os.ttyname(side))
        settings = termios.tcgetattr(side)
        try:
            self.status = program.wait(timeout_s)
            assert termios.tcgetattr(side) == settings
        finally:
            program.kill()
            os.close(side)
            reader.join(60)
            os.close(self._main)

    def _read(self) -> None:
        try:
            while piece := os.read(self._main, 2**16):
                self.raw += piece
                self._stream.feed(piece)
        except OSError:  # Linux reports a closed other side as an error
            pass

    def lines(self) -> list[str]:
        """Return the lines of the screen that are not empty."""
        return [line.rstrip() for line in self.screen.display if line.strip()]


def run_display(words: list[str], columns: int, folder: Path, **env: str) -> Terminal:
    """Run the display below in a forked process, whose stdout is a file in the folder."""
    (folder / "stdout").touch()

    def start(terminal: str) -> Process:
        output: Any = SimpleNamespace(paths=(str(folder / "stdout"), terminal))
        return Program([__file__, *words], environment(**{"TERM": "xterm-256color", **env}), output)

    return Terminal(columns, start)


def _happen(word: str, display: Any, panel: Any) -> None:
    from superoffload import log
    from superoffload.errors import UserError
    from tests.reporting.test_panel import MEMORY, numbers

    if word == "step":
        display.advance(4)
        display.show(numbers(4, 2.5), MEMORY)
        log.steps.info("Step 4 | Loss: 2.5")
    elif word == "warn":
        log.logger.warning("look here")
    elif word == "error":
        log.logger.error("an error " * 12)
    elif word == "other":  # another process on the same terminal
        os.write(2, b"[rank 1] Error: memory ran out\r\n")
    elif word == "break":
        panel.show(numbers(4, 2.5), {"host_bytes": "none"})
    elif word == "grow":
        termios.tcsetwinsize(2, (ROWS, 120))
    elif word == "user":
        raise UserError("--flag: wrong")
    elif word == "bug":
        raise ValueError("a bug")
    elif word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    display.refresh()


def _main(config: Any) -> int:
    from superoffload import log
    from superoffload.reporting.live import LiveDisplay
    from superoffload.reporting.panel import Panel

    log.setup("INFO")
    log.logger.info("before")
    panel = Panel("org/model | superoffload | 1 x CPU", 10, 0)
    with LiveDisplay(panel) as display:
        for word in sys.argv[1:]:
            _happen(word, display, panel)
    log.logger.info("after")
    return 0


if __name__ == "__main__":
    from superoffload import cli

    cli.parse = lambda argv: None  # type: ignore[assignment,return-value]
    cli.run(_main)
