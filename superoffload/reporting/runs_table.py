"""A table of runs: drawn with rich on a terminal, plain lines elsewhere."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from superoffload.reporting.runs import DIED, FINISHED, RUNNING, FoundRun

WIDE = 120
"""Columns from which on model and mode have columns of their own."""
NARROW = 72
"""Columns below which no table fits; the lines are plain, and the terminal wraps them."""
STYLES = {RUNNING: "bold cyan", FINISHED: "green", DIED: "bold red"}
UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def lines(runs: Sequence[FoundRun], root: Path, now: float, width: int | None, colours: bool = False) -> list[str]:
    """Return the lines of the table in so many columns; without a width, plain lines that are as long as they are."""
    width = width if width is None or width >= NARROW else None
    console = Console(
        file=io.StringIO(), width=width or 10_000, force_terminal=colours, color_system="standard" if colours else None
    )
    with console.capture() as captured:
        console.print(_table(runs, root, now, width))
    return [line.rstrip() for line in captured.get().splitlines()]


def _table(runs: Sequence[FoundRun], root: Path, now: float, width: int | None) -> Table:
    wide = width is None or width >= WIDE
    table = Table(
        box=None if width is None else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2 if width is None else 1, 0, 0)
    )
    table.add_column("run", overflow="fold")
    if wide:
        table.add_column("model", overflow="fold")
        table.add_column("mode", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "eval", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("active", justify="right", no_wrap=True)
    for run in runs:
        name = os.path.relpath(run.folder, root)
        name = root.resolve().name if name == "." else name
        model = "/".join((run.model or "?").rstrip("/").split("/")[-2 if wide else -1 :])
        table.add_row(
            *([name, model, run.mode or "?"] if wide else [_stacked(name, f"{model}, {run.mode or '?'}")]),
            Text(run.state, style=STYLES.get(run.state, "")),
            f"{run.step}/{run.total_steps or '?'}",
            _loss(run.loss),
            _loss(run.eval_loss),
            _saved_step(run.checkpoint),
            ago(now - run.active_at),
        )
    return table


def _stacked(name: str, below: str) -> Text:
    return Text.assemble(name, "\n", (below, "dim"))


def _loss(loss: float | None) -> str:
    return "-" if loss is None else "NaN" if loss != loss else f"{loss:.4f}"


def _saved_step(checkpoint: str | None) -> str:
    """Return the step of a checkpoint's name, which can end with a number of its own: `global_step100_2`."""
    return "-" if checkpoint is None else checkpoint.removeprefix("global_step").partition("_")[0]


def ago(seconds: float) -> str:
    """Write a time that has passed in its largest unit, e.g. `5 min`."""
    unit, size = next((unit for unit in UNITS if seconds >= unit[1]), UNITS[-1])
    return f"{int(max(0.0, seconds) / size)} {unit}"
