"""The tracker that every run has: a file of JSON lines."""

import json
import math
from pathlib import Path
from typing import Any


class JsonLines:
    """One line of JSON per record: the numbers of `metrics.jsonl`, the answers of `samples.jsonl`."""

    run_id = None

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

    def attach(self, path: Path) -> None:
        """Store nothing: the file is in the same folder."""

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
