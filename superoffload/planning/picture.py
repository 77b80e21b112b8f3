"""Draw a plan: the memory of a device and of a host against what there is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from superoffload.errors import UserError
from superoffload.planning.plan import Plan
from superoffload.planning.words import GIB, count, gib

COLORS = ("#8fb4dc", "#f5b57a", "#9fd3c7", "#d9c2e9", "#f2d98d", "#b5d99c", "#e8a9a1", "#c9ced6", "#a8d0e6", "#dcc9b6")
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
TOTAL_COLOR = "#d9dee3"
WIDE, NARROW, GAP = 1.15, 0.7, 0.3  # of the bar with parts, of the others, and between them
SMALL, SMALLEST = 0.03, 0.006  # of the height: a part with its label beside it, and one without a label


def draw(plan: Plan, path: Path | str) -> None:
    """Write a picture of a plan as PNG. Raises `UserError` without matplotlib, and if the file cannot be written."""
    picture = figure(plan)
    try:
        picture.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written ({error.strerror})") from error


def figure(plan: Plan) -> Any:
    """Draw a plan as a matplotlib figure. Raises `UserError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('--plot: needs matplotlib; install it with: pip install "superoffload[plots]"') from error
    result = Figure(figsize=(11, 6), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(result)
    job = plan.job
    result.suptitle(
        f"{plan.shape.name}: {count(plan.shape.parameters)} parameters, {job.mode}, "
        f"{job.ranks} rank{'s' if job.ranks > 1 else ''}, {job.batch} x {job.length} tokens, ratio {job.ratio:g}"
    )
    left, right = result.subplots(1, 2, width_ratios=(1, 2.6))
    _stack(left, {"peak of\na step": plan.budget.device}, plan.capacity.device, "One device")
    peaks = {phase.replace(" ", "\n"): {"": size} for phase, size in plan.budget.host_peaks.items()}
    _stack(right, {"between\nsteps": plan.budget.host, **peaks}, plan.capacity.host, "Host memory of one machine")
    return result


def _stack(axes: Any, bars: Mapping[str, Mapping[str, int]], capacity: int | None, title: str) -> None:
    """Draw one bar per entry, its parts from the bottom up with their labels, its sum above, and the capacity."""
    tallest = max(*(sum(parts.values()) for parts in bars.values()), capacity or 0) / GIB
    places = [0.0, *((WIDE + NARROW) / 2 + GAP + number * (NARROW + GAP) for number in range(len(bars) - 1))]
    for number, (place, parts) in enumerate(zip(places, bars.values(), strict=True)):
        _bar(axes, place, NARROW if number else WIDE, parts, tallest)
    axes.set_xticks(places, list(bars))
    if capacity is not None:
        axes.axhline(capacity / GIB, color="#c0392b", linewidth=1.5, linestyle="--")
    axes.set_ylim(0, tallest * 1.1)
    axes.set_xlim(places[0] - WIDE / 2 - GAP, places[-1] + (NARROW if places[1:] else WIDE) / 2 + GAP)
    known = "" if capacity is None else f", capacity {gib(capacity)} GiB (dashed)"
    axes.set_title(title + known, fontsize=10)
    axes.set_ylabel("GiB")
    axes.spines[["top", "right"]].set_visible(False)


def _bar(axes: Any, place: float, width: float, parts: Mapping[str, int], tallest: float) -> None:
    bottom = 0.0
    for (name, size), color in zip(((n, s / GIB) for n, s in parts.items() if s), COLORS * 2, strict=False):
        axes.bar(place, size, width, bottom=bottom, color=color if name else TOTAL_COLOR, edgecolor="white")
        low = size < SMALL * tallest
        if name and size >= SMALLEST * tallest:
            x, side = (place + width / 2 + 0.02, "left") if low else (place, "center")
            label = f"{name} {size:.1f}" if size < 100 else f"{name} {size:.0f}"
            axes.text(x, bottom + size / 2, label, ha=side, va="center", fontsize=7)
        bottom += size
    axes.text(place, bottom, f"{bottom:.1f}", ha="center", va="bottom", weight="bold", fontsize=9,
              bbox=PAPER)  # fmt: skip
