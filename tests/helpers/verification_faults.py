"""Faults that the check of the first steps must catch, on the simulated asynchronous device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from superoffload.offload.settings import VerificationError
from superoffload.offload.shared.messages import Task, TaskKind
from superoffload.offload.trainer.process import OptimizerProcess
from superoffload.offload.zero3 import gradients, transfers
from superoffload.offload.zero3.stepping import HostStep
from superoffload.offload.zero3.verification import Verification
from tests.helpers.async_device import AsyncDevice
from tests.helpers.offload_training import Case, train

FAULTY_FROM_STEP = 2
"""Counted from 1; the first step has no older values that could be stale."""


@contextmanager
def _stale_gradient_on_rank_1() -> Iterator[None]:
    """Leave one gradient as the last step has left it."""
    download, copies = transfers.download, [0]

    def stale(gradient: torch.Tensor, target: torch.Tensor) -> None:
        copies[0] += 1
        if copies[0] < 40 or torch.distributed.get_rank() != 1:
            download(gradient, target)

    with mock.patch.object(gradients, "download", stale):
        yield


@contextmanager
def _stale_upload() -> Iterator[None]:
    """Leave the weights of one sub-group on the device as they were."""
    uploaded, steps = Verification.uploaded, [0]

    def stale(self: Verification, sub_group: int, weights: torch.Tensor) -> None:
        steps[0] += sub_group == 0
        if sub_group == 0 and steps[0] >= FAULTY_FROM_STEP:
            weights.copy_(before[0])
        before[:] = [weights.clone()] if sub_group == 0 else before
        uploaded(self, sub_group, weights)

    before: list[torch.Tensor] = []
    with mock.patch.object(Verification, "uploaded", stale):
        yield


@contextmanager
def _stale_new_weights() -> Iterator[None]:
    """Upload what the last step had staged."""
    upload, last = HostStep._upload, dict[int, torch.Tensor]()

    def stale(self: HostStep, zero: Any, sub_group: int) -> None:
        staging = self._partitions.host[sub_group].staging
        new = staging.clone()
        staging.copy_(last.get(sub_group, new))
        last[sub_group] = new
        upload(self, zero, sub_group)

    with mock.patch.object(HostStep, "_upload", stale):
        yield


@contextmanager
def _rounding_difference() -> Iterator[None]:
    """Let the optimizer process update with a learning rate that is one unit in the last place too large."""
    send = OptimizerProcess.send

    def rounded(self: OptimizerProcess, task: Task, relieve: Callable[[], None] | None = None) -> None:
        if task.kind in (TaskKind.SPECULATE, TaskKind.STEP, TaskKind.COMMIT):
            task = replace(task, hyper=replace(task.hyper, lr=task.hyper.lr * (1 + 2**-23)))
        send(self, task, relieve)

    with mock.patch.object(OptimizerProcess, "send", rounded):
        yield


@contextmanager
def _none() -> Iterator[None]:
    yield


FAULTS: Mapping[str, Any] = {
    "none": _none,
    "a stale gradient on rank 1": _stale_gradient_on_rank_1,
    "a stale upload": _stale_upload,
    "stale new weights": _stale_new_weights,
    "a rounding difference": _rounding_difference,
}


def caught_by_verification(faults: Sequence[str]) -> dict[str, str | None]:
    """Train with each fault, and return the line that ends the run, or None; runs on every rank."""
    lines: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        case = Case(steps=4, clip=2.1, verify_steps=3, report_folder=folder)
        for name in faults:
            lines[name] = None
            with AsyncDevice(0), FAULTS[name]():
                try:
                    train(case, True)
                except VerificationError as error:
                    lines[name] = str(error)
    return lines
