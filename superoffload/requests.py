"""What is asked of a run from outside while it goes on: stop, or save.

SIGTERM and SIGUSR1, which schedulers send before they kill, and Ctrl-C ask for a checkpoint and a stop; another one
some seconds later ends the process at once. A file `OUTPUT_DIR/save_now` and `--save_minutes` ask for a checkpoint. A
rank only notes what it was asked; the ranks bring it together at the end of each step.
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
# One request may arrive several times: a terminal or a scheduler signals every process of a job, and the launcher and
# the recipe pass on what they got.
SAME_REQUEST_S = 3.0


class Requests:
    """Notes requests from `with` on until its end; only the rank that speaks looks at the file and the period.

    The last checkpoint is saved within, so that a scheduler's warning does not cut it off.
    """

    def __init__(self, config: Config, speaks: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = Path(config.output.output_dir) / "save_now"
        self._period_s = config.checkpoint.save_minutes * 60
        self._steps = config.checkpoint.save_steps
        self._speaks = speaks
        self._clock = clock
        self._saved_at = clock()
        self._signal: int | None = None
        self._signalled_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Requests":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self._signal is None:
            self._signal, self._signalled_at = number, self._clock()
        elif self._clock() - self._signalled_at > SAME_REQUEST_S:
            os._exit(128 + number)

    def votes(self) -> tuple[float, float]:
        """Tell whether this rank was asked to stop, and whether to save; 1.0 for yes, to be added up over ranks."""
        due = self._speaks and (
            (self._period_s > 0 and self._clock() - self._saved_at >= self._period_s) or self._file.exists()
        )
        return float(self._signal is not None), float(due)

    def wants_save(self, step: int, votes: float) -> bool:
        """Decide, alike on every rank, whether a checkpoint is due after this step, given the votes of all."""
        return votes > 0 or (self._steps > 0 and step % self._steps == 0)

    def saved(self) -> None:
        """Take note that a checkpoint was attempted: the clock starts anew and the file has been answered."""
        self._saved_at = self._clock()
        if self._speaks:
            try:
                self._file.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s cannot be removed (%s)", self._file, error.strerror)

    @property
    def stopped_by(self) -> str:
        """Name the signal that this rank got, for the log."""
        return signal.Signals(self._signal).name if self._signal is not None else "another rank's signal"
