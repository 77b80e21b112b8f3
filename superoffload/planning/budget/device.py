"""Shape and job -> bytes on one device. Pure arithmetic; imports no torch.

Checked without a device: activations and loss, by counting (tests/benchmarks/plan_device.py), and the sub-groups, with
DeepSpeed's own function. Not checked: CUDA's context, buffers of the communication, and fragmentation.
"""

from functools import lru_cache

from superoffload.planning.budget.activations import (
    INPUTS_ON_DEVICE,
    kept_bytes,
    layer_bytes,
    layer_gradient_bytes,
    layer_input_bytes,
    loss_bytes,
    mask_bytes,
    mlp_bytes,
    mlp_elements,
    states_bytes,
    tile_bytes,
    tiles,
)
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.shape import Shape

GIB = 2**30
CONTEXT_BYTES, NCCL_BYTES = GIB, GIB  # CUDA context, kernels and workspaces; buffers of the communication
NORM_PIECE = 250_000_000  # elements converted to float64 at a time to compute a norm: stage3._constant_buffered_norm2
PIECE = 2**25  # elements of a gradient converted to float32 at a time: offload/zero3/transfers.py, download
SLACK = 0.05  # fragmentation


def sub_groups(shape: Shape, job: Job) -> tuple[int, ...]:
    """Return the elements of every sub-group on one rank (stage3._create_fp16_sub_groups)."""
    return _cut(shape.groups, job.ranks, job.sub_group)


