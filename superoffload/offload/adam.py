"""Adam on one sub-group, in the optimizer process, by the compiled op that ZeRO-Offload uses.

The trainer passes the path of the very library it has loaded: both compute with the same instructions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from typing import Any

import torch

from .bias import as_float32
from .fused import FusedSpeculation
from .messages import AdamHyper, Task, TaskKind
from .state import SubGroupState

_OPTIMIZER_ID = 0
_SAMPLE_NUMEL = 4096 + 5
_SAMPLE_TASK = Task(
    kind=TaskKind.SPECULATE,
    step=7,
    hyper=AdamHyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1),
    factor=0.7,
)
_NO_BETAS = -1.0  # a value no user has: makes the object start its products anew at the next call


def load_op(name: str, path: str) -> Any:
    """Load the compiled cpu_adam extension from `path`; raises ImportError with the loader's words."""
    loader = ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class BetaProducts:
    """Bring the running beta^t of the C++ object where a task wants it (see bias.py)."""

    def __init__(self, op: Any) -> None:
        self._op = op
        self._held: tuple[float, float, int] | None = None
        self._step = -1

    def prepare(self, task: Task) -> None:
        """Make the next update with the task's step and betas use the product that starts at its anchor.

        Costs nothing while steps follow one another; after a resume it replays the steps since the anchor as
        updates of nothing, microseconds each.
        """
        wanted = (as_float32(task.hyper.beta1), as_float32(task.hyper.beta2), task.anchor_step)
        if wanted != self._held or self._step not in (task.step, task.step - 1):
            self._update_nothing(1, _NO_BETAS, _NO_BETAS)
            for step in range(task.anchor_step, task.step):
                self._update_nothing(step, task.hyper.beta1, task.hyper.beta2)
        self._held, self._step = wanted, task.step

    def _update_nothing(self, step: int, beta1: float, beta2: float) -> None:
        nothing = torch.empty(0)
        self._op.adam_update(
            _OPTIMIZER_ID, step, 0.0, beta1, beta2, 1e-8, 0.0, True, nothing, nothing, nothing, nothing
        )


class SubGroupAdam:
    """Compute speculations and steps, chunk by chunk so that what was just written is still in cache."""

    def __init__(self, op: Any, *, adamw_mode: bool, chunk_numel: int) -> None:
        """Make the compiled op's one object; `adamw_mode` False means L2 instead of decoupled decay."""
        op.create_adam(_OPTIMIZER_ID, 1e-3, 0.9, 0.999, 1e-8, 0.0, adamw_mode, False)
        self._op = op
        self._products = BetaProducts(op)
        self._chunk_numel = chunk_numel
        self._scratch: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._fused: FusedSpeculation | None = None

    def adopt(self, fused: FusedSpeculation) -> bool:
        """Speculate with the kernel from now on, if it computes on a sample what the op does; tell whether."""
        generator = torch.Generator().manual_seed(0)
        parameters, gradients, exp_avg, exp_avg_sq = torch.randn(4, _SAMPLE_NUMEL, generator=generator)
        sample = SubGroupState(
            parameters=parameters,
            gradients=gradients,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq.square(),
            staging=torch.zeros(_SAMPLE_NUMEL, dtype=torch.bfloat16),
        )
        self.speculate(_SAMPLE_TASK, sample, lambda: False)
        expected = sample.staging.clone()
        self._fused = fused
        sample.staging.zero_()
        self.speculate(_SAMPLE_TASK, sample, lambda: False)
        if not torch.equal(sample.staging, expected):
            self._fused = None
        return self._fused is not None

    def speculate(self, task: Task, state: SubGroupState, abandoned: Callable[[], bool]) -> bool:
        """Write the weights after this update to the staging region; parameters and moments stay as they are.

        Returns False if `abandoned()` became true between two chunks; the staging region is then undefined.
        """
        self._products.prepare(task)
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
        """Scale the gradients in place, update parameters and moments in place; write staging if asked.

        The gradients stay scaled, as ZeRO-Offload leaves them: a sub-group that no batch reaches is stepped
        with them again.
        """
        self._products.prepare(task)
        for chunk in self._chunks(state.parameters.numel()):
            gradients = state.gradients[chunk]
            if task.factor != 1.0:
                gradients.mul_(task.factor)
            parameters = state.parameters[chunk]
            self._update(task, parameters, gradients, state.exp_avg[chunk], state.exp_avg_sq[chunk])
            if stage:
                state.staging[chunk].copy_(parameters)

    def _update(self, task: Task, parameters: torch.Tensor, gradients: torch.Tensor, *moments: torch.Tensor) -> None:
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

    def _chunks(self, numel: int) -> list[slice]:
        return [slice(i, min(i + self._chunk_numel, numel)) for i in range(0, numel, self._chunk_numel)]

    def _copy(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """Return a copy of `source` in scratch memory that is reused for every chunk."""
        key = (name, source.dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(self._chunk_numel, dtype=source.dtype)
        return self._scratch[key][: source.numel()].copy_(source)
