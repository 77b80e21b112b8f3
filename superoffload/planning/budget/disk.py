"""Shape and job -> bytes on disk. Pure arithmetic; imports no torch."""

from superoffload.planning.budget.device import sub_groups
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.shape import Shape


def checkpoint_bytes(shape: Shape, job: Job) -> int:
    """Return the bytes of one checkpoint, all ranks together: masters and moments, and frozen weights."""
    frozen = job.ranks * -(-shape.frozen // job.ranks)
    return (6 if job.bf16_state else 12) * job.ranks * sum(sub_groups(shape, job)) + 2 * frozen


def export_bytes(shape: Shape) -> int:
    """Return the bytes of an exported model, in bf16."""
    return 2 * shape.parameters


def convert_bytes(shape: Shape, job: Job) -> int:
    """Return the free space that `superoffload convert` needs: the result, and the pieces that it is made from."""
    return 2 * checkpoint_bytes(shape, job)


def disk_bytes(shape: Shape, job: Job) -> int:
    """Return the free space that a run needs: the kept checkpoints, the one being written, and the export.

    checkpoint/save.py removes an old checkpoint only when the new one is complete.
    """
    checkpoints = checkpoint_bytes(shape, job) * (job.kept + 1) if job.saves else 0
    return checkpoints + (export_bytes(shape) if job.exports else 0)
