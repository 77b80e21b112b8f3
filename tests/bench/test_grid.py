"""Flags with several values -> configurations."""

import pytest

from superoffload import config
from superoffload.bench import grid
from superoffload.errors import UserError
from tests.helpers.reports import ONE

pytestmark = pytest.mark.unit


def test_every_axis_has_values_in_the_tests_and_is_a_setting() -> None:
    assert tuple(ONE) == grid.AXES
    assert set(grid.SETTINGS) <= set(config.SPECS)


def test_configurations_are_the_product_and_are_named_by_what_differs() -> None:
    found = grid.cases({**ONE, "mode": grid.MODES, "activation_checkpointing": ("none", "full", "offload")}, ())
    assert [case.name for case in found] == [
        "superoffload, not recomputing", "superoffload, recomputing", "superoffload, recomputing from the host",
        "zerooffload, not recomputing", "zerooffload, recomputing", "zerooffload, recomputing from the host",
    ]  # fmt: skip
    assert found[1].values == {axis: values[0] for axis, values in ONE.items()} | {"activation_checkpointing": "full"}
    assert [case.ds_config for case in found] == ["superoffload.json"] * 3 + ["zerooffload.json"] * 3


def test_tiles_are_named() -> None:
    found = grid.cases({**ONE, "tiled_mlp": (0, 4, "auto")}, ())
    assert [case.name for case in found] == ["untiled", "4 tiles", "auto tiles"]


def test_a_single_configuration_is_named_by_its_mode() -> None:
    assert [case.name for case in grid.cases(ONE, ())] == ["superoffload"]


def test_alternatives_differ_from_the_first_configuration_and_are_not_repeated() -> None:
    found = grid.cases({**ONE, "batch_size": (1, 2)}, ("deepspeed", "upstream-shape"))
    assert [case.name for case in found] == [
        "superoffload, packed, batch 1", "superoffload, packed, batch 2", "DeepSpeed's SuperOffload, packed, batch 1",
        "superoffload, padded to max_length, batch 1",
    ]  # fmt: skip
    assert found[2].ds_config == "superoffload.json"
    assert found[3].flags["padding"] == "max_length" and not found[3].flags["packing"]
    padded = grid.cases({**ONE, "layout": ("max_length",)}, ("upstream-shape",))
    assert len(padded) == 1


def test_the_flags_of_a_configuration_are_those_of_a_run() -> None:
    (case,) = grid.cases(ONE, ())
    made = config.build({"model_name": "m", "output_dir": "o", **case.flags})
    assert made.data.packs and made.training.batch_size == 2


def test_too_many_configurations_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^2 --mode x 13 --batch_size: 26 configurations are too many; .* at most 24$"):
        grid.cases({**ONE, "mode": grid.MODES, "batch_size": tuple(range(1, 14))}, ())
