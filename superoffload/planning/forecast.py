"""What a run needs beside what there is for it. Pure; imports no torch."""

from dataclasses import dataclass

from superoffload.planning.capacity import Capacity
from superoffload.planning.job import Job
from superoffload.planning.memory import Budget
from superoffload.planning.shape import Shape

GIB = 2**30
MARGIN = 0.05
"""How far off the arithmetic may be, as a share of the capacity: a run that exceeds it by more is stopped."""
HOST_SLACK_BYTES = 2 * GIB
"""What is available on the host changes while one looks, so a run must exceed it by this much more."""


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

    shape: Shape
    job: Job
    budget: Budget
    capacity: Capacity
    resumes: bool

    @property
    def phase(self) -> str:
        """Return the phase in which host memory is at its peak."""
        peaks = self.budget.host_peaks
        return max((name for name in peaks if self.resumes or name != "resuming"), key=lambda name: peaks[name])

    @property
    def needs(self) -> tuple[Need, ...]:
        """Return the needs, each beside its capacity; without a GPU, the host's memory is the device's too."""
        there, host_bytes = self.capacity, self.budget.host_peaks[self.phase]
        disk = Need("disk", self.budget.disk, there.disk)
        if there.device is None:
            return Need("host", host_bytes + self.budget.device_peak, there.host, HOST_SLACK_BYTES), disk
        host = Need("host", host_bytes, there.host, HOST_SLACK_BYTES)
        return Need("device", self.budget.device_peak, there.device), host, disk
