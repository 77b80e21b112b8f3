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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.helpers.forked import Program
from tests.helpers.ranks import environment

ROWS = 40


class Terminal:
    """What a forked program has written to a terminal, after its end."""

    def __init__(self, words: list[str], columns: int, folder: Path, **env: str) -> None:
        """Run the display below until its end on a terminal of so many columns."""
        import pyte

        self.screen = pyte.Screen(max(columns, 120), ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self._main, side = pty.openpty()
        self.raw = b""
        termios.tcsetwinsize(side, (ROWS, columns))
        settings = termios.tcgetattr(side)
        reader = threading.Thread(target=self._read)
        reader.start()
        (folder / "stdout").touch()
        output: Any = SimpleNamespace(paths=(str(folder / "stdout"), os.ttyname(side)))
        env = {"TERM": "xterm-256color", **env}
        program = Program([__file__, *words], environment(**env), output)
        try:
            self.status = program.wait(60)
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
