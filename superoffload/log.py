"""Logging: rank 0 logs everything, the other ranks log only errors."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable

from tqdm import tqdm

logger = logging.getLogger("superoffload")

LIBRARIES = ("DeepSpeed", "deepspeed", "transformers", "datasets", "accelerate")


class _AboveProgressBar(logging.Handler):
    """Writes log lines above the progress bar, so that they do not break it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record to stderr."""
        tqdm.write(self.format(record), file=sys.stderr)


def setup(level: str) -> None:
    """Send log records to stderr: at `level` and above on rank 0, at ERROR and above on the other ranks.

    A second call replaces the handler. Libraries log at WARNING and above, or at their own levels if `level` is DEBUG.
    """
    rank = int(os.environ.get("RANK", "0"))
    handler = _AboveProgressBar()
    name = f"[rank {rank}] " if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}%(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(max(logging.ERROR, logging.getLevelName(level)) if rank else level)
    if level != "DEBUG":
        warnings.filterwarnings("ignore", category=FutureWarning)
        for library in LIBRARIES:
            logging.getLogger(library).setLevel(logging.WARNING)


def warn(notes: Iterable[str]) -> None:
    """Log each note as a warning."""
    for note in notes:
        logger.warning("%s", note)


def shows_bars() -> bool:
    """Return whether to show progress bars: only on rank 0, and only if stderr is a terminal."""
    return os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


def hide_bars_of_transformers() -> None:
    """Hide the progress bars of loading and saving a model unless `shows_bars()`."""
    from transformers.utils import logging as transformers_logging

    if not shows_bars():
        transformers_logging.disable_progress_bar()


def progress_bar(total_steps: int, done: int) -> "tqdm[None]":
    """Create a bar of steps, percentage and time left; it shows nothing unless `shows_bars()`."""
    return tqdm(total=total_steps, initial=done, unit="step", disable=not shows_bars())
