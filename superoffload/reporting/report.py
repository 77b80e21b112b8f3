"""The report of a run: one HTML file that needs no network, made of what is in the output folder."""

import json
import shlex
import statistics
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from superoffload import errors
from superoffload.checkpoint.manifest import replace_text
from superoffload.errors import UserError
from superoffload.reporting import curves, records
from superoffload.reporting.records import Records, number
from superoffload.setting import shown

REPORT_FILE = "report.html"
FAILURES = (*errors.FAILURES, TemplateError)
"""What records of another form than this version writes make code raise."""
GIB = 2**30


def write(folder: Path, path: Path) -> Path:
    """Write the report of the run in a folder. Raises `UserError` if there is none, or the file cannot be written.

    Records that another version wrote may raise one of `FAILURES`.
    """
    page = html(records.read(folder))
    try:
        replace_text(path, page)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def html(found: Records) -> str:
    """Return the report as one HTML document."""
    loader = PackageLoader("superoffload.reporting", "page")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    return environment.get_template("report.html").render(view(found))


def view(found: Records) -> dict[str, Any]:
    """Return all that the page shows, by the names in its template."""
    changed, others = _settings(found.settings)
    data = found.run.get("data") or {}
    return {
        "title": title(found),
        "head": _head(found),
        "state": state(found),
        "tiles": _tiles(found),
        "training": curves.training(found),
        "samples": _samples(found.samples),
        "use": _use(found),
        "speed": curves.speed(found),
        "parts": _parts(found),
        "memory": curves.memory(found),
        "data": _data(data),
        "lengths": curves.lengths(data.get("histogram")),
        "sources": _sources(found, data),
        "changed": changed,
        "others": others,
        "environment": found.run.get("environment") or {},
        "notes": found.notes,
    }


def title(found: Records) -> str:
    """Return the name of the model, without the folders before it."""
    name = (found.run.get("model") or {}).get("name") or found.settings.get("model_name") or found.folder.name
    return "/".join(str(name).rstrip("/").split("/")[-2:])


def state(found: Records) -> str:
    """Say how far the run has come, and how it ended if it has."""
    total = number(found.run.get("total_steps"))
    of_total = f" of {total:,.0f}" if total else ""
    steps = f"{found.last_step:,}{of_total} steps"
    if found.run.get("error"):
        return f"Failed; step {found.last_step:,}{of_total} is the last on record. {found.run['error']}"
    if not found.summary and not found.last_step:
        return f"Not finished: no step{of_total} is on record"
    if not found.summary:
        return f"Not finished: step {found.last_step:,}{of_total} is the last on record"
    if found.summary.get("stopped_by"):
        return f"Stopped by {found.summary['stopped_by']} after {steps}"
    return f"Finished after {steps}"


def _head(found: Records) -> list[str]:
    """Return the facts beside the title."""
    run, began = found.run, records.starts(found.run)
    model = run.get("model") or {}
    parameters = number(model.get("parameters"))
    words = [str(run.get("mode") or ""), f"{_count(parameters)} parameters" if parameters else ""]
    if run.get("device"):
        words.append(f"{run.get('ranks', 1)} x {run['device']}")
    if began:
        words.append(f"started {datetime.fromtimestamp(began[-1]['at']):%Y-%m-%d %H:%M}")
        ended = number(found.summary.get("ended_at"))
        words.append(f"took {timedelta(seconds=round(ended - began[-1]['at']))}" if ended else "")
        resumed = [f"{one['step']:,}" for one in began if one["step"]]
        words.append(f"resumed from step {', '.join(resumed)}" if resumed else "")
    words.append(str(found.summary.get("checkpoint_note") or ""))
    return [word for word in words if word]


def _tiles(found: Records) -> list[tuple[str, str, str]]:
    """Return the main figures: a name, the value, and what it can be compared with."""
    tiles = []
    losses = [(x, loss) for x, loss in found.series("loss") if loss is not None]
    if losses:
        tiles.append(("Loss", f"{losses[-1][1]:.4f}", f"{losses[0][1]:.4f} at step {losses[0][0]:,.0f}"))
    held_out = [(x, loss) for x, loss in records.points(found.evaluations, "eval_loss") if loss is not None]
    if held_out:
        step, best = min(held_out, key=lambda point: point[1])
        tiles.append(("Held-out loss", f"{held_out[-1][1]:.4f}", f"lowest {best:.4f} at step {step:,.0f}"))
    speed = _median(found, "target_tokens_per_s")
    if speed is not None:
        flops = _median(found, "tflops_per_gpu")
        tiles.append(("Target tokens/s", f"{speed:,.0f}", f"{flops:,.3g} TFLOPS per device" if flops else ""))
    time_s = _median(found, "step_time_s")
    if time_s is not None:
        tiles.append(("Time of a step", _seconds(time_s), "median"))
    for place in ("device", "host"):
        tiles += _peak(found, place)
    return tiles


