"""The tracker that every run has: a file of JSON lines."""

import json
import math
from pathlib import Path
from typing import Any

from superoffload.checkpoint.manifest import replace_text
from superoffload.log import logger


class JsonLines:
    """One line of JSON per record: the numbers of `metrics.jsonl`, the answers of `samples.jsonl`."""

    run_id = None

    def __init__(self, path: Path, step: int) -> None:
        """Open the file; a resumed run keeps the lines up to `step` and drops later ones."""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if step and path.exists() else []
        replace_text(path, "".join(line + "\n" for line in lines if _step_of(line) <= step))
        self._path, self._failed = path, False
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append a line and flush it to the operating system; a full disk is a warning, and later lines may fit."""
        try:
            self._file.write(to_json(values) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._failed:
                logger.warning("%s: cannot be written (%s); lines may be missing there", self._path, error.strerror)
            self._failed = True

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
