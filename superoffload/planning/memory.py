"""Shape and job -> the memory of a run by place and phase. Pure arithmetic; imports no torch."""

from dataclasses import dataclass

from superoffload.planning.device import device_bytes
from superoffload.planning.disk import checkpoint_bytes, disk_bytes
from superoffload.planning.host import host_bytes, host_peaks
from superoffload.planning.job import Job
from superoffload.planning.shape import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a run needs, in bytes.

    device: parts on one device; their sum is the peak of a step. host: parts on one machine between steps.
    host_peaks: the sum on one machine by phase. checkpoint: one checkpoint. disk: free space that the run needs.
    """

    device: dict[str, int]
    host: dict[str, int]
    host_peaks: dict[str, int]
    checkpoint: int
    disk: int

    @property
    def device_peak(self) -> int:
        """Return the most that one device holds."""
        return sum(self.device.values())

    @property
    def host_peak(self) -> int:
        """Return the most that one machine holds in any phase."""
        return max(self.host_peaks.values())


def budget(shape: Shape, job: Job) -> Budget:
    """Compute the memory of a run."""
    return Budget(
        device=device_bytes(shape, job),
        host=host_bytes(shape, job),
        host_peaks=host_peaks(shape, job),
        checkpoint=checkpoint_bytes(shape, job),
        disk=disk_bytes(shape, job),
    )
