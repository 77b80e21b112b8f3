"""The part of DeepSpeed that this subpackage uses, as types. contract.py checks that every name exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import torch


class DsParameter(Protocol):
    """A torch.nn.Parameter with the attributes that ZeRO-3 adds to it."""

    ds_id: int
    ds_numel: int
    grad: torch.Tensor | None
    requires_grad: bool
    all_gather: Callable[..., Any]
    all_gather_coalesced: Callable[..., Any]

    def partition_numel(self) -> int:
        """Return the number of elements of each rank's partition, including padding."""


class ZeroModule(Protocol):
    """The model, whose parameters are all ZeRO-3's."""

    def parameters(self) -> Iterator[DsParameter]:
        """Return every parameter, trained or not."""


class CpuAdam(Protocol):
    """DeepSpeedCPUAdam; `state` is keyed by DeepSpeed's flat fp32 parameters."""

    ds_opt_adam: ModuleType
    adam_w_mode: bool
    fp32_optimizer_states: bool
    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: dict[torch.Tensor, dict[str, Any]]


class ReduceBucket(Protocol):
    """IPGBucketZ3: `buffer` holds the gradients that are reduced together; None if they stay where they are."""

    buffer: torch.Tensor | None


class ZeroOptimizer(Protocol):
    """DeepSpeedZeroOptimizer_Stage3 with optimizer offload to the CPU.

    `backup_optimizer` is not listed because it exists only if `ratio` is below 1.
    """

    optimizer: CpuAdam
    module: ZeroModule
    persistent_parameters: list[DsParameter]
    device: Any
    dtype: torch.dtype
    master_weights_and_grads_dtype: torch.dtype
    gradient_accumulation_dtype: torch.dtype
    loss_scale: float
    clip_grad: float
    micro_step_id: int
    partial_offload: float
    offload_optimizer_pin_memory: bool
    contiguous_gradients: bool
    reduce_bucket_size: int
    ipg_buckets: dict[torch.dtype, ReduceBucket]
    subgroup_to_device: dict[int, str]
    sub_group_to_group_id: dict[int, int]
    grad_position: dict[int, list[int]]
    norm_for_param_grads: dict[int, torch.Tensor]
    fp16_groups: list[list[DsParameter]]
    fp16_partitioned_groups_flat: list[torch.Tensor]
    fp16_partitioned_groups_flat_id: list[list[int]]
    _offload_boundary_param_ids: set[int]
    _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition: dict[int, torch.Tensor]

    def get_param_id(self, param: DsParameter) -> int:
        """Return the key of a parameter in `grad_position` and `norm_for_param_grads`."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the current backward is the last one before step()."""

    def _get_param_partition_rank(self, param: DsParameter) -> int: ...

    def _constant_buffered_norm2(self, input: torch.Tensor) -> torch.Tensor: ...

    def _create_fp32_partitions(self) -> None: ...

    def _create_next_swappable_fp32_groups(self) -> None: ...

    def initialize_optimizer_states(self) -> None:
        """Attach the gradients to the flat parameters."""

    def _unflatten_partitioned_parameters(self, sub_group_id: int) -> None: ...


def position(zero: ZeroOptimizer, param: DsParameter) -> tuple[int, int, int]:
    """Return where the gradient of a parameter lies: sub-group, offset and number of elements in its flat tensor."""
    sub_group, offset, numel = zero.grad_position[zero.get_param_id(param)]
    return sub_group, offset, numel
