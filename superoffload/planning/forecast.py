"""What a run needs beside what there is for it. Pure; imports no torch."""

from dataclasses import dataclass, replace
from typing import Any

from superoffload.planning import words
from superoffload.planning.plan import Plan
from superoffload.planning.remedies import Search

GIB = 2**30
MARGIN = 0.05
"""How far off the arithmetic may be, as a share of the capacity: a run that exceeds it by more is stopped."""
HOST_SLACK_BYTES = 2 * GIB
"""What is available on the host changes while one looks, so a run must exceed it by this much more."""
LESS = 0.1
"""If memory ran out although it was planned to fit: the share of the plan that must be saved."""
MOST_ADVICE = 3


@dataclass(frozen=True, slots=True)
class Need:
    """What a run needs of one kind of memory, and how much of it there is, in bytes."""

    kind: str
    bytes: int
    capacity: int
    slack: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.bytes / GIB:.1f} of {self.capacity / GIB:.1f} GiB"

    @property
    def over(self) -> bool:
        """Return whether the need exceeds the capacity by more than the margin."""
        return self.bytes > self.capacity * (1 + MARGIN) + self.slack

    @property
    def tight(self) -> bool:
        """Return whether the need exceeds the capacity, or comes closer to it than the margin."""
        return self.bytes > self.capacity * (1 - MARGIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run needs, and what there is for it; `resumes`: from a checkpoint."""

    plan: Plan
    packed: bool
    resumes: bool

    @property
    def phase(self) -> str:
        """Return the phase in which host memory is at its peak."""
        peaks = self.plan.budget.host_peaks
        return max((name for name in peaks if self.resumes or name != "resuming"), key=lambda name: peaks[name])

    @property
    def needs(self) -> tuple[Need, ...]:
        """Return the needs whose capacity is known, each beside it."""
        budget, there = self.plan.budget, self.plan.capacity
        found = (
            ("device", budget.device_peak, there.device, 0),
            ("host", budget.host_peaks[self.phase], there.host, HOST_SLACK_BYTES),
            ("disk", budget.disk, there.disk, 0),
        )
        return tuple(Need(kind, size, most, slack) for kind, size, most, slack in found if most is not None)

    def record(self) -> dict[str, Any]:
        """Return what `run.json` says of the plan."""
        needs = {f"{need.kind}_bytes": need.bytes for need in self.needs}
        there = {f"{need.kind}_available_bytes": need.capacity for need in self.needs}
        shape = self.plan.shape
        return {"parameters": shape.parameters, "trained_parameters": shape.trained, "planned_memory": needs | there}

    def lines(self) -> list[str]:
        """Return the plan in words: its tables, and what would make it fit."""
        return words.lines(self.plan, None, self.packed, None)

    def advice(self, place: str | None = None) -> str:
        """Return the smallest changes that make the run fit, each enough alone; at most three.

        If memory ran out at a `place` (device or host), they make it need a tenth less than planned there.
        """
        remedies = self.plan.remedies
        if place:
            peak = {"device": self.plan.budget.device_peak, "host": self.plan.budget.host_peak}[place]
            most = getattr(self.plan.capacity, place)
            less = replace(self.plan.capacity, **{place: int((1 - LESS) * min(peak, most or peak))})
            remedies, _ = Search(shape=self.plan.shape, capacity=less).remedies(self.plan.job)
        flags = [" ".join(remedy.flags) for remedy in remedies[:MOST_ADVICE]]
        none = "no two flags save a tenth of what was planned" if place else "no two flags are enough"
        return f"use {', or '.join(flags)}" if flags else none
