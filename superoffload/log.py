"""Logging on the screen: rank 0 shows everything, the other ranks show only errors.

`run_log` keeps a complete record in a file.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress

from superoffload.errors import FAILURES

logger = logging.getLogger("superoffload")
steps = logger.getChild("steps")
"""Takes the line of each logged step, which a display shows in another form."""

LIBRARIES = ("DeepSpeed", "deepspeed", "transformers", "datasets", "accelerate", "torch")


class Screen(logging.Handler):
    """Writes log lines to stderr, or gives them to a display that has taken over the terminal."""

    display: Callable[[logging.LogRecord, str], None] | None = None
    """Takes a record and its line while a display runs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        try:
            line = self.format(record)
            if self.display is not None:
                self.display(record, line)
                return
            from tqdm import tqdm

            with suppress(OSError):  # the terminal is gone; training continues
                tqdm.write(line, file=sys.stderr)  # above the progress bars of libraries
        except FAILURES:  # such as a library's record whose arguments do not fit its message
            self.handleError(record)


screen = Screen()


def setup(level: str) -> None:
    """Show log records on stderr: at `level` and above on rank 0, at ERROR and above on the other ranks.

    A second call replaces the levels. Libraries log at WARNING and above, or at their own levels if `level` is DEBUG.
    Their progress bars appear only for work of more than two seconds, and disappear when it is done.
    """
    rank = int(os.environ.get("RANK", "0"))
    name = f"[rank {rank}] " if rank else ""
    screen.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}%(message)s", "%Y-%m-%d %H:%M:%S"))
    screen.setLevel(max(logging.ERROR, logging.getLevelName(level)) if rank else level)
    logger.handlers[:] = [screen]
    logger.propagate = False
    logger.setLevel(screen.level)
    if level != "DEBUG":
        os.environ |= {"TQDM_DELAY": "2", "TQDM_LEAVE": ""}  # tqdm reads these on import; an empty value is false
        warnings.filterwarnings("ignore", category=FutureWarning)
        for library in LIBRARIES:
            logging.getLogger(library).setLevel(logging.WARNING)


def hide_choice_of_cpu() -> None:
    """Hide that DeepSpeed warns of having found no accelerator; called before it is imported.

    For commands that need none. A run has it in its record.
    """
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")


def warn(notes: Iterable[str]) -> None:
    """Log each note as a warning."""
    for note in notes:
        logger.warning("%s", note)


def shows_bars() -> bool:
    """Return whether to show progress bars of libraries: only on rank 0, and only if stderr is a terminal."""
    return os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


def hide_bars_of_transformers() -> None:
    """Hide the progress bars of loading and saving a model unless `shows_bars()`."""
    from transformers.utils import logging as transformers_logging

    if not shows_bars():
        transformers_logging.disable_progress_bar()
