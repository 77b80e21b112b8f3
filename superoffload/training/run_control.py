"""Run control: stop and save on demand.

SIGTERM and SIGUSR1, which schedulers send before they kill a job, and Ctrl-C ask for a checkpoint and a stop; a second
signal a few seconds later ends the process at once. A file `OUTPUT_DIR/save_now` and `--save_minutes` ask for a
checkpoint. A rank only records what it was asked; the ranks decide together, once per step.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from superoffload.config import Config
from superoffload.log import logger

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One stop can arrive as several signals: a terminal or a scheduler signals every process of a job, and the launcher and
# the recipe forward what they receive.
SAME_STOP_S = 3.0


class RunControl:
    """Records signals within its `with` block; only rank 0 looks at the file and the clock.

    The last checkpoint is saved inside the block, so that a scheduler's warning does not interrupt it.
    """

    def __init__(self, config: Config, is_rank_0: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = Path(config.output.output_dir) / "save_now"
        self._period_s = config.checkpoint.save_minutes * 60
        self._steps = config.checkpoint.save_steps
        self._is_rank_0 = is_rank_0
        self._clock = clock
        self._saved_at = clock()
        self._signal: int | None = None
        self._signalled_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "RunControl":
        for number in SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: Any) -> None:
        if self._signal is None:
            self._signal, self._signalled_at = number, self._clock()
        elif self._clock() - self._signalled_at > SAME_STOP_S:
            os._exit(128 + number)

    def votes(self) -> tuple[float, float]:
        """Return this rank's votes to stop and to save, 1.0 for yes, to be summed over all ranks."""
        due = self._is_rank_0 and (
            (self._period_s > 0 and self._clock() - self._saved_at >= self._period_s)
            or os.path.exists(self._file)  # not Path.exists, which raises the error of a disk that does not answer
        )
        return float(self._signal is not None), float(due)

    def wants_save(self, step: int, votes: float) -> bool:
        """Return, equally on every rank, whether to save after this step; `votes` is the sum over all ranks."""
        return votes > 0 or (self._steps > 0 and step % self._steps == 0)

    def saved(self) -> None:
        """Record an attempt to save: restart the clock and remove the file."""
        self._saved_at = self._clock()
        if self._is_rank_0:
            try:
                self._file.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s cannot be removed (%s)", self._file, error.strerror)

    @property
    def stopped_by(self) -> str:
        """Name the signal that this rank received, for the log."""
        return signal.Signals(self._signal).name if self._signal is not None else "another rank's signal"
