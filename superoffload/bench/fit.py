"""Whether all configurations fit into memory together. Imports no torch by itself."""

from collections.abc import Sequence
from dataclasses import replace

from superoffload.bench.grid import Order
from superoffload.config import build
from superoffload.ds_config import merge_flags, read_ds_config
from superoffload.planning import machine
from superoffload.planning.budget import job, memory
from superoffload.planning.budget.shape import Shape
from superoffload.setting import AUTO

GIB = 2**30
SHARE = 0.85
"""How much of what is available may be planned for: the arithmetic may be off."""


def reason_to_be_alone(orders: Sequence[Order], shape: Shape, ranks: int, here: machine.Machine) -> str | None:
    """Return why the configurations cannot all be in memory at once; None if they can.

    Raises `UserError` if the settings of one contradict each other.
    """
    needs = [_need(order, shape, ranks, on_cpu=not here.devices) for order in orders]
    if len(needs) == 1:
        return None
    if here.devices and any(order.flags.get("offload_ratio") == AUTO for order in orders):
        return f"--offload_ratio {AUTO} takes all of the device's memory that is free"
    devices = [device.free_bytes for device in here.devices]
    places = (
        ("device", sum(need.device_peak for need in needs), min(devices, default=None)),
        ("host", sum(need.host_peak for need in needs), here.host_available_bytes),
    )
    for place, needed, there in places:
        if there is not None and needed > SHARE * there:
            return f"together they need {needed / GIB:.1f} GiB of {place} memory, {there / GIB:.1f} GiB are free"
    return None


def _need(order: Order, shape: Shape, ranks: int, *, on_cpu: bool) -> memory.Budget:
    config = build(order.flags, frozenset(order.flags))
    merged = merge_flags(read_ds_config(config), config, ranks)
    asked = job.of(merged.config, merged.ds_config, ranks, ranks)
    rounds_up = job.rounds_pinned_memory()  # no recipe sets the options of the allocator here
    return memory.budget(shape, replace(asked, on_cpu=on_cpu, pinned_rounding=rounds_up))
