"""Numbers become paths, axes and ticks."""

import pytest

from superoffload.reporting import charts
from superoffload.reporting.charts import Series, chart
from superoffload.reporting.records import Points

pytestmark = pytest.mark.unit


def path_of(points: Points, kind: str = "line", from_zero: bool = False) -> str:
    made = chart("t", [Series(name="s", points=points, kind=kind)], from_zero=from_zero)
    assert made is not None
    return made.series[0][1]


@pytest.mark.parametrize(
    ("low", "high", "from_zero", "expected"),
    [
        (0.9, 1.7, False, [0.8, 1.0, 1.2, 1.4, 1.6, 1.8]),
        (0.9, 1.7, True, [0.0, 0.5, 1.0, 1.5, 2.0]),
        (0.0, 1e-5, True, [0.0, 2.5e-6, 5e-6, 7.5e-6, 1e-5]),
        (990.0, 1010.0, False, [990, 995, 1000, 1005, 1010]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(
    low: float, high: float, from_zero: bool, expected: list[float]
) -> None:
    bottom, top, ticks = charts.scale(low, high, from_zero)
    assert ticks == pytest.approx(expected)
    assert [bottom, top] == pytest.approx([ticks[0], ticks[-1]])


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-9])
def test_an_axis_around_one_value_has_a_height(value: float) -> None:
    bottom, top, _ = charts.scale(value, value)
    assert bottom <= value <= top and bottom < top


def test_ticks_of_steps_are_within_the_axis() -> None:
    assert charts.steps_between(10, 3000) == [500, 1000, 1500, 2000, 2500, 3000]
    assert charts.steps_between(1, 4) == [1, 2, 3, 4]
    assert charts.steps_between(0.5, 1.5) == [1]


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (2.5e-6, "2.5e-6"), (0.8, "0.8"), (12000.0, "12,000")])
def test_labels(value: float, text: str) -> None:
    assert charts.label(value) == text


def test_a_line_fills_the_square_and_has_gaps_where_there_is_no_value() -> None:
    assert (
        path_of([(0, 0.0), (1, 2.0), (2, None), (3, 1.0), (4, 0.0)])
        == "M0.0 1000.0L250.0 0.0M750.0 500.0L1000.0 1000.0"
    )
    assert path_of([(0, 0.0), (1, None), (2, 2.0)]) == "M0.0 1000.0h0M1000.0 0.0h0"  # dots


def test_one_point_is_in_the_middle() -> None:
    assert path_of([(7, 1.0)], from_zero=True) == "M500.0 0.0h0"


def test_bars_stand_on_zero() -> None:
    assert (
        path_of([(0, None), (10, 2.0), (20, 4.0)], "bars") == "M0.0 1000V500.0H500.0V1000ZM500.0 1000V0.0H1000.0V1000Z"
    )


def test_nothing_finite_is_no_chart() -> None:
    assert chart("t", [Series(name="s", points=[])]) is None
    assert chart("t", [Series(name="s", points=[(1, None)])]) is None


def test_a_long_line_keeps_its_extremes() -> None:
    values: Points = [(step, float(step % 7)) for step in range(20_000)]
    values[12_345] = (12_345, 99.0)
    values[777] = (777, -5.0)
    path = chart("t", [Series(name="s", points=values)])
    assert path is not None
    kept = path.data["lines"][0]["points"]
    assert len(kept) <= charts.MOST_POINTS + 2
    assert [12_345, 99.0] in kept and [777, -5.0] in kept
    assert kept == sorted(kept)


def test_areas_lie_on_top_of_each_other() -> None:
    below, above = charts.stacked({"a": [(1, 1.0), (2, 2.0)], "b": [(1, 3.0), (2, None)]}, {"a": 3})
    assert (below.color, above.color) == (3, 7)
    assert below.points == [(1, 1.0), (2, 2.0), (2, 0.0), (1, 0.0)]
    assert above.points == [(1, 4.0), (2, 2.0), (2, 2.0), (1, 1.0)]


def test_a_smoothed_value_is_the_mean_of_its_neighbours() -> None:
    values: Points = [(step, float(step % 2)) for step in range(120)]
    values[50] = (50, None)
    found = charts.smoothed(values)
    assert found[0] == values[0] and found[-1] == values[-1]  # none on the other side
    assert [found[place][1] for place in (1, 9, 10, 51)] == pytest.approx([1 / 3, 3 / 5, 2 / 5, 3 / 4])
    assert found[50] == (50, None)


def test_a_short_line_is_not_smoothed() -> None:
    values: Points = [(step, float(step % 2)) for step in range(59)]
    assert charts.smoothed(values) == values
