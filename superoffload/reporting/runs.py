"""The runs below a folder and how far they are, from small files and the ends of large ones. Imports no torch."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from superoffload import config_file, run_log
from superoffload.checkpoint import folder_lock, manifest
from superoffload.errors import UserError, first_line
from superoffload.reporting import records
from superoffload.reporting.records import METRICS_FILE, RUN_FILE, SETTINGS_FILE, SUMMARY_FILE, number

TAIL_BYTES = 2**20
"""How much of the end of metrics.jsonl is read: about 2,000 logged steps."""
NO_RUNS_IN = (".", "global_step", "model_step", "__pycache__", "node_modules", "wandb", "mlruns", "tensorboard")
"""How the names of folders begin that hold no output folder."""

RUNNING, FINISHED, STOPPED, DIED = "running", "finished", "stopped", "died"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRun:
    """What the files of an output folder say about its run; None for what they do not say.

    `loss` and `eval_loss` are the last logged ones, NaN if they were infinite or NaN. `active_at` is the time of the
    last line, in seconds since 1970. `state`: a run that has neither finished nor stopped, and no longer runs, died.
    """

    folder: Path
    model: str | None
    mode: str | None
    step: int
    total_steps: int | None
    loss: float | None
    eval_loss: float | None
    state: str
    checkpoint: str | None
    active_at: float

    def as_dict(self, now: float) -> dict[str, Any]:
        """Return the fields by name, for JSON, and the seconds since the last line; NaN becomes null."""
        values = {**asdict(self), "folder": str(self.folder), "idle_s": round(max(0.0, now - self.active_at))}
        return {name: None if value != value else value for name, value in values.items()}


def find(folder: Path, notes: list[str] | None = None) -> list[FoundRun]:
    """Read the runs in and below a folder, the last active first; `notes` says which files could not be read.

    Raises `UserError` if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    notes = [] if notes is None else notes
    found = [read(path, notes) for path in output_folders(folder, notes)]
    return sorted(found, key=lambda run: run.active_at, reverse=True)


def output_folders(folder: Path, notes: list[str]) -> Iterator[Path]:
    """List the output folders of runs in and below a folder; does not follow links."""

    def closed(error: OSError) -> None:
        notes.append(f"{error.filename} cannot be read: {error.strerror}")

    for path, inner, files in os.walk(folder, onerror=closed):
        inner[:] = [name for name in inner if not name.startswith(NO_RUNS_IN)]
        if RUN_FILE in files or {SETTINGS_FILE, METRICS_FILE} <= {*files}:
            yield Path(path)


def read(folder: Path, notes: list[str] | None = None) -> FoundRun:
    """Read what the files of an output folder say; a file that is missing, truncated or being written says less."""
    unread: list[str] = []
    described = _described(folder, unread)
    model = described.get("model")
    logged, evaluated = _last_lines(folder / METRICS_FILE)
    summary = records.json_object(folder / SUMMARY_FILE, unread)
    has_ended = bool(summary) and not records.outdated(summary, described)
    step = max(number(logged.get("step")) or 0, (number(summary.get("global_step")) or 0) if has_ended else 0)
    total = number(described.get("total_steps"))
    if folder_lock.is_locked(folder):
        state = RUNNING
    elif not has_ended or described.get("error"):
        state = DIED
    else:
        epochs = number(described.get("num_train_epochs")) or 0
        is_complete = step >= total if total else (number(logged.get("epoch")) or 0) >= epochs
        state = FINISHED if is_complete and not summary.get("stopped_by") else STOPPED
    checkpoint = _checkpoint(folder, unread)
    if notes is not None:
        notes += [f"{folder}: {note}" for note in unread]
    return FoundRun(
        folder=folder,
        model=_text(model.get("name")) if isinstance(model, dict) else None,
        mode=_text(described.get("mode")),
        step=int(step),
        total_steps=int(total) if total else None,
        loss=_loss(logged, "loss"),
        eval_loss=_loss(evaluated, "eval_loss"),
        state=state,
        checkpoint=checkpoint,
        active_at=max(_modified(folder / name) for name in (RUN_FILE, SETTINGS_FILE, METRICS_FILE, run_log.FILE)),
    )


def _described(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Return what run.json says; of a run without it, what its settings say."""
    described = records.json_object(folder / RUN_FILE, notes)
    if described:
        return described
    try:
        values = config_file.read(str(folder / SETTINGS_FILE))
    except UserError:
        return {}
    return {
        "model": {"name": values.get("model_name")},
        "mode": Path(values.get("deepspeed_config", "superoffload.json")).stem,
        "total_steps": values.get("bench_steps") or values.get("max_steps"),
        "num_train_epochs": values.get("num_train_epochs", 1),
    }


def _last_lines(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last logged step and the last evaluation near the end of metrics.jsonl, empty if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read(TAIL_BYTES)
    except OSError:
        return {}, {}
    return _last_with(tail, b'"loss":'), _last_with(tail, b'"eval_loss":')


def _last_with(lines: bytes, key: bytes) -> dict[str, Any]:
    """Return the last complete line that holds a key."""
    end = len(lines)
    while (place := lines.rfind(key, 0, end)) >= 0:
        begin = lines.rfind(b"\n", 0, place) + 1
        found = _parsed(lines[begin:].partition(b"\n")[0])
        if found:
            return found
        end = begin
    return {}


def _parsed(text: bytes) -> dict[str, Any]:
    """Return a JSON object, empty if the text is no complete one."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _checkpoint(folder: Path, notes: list[str]) -> str | None:
    """Return the name of the newest checkpoint if it is complete; None for one that cannot be read."""
    try:
        name = manifest.read_latest(folder)
        if name and manifest.read(folder / name):
            return name
        if name:
            notes.append(f"{name}/{manifest.MANIFEST} is missing or cannot be read")
    except (OSError, UserError) as error:
        notes.append(first_line(error))
    return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _loss(line: dict[str, Any], name: str) -> float | None:
    """Return a loss of metrics.jsonl, where null is one that is infinite or NaN."""
    if name not in line:
        return None
    found = number(line[name])
    return float("nan") if found is None else found
