"""The curve of the loss on the model card, as PNG."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from superoffload.errors import FAILURES, first_line
from superoffload.log import logger

Points = Sequence[tuple[int, float]]
"""Steps and losses."""


def draw(path: Path, training: Points, held_out: Points) -> bool:
    """Draw both losses over the steps; return whether there was something to draw, and matplotlib to draw it with.

    A matplotlib that does not work is a warning: the export is worth more than its picture. Raises OSError.
    """
    if len(training) < 2 or importlib.util.find_spec("matplotlib") is None:
        return False
    try:
        _draw(path, training, held_out)
    except OSError:  # such as a full disk
        raise
    except FAILURES as error:
        path.unlink(missing_ok=True)
        logger.warning("The model card has no curve of the loss: %s", first_line(error))
        return False
    return True


def _draw(path: Path, training: Points, held_out: Points) -> None:
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
