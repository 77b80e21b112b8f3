"""Which display a rank has."""

import os
import sys
from pathlib import Path

from superoffload import distributed
from superoffload.reporting.display import Display
from superoffload.training.run import Run


def choose(run: Run) -> Display:
    """Return the display that `--display` asks for, on rank 0; the other ranks show nothing."""
    output = run.config.output
    if not distributed.is_rank_0() or not wants_rich(output.display, output.log_level):
        return Display()
    from superoffload.reporting.live import LiveDisplay
    from superoffload.reporting.panel import Panel

    mode = Path(run.config.offload.deepspeed_config).stem
    device = f"{distributed.world_size()} x {distributed.device_name()}"
    name = run.config.model.model_name.rstrip("/")
    return LiveDisplay(Panel(f"{'/'.join(name.split('/')[-2:])} | {mode} | {device}", run.last_step, run.progress.step))


def wants_rich(display: str, log_level: str) -> bool:
    """Return whether to show the live display; with `auto`, on a terminal that can move its cursor.

    A log level other than INFO asks for lines, all of them or few.
    """
    if display == "auto":
        dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown")
        return sys.stderr.isatty() and not dumb and log_level == "INFO"
    return display == "rich"
