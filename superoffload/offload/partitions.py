"""Flat fp32 parameters and gradients that live in the shared arena from the beginning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .state import Arena, ArenaLayout, SubGroupShape

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class ArenaPartitions(_Base):  # type: ignore[misc]
    """Mix into DeepSpeed's ZeRO-3 optimizer: where its flat parameters come from and who may read them.

    The class it is mixed into sets `_flats` to an empty list and `_own_access` to 0 before DeepSpeed's
    constructor runs, and provides `flush()` and `_device_name()`.
    """

    _flats: list[torch.Tensor]
    _own_access: int

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """Return the flat fp32 parameters; whoever reads them from outside sees committed values."""
        if not self._own_access:
            self.flush()
        return self._flats

    @fp32_partitioned_groups_flat.setter
    def fp32_partitioned_groups_flat(self, value: list[torch.Tensor]) -> None:
        self._flats = value

    def _create_fp32_partitions(self) -> None:
        """Put the fp32 parameters where they stay: straight into the arena, or on the device (`ratio` < 1).

        Replaces the base method, which would make one copy of everything first.
        """
        count = len(self.fp16_partitioned_groups_flat)
        first_on_host = int((1 - self.partial_offload) * count)
        device = self._device_name()
        self.subgroup_to_device = {i: "cpu" if i >= first_on_host else device for i in range(count)}
        self._arena = self._create_arena()
        for i, weights in enumerate(self.fp16_partitioned_groups_flat):
            if i in self._arena.sub_groups:
                flat = self._arena.sub_groups[i].parameters.detach()
                flat.copy_(weights.data)
                self._zero_padding(i, flat)
            else:
                flat = weights.data.to(device, dtype=self.master_weights_and_grads_dtype, copy=True)
            ids = self.fp16_partitioned_groups_flat_id[i]
            flat.ds_id = f"{ids[0]}_{ids[-1]}"  # type: ignore[attr-defined]  # as DeepSpeed does
            flat.requires_grad = True
            self._flats.append(flat)
        for group in self.optimizer.param_groups:  # filled by DeepSpeed for the moment of a step only
            group["params"] = []

    def _create_arena(self) -> Arena:
        master = self.master_weights_and_grads_dtype
        moments = torch.float32 if self.optimizer.fp32_optimizer_states else master
        shapes = {
            i: SubGroupShape(
                numel=weights.numel(),
                master=master,
                moments=moments,
                weights=weights.dtype,
            )
            for i, weights in enumerate(self.fp16_partitioned_groups_flat)
            if self.subgroup_to_device[i] == "cpu"
        }
        arena, self._arena_fd = Arena.create(ArenaLayout.plan(shapes))
        return arena

    def _zero_padding(self, sub_group: int, flat: torch.Tensor) -> None:
        """Zero what lies beyond the real elements: DeepSpeed leaves it uninitialised and saves it."""
        offset = 0
        for param in self.fp16_groups[sub_group]:
            size = param.partition_numel()
            real = min(size, max(0, param.ds_numel - size * self._get_param_partition_rank(param)))
            flat[offset + real : offset + size].zero_()
            offset += size

    def initialize_optimizer_states(self) -> None:
        """Give every flat parameter its gradient: the arena's, or zeros on the device."""
        for i, flat in enumerate(self._flats):
            host = self._arena.sub_groups.get(i)
            flat.grad = host.gradients if host is not None else torch.zeros_like(flat)

    def _release_arena(self) -> None:
        """Drop every reference to the arena held from here; its memory goes with the last one elsewhere."""
        for i in self._arena.sub_groups:
            flat = self._flats[i]
            self.optimizer.state.pop(flat, None)
            flat.grad = None
            flat.data = flat.data.new_empty(0)
        self._arena.release()

    @contextmanager
    def _own_reads(self) -> Iterator[None]:
        """Let DeepSpeed's code, called from here, read the flat parameters without waiting for commits."""
        self._own_access += 1
        try:
            yield
        finally:
            self._own_access -= 1
