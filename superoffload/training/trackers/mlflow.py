"""MLflow, whose runs are where MLFLOW_TRACKING_URI says."""

from datetime import datetime
from pathlib import Path
from typing import Any

from superoffload import config as settings
from superoffload.config import Config
from superoffload.setting import shown
from superoffload.training.trackers import names


class MLflow:
    """A run of MLflow; it records the use of the machine by itself."""

    def __init__(self, config: Config, run_id: str | None) -> None:
        """Start a run, or resume the one with the given id."""
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(config.tracking.wandb_project)
        run = mlflow.start_run(
            run_id=run_id,
            run_name=names.run_name(config, datetime.now()),
            tags=dict.fromkeys(config.tracking.wandb_tags, "true"),
            log_system_metrics=True,
        )
        self.run_id = run.info.run_id
        if run_id is None:  # a parameter cannot change
            mlflow.log_params({name: shown(value) for name, value in settings.flat(config).items()})

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Store the numbers of a step."""
        self._mlflow.log_metrics(names.numbers(values), step=step)

    def attach(self, path: Path) -> None:
        """Store a file as an artifact of the run."""
        self._mlflow.log_artifact(str(path))

    def finish(self) -> None:
        """End the run and wait until its data is stored."""
        self._mlflow.end_run()
