"""Logging: set up once; rank 0 speaks, the others only when something went wrong there."""

import logging
import os
import sys
import warnings

from tqdm import tqdm

logger = logging.getLogger("superoffload")

LIBRARIES = ("DeepSpeed", "deepspeed", "transformers", "datasets", "accelerate")


class _BesideProgressBar(logging.Handler):
    """Writes each line above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line to stderr."""
        tqdm.write(self.format(record), file=sys.stderr)


def setup(level: str) -> None:
    """Send this program's lines to stderr, each once: all of rank 0's, the errors of the others.

    The libraries' own chatter is shown from WARNING on, or whole with `--log_level DEBUG`.
    """
    rank = int(os.environ.get("RANK", "0"))
    handler = _BesideProgressBar()
    name = f"[rank {rank}] " if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}%(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(max(logging.ERROR, logging.getLevelName(level)) if rank else level)
    if level != "DEBUG":
        warnings.filterwarnings("ignore", category=FutureWarning)
        for library in LIBRARIES:
            logging.getLogger(library).setLevel(logging.WARNING)


def shows_bars() -> bool:
    """Tell whether progress bars belong on stderr: on a terminal, and of rank 0 alone."""
    return os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


def hide_bars_of_transformers() -> None:
    """Keep the progress bars of loading and saving a model off what is no terminal."""
    from transformers.utils import logging as of_transformers

    if not shows_bars():
        of_transformers.disable_progress_bar()


def progress_bar(total_steps: int, done: int) -> "tqdm[None]":
    """Show steps, percent and time left where bars belong, and nothing elsewhere."""
    return tqdm(total=total_steps, initial=done, unit="step", disable=not shows_bars())
