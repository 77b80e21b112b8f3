"""Update in one pass over memory, with a kernel of this package.

DeepSpeed's op works in place: to speculate with it, parameters and moments must first be copied, and the new
weights then converted. A step with it reads and writes the gradients first, to scale them. The kernel (fused.cpp)
reads each array once. Its results must equal the op's bit for bit.
The optimizer process checks that on a sample when it starts, for each arithmetic that the kernel has, and does not use
the kernel if all differ.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from enum import Enum
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from ..operators import FUSED, compiled
from ..shared.messages import Task
from ..shared.state import SubGroupState

_log = getLogger(__name__)

MULTIPLE = 16
"""Elements. The kernel leaves the remainder to the op, whose scalar loop rounds as its compiler chose."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]


class Arithmetic(Enum):
    """Whose roundings the kernel repeats: those of DeepSpeed's loop for AVX and NEON, or of its loop for SVE."""

    AVX = "AVX"
    SVE = "SVE"


class _Update(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "factor")),
        *((name, ctypes.c_int32) for name in ("bias_correction", "adamw_mode", "sve")),
        *((name, ctypes.c_int64) for name in ("anchor_step", "step")),
    )


def load(verbose: bool = False) -> str:
    """Compile the kernel unless it is already compiled, and return its path. Raises what the compiler's failure is."""
    from torch.utils.cpp_extension import load as compile_and_load

    return str(
        compile_and_load(
            FUSED,
            [str(_SOURCE)],
            extra_cflags=_FLAGS,
            extra_ldflags=["-fopenmp"],
            is_python_module=False,
            verbose=verbose,
        )
    )


def build() -> str | None:
    """Compile the kernel unless it is already compiled, and return its path; if it fails, warn and return None."""
    try:
        with compiled(FUSED):
            return load()
    except (RuntimeError, OSError, ImportError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        _log.warning("The fused kernel cannot be compiled (%s); updates take a little longer", why)
        return None


class FusedAdam:
    """Calls the compiled kernel, for fp32 masters and moments and bf16 weights."""

    def __init__(self, path: str, *, adamw_mode: bool, arithmetic: Arithmetic) -> None:
        """Load the kernel. Raises OSError if that fails."""
        library = ctypes.CDLL(path)
        self._speculate, self._step = library.speculate, library.step
        self._speculate.restype = self._step.restype = None
        self._adamw_mode = adamw_mode
        self.arithmetic = arithmetic

    @staticmethod
    def serves(state: SubGroupState) -> bool:
        """Return whether the kernel supports the precisions of a sub-group."""
        fp32 = (state.parameters, state.gradients, state.exp_avg, state.exp_avg_sq)
        return all(t.dtype is torch.float32 for t in fp32) and state.staging.dtype is torch.bfloat16

    def speculate(self, task: Task, state: SubGroupState, chunk: slice) -> int:
        """Write the staging region of a chunk, up to the last whole MULTIPLE; return how many elements were written."""
        tensors = (state.parameters, state.gradients, state.exp_avg, state.exp_avg_sq, state.staging)
        return self._call(self._speculate, task, tensors, chunk)

    def step(self, task: Task, state: SubGroupState, *, stage: bool) -> int:
        """Scale gradients, update parameters and moments in place, up to the last whole MULTIPLE; return how many.

        If `stage`, also write the staging region.
        """
        tensors = (state.parameters, state.gradients, state.exp_avg, state.exp_avg_sq)
        whole = slice(0, state.parameters.numel())
        return self._call(self._step, task, (*tensors, state.staging if stage else None), whole)

    def _call(self, function: Any, task: Task, tensors: Iterable[torch.Tensor | None], chunk: slice) -> int:
        numel: int = (chunk.stop - chunk.start) // MULTIPLE * MULTIPLE
        h = task.hyper
        update = _Update(
            *(h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, task.factor),
            *(h.bias_correction, self._adamw_mode, self.arithmetic is Arithmetic.SVE),
            *(task.anchor_step, task.step),
        )
        addresses = (None if t is None else t.data_ptr() + chunk.start * t.element_size() for t in tensors)
        function(ctypes.byref(update), ctypes.c_int64(numel), *map(ctypes.c_void_p, addresses))
        return numel
