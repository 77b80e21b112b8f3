"""`--offload_ratio auto`: the largest share of the optimizer that fits the device. Imports no torch."""

import math
from dataclasses import replace

from superoffload.planning.budget.device import on_device, sub_groups
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.memory import budget
from superoffload.planning.budget.shape import Shape
from superoffload.planning.forecast import MARGIN

STEPS = 100


def auto(shape: Shape, job: Job, device_bytes: int | None, saved: float | None = None) -> tuple[float, str]:
    """Return the ratio for a device with so much memory, None without one, and why; `saved` is the checkpoint's.

    It puts as many sub-groups on the device as leave the margin free, in steps that DeepSpeed's count of sub-groups
    follows exactly. A run keeps the ratio of its checkpoint if that fits, because host and device round differently.
    """
    limit = math.inf if device_bytes is None else device_bytes * (1 - MARGIN)

    def count(ratio: float) -> int:
        return len(on_device(shape, replace(job, ratio=ratio)))

    def fits(ratio: float) -> bool:
        return budget(shape, replace(job, ratio=ratio)).device_peak <= limit

    if saved is not None and fits(saved):
        return saved, "as in the checkpoint"
    if device_bytes is None:
        return 1.0, "because there is no GPU"
    ratios = [step / STEPS for step in range(STEPS + 1)]
    most = count(next((ratio for ratio in ratios if fits(ratio)), 1.0))
    ratio = next(ratio for ratio in reversed(ratios) if count(ratio) == most)
    why = f"which puts {most} of {len(sub_groups(shape, job))} sub-groups on the device"
    return ratio, why if saved is None else f"{why}; the checkpoint was saved with {saved}, and rounds differently"
