"""Speculate in one pass over memory, by a kernel of our own; the compiled op stays the measure of what is right.

DeepSpeed's op works in place: to speculate with it, parameters and moments are copied first and the new weights
converted after. The kernel (fused.cpp) reads each once. Its results must be the op's, bit for bit; the optimizer
process makes sure of that on a sample when it starts, and does without it where they are not.
"""

from __future__ import annotations

import ctypes
from logging import getLogger
from pathlib import Path

import torch

from .messages import Task
from .state import SubGroupState

_log = getLogger(__name__)

NAME = "superoffload_fused"
MULTIPLE = 16
"""Elements; the op computes what is left over by a loop whose roundings its compiler chose."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]


class _Update(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "factor")),
        *((name, ctypes.c_int32) for name in ("bias_correction", "adamw_mode")),
        *((name, ctypes.c_int64) for name in ("anchor_step", "step")),
    )


def build() -> str | None:
    """Compile the kernel where that has not been done, and return its path; None, with a warning, if it fails."""
    from torch.utils.cpp_extension import load

    try:
        path = load(NAME, [str(_SOURCE)], extra_cflags=_FLAGS, extra_ldflags=["-fopenmp"], is_python_module=False)
    except (RuntimeError, OSError, ImportError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        _log.warning("The fused kernel cannot be compiled (%s); speculations take a little longer", why)
        return None
    return str(path)


class FusedSpeculation:
    """The compiled kernel, for fp32 masters and moments and bf16 weights."""

    def __init__(self, path: str, *, adamw_mode: bool) -> None:
        """Load it; raises OSError."""
        self._speculate = ctypes.CDLL(path).speculate
        self._speculate.restype = None
        self._adamw_mode = adamw_mode

    @staticmethod
    def serves(state: SubGroupState) -> bool:
        """Tell whether a sub-group is kept in the precisions that the kernel knows."""
        fp32 = (state.parameters, state.gradients, state.exp_avg, state.exp_avg_sq)
        return all(t.dtype is torch.float32 for t in fp32) and state.staging.dtype is torch.bfloat16

    def speculate(self, task: Task, state: SubGroupState, chunk: slice) -> int:
        """Write the staging region of a chunk but for a rest shorter than MULTIPLE; return how many elements."""
        numel: int = (chunk.stop - chunk.start) // MULTIPLE * MULTIPLE
        h = task.hyper
        update = _Update(
            *(h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, task.factor),
            *(h.bias_correction, self._adamw_mode),
            *(task.anchor_step, task.step),
        )
        tensors = (state.parameters, state.gradients, state.exp_avg, state.exp_avg_sq, state.staging)
        addresses = (ctypes.c_void_p(t.data_ptr() + chunk.start * t.element_size()) for t in tensors)
        self._speculate(ctypes.byref(update), ctypes.c_int64(numel), *addresses)
        return numel
