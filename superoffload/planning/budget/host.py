"""Shape and job -> bytes of host memory. Pure arithmetic; imports no torch.

Everything is for one machine, all its ranks together. The page cache is not counted: the weights' files while they are
loaded, checkpoints and tokenised rows are mapped or streamed, and the system drops these pages when it needs memory.
"""

from collections import Counter

from superoffload.planning.budget.activations import INPUTS_ON_DEVICE, layer_input_bytes
from superoffload.planning.budget.device import on_device, sub_groups
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.shape import Shape

MIB = 2**20
# Private memory of the processes, measured with a model of 0.1 million parameters on the CPU, with Python 3.11, torch
# 2.13, DeepSpeed 0.19.8 and transformers 5 (tests/benchmarks/results/plan_host.md).
LAUNCHER_BYTES = 325 * MIB  # `deepspeed` and its launcher, once per machine
LOADED_BYTES = 330 * MIB  # a rank that has imported everything
RANK_BYTES = 400 * MIB  # a rank that trains
OPTIMIZER_PROCESS_BYTES = 150 * MIB
LIBRARIES_BYTES = 160 * MIB  # pages of torch's libraries and of others, which all processes share
CUDA_BYTES = 1024 * MIB  # what CUDA's driver and libraries hold on the host for each rank; an estimate
EXPORT_SHARD_BYTES = 5 * 10**9
PINNED_THRESHOLD_BYTES = 64 * MIB  # what recipes pass to torch as PYTORCH_ALLOC_CONF
CPU_BUFFER_BYTES = 66 * MIB  # shared memory of each rank for DeepSpeed's collectives on the CPU, csrc/cpu/comm/shm.cpp
# glibc keeps freed memory in pieces of up to 32 MiB. Where the CPU is the device, weights and gradients leave this much
# for each of a rank's parameters, measured: after loading, between steps, and more at the peak of a step.
FREED_WHILE_LOADING_BYTES, FREED_BYTES, FREED_IN_STEP_BYTES = 0.8, 3.9, 1.0
LIVE = 10**9  # parameters that stay gathered between forward and backward, stage3_max_reuse_distance
LOSS_TILE = 2**24  # logits that the chunked loss holds at a time, model/head.py
NCCL_SHM_BYTES = 1024 * MIB  # what NVIDIA recommends: docker run --shm-size=1g


def on_host(shape: Shape, job: Job) -> tuple[int, ...]:
    """Return the elements of the sub-groups of one rank that the host steps."""
    return sub_groups(shape, job)[len(on_device(shape, job)) :]


def host_bytes(shape: Shape, job: Job) -> dict[str, int]:
    """Return the bytes of each part between steps.

    masters, moments, gradients: of the host's sub-groups, 4 bytes an element or 2 in bf16. staging: new weights in
    bf16, with superoffload, whose arena holds these five; its gaps, up to 2 MiB a sub-group, are never touched.
    accumulation: sums over micro-batches. weights: with `--offload_params`. activations: inputs of layers that are kept
    on the host. pinned: what torch's allocator rounds up or keeps. device: without a device, what it would hold.
    runtime: private memory of the processes. libraries: their files, once.
    """
    ranks, groups = job.ranks_per_node, on_host(shape, job)
    each = 2 if job.bf16_state else 4
    number = ranks * sum(groups)
    superoffload = job.mode == "superoffload"
    return {
        "masters": each * number,
        "moments": 2 * each * number,
        "gradients": each * number,
        "staging": 2 * number if superoffload else 0,
        "accumulation": ranks * _accumulation(shape, job),
        "weights": ranks * 2 * _partition(shape, job) if job.offload_params and not job.on_cpu else 0,
        "activations": ranks * sum(_layer_inputs(shape, job)),
        "pinned": ranks * _pinned(shape, job),
        "device": ranks * _instead_of_device(shape, job),
        "runtime": LAUNCHER_BYTES + ranks * _runtime(job),
        "libraries": LIBRARIES_BYTES,
    }


