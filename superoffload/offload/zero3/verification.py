"""A check of the first steps, for devices and hosts on which this package has never run.

In every round a few blocks of each sub-group are drawn at random, and these are compared bit for bit:

    gradient   what has arrived in the arena when the norm is known   with what the device handed over
    update     the new weights S when they are uploaded               with a plain Adam of the state before the step
    hold       the gradient G when S is uploaded                      with the one at the decision, scaled or not
    upload     the weights on the device after the upload             with S
    commit     P, M and V at the next decision                        with that Adam's results

The plain Adam is DeepSpeed's compiled op, called in the trainer on copies of the blocks. What is found about a step is
compared in the next one, when the device has finished anyway, so the check adds no wait that could hide a missing one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import count
from logging import getLogger
from pathlib import Path
from random import Random
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from ..settings import OffloadSettings
from ..shared.messages import Task
from ..shared.state import SubGroupState
from ..worker.adam import BetaProducts
from .surface import CpuAdam

_log = getLogger(__name__)

# A multiple of the op's vectors: in a sample, each element takes the path that it takes in the whole.
_BLOCK_NUMEL = 1024
_BLOCKS = 4
_OPTIMIZER_IDS = count(1 << 30)  # DeepSpeed counts its own from 0
_STEPS_ON_CUDA = 3
_STATE = ("parameters", "gradients", "exp_avg", "exp_avg_sq")

Blocks = list[slice]


@dataclass(slots=True, kw_only=True)
class _Expected:
    """What one sub-group must be after a step, and what was found at its upload; all tensors are samples."""

    blocks: Blocks
    task: Task
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    found: dict[str, torch.Tensor]


@dataclass(slots=True, kw_only=True)
class _Mismatch:
    sub_group: int
    phase: str
    expected: torch.Tensor
    found: torch.Tensor


class Verification:
    """Compares samples of the first steps; does nothing before, after, or if the number of steps is 0."""

    def __init__(self, settings: OffloadSettings) -> None:
        """Read the number of steps from the settings, or from the accelerator in use."""
        on_cuda = get_accelerator().device_name() == "cuda"
        default = _STEPS_ON_CUDA if on_cuda else 0
        self._steps = default if settings.verify_steps is None else settings.verify_steps
        self._settings = settings
        self._decisions = 0
        self._host: Mapping[int, SubGroupState] = {}
        self._blocks: dict[int, Blocks] = {}
        self._arriving: dict[int, dict[int, torch.Tensor]] = {}
        self._expected: dict[int, _Expected] = {}

    def begin(self, host: Mapping[int, SubGroupState], main: CpuAdam) -> bool:
        """Draw the first blocks; return whether there is anything to check.

        main: the optimizer whose compiled op computes what is expected.
        """
        if self._steps:
            self._host = host
            self._adam = _PlainAdam(main)
            self._draw()
        return bool(self._steps)

    def gradient(self, sub_group: int, offset: int, gradient: torch.Tensor) -> None:
        """Keep the sampled part of a final gradient that is about to be written to `offset` of its sub-group."""
        position = 0
        for block in self._blocks.get(sub_group, ()):
            start, stop = max(block.start, offset), min(block.stop, offset + gradient.numel())
            if start < stop:
                piece = gradient.view(-1)[start - offset : stop - offset].clone()
                self._arriving[sub_group][position + start - block.start] = piece
            position += block.stop - block.start

    def uploaded(self, sub_group: int, weights: torch.Tensor) -> None:
        """Keep samples of what has just been uploaded, on the stream of the upload, to `weights` on the device."""
        expected = self._expected.get(sub_group)
        if expected is not None:
            state = self._host[sub_group]
            expected.found = {
                "update": _take(state.staging, expected.blocks),
                "hold": _take(state.gradients, expected.blocks),
                "upload": _take(weights, expected.blocks),
            }

    def forget_gradients(self) -> None:
        """Check no gradient of this round: the batch has been dropped, or a gradient replaced from outside."""
        self._arriving = {i: {} for i in self._blocks}

    def forget(self) -> None:
        """Check nothing of the last step and no gradient of this round: values have been replaced from outside."""
        self._expected = {}
        self.forget_gradients()

    def decided(self, tasks: Mapping[int, Task]) -> bool:
        """Check this round's gradients and the last step, then compute what this step must lead to (collective).

        tasks: the update of every sub-group, before it is sent; all commits are in P, M and V. Returns whether there is
        more to check. Raises the error of the settings, on every rank, if a rank has found a mismatch.
        """
        self._decisions += 1
        self._raise_together([*self._mismatches_of_gradients(), *self._mismatches_of_last_step()])
        if self._decisions > self._steps:
            self._expected, self._blocks, self._arriving = {}, {}, {}
            _log.info("The first %d steps are verified: samples equal plain arithmetic bit for bit", self._steps)
            return False
        self._expected = {i: self._expect(i, task) for i, task in tasks.items()}
        self._draw()
        return True

    def _draw(self) -> None:
        random = Random(self._decisions)  # not torch's generator: the run's own random numbers must stay the same
        self._blocks = {i: _draw_blocks(state.parameters.numel(), random) for i, state in self._host.items()}
        self.forget_gradients()

    def _expect(self, sub_group: int, task: Task) -> _Expected:
        state, blocks = self._host[sub_group], self._blocks[sub_group]
        before = {name: _take(getattr(state, name), blocks) for name in _STATE}
        after = {name: tensor.clone() for name, tensor in before.items()}
        self._adam.step(task, *after.values())
        after["staging"] = after["parameters"].to(state.staging.dtype)
        return _Expected(blocks=blocks, task=task, before=before, after=after, found={})

    def _mismatches_of_gradients(self) -> list[_Mismatch]:
        found = []
        for sub_group, pieces in self._arriving.items():
            arrived = _take(self._host[sub_group].gradients, self._blocks[sub_group])
            for position, piece in pieces.items():
                expected = piece.cpu().to(arrived.dtype)
                there = arrived[position : position + expected.numel()]
                found += _compare(sub_group, "gradient", expected, there)
        return found

    def _mismatches_of_last_step(self) -> list[_Mismatch]:
        found = []
        for sub_group, step in self._expected.items():
            if not step.found:
                continue
            state, after = self._host[sub_group], step.after
            held = step.found["hold"]  # a step scales the gradient in place; a speculation does not
            scaled = _equal(held, after["gradients"])
            found += _compare(sub_group, "update", after["staging"], step.found["update"])
            found += _compare(sub_group, "hold", held if scaled else step.before["gradients"], held)
            found += _compare(sub_group, "upload", step.found["update"], step.found["upload"].cpu())
            for name in ("parameters", "exp_avg", "exp_avg_sq"):
                found += _compare(sub_group, "commit", after[name], _take(getattr(state, name), step.blocks))
        return found

    def _raise_together(self, mismatches: list[_Mismatch]) -> None:
        """Raise on every rank if any rank has a mismatch, after each of those has written its report (collective)."""
        own = self._report(mismatches[0]) if mismatches else None
        texts: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, own)
        text = next((t for t in texts if t is not None), None)
        if text is not None:
            raise self._settings.verify_error(text)

    def _report(self, mismatch: _Mismatch) -> str:
        """Save the samples behind a mismatch, and return the line that describes it."""
        step, path = self._expected.get(mismatch.sub_group), Path(self._settings.report_folder)
        path = path / f"verify_rank{dist.get_rank()}.pt"
        state = asdict(mismatch) | {"decision": self._decisions, "last_step": asdict(step) if step else None}
        try:
            os.makedirs(path.parent, exist_ok=True)
            torch.save(state, path)
            kept = f"the samples are in {path}"
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if it cannot open the file
            kept = f"the samples could not be written to {path} ({next(iter(str(error).splitlines()), error)})"
        number = self._decisions - (mismatch.phase != "gradient")
        return (
            f"SuperOffload failed the check of step {number} on rank {dist.get_rank()}: sub-group "
            f"{mismatch.sub_group}, {mismatch.phase}: {_describe(mismatch)}. Do not use this run's weights; {kept}; "
            "report them, and train in zerooffload mode"
        )


class _PlainAdam:
    """Calls DeepSpeed's op on whole tensors, without chunks, speculation or another process.

    The op keeps running products for each optimizer id, so every engine of a process needs an id of its own.
    """

    def __init__(self, main: CpuAdam) -> None:
        self._op: Any = main.ds_opt_adam
        self._id = next(_OPTIMIZER_IDS)
        self._op.create_adam(self._id, 1e-3, 0.9, 0.999, 1e-8, 0.0, bool(main.adam_w_mode), False)
        self._products = BetaProducts(self._op, self._id)

    def step(self, task: Task, parameters: torch.Tensor, gradients: torch.Tensor, *moments: torch.Tensor) -> None:
        """Scale the gradients, and update parameters and moments, all in place."""
        self._products.prepare(task)
        if task.factor != 1.0:
            gradients.mul_(task.factor)
        h = task.hyper
        hypers = (h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, h.bias_correction)
        self._op.adam_update(self._id, task.step, *hypers, parameters, gradients, *moments)


def _draw_blocks(numel: int, random: Random) -> Blocks:
    """Draw blocks of a sub-group; its last, shorter block is always there."""
    whole, rest = divmod(numel, _BLOCK_NUMEL)
    drawn = sorted(random.sample(range(whole), min(_BLOCKS, whole)))
    blocks = [slice(i * _BLOCK_NUMEL, (i + 1) * _BLOCK_NUMEL) for i in drawn]
    return [*blocks, slice(numel - rest, numel)] if rest else blocks


def _take(flat: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    return torch.cat([flat[block] for block in blocks]) if blocks else flat[:0].clone()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bit for bit, so that NaN equals NaN."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _compare(sub_group: int, phase: str, expected: torch.Tensor, found: torch.Tensor) -> list[_Mismatch]:
    if _equal(expected, found):
        return []
    return [_Mismatch(sub_group=sub_group, phase=phase, expected=expected, found=found)]


def _describe(mismatch: _Mismatch) -> str:
    expected, found = mismatch.expected.double(), mismatch.found.double()
    different = ~((expected == found) | (expected.isnan() & found.isnan()))
    first = int(different.double().argmax())
    return (
        f"{int(different.sum())} of {different.numel()} sampled values differ, the first is "
        f"{float(found[first]):.9g} instead of {float(expected[first]):.9g}"
    )
