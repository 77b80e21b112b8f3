"""Track the numbers of a run: always in a local file, and in Weights & Biases with `--use_wandb`.

A tracker's failure never stops training: it is logged once, and that tracker is disabled.
"""

import json
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from superoffload import config as settings
from superoffload.config import Config
from superoffload.log import logger


class Tracker(Protocol):
    """Records the numbers of logged steps."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record the numbers of a step."""

    def finish(self) -> None:
        """Write what is buffered and close."""


class JsonLines:
    """One line of JSON per logged step in `metrics.jsonl`."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the file; a resumed run keeps the lines up to `step` and drops later ones."""
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in kept)
        self._file.flush()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append a line and flush it to the operating system."""
        self._file.write(to_json(values) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


def to_json(values: dict[str, Any], indent: int | None = None) -> str:
    """Return the values as JSON; infinity and NaN, which JSON does not have, become null."""
    strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(strict, indent=indent, allow_nan=False)


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for a line that a crash truncated."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _heading(key: str) -> str:
    if key.startswith("eval_"):
        return f"eval/{key.removeprefix('eval_')}"
    if "/" in key:  # of one source: loss/NAME, target_tokens/NAME
        return key
    return f"{'train' if key in ('loss', 'lr', 'grad_norm', 'epoch') else 'perf'}/{key}"


class Wandb:
    """A Weights & Biases run; with WANDB_MODE=offline nothing leaves this machine."""

    def __init__(self, config: Config, run_id: str | None) -> None:
        """Start a run, or resume the one with the given id."""
        import wandb  # only with --use_wandb: it takes a second and is optional

        self._wandb = wandb
        tracking = config.tracking
        run = wandb.init(
            id=run_id,
            resume="allow" if run_id else None,
            project=tracking.wandb_project,
            name=tracking.wandb_run_name or run_name(config, datetime.now()),
            tags=list(tracking.wandb_tags),
            config=settings.flat(config),
        )
        self.run_id = getattr(run, "id", None)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers of a step, named as upstream names them."""
        self._wandb.log({_heading(key): value for key, value in values.items()}, step=step)

    def finish(self) -> None:
        """End the run and wait until its data has been sent."""
        self._wandb.finish()


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

    @property
    def run_id(self) -> str | None:
        """Return the id with which this tracker can be resumed, if it has one."""
        return getattr(self._tracker, "run_id", None)

    def finish(self) -> None:
        """End the tracker; further calls do nothing."""
        if self._tracker is not None:
            self._try("finish", self._tracker.finish)
            self._tracker = None


class Trackers:
    """All trackers of a run as one."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to resume the same W&B run."""
        ids = [getattr(tracker, "run_id", None) for tracker in self._trackers]
        return {"run_id": next((run_id for run_id in ids if run_id), None)}

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Forward the numbers of a step to every tracker."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def finish(self) -> None:
        """End every tracker."""
        for tracker in self._trackers:
            tracker.finish()


def start(config: Config, is_rank_0: bool, step: int = 0, state: dict[str, Any] | None = None) -> Trackers:
    """Start the trackers of this rank; only rank 0 has any.

    `step` and `state` are those of the checkpoint that the run resumes from.
    """
    if not is_rank_0:
        return Trackers([])
    path = Path(config.output.output_dir) / "metrics.jsonl"
    trackers: list[Tracker] = [Guarded("metrics.jsonl", lambda: JsonLines(path, step))]
    if config.tracking.use_wandb:
        trackers.append(Guarded("Weights & Biases", lambda: Wandb(config, (state or {}).get("run_id"))))
    return Trackers(trackers)


def run_name(config: Config, now: datetime) -> str:
    """Name a run as upstream does: model, batch size, length, activation checkpointing, time."""
    model, training = config.model, config.training
    short = model.model_name.rstrip("/").split("/")[-1]
    return (
        f"{short}_bs{training.batch_size}_seq{config.data.max_length}_ac{int(model.activation_checkpointing)}"
        f"_T{now:%Y%m%d_%H%M%S}"
    )
