"""Where the time of a step goes: one bar of parts for each configuration, as PNG."""

import importlib.util
from pathlib import Path
from typing import Any

from superoffload.bench.report import REST, Report
from superoffload.errors import UserError
from superoffload.training.step_parts import PARTS

COLORS = ("#c9ced6", "#8fb4dc", "#f2d98d", "#5b86b8", "#e8a9a1", "#d9c2e9", "#e7e9ec")
LABELLED = 0.04  # of the longest bar: a part with its number inside


def check() -> None:
    """Raise `UserError` without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            '--out: the picture needs matplotlib; pip install "superoffload[plots]" installs it, --no_picture omits it'
        )


def draw(report: Report, path: Path) -> None:
    """Write the picture of a report; none if no configuration has numbers."""
    if any(one.get("step_time_s") for one in report["configurations"]):
        figure(report).savefig(path, format="png")


def figure(report: Report) -> Any:
    """Draw the parts of a step in milliseconds; configurations without numbers are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [one for one in report["configurations"] if one.get("step_time_s")]
    result = Figure(figsize=(11, 1.6 + 0.5 * len(measured)), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(result)
    axes = result.subplots()
    left = [0.0] * len(measured)
    longest = max((sum(one["parts_s"].values()) for one in measured), default=0.0) * 1000
    for part, color in zip((*PARTS, REST), COLORS, strict=True):
        widths = [1000 * max(0.0, one["parts_s"].get(part, 0.0)) for one in measured]
        if any(widths):
            axes.barh(range(len(measured)), widths, left=left, color=color, edgecolor="white", label=part)
        for place, (begin, width) in enumerate(zip(left, widths, strict=True)):
            if width > LABELLED * longest:
                axes.text(begin + width / 2, place, f"{width:,.0f}", ha="center", va="center", fontsize=8)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for place, (end, one) in enumerate(zip(left, measured, strict=True)):
        axes.text(end, place, f" {one['target_tokens_per_s']['median']:,.0f} target tokens/s", va="center", fontsize=8)
    axes.set_yticks(range(len(measured)), [one["name"] for one in measured])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.25 or 1)
    axes.set_xlabel("milliseconds per step")
    axes.set_title(f"{report['model']['name']}: where the time of a step goes", fontsize=10)
    axes.legend(ncols=len(PARTS) + 1, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return result
