"""A run from Python: `finetune`, for notebooks and scripts. Imports neither torch nor DeepSpeed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from superoffload import cli, config, config_file, launcher
from superoffload.ds_config import REPOSITORY
from superoffload.errors import UserError, nearest

SCRIPT = REPOSITORY / "finetune_zero3.py"
ERROR = "Error: "
KEPT_LINES = 50
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    *launcher.SIZES,
)  # fmt: skip
"""What would make the run a rank of the job that this process belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """What a run has left: its output folder, the steps done, the last loss, and its checkpoint and export, if any.

    `final_loss` is the mean over the target tokens since the line before the last; NaN if no step was left to do.
    """

    output_dir: Path
    steps: int
    final_loss: float
    checkpoint: Path | None
    export: Path | None


def finetune(**settings: Any) -> Finetuned:
    """Fine-tune a model on one rank, with the settings of `finetune_zero3.py` by the names of its flags.

    `finetune(model_name="org/name", dataset_name=["a.jsonl", "b.jsonl"], output_dir="out", lr=2e-5, packing=False)`;
    `config="run.yaml"` reads a file of settings. The run is a process of its own, `finetune_zero3.py` with these flags:
    its numbers are those of the command bit for bit, it leaves nothing behind in this process (memory, threads, a
    process group, environment, logging), and a second call starts afresh. Its lines appear on `sys.stderr`. Ctrl-C
    stops it as it stops the command: it saves, then `KeyboardInterrupt` is raised. Raises `UserError` for what the
    command would end with in one line, and `RuntimeError` for any other failure, whose traceback is among the lines.
    """
    flags = _flags(settings)
    asked = cli.parse(flags)
    if not SCRIPT.is_file():
        raise UserError(
            "finetune: starts finetune_zero3.py, which is not installed; run `pip install -e .` in a clone of the "
            "repository"
        )
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    began = time.time()
    _run([sys.executable, str(SCRIPT), *flags], environment)
    return _result(asked, began)


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings as flags. Raises `UserError` for a name that is no setting, and for a switch with a value."""
    known = {name: spec for name, (_, spec) in config_file.settings().items()}
    result: list[str] = []
    for name, value in settings.items():
        if name != "config" and name not in known:
            raise UserError(f"finetune: {name}: there is no such setting{nearest(name, known)}")
        spec = known.get(name)
        if spec is not None and spec.type is bool:
            if not isinstance(value, bool):
                raise UserError(f"--{name} {value!r}: must be True or False")
            result.append(f"--{name}" if value else f"--no_{name}")
        elif value is None:
            continue
        elif spec is not None and "several" in spec.metadata:
            values = [value] if isinstance(value, str | os.PathLike | int | float) else list(value)
            flags = [text for text in map(str, values[1:]) if cli.is_flag(text)]
            if flags:
                raise UserError(f"--{name} {flags[0]}: begins as a flag does; make it the first value")
            result += [f"--{name}={values[0]}", *map(str, values[1:])] if values else []
        else:
            result.append(f"--{name}={value}")
    return result


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run a command to its end, its lines on `sys.stderr`; raise what its status and its lines say."""
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    interrupted = False
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    try:
        while True:
            try:
                _forward(process.stdout, lines)
                status = process.wait()
                break
            except KeyboardInterrupt:  # in a terminal the process has had it too; it takes two at once for one
                interrupted = True
                process.send_signal(signal.SIGINT)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
    if interrupted:
        raise KeyboardInterrupt
    if status:
        raise _error(status, lines)


def _forward(output: IO[str], lines: deque[str]) -> None:
    for line in output:
        lines.append(line.rstrip("\n"))
        sys.stderr.write(line)
        sys.stderr.flush()


def _error(status: int, lines: deque[str]) -> Exception:
    own = next((line for line in reversed(lines) if line.startswith(ERROR)), None)
    if own is not None:
        return UserError(own.removeprefix(ERROR))
    if status == 3:
        return UserError("finetune: the last checkpoint or the export failed; see the lines above, or run.log")
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return RuntimeError(f"finetune: the run {how}; its last line: {lines[-1] if lines else '(none)'}")


def _result(asked: config.Config, began: float) -> Finetuned:
    """Read what the run has left. Raises `RuntimeError` if it could not write its summary."""
    folder = Path(asked.output.output_dir)
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if summary.get("ended_at", 0.0) < began:  # of an earlier run, or none
        raise RuntimeError(f"finetune: the run has ended, but {path} could not be written; see {folder / 'run.log'}")
    loss, checkpoint = summary["final_loss"], summary["checkpoint"]
    export = folder / f"model_step{summary['global_step']}"
    return Finetuned(
        output_dir=folder,
        steps=summary["global_step"],
        final_loss=float("nan") if loss is None else loss,
        checkpoint=Path(checkpoint) if checkpoint else None,
        export=export if asked.checkpoint.export and export.is_dir() else None,
    )
