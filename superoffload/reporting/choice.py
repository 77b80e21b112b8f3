"""Which display a rank has."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from superoffload import distributed
from superoffload.errors import first_line
from superoffload.log import logger
from superoffload.reporting.display import Display
from superoffload.training.run import Run

if TYPE_CHECKING:
    from superoffload.reporting.panel import Panel


def choose(run: Run) -> Display:
    """Return the display that `--display` asks for, on rank 0; the other ranks show nothing.

    If it cannot be made, a warning says so, and log lines take its place.
    """
    output = run.config.output
    if distributed.is_rank_0() and wants_rich(output.display, output.log_level):
        from superoffload.reporting import live  # only here: it loads rich

        try:
            return live.LiveDisplay(_panel(run))
        except live.DRAWING_FAILURES as error:
            logger.warning("The live display cannot be made, lines follow instead: %s", first_line(error))
    return Display()


def _panel(run: Run) -> "Panel":
    from superoffload.reporting.panel import Panel

    mode = Path(run.config.offload.deepspeed_config).stem
    device = f"{distributed.world_size()} x {distributed.device_name()}"
    name = run.config.model.model_name.rstrip("/")
    return Panel(f"{'/'.join(name.split('/')[-2:])} | {mode} | {device}", run.last_step, run.progress.step)


def wants_rich(display: str, log_level: str) -> bool:
    """Return whether to show the live display; with `auto`, on a terminal and at the default level.

    Never if TERM says that the cursor cannot be moved, since rich then draws nothing. A log level other than INFO asks
    for lines, all of them or few.
    """
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return False
    return display == "rich" or (display == "auto" and sys.stderr.isatty() and log_level == "INFO")
