"""The results of all parts: kept one file a part, and reported as one Markdown table and one JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.ranks import REPOSITORY

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what was measured, its value, and what to compare it with."""

    what: str
    value: str
    compare: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one part; `data` holds the numbers behind the rows."""

    name: str
    what: str
    result: str
    time_s: float
    why: str = ""
    rows: list[Row] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def fingerprint(machine: Mapping[str, Any], rehearse: bool) -> str:
    """Return a checksum of the code and the kind of machine: other code makes an earlier result worthless."""
    paths = [REPOSITORY / "finetune_zero3.py", *sorted((REPOSITORY / "configs").glob("*.json"))]
    for folder in ("superoffload", "tests/benchmarks", "tests/helpers", "tests/offload"):
        paths += sorted(p for p in (REPOSITORY / folder).rglob("*") if p.suffix in (".py", ".cpp"))
    kind = [machine[name] for name in ("device", "devices", "torch", "deepspeed", "transformers")]
    digest = hashlib.sha256(repr((kind, rehearse)).encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def keep(folder: Path, mark: str, result: Result) -> None:
    """Write a part's result, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"fingerprint": mark, **asdict(result)}, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def kept(folder: Path, mark: str, name: str) -> Result | None:
    """Return the result of a part that an earlier call finished with the same code on such a machine, else None."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.pop("fingerprint") != mark:
        return None
    return Result(**{**found, "rows": [Row(**row) for row in found["rows"]]})


def write(folder: Path, machine: Mapping[str, Any], rehearse: bool, results: Sequence[Result]) -> None:
    """Write on_gpu.md and on_gpu.json."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"machine": dict(machine), "rehearsal": rehearse, "parts": [asdict(result) for result in results]}
    (folder / "on_gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "on_gpu.md").write_text(markdown(machine, rehearse, results), encoding="utf-8")


def markdown(machine: Mapping[str, Any], rehearse: bool, results: Sequence[Result]) -> str:
    """Return the table; the reason of a part that failed or was skipped is its first line, whole in the JSON file."""
    kind = (
        "a rehearsal on the CPU, whose numbers mean nothing"
        if rehearse
        else f"{machine['devices']} x {machine['device']}"
    )
    lines = [
        "# Measurements on a GPU",
        "",
        f"Machine: {kind}; {machine['cores']} cores, {machine['host_gib']:.0f} GiB of host memory available. torch "
        f"{machine['torch']}, DeepSpeed {machine['deepspeed']}, transformers {machine['transformers']}. Command: "
        f"`bash tests/benchmarks/on_gpu.sh{' --rehearse' if rehearse else ''}`.",
        "",
        "| part | measured | value | compare |",
        "| --- | --- | --- | --- |",
    ]
    for result in results:
        why = f": {result.why.splitlines()[0]}" if result.why else ""
        outcome = f"{result.result} in {result.time_s:.0f} s" if result.result != SKIPPED else result.result
        lines.append(_line(result.name, result.what, f"**{outcome}**{why}", ""))
        lines += [_line("", row.what, row.value, row.compare) for row in result.rows]
    return "\n".join([*lines, ""])


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
