"""The way of a gradient: from DeepSpeed's reduce bucket into the arena, and who is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .coordinator import Coordinator
from .settings import OffloadSettings
from .state import Arena

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

DsParameter = Any
"""A torch.nn.Parameter with what DeepSpeed has added to it (`ds_id`, `ds_numel`, `partition_numel()`)."""


class GradientFlow(_Base):  # type: ignore[misc]
    """Mix into DeepSpeed's ZeRO-3 optimizer, over OutsideAccess and ArenaPartitions."""

    _settings: OffloadSettings
    _arena: Arena
    _coordinator: Coordinator | None
    _own_access: int
    _bypassed: set[int]
    """Parameters (by ds_id) whose gradient of this epoch is not in DeepSpeed's accumulation buffer."""

    def partition_grads(self, params_to_release: list[DsParameter], grad_partitions: list[torch.Tensor]) -> Any:
        """Move one bucket's gradients to the host; at the boundary, speculate on what is complete."""
        boundary = self.is_gradient_accumulation_boundary()
        with self._own_reads():
            if boundary and self.micro_step_id == 0 and self._accumulation_can_be_bypassed():
                self._write_directly(params_to_release, grad_partitions)
                buffers = []
            else:
                for param in params_to_release:
                    self._fill_accumulation_buffer(param)
                buffers = super().partition_grads(params_to_release, grad_partitions)
            if boundary:
                self._note_arrivals(params_to_release)
        return buffers

    def _accumulation_can_be_bypassed(self) -> bool:
        """Return whether a step of one micro-batch may leave DeepSpeed's accumulation buffer alone.

        fp16 may not: the overflow check reads that buffer. Nor may masters of lower precision than the sums,
        from which the buffer could not be filled exactly afterwards.
        """
        exact = self.master_weights_and_grads_dtype in (torch.float32, self.gradient_accumulation_dtype)
        return self._settings.direct_gradients and self.dtype != torch.float16 and exact

    def _write_directly(self, params: list[DsParameter], partitions: list[torch.Tensor]) -> None:
        """Write gradients straight to where they are stepped.

        DeepSpeed would send them to its accumulation buffer on the host, fetch them back for the norm, and
        send them again: three transfers where one does.
        """
        for param, partition in zip(params, partitions, strict=True):
            size = param.partition_numel()
            if size * self._get_param_partition_rank(param) < param.ds_numel:  # not only padding
                unrounded = self.gradient_accumulation_dtype in (torch.float32, partition.dtype)
                if unrounded and partition.device.type == "cpu":
                    self._write_on_host(param, partition.view(-1))
                else:
                    gradient = partition.to(self.gradient_accumulation_dtype).view(-1)
                    self._offload_grad_partition_at_boundary(param, gradient, {}, {})
                self._offload_boundary_param_ids.add(param.ds_id)
                self._bypassed.add(param.ds_id)
            if param.grad is not None and param.grad.device.type != "cpu":
                param.grad.record_stream(torch.accelerator.current_stream())
            param.grad = None

    def _write_on_host(self, param: DsParameter, partition: torch.Tensor) -> None:
        """Convert a gradient while it is written, and take its norm there: DeepSpeed would make copies for either."""
        sub_group, offset, _ = self.grad_position[self.get_param_id(param)]
        if sub_group in self._arena.sub_groups:
            self._running().gradient_changes(sub_group)
        gradient = self._flats[sub_group].grad.narrow(0, offset, partition.numel())
        gradient.copy_(partition)
        self.norm_for_param_grads[self.get_param_id(param)] = self._constant_buffered_norm2(gradient)

    def _fill_accumulation_buffer(self, param: DsParameter) -> None:
        """Make up for a bypass in this epoch: another backward before the step adds to that buffer."""
        if param.ds_id in self._bypassed:
            self._bypassed.discard(param.ds_id)
            sub_group, offset, numel = self.grad_position[self.get_param_id(param)]
            gradient = self._flats[sub_group].grad[offset : offset + numel]
            self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[param.ds_id].copy_(gradient)

    def _note_arrivals(self, params: list[DsParameter]) -> None:
        coordinator = self._running()
        coordinator.pump()  # notices a dead optimizer process even while nothing is waited for
        speculate = self._settings.speculate and coordinator.worth_speculating
        factor = self._factor(None) if speculate else None
        for param in params:
            sub_group = self.grad_position[self.get_param_id(param)][0]
            if sub_group in self._arena.sub_groups:
                coordinator.arrived(sub_group, self.get_param_id(param), factor)

    def _offload_grad_partition_at_boundary(self, param: DsParameter, *args: Any) -> None:
        """Write one parameter's gradient into the arena, once the last step's commit no longer reads it."""
        sub_group = self.grad_position[self.get_param_id(param)][0]
        if sub_group in self._arena.sub_groups:
            self._running().gradient_changes(sub_group)
        with self._own_reads():
            super()._offload_grad_partition_at_boundary(param, *args)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients; between backward and step this drops the batch, and its speculations with it."""
        if not self._own_access and self._coordinator is not None:
            self._coordinator.discard()
            self._bypassed.clear()
        super().zero_grad(set_to_none)
