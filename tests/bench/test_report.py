"""Medians, and ratios with their spread."""

from typing import Any

import pytest

from superoffload.bench import report

pytestmark = pytest.mark.unit


def turn(number: int, step_s: float, targets_per_s: float, **parts: float) -> dict[str, Any]:
    return {
        "round": number, "steps": 2, "step_time_s": step_s, "tokens_per_s": 2 * targets_per_s,
        "target_tokens_per_s": targets_per_s, "tflops_per_gpu": 0.2, "hardware_tflops_per_gpu": 0.3,
        "padding_share": 0.1, "parts": parts, "clipped_steps": number, "loss": 1.0,
    }  # fmt: skip


def test_ratios_are_taken_within_each_round_and_keep_their_spread() -> None:
    """The machine was twice as slow in the second round, in which both slowed down."""
    first = [turn(0, 1.0, 100.0), turn(1, 2.0, 50.0), turn(2, 1.0, 100.0)]
    other = [turn(0, 1.0, 120.0), turn(1, 2.0, 55.0), turn(2, 1.0, 130.0)]
    found = report.summarise(other, first, product_flops_per_s=1e12)
    assert found["ratio"] == pytest.approx({"median": 1.2, "min": 1.1, "max": 1.3})
    assert found["target_tokens_per_s"] == {"median": 120.0, "min": 55.0, "max": 130.0}
    assert found["share_of_product"] == pytest.approx(0.2)
    assert found["clipped_share"] == pytest.approx(0.5)


def test_parts_are_medians_and_what_is_in_none_is_the_rest() -> None:
    turns = [turn(0, 10.0, 1.0, forward=4.0, backward=5.0), turn(1, 12.0, 1.0, forward=4.0, backward=6.0),
             turn(2, 30.0, 1.0, forward=9.0, backward=20.0)]  # fmt: skip
    assert report.summarise(turns, turns, None)["parts_s"] == {"forward": 4.0, "backward": 6.0, "rest": 1.0}


def test_rounds_that_the_first_configuration_did_not_finish_give_no_ratio() -> None:
    found = report.summarise([turn(0, 1.0, 100.0), turn(1, 1.0, 300.0)], [turn(0, 1.0, 50.0)], None)
    assert found["ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0} and found["share_of_product"] is None
    assert report.summarise([turn(0, 1.0, 100.0)], [], None)["ratio"] is None
    assert report.summarise([], [], None) == {}


def test_ranks_share_the_cores_of_a_cpu_but_not_a_device() -> None:
    assert report.product_rate([1.0, 4.0, 8.0], [{"device": "cpu"}], 2) == 2.0
    assert report.product_rate([1.0, 4.0, 8.0], [{}, {"device": "cuda"}], 2) == 4.0
    assert report.product_rate([], [], 1) is None