@lru_cache(maxsize=64)
def _cut(groups: tuple[tuple[int, ...], ...], ranks: int, most: int) -> tuple[int, ...]:
    result: list[int] = []
    for group in groups:
        size = 0
        for number, numel in enumerate(group, 1):
            size += -(-numel // ranks)
            if size >= most or number == len(group):
                result.append(size)
                size = 0
    return tuple(result)


def on_device(shape: Shape, job: Job) -> tuple[int, ...]:
    """Return the elements of the sub-groups that the device steps; DeepSpeed rounds their number down.

    Source: offload/zero3/partitions.py, create; stage3._create_fp32_partitions.
    """
    found = sub_groups(shape, job)
    return found[: int((1 - job.ratio) * len(found))]


def device_bytes(shape: Shape, job: Job) -> dict[str, int]:
    """Return the bytes of each part on one device; their sum is the peak of a step.

    What is there all the time: weights (2 bytes per parameter, frozen ones too, and none with `--offload_params`),
    optimizer (master weights, gradients and two moments of the device's sub-groups) and bucket (stage3's
    ipg_buckets; accumulation.set_up). `gathered`: see `gathered_elements`. `activations`: what forward keeps for
    backward, of every layer its input alone with recomputation, and the mask of rows that are not packed. `working`:
    the largest of `moments`. `other`: CUDA, communication, fragmentation. The buffer of gradient accumulation lies on
    the host (offload/zero3/accumulation.py). Rows are assumed to be full: `job.length` tokens, all of them targets.
    """
    state = 8 if job.bf16_state else 16
    parts = {
        "weights": 0 if job.offload_params else 2 * -(-shape.parameters // job.ranks),
        "optimizer": state * sum(on_device(shape, job)),
        "bucket": 2 * job.bucket,
        "gathered": 2 * gathered_elements(shape, job),
        "activations": activation_bytes(shape, job),
        "working": max(0, *moments(shape, job).values()),
    }
    other = int(SLACK * sum(parts.values())) + CONTEXT_BYTES + (NCCL_BYTES if job.ranks > 1 else 0)
    return {**parts, "other": other}


def activation_bytes(shape: Shape, job: Job) -> int:
    """Return what is kept from forward to backward, the loss not counted.

    With inputs of layers on the host, one of them is on the device at the moments that count: the last one until
    backward begins, then the one that the next layer will need. A layer's own is dropped once it has been recomputed.
    """
    each = layer_input_bytes(shape) if job.recompute else kept_bytes(shape, job)
    layers = INPUTS_ON_DEVICE if job.offload_activations else shape.layers
    return (each * layers + mask_bytes(job)) * job.tokens


def moments(shape: Shape, job: Job) -> dict[str, int]:
    """Return what is needed for a moment, beside the parts that are there all the time, in the order of a step.

    loss: see `loss_bytes`. head: the gradient of the output layer, on its way to the host if it is larger than the
    bucket. layer: the backward of one layer. tile: that of its MLP in tiles. bucket: within a layer, when the bucket is
    full. embedding: the gradient of the input embedding, when the bucket must be emptied first, and activations are
    gone. With a tied output layer, autograd keeps its gradient until then. step: of the largest sub-group on the
    device, also without activations: the square root of the second moment (torch.optim.AdamW).
    """
    head = 2 * shape.head
    tied = head if shape.tied else 0
    alone = _to_host_bytes(shape.head, job) if shape.head > job.bucket else 0
    kept = kept_bytes(shape, job)
    again = kept if job.recompute else 0  # else they are among the activations
    activations = activation_bytes(shape, job)
    emptied = _emptied(shape, job)
    gradients = layer_gradient_bytes(shape) + again
    waiting = {"first": 0, "mlp": 4 * shape.intermediate, "attention": mlp_bytes(shape)}  # what is gone by then
    tile = together = 0  # gradients of an MLP in tiles come together; one of them is among what waits anyway
    if tiles(shape, job):
        waiting = dict.fromkeys(waiting, 0)
        tile = tied + again * job.tokens + tile_bytes(shape, job)
        together = 2 * (mlp_elements(shape) - min(_largest_in_layers(shape), mlp_elements(shape)))
    return {
        "loss": loss_bytes(shape, job),
        "head": 0 if shape.tied else states_bytes(shape, job) + head + alone,
        "layer": tied + (layer_bytes(shape, job) - kept + again) * job.tokens,
        "tile": tile,
        "bucket": tied
        + together
        + max(emptied[what] + (gradients - gone) * job.tokens for what, gone in waiting.items()),
        "embedding": max(tied + head + max(emptied["embedding"], alone), emptied["end"]) - activations,
        "step": (2 if job.bf16_state else 4) * max(on_device(shape, job), default=0) - activations,
    }


def _largest_in_layers(shape: Shape) -> int:
    return max((numel for group in shape.groups for numel in group if numel != shape.head), default=0)


def _emptied(shape: Shape, job: Job) -> dict[str, int]:
    """Return the most bytes for emptying the bucket, by what comes next.

    That is the first gradient of a layer in backward, that of the MLP's last weight; another of the MLP or of the
    attention, when activations are partly gone; that of the embedding; or nothing, at the end. Backward fills the
    bucket in the opposite order of the parameters; norms and biases do not count. A gradient that does not fit waits
    until the others have been copied to a tensor of the same size (coalesced_collectives.reduce_scatter_coalesced),
    from which they go to the host one by one; one that is larger than the bucket, or alone in it, is not copied. Copies
    to the host that are late do not add to this: torch's allocator waits for them before it gives up. The activations
    of later layers, which are gone by then, are subtracted.
    """
    done = 0 if job.offload_activations else activation_bytes(shape, job) // max(1, shape.layers)
    result = dict.fromkeys(("first", "mlp", "attention", "embedding", "end"), 0)
    inside: list[int] = []

    def cost(*waiting: int) -> int:
        copied = sum(inside) if len(inside) > 1 else 0
        return 2 * copied + _to_host_bytes(max(inside, default=0), job) + 2 * sum(waiting)

    matrices = list(reversed(shape.groups[0][1:])) if shape.groups else []
    in_layers = len(matrices) - (0 if shape.tied else 1)
    each = in_layers // max(1, shape.layers)
    in_mlp = shape.hidden * shape.intermediate // shape.experts_per_token  # elements of its matrices, at least
    for number, numel in enumerate(matrices, in_layers - len(matrices)):  # the head is number -1
        found = 0
        if inside and sum(inside) + numel > job.bucket:
            found = cost(numel)
            inside.clear()
        if numel <= job.bucket:
            inside.append(numel)
        elif number >= 0:
            found = max(found, 2 * numel + _to_host_bytes(numel, job))
        if each:
            found -= max(0, number) // each * done
        what = "first" if each and number % each == 0 else "mlp" if numel >= in_mlp else "attention"
        result[what] = max(result[what], found)
    result["embedding"] = cost()
    if sum(inside) + shape.head > job.bucket:
        inside.clear()
    inside.append(shape.head)
    result["end"] = cost() if shape.head <= job.bucket else 0
    return result


def held_elements(shape: Shape, job: Job) -> int:
    """Return the most parameters that are gathered, or about to be; 0 where a rank's own weights serve.

    One rank without `--offload_params` gathers nothing: its partition is the parameter (partition_parameters,
    NoGatherHandle). Otherwise, as partitioned_param_coordinator has it: every module that is called fetches parameters
    ahead, as long as fewer than `max_live` are there, and the last that is fetched may be the largest
    (_fetch_sub_module_impl); a layer stays from its recomputation to its backward. Between forward and backward, the
    head is there, and the last layers whose backward is less than `reuse` elements away (__params_to_release).
    """
    if job.ranks == 1 and not job.offload_params:
        return 0
    ahead = job.max_live + shape.largest if job.prefetch else 0
    passes = 3 if job.recompute else 2  # of a layer between its forward and its backward, the backward's own included
    between = -(-max(0, job.reuse - 2 * shape.head) // (passes * shape.layer)) if shape.layer else 0
    kept = shape.head + min(between, shape.layers) * shape.layer
    return min(shape.parameters, max(ahead, shape.layer, shape.unit, kept))  # a tiled MLP is less than its layer


def gathered_elements(shape: Shape, job: Job) -> int:
    """Return the elements of `held_elements`, and of those that are there twice for a moment.

    Parameters that several ranks gather together, a leaf module or those fetched ahead at a time, arrive in a tensor of
    their own (AllGatherCoalescedHandle.wait).
    """
    held = held_elements(shape, job)
    leaf = mlp_elements(shape) if shape.experts_per_token > 1 or tiles(shape, job) else 0
    together = max(leaf, job.prefetch + _largest_in_layers(shape) if job.prefetch else 0)
    return held + (min(held, together) if job.ranks > 1 else 0)


def _to_host_bytes(numel: int, job: Job) -> int:
    """Return the bytes of the copies of a rank's part of a gradient on its way to the host.

    A piece in float64 for the norm; in the mode `superoffload` then a piece in float32 (offload/zero3/gradients.py,
    _write_directly). In `zerooffload` and with gradient accumulation, the sum so far is copied to the device first
    (stage3.partition_grads), and all of it is converted to float32 (stage3._offload_grad_partition_at_boundary).
    """
    part = -(-numel // job.ranks)
    norm = 8 * min(part, NORM_PIECE)
    if job.mode == "superoffload" and job.accumulation == 1:
        return max(norm, 4 * min(part, PIECE))
    return 2 * part + max(norm, 4 * part)
