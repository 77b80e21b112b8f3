"""Whether all configurations fit into memory together."""

from dataclasses import replace
from typing import Any

import pytest

from superoffload.bench import fit, grid
from superoffload.ds_config import REPOSITORY
from superoffload.planning.budget import shape
from superoffload.planning.machine import Device, Machine
from tests.helpers.reports import ONE

pytestmark = pytest.mark.unit

GIB = 2**30
MACHINE = Machine(
    devices=(Device(name="d", total_bytes=80 * GIB, free_bytes=79 * GIB),),
    host_bytes=256 * GIB, host_available_bytes=250 * GIB, cores=8, shm_bytes=0, shm_free_bytes=0, memlock_bytes=None,
    numa_nodes=1,
)  # fmt: skip


def order(mode: str, **flags: Any) -> grid.Order:
    values = {"model_name": "m", "output_dir": "o", "deepspeed_config": str(REPOSITORY / f"configs/{mode}.json")}
    (case,) = grid.cases({**ONE, "mode": (mode,)}, ())
    return grid.Order(flags={**values, **case.flags, **flags}, mode=mode, random_weights=True, documents=1)


def test_two_that_fit_take_turns_and_more_than_there_is_room_for_do_not() -> None:
    small, large = shape.built_in("llama-1b"), shape.built_in("llama-8b")
    both = [order("superoffload"), order("zerooffload")]
    assert fit.reason_to_be_alone(both, small, 1, MACHINE) is None
    why = fit.reason_to_be_alone(both, large, 1, MACHINE)
    assert why is not None and "of host memory, 250.0 GiB are free" in why
    assert fit.reason_to_be_alone(both[:1], large, 1, MACHINE) is None


def test_the_memory_of_the_device_counts_too() -> None:
    narrow = replace(MACHINE, devices=(replace(MACHINE.devices[0], free_bytes=8 * GIB),))
    why = fit.reason_to_be_alone([order("superoffload")] * 2, shape.built_in("llama-1b"), 1, narrow)
    assert why is not None and "of device memory, 8.0 GiB are free" in why


def test_what_fills_the_device_does_not_share_it() -> None:
    orders = [order("superoffload", offload_ratio="auto"), order("zerooffload")]
    small = shape.built_in("llama-1b")
    assert fit.reason_to_be_alone(orders, small, 1, MACHINE) == (
        "--offload_ratio auto takes all of the device's memory that is free"
    )
    assert fit.reason_to_be_alone(orders, small, 1, replace(MACHINE, devices=())) is None


def test_memory_that_torch_rounds_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the options of the recipes."""
    needs = []
    for options in ("pinned_max_round_threshold_mb:64", ""):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", options)
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        needs.append(fit._need(order("zerooffload"), shape.built_in("llama-8b"), 1, on_cpu=False).host_peak)
    assert needs[0] < needs[1]
