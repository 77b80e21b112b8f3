"""Read what a run has recorded in its output folder, whatever became of the run."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from superoffload import config_file
from superoffload.checkpoint import manifest
from superoffload.errors import UserError

RUN_FILE, METRICS_FILE, SUMMARY_FILE = "run.json", "metrics.jsonl", "summary.json"
SAMPLES_FILE, SETTINGS_FILE = "samples.jsonl", "config.yaml"

Line = dict[str, Any]
Points = list[tuple[float, float | None]]
"""Pairs of a step and a value, which is None if it was infinite or NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What the output folder of a run holds; what is missing there is empty here.

    run: `run.json`. summary: `summary.json`, empty unless it is of the run's last start. steps, evaluations: the lines
    of `metrics.jsonl`, by step. samples: the lines of `samples.jsonl`. settings: all of `config.yaml`, by the name of
    their flag. checkpoint, export: the newest of each. notes: what could not be read.
    """

    folder: Path
    run: Line
    summary: Line
    steps: list[Line]
    evaluations: list[Line]
    samples: list[Line]
    settings: dict[str, Any]
    checkpoint: Path | None
    export: Path | None
    notes: tuple[str, ...] = ()

    def series(self, name: str) -> Points:
        """Return a number of every logged step that has it."""
        return points(self.steps, name)

    @property
    def sources(self) -> list[str]:
        """Return the short names of the data sets if there are several, in the order of the metrics."""
        found = dict.fromkeys(key for line in (*self.steps, *self.evaluations) for key in line)
        names = [key.removeprefix("eval_") for key in found if key.startswith(("loss/", "eval_loss/"))]
        return list(dict.fromkeys(name.removeprefix("loss/") for name in names))

    @property
    def last_step(self) -> int:
        """Return the last step that is known to be done."""
        known = [line["step"] for line in (*self.steps, *self.evaluations)]
        return int(max([number(self.summary.get("global_step")) or 0, *known]))


def read(folder: Path) -> Records:
    """Read the records of a run. Raises `UserError` if the folder has none."""
    if not any((folder / name).is_file() for name in (RUN_FILE, METRICS_FILE)):
        raise UserError(f"{folder}: has neither {RUN_FILE} nor {METRICS_FILE}; give the output folder of a run")
    notes: list[str] = []
    run, summary = (json_object(folder / name, notes) for name in (RUN_FILE, SUMMARY_FILE))
    metrics = sorted(_lines(folder / METRICS_FILE, notes), key=lambda line: float(line["step"]))
    return Records(
        folder=folder,
        run=run,
        summary={} if outdated(summary, run) else summary,
        steps=[line for line in metrics if "loss" in line],
        evaluations=[line for line in metrics if "eval_loss" in line],
        samples=list(_lines(folder / SAMPLES_FILE, notes)),
        settings=_settings(folder / SETTINGS_FILE, notes),
        checkpoint=next(iter(manifest.complete_checkpoints(folder)), None),
        export=_newest_export(folder),
        notes=tuple(notes),
    )


def points(lines: list[Line], name: str) -> Points:
    """Return the number of that name of every line that has it."""
    return [(float(line["step"]), number(line[name])) for line in lines if name in line]


def number(value: Any) -> float | None:
    """Return a value as a float; None if it is none, infinite or NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return found if math.isfinite(found) else None


def default(name: str) -> Any:
    """Return the default of a setting; None for one that has to be given."""
    found = config_file.settings()[name][1].default
    return None if found is MISSING else found


def starts(run: Mapping[str, Any]) -> list[Line]:
    """Return the starts of a run: when (`at`, seconds since 1970), and from which step (`step`)."""
    found = run.get("starts")
    listed = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return [one for one in listed if all(number(one.get(name)) is not None for name in ("at", "step"))]


def outdated(summary: Line, run: Line) -> bool:
    """Return whether a summary was written before the last start, which then has not ended in order."""
    began, ended = starts(run), number(summary.get("ended_at"))
    return bool(began) and (ended is None or ended < began[-1]["at"])


def json_object(path: Path, notes: list[str]) -> Line:
    """Return the object that a file holds; empty without one, of which `notes` says why if there is a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path, notes: list[str]) -> Iterator[Line]:
    """Yield the lines that are JSON objects with a step; a run that was killed may have truncated the last one."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return
    damaged = 0
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and number(line.get("step")) is not None:
            yield line
        else:
            damaged += 1
    if damaged:
        notes.append(f"{path.name}: {damaged} of {len(texts)} lines cannot be read, as after a run that was killed")


def _settings(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = config_file.read(str(path))
    except UserError as error:
        notes.append(str(error))
        return {}
    return {name: values.get(name, default(name)) for name in config_file.settings()}


def _newest_export(folder: Path) -> Path | None:
    found = [path for path in folder.glob("model_step*") if (path / "config.json").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
