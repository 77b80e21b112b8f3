"""Adam on one sub-group, computed by the compiled op that ZeRO-Offload uses.

The trainer passes the path of the library it has loaded itself, so both processes use the same instructions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.machinery import ExtensionFileLoader
from typing import Any

import torch

from ..shared.bias import as_float32
from ..shared.messages import AdamHyper, Task, TaskKind
from ..shared.state import SubGroupState
from .fused import FusedAdam

_OPTIMIZER_ID = 0
_SAMPLE_NUMEL = 4096 + 5
_SAMPLE_TASK = Task(
    kind=TaskKind.SPECULATE,
    step=7,
    hyper=AdamHyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1),
    factor=0.7,
)
_NO_BETAS = -1.0  # no user has this value, so the object restarts its products at the next call


def load_op(name: str, path: str) -> Any:
    """Load the compiled cpu_adam extension from `path`. Raises ImportError if that fails."""
    loader = ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class BetaProducts:
    """Sets the running beta^t of the C++ object to what a task needs (see bias.py)."""

    def __init__(self, op: Any, optimizer_id: int = _OPTIMIZER_ID) -> None:
        self._op = op
        self._optimizer_id = optimizer_id
        self._held: tuple[float, float, int] | None = None
        self._step = -1

    def prepare(self, task: Task) -> None:
        """Make the next update with the task's step and betas use the product that starts at its anchor.

        This is free while each step follows the last. After a resume, it replays the steps since the anchor as
        updates of empty tensors, which take microseconds each.
        """
        wanted = (as_float32(task.hyper.beta1), as_float32(task.hyper.beta2), task.anchor_step)
        if wanted != self._held or self._step not in (task.step, task.step - 1):
            self._update_empty(1, _NO_BETAS, _NO_BETAS)
            for step in range(task.anchor_step, task.step):
                self._update_empty(step, task.hyper.beta1, task.hyper.beta2)
        self._held, self._step = wanted, task.step

    def _update_empty(self, step: int, beta1: float, beta2: float) -> None:
        empty = torch.empty(0)
        self._op.adam_update(self._optimizer_id, step, 0.0, beta1, beta2, 1e-8, 0.0, True, empty, empty, empty, empty)


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """How many threads compute: during forward and backward, and in a step, for which the trainer waits."""

    beside_trainer: int
    while_trainer_waits: int


class SubGroupAdam:
    """Computes speculations and steps, chunk by chunk, so that what was just written is still in cache."""

    def __init__(self, op: Any, *, adamw_mode: bool, chunk_numel: int, threads: Threads | None = None) -> None:
        """Create the compiled op's one object; `adamw_mode` False means L2 instead of decoupled weight decay.

        threads: how many to compute with; None leaves torch's number unchanged.
        """
        op.create_adam(_OPTIMIZER_ID, 1e-3, 0.9, 0.999, 1e-8, 0.0, adamw_mode, False)
        self._op = op
        self._products = BetaProducts(op)
        self._chunk_numel = chunk_numel
        self._threads = threads
        self._scratch: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._fused: FusedAdam | None = None

    def adopt(self, *kernels: FusedAdam) -> bool:
        """Use the first kernel whose results on a sample equal the op's; return whether there is one.

        Compares parameters and moments in fp32 too: most differences in the last bits do not survive the rounding of
        the sample's weights to bf16.
        """
        expected = _sample()
        self.step(_SAMPLE_TASK, expected, stage=True)
        for kernel in kernels:
            speculated, stepped = _sample(), _sample()
            self._fused = kernel
            self.speculate(_SAMPLE_TASK, speculated, lambda: False)
            self.step(_SAMPLE_TASK, stepped, stage=True)
            if torch.equal(speculated.staging, expected.staging) and all(
                torch.equal(getattr(stepped, field.name), getattr(expected, field.name))
                for field in fields(SubGroupState)
            ):
                return True
        self._fused = None
        return False

    def speculate(self, task: Task, state: SubGroupState, abandoned: Callable[[], bool]) -> bool:
        """Write the weights after this update to the staging region; leave parameters and moments unchanged.

        Returns False if `abandoned()` became true between two chunks; the staging region is then undefined.
        """
        self._use_threads(trainer_waits=False)
        for chunk in self._chunks(state.parameters.numel()):
            if abandoned():
                return False
            if self._fused is not None and self._fused.serves(state):
                chunk = slice(chunk.start + self._fused.speculate(task, state, chunk), chunk.stop)
                if chunk.start == chunk.stop:
                    continue
            parameters = self._copy("parameters", state.parameters[chunk])
            exp_avg = self._copy("exp_avg", state.exp_avg[chunk])
            exp_avg_sq = self._copy("exp_avg_sq", state.exp_avg_sq[chunk])
            gradients = state.gradients[chunk]
            if task.factor != 1.0:
                gradients = self._copy("gradients", gradients).mul_(task.factor)
            self._update(task, parameters, gradients, exp_avg, exp_avg_sq)
            state.staging[chunk].copy_(parameters)
        return True

    def step(self, task: Task, state: SubGroupState, *, stage: bool) -> None:
        """Scale the gradients, update parameters and moments, all in place; if `stage`, write the staging region.

        The gradients stay scaled, as ZeRO-Offload leaves them: a sub-group that receives no gradient in a
        round is stepped with the old ones again.
        """
        self._use_threads(trainer_waits=stage)
        done = self._fused.step(task, state, stage=stage) if self._fused and self._fused.serves(state) else 0
        for chunk in self._chunks(state.parameters.numel(), done):
            gradients = state.gradients[chunk]
            if task.factor != 1.0:
                gradients.mul_(task.factor)
            parameters = state.parameters[chunk]
            self._update(task, parameters, gradients, state.exp_avg[chunk], state.exp_avg_sq[chunk])
            if stage:
                state.staging[chunk].copy_(parameters)

    def _update(self, task: Task, parameters: torch.Tensor, gradients: torch.Tensor, *moments: torch.Tensor) -> None:
        self._products.prepare(task)  # not where the kernel computes all: then the op's object stays as it is
        h = task.hyper
        self._op.adam_update(
            _OPTIMIZER_ID,
            task.step,
            h.lr,
            h.beta1,
            h.beta2,
            h.eps,
            h.weight_decay,
            h.bias_correction,
            parameters,
            gradients,
            *moments,
        )

    def _use_threads(self, *, trainer_waits: bool) -> None:
        if self._threads is not None:
            number = self._threads.while_trainer_waits if trainer_waits else self._threads.beside_trainer
            if number != torch.get_num_threads():
                torch.set_num_threads(number)

    def _chunks(self, numel: int, first: int = 0) -> list[slice]:
        return [slice(i, min(i + self._chunk_numel, numel)) for i in range(first, numel, self._chunk_numel)]

    def _copy(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """Copy `source` to scratch memory that is reused for every chunk; return the copy."""
        key = (name, source.dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(self._chunk_numel, dtype=source.dtype)
        return self._scratch[key][: source.numel()].copy_(source)


def _sample() -> SubGroupState:
    """Return a small sub-group, with the same values at every call."""
    generator = torch.Generator().manual_seed(0)
    parameters, gradients, exp_avg, exp_avg_sq = torch.randn(4, _SAMPLE_NUMEL, generator=generator)
    return SubGroupState(
        parameters=parameters,
        gradients=gradients,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq.square(),
        staging=torch.zeros(_SAMPLE_NUMEL, dtype=torch.bfloat16),
    )
