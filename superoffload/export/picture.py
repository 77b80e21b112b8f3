"""The curve of the loss on the model card, as PNG."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

Points = Sequence[tuple[int, float]]
"""Steps and losses."""


def draw(path: Path, training: Points, held_out: Points) -> bool:
    """Draw both losses over the steps; return whether there was something to draw, and matplotlib to draw it with."""
    if len(training) < 2 or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    result = Figure(figsize=(8, 4), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(result)
    axes = result.subplots()
    axes.plot(*zip(*training, strict=True), color="#8fb4dc", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c0392b", markersize=4, label="held-out rows")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    result.savefig(path, format="png")
    return True
