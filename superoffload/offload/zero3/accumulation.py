"""DeepSpeed's gradient accumulation buffer, allocated when it is first needed.

It lies on the host, takes as much as all gradients of this rank, and is page-locked, which rounds its size up to a
power of two. A step of one micro-batch whose gradients go straight into the arena never uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from .surface import ZeroOptimizer

_log = getLogger(__name__)


class AccumulationBuffer:
    """Owns the buffer and the view of each parameter in it, by ds_id; DeepSpeed sees both as its own attributes."""

    def __init__(self) -> None:
        self._whole: torch.Tensor | None = None
        self._views: dict[int, torch.Tensor] = {}
        self._closed = False

    @property
    def is_allocated(self) -> bool:
        """Return whether the buffer has been needed so far."""
        return self._whole is not None

    def whole(self, zero: ZeroOptimizer) -> torch.Tensor | None:
        """Return the buffer, zero-filled if this is its first use; None if it was not used before closing()."""
        if self._whole is None and not self._closed:
            self._allocate(zero)
        return self._whole

    def views(self, zero: ZeroOptimizer) -> dict[int, torch.Tensor]:
        """Return the view of each parameter; allocate the buffer if this is its first use."""
        self.whole(zero)
        return self._views

    def set_views(self, views: dict[int, torch.Tensor]) -> None:
        """Replace the views, as DeepSpeed does when it moves the buffer."""
        self._views = views

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Let DeepSpeed release the buffer inside the block without allocating it first; free it afterwards."""
        self._closed = True
        try:
            yield
        finally:
            self._whole, self._views = None, {}

    def _allocate(self, zero: ZeroOptimizer) -> None:
        params = [param for group in zero.fp16_groups for param in group]
        numel, dtype = sum(p.partition_numel() for p in params), zero.gradient_accumulation_dtype
        if zero.offload_optimizer_pin_memory:  # not pin_memory(), which would hold a pageable copy for a moment
            whole = get_accelerator().pin_empty(numel, dtype=dtype).zero_()
        else:
            whole = torch.zeros(numel, dtype=dtype, device=zero.device)
        offset = 0
        for param in params:
            self._views[param.ds_id] = whole.narrow(0, offset, param.partition_numel())
            offset += param.partition_numel()
        self._whole = whole
        _log.debug("gradients are accumulated in %.2f GiB of host memory", whole.nbytes / 2**30)


def set_up(zero: ZeroOptimizer) -> None:
    """Do what DeepSpeed's _setup_for_real_optimizer does, except for the accumulation buffer (collective)."""
    zero._create_fp32_partitions()
    dist.barrier()
    zero._create_next_swappable_fp32_groups()
    zero.initialize_optimizer_states()
    dist.barrier()
    if zero.contiguous_gradients:
        device = get_accelerator().current_device_name()
        for dtype, bucket in zero.ipg_buckets.items():
            bucket.buffer = torch.empty(zero.reduce_bucket_size, dtype=dtype, device=device)
