"""Shape and job -> the memory of a run by place and phase. Pure arithmetic; imports no torch."""

from dataclasses import dataclass

from superoffload.planning.budget.device import device_bytes
from superoffload.planning.budget.disk import checkpoint_bytes, disk_bytes
from superoffload.planning.budget.host import host_bytes, host_peaks
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.shape import Shape

BUFFER_FACTOR = 1.5  # additional_buffer_factor, DeepSpeed's default


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


def deepspeed_estimate(shape: Shape, job: Job) -> dict[str, int]:
    """Return what DeepSpeed's own estimator says for one device and for one machine, in bytes.

    The formula of deepspeed/runtime/zero/stage3.py, estimate_zero3_model_states_mem_needs, with the optimizer on the
    host. Its device holds the weights, and the largest module (`Shape.unit`) with its gradient, but no activations,
    loss, bucket or device share of the optimizer. Its host holds 16 bytes per parameter, 18 with the weights, and half
    as much again for buffers, whatever the mode and the precision of the state.
    """
    layer = 4 * shape.unit
    nodes = job.ranks // job.ranks_per_node
    weights = 0 if job.offload_params else int(2 * shape.parameters / job.ranks)
    each = 18 if job.offload_params else 16
    return {"device": int(layer + weights), "host": int(shape.parameters * each * (1 / nodes) * BUFFER_FACTOR)}
