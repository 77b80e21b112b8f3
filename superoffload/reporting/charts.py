"""Series of numbers -> charts, as paths within a square of 1000 by 1000 that a page stretches. Pure."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from superoffload.reporting.records import Points

SIZE = 1000
MOST_POINTS = 600
"""About as many points of a line as a wide screen has columns for; a longer line keeps the extremes of each part."""
AREA_POINTS = 120
SMOOTHED_PARTS = 60
"""A smoothed value is the mean of about a thirtieth of its line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line of a chart. kind: line, faint, dots, limit (a level over the whole width), area, or bars.

    color: its number in the page's palette; 0 is the accent. hidden: not in the legend and not under the pointer.
    """

    name: str
    points: Points
    kind: str = "line"
    color: int = 0
    hidden: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What a page draws: a path for each series, ticks as pairs of a position in percent and a label.

    data: what the page shows under the pointer.
    """

    title: str
    unit: str
    x_name: str
    note: str
    wide: bool
    series: list[tuple[Series, str]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    data: dict[str, Any] = field(default_factory=dict)


def chart(  # noqa: PLR0913 - what is written around a chart
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    x_name: str = "step",
    note: str = "",
    wide: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """Draw series into a chart; None if they have no finite value."""
    shown = [
        Series(name=one.name, points=_thinned(one), kind=one.kind, color=one.color, hidden=one.hidden)
        for one in series
        if any(value is not None for _, value in one.points)
    ]
    levels = [value for one in shown for _, value in one.points if value is not None]
    places = [x for one in shown if one.kind != "limit" for x, _ in one.points]
    if not levels or not places:
        return None
    from_zero = from_zero or any(one.kind in ("area", "bars") for one in shown)
    low, high, y_ticks = scale(min(levels), max(levels), from_zero)
    left, right = min(places), max(places)
    left, right = (left, right) if right > left else (left - 0.5, right + 0.5)

    def x_of(x: float) -> float:
        return SIZE * (x - left) / (right - left)

    def y_of(y: float) -> float:
        return SIZE * (1 - (y - low) / (high - low))

    return Chart(
        title=title,
        unit=unit,
        x_name=x_name,
        note=note,
        wide=wide,
        series=list(_paths(shown, x_of, y_of)),
        x_ticks=[(x_of(x) / 10, label(x)) for x in steps_between(left, right)],
        y_ticks=[(y_of(y) / 10, label(y)) for y in y_ticks],
        data={"from": left, "to": right, "low": low, "high": high, "lines": list(_data(shown))},
    )


def stacked(parts: dict[str, Points], colors: dict[str, int]) -> list[Series]:
    """Turn parts of a whole, with the same steps, into areas one on top of the other, the first at the bottom."""
    thin = {name: means(points, AREA_POINTS) for name, points in parts.items()}
    base = [0.0] * max((len(points) for points in thin.values()), default=0)
    result = []
    for name, points in thin.items():
        tops = [below + (value or 0.0) for below, (_, value) in zip(base, points, strict=True)]
        outline = [(x, top) for (x, _), top in zip(points, tops, strict=True)]
        floor = [(x, below) for (x, _), below in zip(points, base, strict=True)]
        result.append(Series(name=name, points=[*outline, *reversed(floor)], kind="area", color=colors.get(name, 7)))
        base = tops
    return result


def means(points: Points, most: int) -> Points:
    """Return the means of up to `most` parts of a line; values that are None count as 0."""
    width = max(1, math.ceil(len(points) / most))
    parts = [points[first : first + width] for first in range(0, len(points), width)]
    return [(part[len(part) // 2][0], sum(value or 0.0 for _, value in part) / len(part)) for part in parts]


def smoothed(points: Points) -> Points:
    """Return the mean of each value and its neighbours, fewer of them near the ends; None stays None.

    A mean over both sides does not lag behind, as an exponential mean does.
    """
    reach = len(points) // SMOOTHED_PARTS
    sums = [0.0, *accumulate(value or 0.0 for _, value in points)]
    counts = [0, *accumulate(value is not None for _, value in points)]
    result: Points = []
    for place, (x, value) in enumerate(points):
        half = min(reach, place, len(points) - 1 - place)
        first, after = place - half, place + half + 1
        mean = None if value is None else (sums[after] - sums[first]) / (counts[after] - counts[first])
        result.append((x, mean))
    return result


def scale(low: float, high: float, from_zero: bool = False) -> tuple[float, float, list[float]]:
    """Return the ends of an axis around values, and its ticks."""
    low = min(0.0, low) if from_zero else low
    if high <= low:
        low, high = (low - abs(low) * 0.1 - 1e-12, high + abs(high) * 0.1 + 1e-12) if high else (0.0, 1.0)
    step = _nice((high - low) / 4)
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return bottom, top, [bottom + number * step for number in range(round((top - bottom) / step) + 1)]


def steps_between(low: float, high: float) -> list[float]:
    """Return ticks within an axis of whole numbers."""
    step = max(1.0, _nice((high - low) / 6))
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _nice(step: float) -> float:
    """Return the smallest of 1, 2, 2.5, 5 and 10 times a power of ten that is not less."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999) * power


def label(value: float) -> str:
    """Write the number of a tick."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{round(value, 12):.4g}".replace("e-0", "e-")


def _thinned(series: Series) -> Points:
    points = series.points
    if len(points) <= MOST_POINTS or series.kind in ("area", "bars"):
        return points
    width = math.ceil(2 * len(points) / MOST_POINTS)
    return [point for first in range(0, len(points), width) for point in _extremes(points[first : first + width])]


def _extremes(points: Points) -> Iterable[tuple[float, float | None]]:
    """Return the lowest and the highest of some points, in their order; if none is finite, the first."""
    finite = [point for point in points if point[1] is not None]
    if not finite:
        return points[:1]
    ends = {min(finite, key=lambda point: point[1] or 0.0), max(finite, key=lambda point: point[1] or 0.0)}
    return sorted(ends)


def _paths(
    shown: Sequence[Series], x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> Iterable[tuple[Series, str]]:
    for one in shown:
        if one.kind == "limit":
            path = f"M0 {y_of(one.points[0][1] or 0.0):.1f}H{SIZE}"
        elif one.kind == "bars":
            path = _bars(one.points, x_of, y_of)
        else:
            placed = [(x_of(x), None if y is None else y_of(y)) for x, y in one.points]
            path = _dots(placed) if one.kind == "dots" else _line(placed) + ("Z" if one.kind == "area" else "")
        yield one, path


def _line(placed: Points) -> str:
    """Return the path of a line, with gaps where there is no value; a point alone is a dot."""
    words: list[str] = []
    drawing = False
    for number, (x, y) in enumerate(placed):
        if y is None:
            drawing = False
            continue
        words.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
        last = number + 1 == len(placed) or placed[number + 1][1] is None
        if last and not drawing:
            words.append("h0")
        drawing = True
    return "".join(words)


def _dots(placed: Points) -> str:
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in placed if y is not None)


def _bars(points: Points, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    """Return bars between the places of two points, each as high as the second."""
    left = x_of(points[0][0])
    words = []
    for end, count in points[1:]:
        right = x_of(end)
        words.append(f"M{left:.1f} {SIZE}V{y_of(count or 0.0):.1f}H{right:.1f}V{SIZE}Z")
        left = right
    return "".join(words)


def _data(shown: Sequence[Series]) -> Iterable[dict[str, Any]]:
    for one in shown:
        if not one.hidden and one.kind in ("line", "dots"):
            yield {"name": one.name, "color": one.color, "points": [[x, y] for x, y in one.points if y is not None]}
