"""The display on a terminal: one panel, drawn again when something has changed, below what must stay visible."""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.errors import ConsoleError, StyleError
from rich.live import Live
from rich.segment import SegmentLines
from rich.text import Text

from superoffload import log
from superoffload.errors import FAILURES, first_line
from superoffload.reporting.display import Display
from superoffload.reporting.panel import Panel
from superoffload.training.metrics import StepMetrics

DRAWING_FAILURES = (*FAILURES, ConsoleError, StyleError)
"""What rich raises, or the terminal; none of it may end a run."""


class _Live(Live):
    """Draws only when something has changed: a draw would erase what another rank, or a killer, has said since."""

    changed = True

    def refresh(self) -> None:
        """Draw again, if there is something new."""
        if self.changed:
            self.changed = False
            super().refresh()


class LiveDisplay(Display):
    """Draws the panel from a thread of its own, so a step costs nothing; a failure ends the display, never the run."""

    def __init__(self, panel: Panel) -> None:
        """Prepare the display; `with` starts it."""
        self._panel = panel
        self._error: BaseException | None = None
        self._console = Console(file=sys.stderr, force_terminal=True, force_interactive=True, highlight=False)
        self._live = _Live(
            console=self._console,
            get_renderable=self._draw,
            refresh_per_second=1,
            redirect_stdout=False,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        """Take over the terminal; log records become events of the display, errors stay above it."""
        log.screen.display = self._take
        self._guarded(self._live.start)
        # The cursor stays visible: a run that is killed could not bring it back.
        self._guarded(lambda: self._console.show_cursor(True))
        self._report()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the terminal; what follows is written below it."""
        self._guarded(self._live.stop)
        self._report()
        log.screen.display = None

    def advance(self, step: int) -> None:
        """Count a step."""
        self._panel.advance(step)
        self._live.changed = True
        self._report()

    def show(self, numbers: StepMetrics, memory: dict[str, int]) -> None:
        """Take the numbers of the steps since the last call."""
        self._panel.show(numbers, memory)

    def refresh(self) -> None:
        """Draw the state of now."""
        self._guarded(self._live.refresh)

    def _draw(self) -> RenderableType:
        """Return what to draw: lines that rich only has to put out, so that a failure to draw them is noticed here.

        The cursor stays on an empty line below, where the terminal's ^C and the lines of other programs do no harm.
        """
        if self._error is None:
            try:
                lines = self._console.render_lines(self._panel, pad=False)
                return SegmentLines([*lines, []], new_lines=True)
            except DRAWING_FAILURES as error:
                self._error = error
        return Text("")

    def _take(self, record: logging.LogRecord, line: str) -> None:
        """Take a log record: the display shows a step's numbers itself, and other messages as events."""
        if record.levelno >= logging.ERROR:
            self._guarded(lambda: self._console.print(Text(line), soft_wrap=True))
        elif record.name != log.steps.name:
            time_of_day = time.strftime("%H:%M:%S", time.localtime(record.created))
            style = "bold magenta" if record.levelno >= logging.WARNING else ""
            self._panel.add_event(time_of_day, record.getMessage(), style)
            self._live.changed = True

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except DRAWING_FAILURES as error:
            self._error = error

    def _report(self) -> None:
        """Say that the display has failed, and leave the terminal to lines; not while drawing, which holds a lock."""
        if self._error is not None and log.screen.display is not None:
            log.screen.display = None
            self._guarded(self._live.stop)
            log.logger.warning("The display failed and is disabled: %s", first_line(self._error))