def _peak(found: Records, place: str) -> list[tuple[str, str, str]]:
    used = [value for _, value in found.series(f"{place}_peak_bytes") or found.series(f"{place}_bytes") if value]
    total = next((value for _, value in found.series(f"{place}_total_bytes") if value), None)
    if not used or not total:
        return []
    return [(f"{place.capitalize()} memory", f"{max(used) / GIB:.1f} GiB", f"peak, of {total / GIB:.1f} GiB")]


def _median(found: Records, name: str) -> float | None:
    values = [value for _, value in found.series(name) if value is not None]
    return statistics.median(values) if values else None


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _seconds(time_s: float) -> str:
    return f"{time_s * 1000:,.0f} ms" if time_s < 1 else f"{time_s:,.2f} s"


def _parts(found: Records) -> list[tuple[str, str, str]]:
    """Return the mean milliseconds of each part of a step, and its share."""
    means = {
        name: statistics.fmean(value or 0.0 for _, value in points)
        for name, points in curves.step_parts(found).items()
    }  # fmt: skip
    whole = sum(means.values())
    return [(name, f"{mean * 1000:,.1f}", f"{mean / whole:.1%}") for name, mean in means.items()] if whole else []


def _samples(lines: list[records.Line]) -> dict[str, Any]:
    """Return the prompts, each with its answers at the first and the last evaluation."""
    complete = [line for line in lines if all(isinstance(line.get(name), list) for name in ("prompts", "answers"))]
    if not complete:
        return {}
    ends = [complete[0], complete[-1]] if len(complete) > 1 else complete
    first = [str(prompt) for prompt in ends[0]["prompts"]]
    answers = [dict(zip(map(str, line["prompts"]), map(str, line["answers"]), strict=False)) for line in ends]
    return {
        "steps": [f"{line['step']:,}" for line in ends],
        "rows": [(prompt, [of.get(prompt, "") for of in answers]) for prompt in first],
    }


def _use(found: Records) -> list[tuple[str, str]]:
    """Return what can be done with the model, each with the command."""
    if found.checkpoint is None and found.export is None:
        return []
    run = shlex.quote(str(found.folder))
    model = found.export or found.folder / f"model_step{found.last_step}"
    target = shlex.quote(str(model))
    export = [] if found.export else [("Export the newest checkpoint", f"superoffload export {run} {target}")]
    return [
        ("Talk to it", f"superoffload chat {run}"),
        *export,
        ("Upload it to the hub", f"superoffload push {run} USER/NAME"),
        (
            "Use it in transformers",
            f'from transformers import pipeline\npipeline("text-generation", {json.dumps(str(model))})',
        ),
        ("Serve it with vLLM", f"vllm serve {target}"),
    ]


def _data(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = data.get("counts") or {}
    tokens, targets = number(data.get("tokens")), number(data.get("target_tokens"))
    figures = {
        "rows": data.get("rows"),
        "truncated rows": counts.get("truncated"),
        "dropped rows": counts.get("dropped"),
        "malformed rows": counts.get("bad"),
        "tokens": tokens,
        "target tokens": targets,
        "longest row": data.get("longest"),
        "steps per epoch": data.get("steps_per_epoch"),
    }
    result = [(name, f"{value:,.0f}") for name, value in figures.items() if number(value) is not None]
    if tokens and targets:
        result.append(("share of targets", f"{targets / tokens:.1%}"))
    if data.get("packed"):
        result += [("packs", f"{data['packs']:,}"), ("packs are full to", f"{data['fill']:.1%}")]
    elif data:
        result.append(("packs", "none, rows are not packed"))
    return result


def _sources(found: Records, data: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of several data sets: name, rows, tokens, share of the targets, first and last loss."""
    result = []
    for source in data.get("sources") or ():
        losses = [value for _, value in found.series(f"loss/{source['label']}") if value is not None]
        ends = (f"{losses[0]:.4f}", f"{losses[-1]:.4f}") if losses else ("", "")
        shares = (f"{source['rows']:,}", f"{source['tokens']:,}", f"{source['target_share']:.1%}")
        result.append([source["label"], *shares, *ends])
    return result


Row = tuple[str, str, str]


def _settings(values: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """Return name, value and default of the settings that differ from their default, and of the others."""
    changed: list[Row] = []
    others: list[Row] = []
    for name, value in values.items():
        default = records.default(name)
        row = (name, "" if value is None else shown(value), "" if default is None else shown(default))
        (others if value == default else changed).append(row)
    return changed, others
