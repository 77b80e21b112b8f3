"""What the live display shows, drawn with rich; holds the state of the display and touches no terminal.

Colours are those of the terminal's own palette, on its own background.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta

from rich import box, panel
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from superoffload.training.metrics import StepMetrics

GIB = 2**30
BARS = "▁▂▃▄▅▆▇█"
EVENTS = 4
SMOOTHING = 0.9
"""Share of the smoothed loss that stays from one logged step to the next."""
_TIMED_STEPS = 100
_KEPT_LOSSES = 200


class Panel:
    """The state of a run as a person wants it, and its picture in the width of the terminal."""

    def __init__(self, title: str, last_step: int, step: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with no numbers at `step`, of a run that ends with `last_step`."""
        self._title, self._last_step, self._step, self._clock = title, last_step, step, clock
        self._began_s = clock()
        self._marks = deque([self._began_s], maxlen=_TIMED_STEPS + 1)
        self._numbers: StepMetrics | None = None
        self._memory: dict[str, int] = {}
        self._losses: deque[float] = deque(maxlen=_KEPT_LOSSES)
        self._smoothed = self._weight = 0.0
        self._events: deque[tuple[str, str, str]] = deque(maxlen=EVENTS)

    def advance(self, step: int) -> None:
        """Count a step."""
        self._step = step
        self._marks.append(self._clock())

    def show(self, numbers: StepMetrics, memory: dict[str, int]) -> None:
        """Take the numbers of the steps since the last call."""
        self._numbers, self._memory = numbers, memory
        self._losses.append(numbers.loss)
        if numbers.loss - numbers.loss == 0:  # finite
            self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * numbers.loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)

    def add_event(self, time_of_day: str, message: str, style: str = "") -> None:
        """Take what happened, of which the first line is shown."""
        self._events.append((time_of_day, message.split("\n")[0], style))

    def left_s(self) -> float | None:
        """Return the time left, from the time of the last hundred steps; None before the first."""
        steps = len(self._marks) - 1
        if not steps:
            return None
        return (self._marks[-1] - self._marks[0]) / steps * (self._last_step - self._step)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for name, value in self._rows(options.max_width - 18, options.ascii_only):
            grid.add_row(name, value)
        for time_of_day, line, style in list(self._events):  # the run adds to it meanwhile
            grid.add_row(time_of_day, Text(line, style=style))
        shape = box.ASCII if options.ascii_only else box.ROUNDED
        yield panel.Panel(
            grid, title=Text(self._title, style="bold"), title_align="left", box=shape, border_style="dim"
        )

    def _rows(self, width: int, ascii_only: bool) -> Iterable[tuple[str, Text | Table]]:
        yield "step", self._progress()
        numbers = self._numbers
        if numbers is None:
            yield "loss", Text("after the first steps", style="dim")
            return
        rates = numbers.rates
        loss = Text.assemble((f"{numbers.loss:.4f}", "bold"), f"  smoothed {self.smoothed_loss():.4f}  ")
        if not ascii_only:
            loss.append(sparkline(self._losses, width - loss.cell_len), style="cyan")
        yield "loss", loss
        yield "lr", Text(f"{numbers.lr:.2e}  gradient norm {numbers.grad_norm:.3f}  epoch {numbers.epoch:.2f}")
        yield (
            "speed",
            Text(
                f"{rates.target_tokens_per_s:,.0f} target tokens/s  {rates.tflops_per_gpu:,.2f} TFLOPS/GPU  "
                f"{rates.step_time_s:.3g} s/step"
            ),
        )
        if self._memory:
            yield "memory", Text("  ".join(self._in_use()))

    def _progress(self) -> Table:
        left = self.left_s()
        passed = timedelta(seconds=round(self._clock() - self._began_s))
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(
            f"{self._step:,}/{self._last_step:,}",
            ProgressBar(self._last_step, self._step, style="dim", complete_style="cyan", finished_style="green"),
            f"{self._step / max(1, self._last_step):.0%}  {passed} passed"
            + (f"  {timedelta(seconds=round(left))} left" if left is not None else ""),
        )
        return row

    def _in_use(self) -> Iterable[str]:
        for name in ("device", "host"):
            if f"{name}_bytes" in self._memory:
                used, total = self._memory[f"{name}_bytes"] / GIB, self._memory[f"{name}_total_bytes"] / GIB
                peak = self._memory.get(f"{name}_peak_bytes")
                yield f"{name} {used:.1f} of {total:.1f} GiB" + (f" (peak {peak / GIB:.1f})" if peak else "")

    def smoothed_loss(self) -> float:
        """Return the exponential mean of the logged losses, without bias to its start (Adam, algorithm 1)."""
        return self._smoothed / self._weight if self._weight else float("nan")


def sparkline(values: Iterable[float], width: int) -> str:
    """Draw the last `width` values as bars between their extremes; one that is infinite or NaN is a cross."""
    last = list(values)[-width:] if width > 0 else []
    finite = [value for value in last if value - value == 0]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] if value - value == 0 else "×" for value in last)
