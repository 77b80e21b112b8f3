"""Shape and job -> bytes on one device. Pure arithmetic; imports no torch."""

from superoffload.planning.job import Job
from superoffload.planning.shape import Shape

GIB = 2**30
CONTEXT_BYTES, NCCL_BYTES = GIB, GIB  # CUDA context, kernels and workspaces; buffers of the communication
MAX_LIVE = 10**9  # parameters that DeepSpeed keeps gathered, stage3_max_live_parameters
NORM_PIECE = 250_000_000  # elements that DeepSpeed converts to float64 at a time to compute a norm
SLACK = 0.05  # fragmentation


def sub_groups(shape: Shape, job: Job) -> tuple[int, ...]:
    """Return the elements of every sub-group on one rank (stage3._create_fp16_sub_groups)."""
    result: list[int] = []
    for group in shape.groups:
        size = 0
        for number, numel in enumerate(group, 1):
            size += -(-numel // job.ranks)
            if size >= job.sub_group or number == len(group):
                result.append(size)
                size = 0
    return tuple(result)


def on_device(shape: Shape, job: Job) -> tuple[int, ...]:
    """Return the elements of the sub-groups that the device steps; DeepSpeed rounds their number down."""
    found = sub_groups(shape, job)
    return found[: int((1 - job.ratio) * len(found))]


def layer_bytes_per_token(shape: Shape, job: Job) -> int:
    """Return what recomputing one layer and running it backward holds, in bf16, per token of the micro-batch."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 6 * (queries + keys)  # queries, keys and values, before and after their rotation; the result
    attention += 14 * shape.heads * job.length if job.eager else 0  # scores, in float32 too, and their gradients
    experts = shape.experts_per_token
    routed = 8 * experts * shape.hidden if experts > 1 else 0  # tokens sorted by expert, in and out, and gradients
    return attention + 18 * shape.hidden + 14 * shape.intermediate + routed


def device_bytes(shape: Shape, job: Job) -> dict[str, int]:
    """Return the bytes of each part on one device; their sum is the peak of a step.

    What is there all the time: weights, optimizer, bucket, gathered, checkpoints. `working` is the largest of what
    comes and goes: the head's loss and gradient, one layer backward, or the step of one sub-group.
    """
    largest = max(numel for group in shape.groups for numel in group if numel != shape.head)
    stepped = on_device(shape, job)
    loss = 2 * shape.head + 8 * job.tokens * shape.hidden  # gradient of the weight; states and their gradient
    layer = layer_bytes_per_token(shape, job) * job.tokens + 2 * job.bucket + 2 * largest + _to_host(largest, job.ranks)
    parts = {
        "weights": 2 * shape.parameters // job.ranks,
        "optimizer": 16 * sum(stepped),
        "bucket": 2 * job.bucket,
        "gathered": 2 * MAX_LIVE if job.ranks > 1 else 0,
        "checkpoints": 2 * job.tokens * shape.hidden * shape.layers,
        "working": max(loss, 2 * shape.head + _to_host(shape.head, job.ranks), layer, 4 * max(stepped, default=0)),
    }
    other = int(SLACK * sum(parts.values())) + CONTEXT_BYTES + (NCCL_BYTES if job.ranks > 1 else 0)
    return {**parts, "other": other}


def _to_host(numel: int, ranks: int) -> int:
    """Return the bytes of the copies of a gradient on its way to the host: in float32, or a piece for the norm."""
    return max(4 * numel // ranks, 8 * min(numel // ranks, NORM_PIECE))
