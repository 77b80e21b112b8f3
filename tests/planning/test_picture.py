"""The picture of a plan."""

import sys
from pathlib import Path

import pytest

from superoffload.errors import UserError
from superoffload.planning import picture, plan, speed
from superoffload.planning.plan import Plan
from superoffload.planning.remedies import Capacity
from tests.helpers.planning import recipe

GIB = 2**30


@pytest.fixture(scope="module")
def example() -> Plan:
    shape, wanted = recipe("llama-8b")
    return plan.make(
        shape, wanted, Capacity(device=40 * GIB, host=480 * GIB), speed.hardware(None, None, wanted.ranks, None)
    )


# Not marked `unit`: on its first import ever, matplotlib runs fc-list to find the fonts.
def test_parts_sums_and_capacities_are_labelled(example: Plan) -> None:
    pytest.importorskip("matplotlib")
    left, right = picture.figure(example).axes
    texts = [[text.get_text() for text in axes.texts] for axes in (left, right)]
    for found, parts, capacity in zip(texts, (example.budget.device, example.budget.host), (40, 480), strict=True):
        large = [name for name, size in parts.items() if size > 0.01 * capacity * GIB]
        assert len(large) >= 3
        assert all(any(text.startswith(f"{name} ") for text in found) for name in large)
        assert f"{sum(parts.values()) / GIB:.1f}" in found
    assert [axes.get_title() for axes in (left, right)] == [
        "One device, capacity 40.0 GiB (dashed)", "Host memory of one machine, capacity 480.0 GiB (dashed)"
    ]  # fmt: skip
    assert [axes.lines[0].get_ydata()[0] for axes in (left, right)] == [40, 480]
    assert [label.get_text().replace("\n", " ") for label in right.get_xticklabels()] == [
        "between steps", *example.budget.host_peaks
    ]  # fmt: skip
    heights = [bar.get_height() for bar in left.patches]
    assert sum(heights) == pytest.approx(example.budget.device_peak / GIB)


def test_a_png_is_written(example: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture.draw(example, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"^--plot .*: cannot be written \(No such file or directory\)$"):
        picture.draw(example, tmp_path / "missing" / "plan.png")


@pytest.mark.unit
def test_without_matplotlib_the_extra_is_named(example: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(
        UserError, match=r'^--plot: needs matplotlib; install it with: pip install "superoffload\[plots\]"$'
    ):
        picture.draw(example, "plan.png")
