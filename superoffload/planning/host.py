"""Shape and job -> bytes of host memory and of disk. Pure arithmetic; imports no torch."""

from superoffload.planning.job import Job
from superoffload.planning.shape import Shape

RUNTIME_BYTES = int(0.6 * 2**30)  # per process: Python, torch, DeepSpeed


def host_bytes(shape: Shape, job: Job) -> dict[str, int]:
    """Return the bytes of each part on one machine between steps, all its ranks together."""
    share = job.ranks_per_node / job.ranks
    number = int(shape.trained * share * job.ratio)
    each = 2 if job.bf16_state else 4
    superoffload = job.mode == "superoffload"
    return {
        "masters": each * number,
        "moments": 2 * each * number,
        "gradients": each * number,
        "staging": 2 * number if superoffload else 0,
        "weights": int(2 * shape.parameters * share) if job.offload_params else 0,
        "pinned": 0,
        "runtime": job.ranks_per_node * RUNTIME_BYTES * (2 if superoffload else 1),
    }


def host_peaks(shape: Shape, job: Job) -> dict[str, int]:
    """Return the bytes on one machine in each phase: loading, first step, steady, saving, resuming."""
    steady = sum(host_bytes(shape, job).values())
    return dict.fromkeys(("loading", "first step", "steady", "saving", "resuming"), steady)


def checkpoint_bytes(shape: Shape, job: Job) -> int:
    """Return the bytes of one checkpoint, all ranks together: masters and moments, and the weights."""
    return shape.trained * (6 if job.bf16_state else 12) + 2 * shape.frozen


def disk_bytes(shape: Shape, job: Job) -> int:
    """Return the free space that a run needs: the kept checkpoints, the one being written, and the export."""
    checkpoints = checkpoint_bytes(shape, job) * (job.kept + 1) if job.saves else 0
    return checkpoints + (2 * shape.parameters if job.exports else 0)
