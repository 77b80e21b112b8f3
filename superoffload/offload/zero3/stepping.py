"""The optimizer step: host sub-groups in the optimizer process, the device share in DeepSpeed's own code."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .checkpointing import AdamStateBook
from .gradients import gradient_factor
from .partitions import ArenaPartitions
from .service import OptimizerService
from .surface import ZeroOptimizer

_FOLLOWED = ("lr", "betas", "eps", "weight_decay")


class HostStep:
    """Steps all host sub-groups in one step() of DeepSpeed."""

    def __init__(self, partitions: ArenaPartitions, service: OptimizerService, book: AdamStateBook) -> None:
        self._partitions = partitions
        self._service = service
        self._book = book
        _separate_device_groups(book)

    def decide(self, zero: ZeroOptimizer, total_norm: torch.Tensor) -> None:
        """Send the factor of this round to the optimizer process; only the first call in a round has an effect."""
        if self._partitions.host:
            clipped, unclipped = (gradient_factor(zero.loss_scale, zero.clip_grad, norm) for norm in (total_norm, None))
            self._service.coordinator.decide(clipped, unclipped)

    def step(self, zero: ZeroOptimizer, sub_group: int, base: Callable[[int], None]) -> None:
        """Step a device sub-group with `base`; the first host sub-group collects the new weights of all of them."""
        if sub_group not in self._partitions.host:
            self._align_device_group(zero.sub_group_to_group_id[sub_group])
            base(sub_group)
        elif sub_group == min(self._partitions.host):
            coordinator = self._service.coordinator
            self._service.transfers.begin_uploads()
            coordinator.collect(lambda i: self._upload(zero, i))
            self._book.set_steps(coordinator.steps)

    def reassign(self, zero: ZeroOptimizer, sub_group: int, base: Callable[[int], None]) -> None:
        """Point the parameters to the new weights; a host sub-group's have been uploaded by now."""
        if sub_group in self._partitions.host:
            zero._unflatten_partitioned_parameters(sub_group)
        else:
            base(sub_group)

    def _upload(self, zero: ZeroOptimizer, sub_group: int) -> None:
        """Copy new weights to the device; a gather of one of these parameters waits for the copy."""
        staging = self._partitions.host[sub_group].staging
        weights = zero.fp16_partitioned_groups_flat[sub_group].data
        with self._service.transfers.uploading(sub_group):
            weights.copy_(staging, non_blocking=True)
            self._service.verification.uploaded(sub_group, weights)

    def _align_device_group(self, group_id: int) -> None:
        """Give the device share's Adam the current hyper-parameters of the main one."""
        if self._book.backup is None:
            raise RuntimeError("DeepSpeed has a share of the optimizer on the device, but no optimizer for it")
        main, group = self._book.main.param_groups[group_id], self._book.backup.param_groups[group_id]
        group.update({key: main[key] for key in _FOLLOWED})
        group["decoupled_weight_decay"] = bool(self._book.main.adam_w_mode)


def _separate_device_groups(book: AdamStateBook) -> None:
    """Give the device share's Adam param groups of its own.

    DeepSpeed shares the dicts of all groups but the first with the main optimizer, and never updates the first.
    """
    if book.backup is not None:
        template = {**book.backup.param_groups[0], "params": []}
        book.backup.param_groups[:] = [dict(template) for _ in book.main.param_groups]
