"""Track the numbers of a run: always in `metrics.jsonl`, and where `--report_to` says.

A tracker's failure never stops training: it is logged once, and that tracker is disabled.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from superoffload.config import Config, TrackingSettings
from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.training.trackers.json_lines import JsonLines
from superoffload.training.trackers.mlflow import MLflow
from superoffload.training.trackers.tensorboard import TensorBoard
from superoffload.training.trackers.trackio import Trackio
from superoffload.training.trackers.wandb import Wandb


class Tracker(Protocol):
    """Records the numbers of logged steps."""

    @property
    def run_id(self) -> str | None:
        """Return the id with which a resumed run continues this one, if it has one."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record the numbers of a step."""

    def attach(self, path: Path) -> None:
        """Store a file with the run, if the tracker has a place for files."""

    def finish(self) -> None:
        """Write what is buffered and close."""


class Guarded:
    """A tracker that may fail: a failure is logged as a warning, logging stops, and `finish` is still called."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = self._try("start", make)
        self._logging = self._tracker is not None

    def _try(self, what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # noqa: BLE001  training continues whatever a tracker raises
            logger.warning("%s failed to %s and is disabled: %s", self._name, what, error)
            self._logging = False
            return None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Forward the numbers."""
        tracker = self._tracker
        if self._logging and tracker is not None:
            self._try("log", lambda: tracker.log(step, values))

    def attach(self, path: Path) -> None:
        """Forward a file."""
        tracker = self._tracker
        if self._logging and tracker is not None:
            self._try("store a file", lambda: tracker.attach(path))

    @property
    def run_id(self) -> str | None:
        """Return the id of this tracker's run, if it has one."""
        return self._tracker.run_id if self._tracker is not None else None

    def finish(self) -> None:
        """End the tracker; further calls do nothing."""
        if self._tracker is not None:
            self._try("finish", self._tracker.finish)
            self._tracker = None


class Trackers:
    """All trackers of a run as one."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        """Take the trackers by name."""
        self._trackers = trackers

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to continue the same runs: their ids by the name of the tracker."""
        return {"run_ids": {name: tracker.run_id for name, tracker in self._trackers.items() if tracker.run_id}}

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Forward the numbers of a step to every tracker."""
        for tracker in self._trackers.values():
            tracker.log(step, values)

    def attach(self, path: Path) -> None:
        """Forward a file to every tracker."""
        for tracker in self._trackers.values():
            tracker.attach(path)

    def finish(self) -> None:
        """End every tracker."""
        for tracker in self._trackers.values():
            tracker.finish()


def check(settings: TrackingSettings) -> None:
    """Raise `UserError` if the package of a tracker is not installed."""
    for name in settings.trackers:
        if find_spec(name) is None:
            flag = f"report_to {name}" if name in settings.report_to else "use_wandb"
            raise UserError(f"--{flag}: the package {name} is not installed; run: pip install {name}")


def start(config: Config, is_rank_0: bool, step: int = 0, state: dict[str, Any] | None = None) -> Trackers:
    """Start the trackers of this rank; only rank 0 has any.

    `step` and `state` are those of the checkpoint that the run resumes from.
    """
    if not is_rank_0:
        return Trackers({})
    state = state or {}
    ids: dict[str, str | None] = state.get("run_ids", {"wandb": state.get("run_id")})  # as version 0.1.0 wrote it
    path = Path(config.output.output_dir) / "metrics.jsonl"
    makers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: Wandb(config, ids.get("wandb")),
        "tensorboard": lambda: TensorBoard(config, ids.get("tensorboard"), step),
        "trackio": lambda: Trackio(config, ids.get("trackio")),
        "mlflow": lambda: MLflow(config, ids.get("mlflow")),
    }
    chosen = {name: makers[name] for name in config.tracking.trackers}
    makers = {"metrics.jsonl": lambda: JsonLines(path, step), **chosen}
    return Trackers({name: Guarded(name, make) for name, make in makers.items()})


def start_samples(config: Config, is_rank_0: bool, step: int = 0) -> Trackers:
    """Start to record the answers to `--sample_prompts` in `samples.jsonl`, on rank 0.

    Without prompts there is no such file, unless an earlier run has left one, whose later answers are removed.
    """
    path = Path(config.output.output_dir) / "samples.jsonl"
    if not is_rank_0 or not (config.evaluation.sample_prompts or path.exists()):
        return Trackers({})
    return Trackers({path.name: Guarded(path.name, lambda: JsonLines(path, step))})