def host_peaks(shape: Shape, job: Job) -> dict[str, int]:
    """Return the bytes in each phase: loading, first step, steady, saving, resuming, and export if asked for.

    loading: rank 0 maps the weights' files, and every rank keeps its partition on the device, or on the host with
    `--offload_params` (transformers/integrations/deepspeed.py). first step: also the construction of the engine, which
    copies the weights through the host (`defragment` in deepspeed/runtime/zero/utils.py). saving: torch.save streams
    what is on the host, and copies the device's share to it tensor by tensor, but frozen weights all at once.
    resuming: the state is copied from mapped files into its place. export: by rank 0, shard by shard.
    """
    parts, ranks = host_bytes(shape, job), job.ranks_per_node
    steady = sum(parts.values())
    loading = LAUNCHER_BYTES + LIBRARIES_BYTES + ranks * (LOADED_BYTES + (0 if job.on_cpu else CUDA_BYTES))
    if job.on_cpu or job.offload_params:
        loading += ranks * 2 * _partition(shape, job)
    if job.on_cpu:
        loading += ranks * int(FREED_WHILE_LOADING_BYTES * _partition(shape, job))
    constructing = loading + ranks * 2 * sum(sub_groups(shape, job))
    first = steady + ranks * _temporary(shape, job)
    copied = _largest_on_device(shape, job) + 2 * shape.frozen // job.ranks
    saving = steady + (0 if job.on_cpu else ranks * copied)
    peaks = {
        "loading": loading,
        "first step": max(constructing, first),
        "steady": steady,
        "saving": saving,
        "resuming": max(constructing, first),
    }
    if job.exports:
        peaks["export"] = steady + 8 * shape.largest + min(EXPORT_SHARD_BYTES, 2 * shape.parameters)
    return peaks


def shm_bytes(shape: Shape, job: Job) -> int:
    """Return the space that a run needs in /dev/shm.

    The arena needs none: it is a memfd, which the size of /dev/shm does not limit. NCCL shares memory between the ranks
    of a machine (docs.nvidia.com/deeplearning/nccl, Troubleshooting, Shared memory).
    """
    if job.ranks_per_node == 1:
        return 0
    return job.ranks_per_node * CPU_BUFFER_BYTES if job.on_cpu else NCCL_SHM_BYTES


def memlock_bytes(shape: Shape, job: Job) -> int:
    """Return the memory that counts towards `ulimit -l`.

    CUDA pins memory through its driver, which does not look at that limit (os_lock_user_pages in kernel-open/nvidia/
    os-mlock.c of NVIDIA's open-gpu-kernel-modules), so that a run on one machine needs none. Between machines,
    InfiniBand's verbs register NCCL's buffers, which do count: about a GiB for each rank, an estimate.
    """
    return job.ranks_per_node * 1024 * MIB if job.ranks > job.ranks_per_node and not job.on_cpu else 0


def _largest_on_device(shape: Shape, job: Job) -> int:
    """Return the bytes of the largest tensor of the device's share of the optimizer."""
    return (2 if job.bf16_state else 4) * max(on_device(shape, job), default=0)


