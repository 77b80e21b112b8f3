"""Trackio, whose runs are in a local database; TRACKIO_DIR says where."""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

from superoffload import config as settings
from superoffload.config import Config
from superoffload.training.trackers import names


class Trackio:
    """A run of trackio, whose id is its name; it records the use of devices and cores by itself."""

    def __init__(self, config: Config, run_id: str | None) -> None:
        """Start a run, or resume the one with the given id."""
        import trackio

        self._trackio = trackio
        self.run_id = run_id or names.run_name(config, datetime.now())
        trackio.init(
            project=config.tracking.wandb_project,
            name=self.run_id,
            resume="allow" if run_id else "never",
            config={key: str(value) for key, value in settings.flat(config).items()},
            embed=False,
        )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Store the numbers of a step."""
        self._trackio.log(names.numbers(values), step=step)

    def attach(self, path: Path) -> None:
        """Store a file as an artifact of the run, under a name that trackio accepts."""
        name = re.sub(r"[^\w.-]", "-", f"{path.stem}-{self.run_id}")
        self._trackio.log_artifact(path, name=name, type=path.stem)

    def finish(self) -> None:
        """End the run and wait until its data is stored."""
        self._trackio.finish()
