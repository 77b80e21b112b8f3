"""DeepSpeed's flat fp32 parameters and their gradients, which live in the arena from the beginning."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ..shared.affinity import Cores
from ..shared.state import KINDS, Arena, ArenaLayout, SubGroupShape, SubGroupState
from ..trainer.bookkeeping import startup_phase
from ..trainer.first_touch import touch
from .surface import CpuAdam, ZeroOptimizer


class ArenaPartitions:
    """Owns the arena and the flat tensors; knows whether a read of them comes from DeepSpeed's own step."""

    def __init__(self) -> None:
        self.flats: list[torch.Tensor] = []
        """The flat fp32 parameter of every sub-group: on the host in the arena, else on the device."""
        self.weights: list[torch.Tensor] = []
        """The flat low-precision weights of every sub-group."""
        self._arena: Arena | None = None
        self._arena_fd = -1
        self._own_access = 0

    @property
    def host(self) -> Mapping[int, SubGroupState]:
        """Return the sub-groups that the CPU steps, with their regions."""
        return self.arena.sub_groups

    @property
    def arena(self) -> Arena:
        """Return the arena. Raises RuntimeError before create()."""
        if self._arena is None:
            raise RuntimeError("the arena has not been created yet")
        return self._arena

    def create(self, zero: ZeroOptimizer, device: str, cores: Cores) -> None:
        """Put the fp32 parameters in their final place: the arena, or `device` for the device share (`ratio` < 1).

        Replaces a base method that would first copy all of them to ordinary memory. `cores` are those that will work on
        the arena; its pages are allocated from there.
        """
        count = len(zero.fp16_partitioned_groups_flat)
        first_on_host = int((1 - zero.partial_offload) * count)
        zero.subgroup_to_device = {i: "cpu" if i >= first_on_host else device for i in range(count)}
        with startup_phase("allocating the arena"):
            self._arena, self._arena_fd = Arena.create(_plan(zero))
            touch((getattr(regions, kind) for regions in self.host.values() for kind in KINDS), cores)
        with startup_phase("copying the weights to the arena"):
            self._fill(zero, device)
        for group in zero.optimizer.param_groups:
            group["params"] = []  # DeepSpeed fills them only during a step

    def _fill(self, zero: ZeroOptimizer, device: str) -> None:
        for i, weights in enumerate(zero.fp16_partitioned_groups_flat):
            if i in self.host:
                flat = self.host[i].parameters.detach()
                flat.copy_(weights.data)
                _zero_padding(zero, i, flat)
            else:
                flat = weights.data.to(device, dtype=zero.master_weights_and_grads_dtype, copy=True)
            ids = zero.fp16_partitioned_groups_flat_id[i]
            flat.ds_id = f"{ids[0]}_{ids[-1]}"  # type: ignore[attr-defined]  # DeepSpeed sets it too
            flat.requires_grad = True
            self.flats.append(flat)

    def attach_gradients(self) -> None:
        """Give every flat parameter its gradient: region G of the arena, or zeros on the device."""
        for i, flat in enumerate(self.flats):
            host = self.host.get(i)
            flat.grad = host.gradients if host is not None else torch.zeros_like(flat)

    def gradient(self, sub_group: int, offset: int, numel: int) -> torch.Tensor:
        """Return a view of one parameter's gradient in its flat tensor."""
        flat_gradient = self.flats[sub_group].grad
        if flat_gradient is None:
            raise RuntimeError(f"sub-group {sub_group} has no gradient: the optimizer has been destroyed")
        return flat_gradient.narrow(0, offset, numel)

    @contextmanager
    def hand_over(self) -> Iterator[int]:
        """Yield the arena's descriptor for the optimizer process; close it afterwards."""
        try:
            yield self._arena_fd
        finally:
            os.close(self._arena_fd)

    @contextmanager
    def own_access(self) -> Iterator[None]:
        """Let DeepSpeed's code that is called inside the block read the flat parameters without waiting for commits."""
        self._own_access += 1
        try:
            yield
        finally:
            self._own_access -= 1

    @property
    def in_own_access(self) -> bool:
        """Return whether an own_access() block is active."""
        return self._own_access > 0

    @contextmanager
    def releasing(self, main: CpuAdam) -> Iterator[None]:
        """After the block, also if it fails: drop every reference to the arena, and empty the flat parameters in it."""
        try:
            yield
        finally:
            for i in self.host:
                flat = self.flats[i]
                main.state.pop(flat, None)
                flat.grad = None
                flat.data = flat.data.new_empty(0)
            self.arena.release()


def _plan(zero: ZeroOptimizer) -> ArenaLayout:
    master = zero.master_weights_and_grads_dtype
    moments = torch.float32 if zero.optimizer.fp32_optimizer_states else master
    shapes = {
        i: SubGroupShape(numel=weights.numel(), master=master, moments=moments, weights=weights.dtype)
        for i, weights in enumerate(zero.fp16_partitioned_groups_flat)
        if zero.subgroup_to_device[i] == "cpu"
    }
    return ArenaLayout.plan(shapes)


def _zero_padding(zero: ZeroOptimizer, sub_group: int, flat: torch.Tensor) -> None:
    """Zero the padding behind each parameter's elements: DeepSpeed leaves it uninitialised and saves it."""
    offset = 0
    for param in zero.fp16_groups[sub_group]:
        size = param.partition_numel()
        real = min(size, max(0, param.ds_numel - size * zero._get_param_partition_rank(param)))
        flat[offset + real : offset + size].zero_()
        offset += size
