"""Run Liger's kernels in Triton's interpreter, on the CPU. A program: Triton reads its environment on import."""

import importlib
import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from superoffload.model import kernels
from tests.helpers.packs import tiny


@triton.jit  # type: ignore[untyped-decorator]
def rsqrt(x: Any) -> Any:
    """Stand in for CUDA's device library, which the interpreter does not have."""
    return tl.rsqrt(x)


def scalars_as_tensors() -> None:
    """Give kernels float arguments as tensors, as the compiler does; the interpreter passes them as they are."""
    convert = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(torch.tensor([value], dtype=torch.float32).numpy(), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = converted


def problems(kind: str) -> dict[str, str | None]:
    """Try each kernel on a small float32 model; return why it does not suit, by kind of module."""
    return {place.name: kernels._problem(place) for place in kernels._places(kernels.liger(), tiny(kind, "eager"))}


if __name__ == "__main__":
    scalars_as_tensors()
    norms: Any = importlib.import_module("liger_kernel.ops.rms_norm")
    norms.rsqrt = rsqrt
    print(json.dumps({kind: problems(kind) for kind in sys.argv[1:]}))
