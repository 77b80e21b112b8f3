"""The record of a run in `OUTPUT_DIR/run.log`: all that rank 0 says, and the warnings and errors of every rank.

It takes what the screen does not show at the default level: what DeepSpeed, transformers, datasets and torch log, warn
of and print. Standard output belongs to it, because only libraries print there during a run.
"""

import io
import logging
import os
import shlex
import sys
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

from superoffload import log

FILE = "run.log"
_BUFFERED_RECORDS = 10_000
# torch says at each of DeepSpeed's collectives that it has a new name, which only DeepSpeed can use. Python would show
# that in each step: it forgets what it has shown whenever a library changes the filters, as torch does.
_RENAMED_COLLECTIVES = r"`torch\.distributed\.\w+` is deprecated"
_printed = logging.getLogger("stdout")


class _Prints(io.TextIOBase):
    """Takes the place of standard output and logs each complete line."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._open_line = ""
        self._busy = False

    def write(self, text: str) -> int:
        """Log the lines that `text` completes."""
        *lines, self._open_line = (self._open_line + text).split("\n")
        if not self._busy:  # or else a handler that writes to standard output would never end
            self._busy = True
            for line in filter(str.strip, lines):
                _printed.info("%s", line)
            self._busy = False
        return len(text)

    def writable(self) -> bool:
        """Say yes, as a file would."""
        return True


class _File(logging.FileHandler):
    """Says once that the disk is full, say, instead of a traceback for each record."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Report what has just been raised."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            log.logger.warning("%s: cannot be written (%s); lines are missing there", self.baseFilename, error.strerror)


class RunLog:
    """Records in memory from `capture` on, and in the file as soon as there is a folder for it."""

    def __init__(self) -> None:
        """Record nothing yet."""
        self._handler: logging.Handler = logging.NullHandler()
        self._rank = 0

    def capture(self, level: str) -> None:
        """Take what libraries print, warn of and log off the screen, unless `level` is DEBUG, and record it.

        Their errors are still shown. Called once, after `log.setup` and before the libraries are imported.
        """
        self._rank = int(os.environ.get("RANK", "0"))
        lowest = logging.DEBUG if level == "DEBUG" else logging.INFO
        self._record_with(MemoryHandler(_BUFFERED_RECORDS, flushLevel=logging.CRITICAL + 1), lowest)
        if level != "DEBUG":
            log.screen.addFilter(_is_own_or_error)
        log.logger.setLevel(min(log.logger.level, self._handler.level))
        _printed.setLevel(logging.INFO)
        sys.stdout = _Prints()
        logging.captureWarnings(True)
        warnings.filterwarnings("default", category=FutureWarning)
        warnings.filterwarnings("ignore", _RENAMED_COLLECTIVES, FutureWarning)

    def _record_with(self, handler: logging.Handler, lowest: int) -> None:
        """Record with another handler than before; `lowest` is the level on rank 0."""
        name = f"[rank {self._rank}] " if self._rank else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}[%(name)s] %(message)s"))
        handler.setLevel(logging.WARNING if self._rank else lowest)
        for logger in (logging.root, log.logger):
            logger.handlers[:] = [log.screen, handler]
        self._handler = handler

    def _adopt_libraries(self) -> None:
        """Take the handlers of libraries away, which write to the terminal; each adds its own on import."""
        for name in log.LIBRARIES:
            library = logging.getLogger(name)
            library.handlers[:] = []
            library.propagate = True

    def open(self, folder: str) -> None:
        """Append to `run.log` in the output folder from now on, starting with what has been recorded before.

        A file that cannot be opened is a warning.
        """
        self._adopt_libraries()
        before, path = self._handler, Path(folder) / FILE
        try:
            self._record_with(_File(path, encoding="utf-8"), before.level)
        except OSError as error:
            self._record_with(logging.NullHandler(), before.level)
            log.logger.warning("%s: cannot be written (%s)", path, error.strerror)
        if not self._rank:
            self.add("Started: " + shlex.join(sys.argv), logging.INFO)
        if isinstance(before, MemoryHandler):
            before.setTarget(self._handler)
            before.close()

    def add(self, text: str, level: int = logging.ERROR) -> None:
        """Record a text that is not shown, or shown by other means."""
        self._handler.handle(logging.LogRecord(log.logger.name, level, "", 0, "%s", (text.rstrip(),), None))


def _is_own_or_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.split(".")[0] == log.logger.name


run_log = RunLog()
