"""What became faster or slower since another benchmark."""

import pytest

from superoffload.bench import compare
from tests.helpers.reports import configuration, report

pytestmark = pytest.mark.unit

BEFORE = report(
    configuration("a", [100.0, 101.0, 99.0]),
    configuration("b", [100.0, 110.0, 90.0], mode="zerooffload"),
    configuration("c", [100.0], batch_size=8),
    configuration("gone", [100.0], batch_size=4),
    configuration("was broken", [], failure="no memory", max_length=8),
)
NOW = report(
    configuration("a", [120.0, 121.0, 119.0]),
    configuration("b, renamed", [100.0, 120.0, 95.0], mode="zerooffload"),
    configuration("c", [50.0], batch_size=8),
    configuration("new", [1.0], batch_size=16),
    configuration("was broken", [5.0], max_length=8),
    versions={"torch": "2.14.0", "deepspeed": "0.19.8"},
    product_flops_per_s={"median": 8e11, "min": 8e11, "max": 8e11},
)


def test_only_what_is_beyond_the_spread_is_faster_or_slower() -> None:
    faster, same, slower, new, repaired, gone, product, differences = compare.lines(BEFORE, NOW)
    assert faster.startswith("a: faster, 1.200 of the target tokens/s (1.178-1.222); most of it in backward, -117 ms")
    assert same == "b, renamed: no change beyond the spread, 1.000 of the target tokens/s (0.864-1.333)"
    assert slower.startswith("c: slower, 0.500 of the target tokens/s (0.500-0.500); most of it in backward, +700 ms")
    assert new == "new: not in the benchmark before"
    assert repaired == "was broken: failed before, measured now"
    assert gone == "gone: only in the benchmark before"
    assert product == "The machine's bf16 matrix product: 2.000 of before"
    assert differences == "What differs: torch was 2.13.0, is 2.14.0."


def test_equal_benchmarks_differ_in_nothing() -> None:
    lines = compare.lines(NOW, NOW)
    assert not any("faster" in line or "slower" in line for line in lines)
    assert lines[-1] == "What differs: neither machine nor versions."


def test_another_model_or_number_of_ranks_is_not_compared() -> None:
    name, count = "llama-1b", NOW["model"]["parameters"]
    other = report(model={"name": name, "parameters": 1000, "random_weights": True}, ranks=4)
    assert compare.lines(other, NOW) == [
        f"Nothing to compare with: model was {name} of 1,000 parameters, is {name} of {count:,} parameters; "
        "ranks was 4, is 1."
    ]
    real = report(model={**NOW["model"], "random_weights": False})
    assert compare.lines(real, NOW)[0].startswith("Nothing to compare with")


def test_a_benchmark_that_ended_before_it_knew_the_model_is_compared_all_the_same() -> None:
    early = report(configuration("a", [], failure="no memory"), model={**NOW["model"], "parameters": None})
    assert compare.lines(NOW, early)[0] == "a: measured before, failed now"
