"""Draw the curves of runs into one picture, with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from superoffload import config_file
from superoffload.errors import UserError
from superoffload.reporting import records
from superoffload.reporting.charts import smoothed
from superoffload.reporting.records import Points, Records
from superoffload.setting import shown

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1c2330", "#8a93a3")
FORMATS = (".png", ".svg", ".pdf")
NOT_NAMED = ("evaluation", "output", "checkpoint", "measurement", "tracking")
"""Groups of settings that do not change a curve."""
LEGEND_WIDTH = 100


def draw(runs: Sequence[Records], path: Path) -> None:
    """Write the picture of some runs. Raises `UserError` without matplotlib, and if the file cannot be written."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out {path}: must end with one of {', '.join(FORMATS)}")
    picture = figure(runs)
    try:
        picture.savefig(path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error


def figure(runs: Sequence[Records]) -> Any:
    """Draw loss with held-out loss, and throughput, of some runs. Raises `UserError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('--out: needs matplotlib; install it with: pip install "superoffload[plots]"') from error
    result = Figure(figsize=(10, 6.5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(result)
    loss, speed = result.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    names = labels(runs)
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        look = {"color": COLORS[number % len(COLORS)], "linewidth": 1.6}
        _line(loss, smoothed(run.series("loss")), label=fill(name, LEGEND_WIDTH), **look)
        held_out = records.points(run.evaluations, "eval_loss")
        _line(loss, held_out, marker="o", markersize=5, linestyle=":", **look)
        _line(speed, run.series("target_tokens_per_s"), **look)
    loss.set_title("Loss, smoothed (dots: held out)", loc="left", fontsize=10)
    speed.set_title("Target tokens per second", loc="left", fontsize=10)
    speed.set_ylim(bottom=0)
    speed.set_xlabel("step")
    for axes in (loss, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e7ec", linewidth=0.8)
        axes.set_axisbelow(True)
    loss.legend(frameon=False, fontsize=9)
    return result


def labels(runs: Sequence[Records]) -> list[str]:
    """Name each run by its folder and the settings in which the runs differ, and these alone if that is enough."""
    known = [name for name, (group, _) in config_file.settings().items() if group not in NOT_NAMED]
    known = known if all(run.settings for run in runs) else []
    differing = [name for name in known if len({_value(run, name) for run in runs}) > 1]
    names = [", ".join(f"{name} {_value(run, name)}" for name in differing) for run in runs]
    folders = [run.folder.name or str(run.folder) for run in runs]
    if differing and len(set(names)) == len(names):
        return names
    return [f"{folder}: {name}" if name else folder for folder, name in zip(folders, names, strict=True)]


def _value(run: Records, name: str) -> str:
    return shown(run.settings.get(name)).rstrip("/").split("/")[-1].removesuffix(".json")


def _line(axes: Any, points: Points, **look: Any) -> None:
    if points:
        axes.plot([x for x, _ in points], [float("nan") if y is None else y for _, y in points], **look)
