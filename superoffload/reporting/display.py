"""What a display can do, and the one that shows nothing: log lines are enough without a terminal."""

from types import TracebackType
from typing import Self

from superoffload.training.metrics import StepMetrics


class Display:
    """Shows nothing: of other ranks, and of a run whose log lines are its display."""

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was, with the last state on it."""

    def advance(self, step: int) -> None:
        """Count a step."""

    def show(self, numbers: StepMetrics, memory: dict[str, int]) -> None:
        """Show the numbers of the steps since the last call, and the memory in use, named as in `metrics.jsonl`."""