def _partition(shape: Shape, job: Job) -> int:
    """Return the elements of one rank's weights, trained and frozen."""
    return sum(sub_groups(shape, job)) + -(-shape.frozen // job.ranks)


def _accumulation(shape: Shape, job: Job) -> int:
    """Return DeepSpeed's buffer for sums of gradients on one rank, over all sub-groups, also those of the device.

    ZeRO-Offload always has it (stage3._setup_for_real_optimizer), superoffload from the first step of several
    micro-batches on (offload/zero3/accumulation.py).
    """
    needed = job.mode == "zerooffload" or job.accumulation > 1
    return job.sum_bytes * sum(sub_groups(shape, job)) if needed else 0


def _pinned(shape: Shape, job: Job) -> int:
    """Return what torch's pinned allocations take on one rank beyond the tensors in them.

    ATen/core/CachingHostAllocator.h rounds them up to a power of two, and keeps freed blocks for others of their size;
    with the options that recipes pass, only up to 64 MiB. superoffload's arena is registered in place, without that.
    """
    if job.on_cpu:
        return 0
    inputs = sum(_block(size, job) - size for size in _layer_inputs(shape, job))
    if not job.pin_memory:
        return inputs
    held: list[int] = [_accumulation(shape, job)]
    freed: list[int] = []
    if job.mode == "zerooffload":
        each = 2 if job.bf16_state else 4
        held += [each * numel for numel in on_host(shape, job)]
        freed += [each * numel for numel in on_device(shape, job)]  # pinned first, then copied to the device
    if job.offload_params:
        held += [2 * sum(-(-numel // job.ranks) for numel in group) for group in shape.groups]
        freed += [2 * -(-numel // job.ranks) for group in shape.groups for numel in group]
    blocks = Counter(_block(size, job) for size in held)
    kept = Counter(_block(size, job) for size in freed if _is_kept(size, job))
    if not job.offload_params:  # one block after the other: the next of its size takes it
        kept = Counter({size: 1 for size in kept if size not in blocks})
    rounded = sum(_block(size, job) - size for size in held)
    return inputs + rounded + sum(size * count for size, count in kept.items())


def _layer_inputs(shape: Shape, job: Job) -> list[int]:
    """Return the buffers for the inputs of the layers on one rank (model/recomputation.py, buffer_bytes).

    Every micro-batch uses the same ones.
    """
    if not job.offload_activations:
        return []
    size = layer_input_bytes(shape) * job.tokens
    unit = 1 << max(0, size.bit_length() - 4)
    return [-(-size // unit) * unit] * shape.layers


def _is_kept(size: int, job: Job) -> bool:
    return job.pinned_rounding or size <= PINNED_THRESHOLD_BYTES


def _block(size: int, job: Job) -> int:
    """Return the block that torch pins for a tensor."""
    return 1 << (size - 1).bit_length() if size > 1 and _is_kept(size, job) else size


def _runtime(job: Job) -> int:
    """Return the private memory of a rank and its optimizer process."""
    process = OPTIMIZER_PROCESS_BYTES if job.mode == "superoffload" else 0
    return RANK_BYTES + process + (0 if job.on_cpu else CUDA_BYTES)


def _instead_of_device(shape: Shape, job: Job) -> int:
    """Return what one rank holds between steps where the CPU is the device."""
    if not job.on_cpu:
        return 0
    gathered = 2 * min(LIVE, shape.parameters) if job.ranks > 1 else 0
    stepped = (8 if job.bf16_state else 16) * sum(on_device(shape, job))
    freed = int(FREED_BYTES * _partition(shape, job))
    return 2 * _partition(shape, job) + stepped + 2 * min(job.bucket, shape.trained) + gathered + freed


def _temporary(shape: Shape, job: Job) -> int:
    """Return the most that one rank holds for a moment during a step: nothing, unless the CPU is the device.

    Then: the activations of a layer, 34 H bytes per token and 5 A T more with scores (Korthikanti et al. 2022, equation
    1), for each layer without recomputation; logits; the largest gradient and a copy of it in float64; freed memory.
    """
    if not job.on_cpu:
        return 0
    layer = 34 * shape.hidden + (5 * shape.heads * job.length if job.eager else 0)
    inputs = INPUTS_ON_DEVICE if job.offload_activations else shape.layers
    layers = layer_input_bytes(shape) * inputs + layer if job.recompute else layer * shape.layers
    logits = job.tokens * shape.vocabulary
    freed = int(FREED_IN_STEP_BYTES * _partition(shape, job))
    held = min(logits, LOSS_TILE) if job.chunked_loss else logits
    return job.tokens * layers + 12 * held + 12 * shape.largest + freed
