"""Weights & Biases."""

from datetime import datetime
from pathlib import Path
from typing import Any

from superoffload import config as settings
from superoffload.config import Config
from superoffload.training.trackers import names


class Wandb:
    """A Weights & Biases run; with WANDB_MODE=offline nothing leaves this machine.

    It records the use of devices, cores, memory and disk by itself.
    """

    def __init__(self, config: Config, run_id: str | None) -> None:
        """Start a run, or resume the one with the given id."""
        import wandb

        self._wandb = wandb
        run = wandb.init(
            id=run_id,
            resume="allow" if run_id else None,
            project=config.tracking.wandb_project,
            name=names.run_name(config, datetime.now()),
            tags=list(config.tracking.wandb_tags),
            config=settings.flat(config),
        )
        self.run_id = getattr(run, "id", None)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers of a step."""
        self._wandb.log(names.headed(values), step=step)

    def attach(self, path: Path) -> None:
        """Store a file as an artifact of the run."""
        self._wandb.log_artifact(str(path), name=f"{path.stem}-{self.run_id}", type=path.stem)

    def finish(self) -> None:
        """End the run and wait until its data has been sent."""
        self._wandb.finish()
