"""The path of a gradient: from DeepSpeed's reduce bucket into the arena, and on to the coordinator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from deepspeed.accelerator import get_accelerator

from ..settings import OffloadSettings
from .partitions import ArenaPartitions
from .service import OptimizerService
from .surface import DsParameter, ZeroOptimizer, position
from .transfers import download

PartitionGrads = Callable[[list[DsParameter], list[torch.Tensor]], list[torch.Tensor]]
"""DeepSpeed's own partition_grads."""


def gradient_factor(loss_scale: float, clip_grad: float, total_norm: torch.Tensor | None) -> float:
    """Return what gradients are multiplied by, with the arithmetic of DeepSpeed's unscale_and_clip_grads.

    total_norm: norm of the scaled gradients; None means a norm below the threshold.
    """
    combined_scale: torch.Tensor | float = loss_scale
    if clip_grad > 0.0:
        if total_norm is None:
            clip = torch.ones((), dtype=torch.float32)
        else:
            clip = torch.clamp((total_norm / loss_scale + 1e-6) / clip_grad, min=1.0)
        combined_scale = clip * loss_scale
    return float(1.0 / combined_scale)


class HostGradients:
    """Writes gradients of host sub-groups to the arena, and reports them to the coordinator."""

    def __init__(self, settings: OffloadSettings, partitions: ArenaPartitions, service: OptimizerService) -> None:
        self._settings = settings
        self._partitions = partitions
        self._service = service
        self._transfers = service.transfers
        self._bypassed: set[int] = set()
        """Parameters (by ds_id) whose gradient of this round is not in DeepSpeed's accumulation buffer."""

    def partition(
        self,
        zero: ZeroOptimizer,
        params: list[DsParameter],
        partitions: list[torch.Tensor],
        base: PartitionGrads,
    ) -> list[torch.Tensor]:
        """Move the gradients of one bucket to the host; in the last backward, speculate on complete sub-groups."""
        boundary = zero.is_gradient_accumulation_boundary()
        if self._transfers.asynchronous:
            partitions = [_outside_buckets(zero, partition) for partition in partitions]
        with self._partitions.own_access():
            if boundary and zero.micro_step_id == 0 and self._can_bypass_accumulation(zero):
                self._write_directly(zero, params, partitions)
                buffers = []
            else:
                self.fill_accumulation_buffers(zero, params)
                with self._transfers.downloading(partitions):
                    buffers = base(params, partitions)
            if boundary:
                self._report_arrivals(zero, params)
        return buffers

    @contextmanager
    def finishing_accumulation(self) -> Iterator[None]:
        """Let DeepSpeed write the sums of its accumulation buffer to the flat gradients inside the block."""
        with self._transfers.downloading(()):
            yield

    @contextmanager
    def writing(self, zero: ZeroOptimizer, param: DsParameter, gradient: torch.Tensor) -> Iterator[None]:
        """Let DeepSpeed write one parameter's gradient inside the block, once no commit reads the old one any more."""
        sub_group, offset, _ = position(zero, param)
        self._before_change(sub_group)
        self._service.verification.gradient(sub_group, offset, gradient)
        with self._partitions.own_access():
            yield

    def fill_accumulation_buffers(self, zero: ZeroOptimizer, params: Iterable[DsParameter]) -> None:
        """Copy bypassed gradients of this round to DeepSpeed's accumulation buffer, which is read or added to next."""
        bypassed = [param for param in params if param.ds_id in self._bypassed]
        if not bypassed:
            return
        self._transfers.synchronize()  # the host reads the gradients that the device has sent
        buffers = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for param in bypassed:
            self._bypassed.discard(param.ds_id)
            buffers[param.ds_id].copy_(self._partitions.gradient(*position(zero, param)))

    def drop_batch(self) -> None:
        """Abandon the round if gradients are zeroed from outside, between backward and step."""
        if not self._partitions.in_own_access and self._service.is_running:
            self.abandon_round()

    def abandon_round(self) -> None:
        """Forget the speculations and gradients of this round."""
        self._service.coordinator.discard()
        self._service.verification.forget_gradients()
        self._bypassed.clear()

    def end_round(self) -> None:
        """Begin the next round."""
        self._bypassed.clear()
        self._service.coordinator.end_round()

    def _can_bypass_accumulation(self, zero: ZeroOptimizer) -> bool:
        """Return whether a step of one micro-batch may leave DeepSpeed's accumulation buffer unused.

        fp16 may not, because the overflow check reads that buffer. Neither may masters of lower precision than
        the sums, because the buffer could not be filled from them exactly afterwards.
        """
        exact = zero.master_weights_and_grads_dtype in (torch.float32, zero.gradient_accumulation_dtype)
        return self._settings.direct_gradients and zero.dtype != torch.float16 and exact

    def _write_directly(self, zero: ZeroOptimizer, params: list[DsParameter], partitions: list[torch.Tensor]) -> None:
        """Write gradients straight to the flat gradients.

        DeepSpeed would copy them to its accumulation buffer on the host, back to the device for the norm, and to
        the host again: three transfers where one is enough.
        """
        arriving: list[tuple[torch.Tensor, torch.Tensor]] = []
        for param, partition in zip(params, partitions, strict=True):
            if param.partition_numel() * zero._get_param_partition_rank(param) < param.ds_numel:  # not only padding
                arriving += self._write(zero, param, partition.view(-1))
                zero._offload_boundary_param_ids.add(param.ds_id)
                self._bypassed.add(param.ds_id)
            if param.grad is not None and self._transfers.asynchronous:
                param.grad.record_stream(get_accelerator().current_stream())
            param.grad = None
        with self._transfers.downloading([gradient for gradient, _ in arriving]):
            for gradient, target in arriving:
                download(gradient, target)

    def _write(
        self, zero: ZeroOptimizer, param: DsParameter, partition: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Take the norm of a gradient and write it to its place; return (gradient, place) if the copy is still due.

        On the host, converts while writing and takes the norm in place; DeepSpeed would copy for both.
        """
        sub_group, offset, _ = position(zero, param)
        self._before_change(sub_group)
        exact = zero.gradient_accumulation_dtype in (torch.float32, partition.dtype)
        gradient = partition if exact else partition.to(zero.gradient_accumulation_dtype)
        self._service.verification.gradient(sub_group, offset, gradient)
        target = self._partitions.gradient(sub_group, offset, gradient.numel())
        due = self._transfers.asynchronous and sub_group in self._partitions.host
        if not due:
            target.copy_(gradient)
        measured = gradient if due else target
        zero.norm_for_param_grads[zero.get_param_id(param)] = zero._constant_buffered_norm2(measured)
        return [(gradient, target)] if due else []

    def _before_change(self, sub_group: int) -> None:
        if sub_group in self._partitions.host:
            self._service.coordinator.gradient_changes(sub_group)

    def _report_arrivals(self, zero: ZeroOptimizer, params: list[DsParameter]) -> None:
        coordinator = self._service.coordinator
        coordinator.pump()  # notices a dead optimizer process even if nothing has to be waited for
        speculate = self._settings.speculate is not False and coordinator.worth_speculating
        factor = gradient_factor(zero.loss_scale, zero.clip_grad, None) if speculate else None
        for param in params:
            sub_group = position(zero, param)[0]
            if sub_group in self._partitions.host:
                coordinator.arrived(sub_group, zero.get_param_id(param), factor)


def _outside_buckets(zero: ZeroOptimizer, partition: torch.Tensor) -> torch.Tensor:
    """Return a gradient whose memory stays unchanged until it has been copied to the host.

    If a bucket holds a single parameter, DeepSpeed reduces it in place, and refills the bucket before the copy ends.
    """
    address = partition.untyped_storage().data_ptr()
    buffers = (bucket.buffer for bucket in zero.ipg_buckets.values())
    reused = any(b is not None and b.untyped_storage().data_ptr() == address for b in buffers)
    return partition.clone() if reused else partition
