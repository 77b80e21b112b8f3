"""Decide: does a job fit, what would make it fit, what is the most that fits, how long does a step take.

Imports no torch. `words.py` says it, `picture.py` draws it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from superoffload.planning.budget.job import Job
from superoffload.planning.budget.memory import Budget, budget, deepspeed_estimate
from superoffload.planning.budget.shape import Shape
from superoffload.planning.remedies import Capacity, Remedy, Search
from superoffload.planning.speed import Hardware, StepTime, in_mode, step_time

MODES = ("superoffload", "zerooffload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is known of a run before it starts.

    missing: bytes beyond the capacity, by place. remedies: the smallest changes that make it fit, each enough alone;
    nearest: if there are none, what comes nearest. largest_batch: the most rows that fit with all else the same; None
    if not even one fits. longest: the largest length by flags for longer rows, "" for none of them. steps: by mode.
    """

    shape: Shape
    job: Job
    capacity: Capacity
    budget: Budget
    missing: dict[str, int]
    remedies: tuple[Remedy, ...]
    nearest: Remedy | None
    largest_batch: int | None
    longest: dict[str, int | None]
    hardware: Hardware
    steps: dict[str, StepTime]

    @property
    def largest_length(self) -> int | None:
        """Return the largest length that fits with all else the same; None if not even the least fits."""
        return self.longest[""]

    @property
    def fits(self) -> bool:
        """Return whether the run fits wherever the capacity is known."""
        return not self.missing

    @property
    def step(self) -> StepTime:
        """Return the time of a step in the mode of the job."""
        return self.steps[self.job.mode]

    @property
    def best_mode(self) -> str:
        """Return the mode in which a step is shorter; if both take as long, DeepSpeed's own."""
        times = {mode: self.steps[mode].step_s for mode in MODES}
        return "superoffload" if times["superoffload"] < 0.97 * times["zerooffload"] else "zerooffload"


def make(shape: Shape, job: Job, capacity: Capacity, hardware: Hardware) -> Plan:
    """Plan a job; takes about a second where it does not fit, and less where it does."""
    search = Search(shape=shape, capacity=capacity)
    remedies, nearest = search.remedies(job)
    return Plan(
        shape=shape,
        job=job,
        capacity=capacity,
        budget=budget(shape, job),
        missing=search.missing(job),
        remedies=remedies,
        nearest=nearest,
        largest_batch=search.largest(job, "batch"),
        longest=search.longest(job),
        hardware=hardware,
        steps={mode: in_mode(shape, job, hardware, mode) for mode in MODES},
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON has it, all sizes in bytes and all times in seconds; the names do not change.

    Times are null on the CPU, for which there is no estimate.
    """
    return {
        "fits": plan.fits,
        "model": {"name": plan.shape.name, "parameters": plan.shape.parameters, "trained": plan.shape.trained},
        "job": asdict(plan.job),
        "capacity": asdict(plan.capacity),
        "missing": plan.missing,
        **_memory(plan.budget),
        "deepspeed_estimate": deepspeed_estimate(plan.shape, plan.job),
        "remedies": [_remedy(plan, remedy) for remedy in plan.remedies],
        "nearest": _remedy(plan, plan.nearest) if plan.nearest else None,
        "largest_batch": plan.largest_batch,
        "largest_length": plan.largest_length,
        "longest": plan.longest,
        "hardware": asdict(plan.hardware),
        "time": None if plan.job.on_cpu else {mode: _time(step) for mode, step in plan.steps.items()},
        "best_mode": None if plan.job.on_cpu else plan.best_mode,
    }


def _memory(need: Budget) -> dict[str, Any]:
    return {**asdict(need), "device_peak": need.device_peak, "host_peak": need.host_peak}


def _remedy(plan: Plan, remedy: Remedy) -> dict[str, Any]:
    step = None if remedy.job.on_cpu else step_time(plan.shape, remedy.job, plan.hardware)
    return {
        "flags": list(remedy.flags),
        "missing": plan.capacity.missing(remedy.budget),
        "device_peak": remedy.budget.device_peak,
        "host_peak": remedy.budget.host_peak,
        "step_s": step and step.step_s,
        "tokens_per_s": step and step.tokens_per_s,
    }


def _time(step: StepTime) -> dict[str, Any]:
    return {**asdict(step), "exposed_s": step.exposed_s, "tokens_per_s": step.tokens_per_s}
