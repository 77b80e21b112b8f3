"""Load a checkpoint's files without running code from them.

A pickle may name any function of any module and call it. Here it may name tensors, plain values and the few types that
DeepSpeed's checkpoints hold, and nothing else.
"""

import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from superoffload.errors import UserError, first_line
from superoffload.protocols import Engine

TRUST = "--trust_checkpoint"
# What torch raises for files that are damaged or not its own, besides UnpicklingError.
DAMAGE = (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What may run code: a checkpoint's files when they are loaded, and code that the model brings along."""

    files: bool = False
    code: bool = False


NO_TRUST = Trust()


def load(path: Path, *, trusted: bool = False) -> Any:
    """Load one file on the host, its tensors mapped from the file, so that they take no memory until they are read.

    trusted: allow every type, as `pickle` does. Raises `UserError` for a damaged file or a type that is not allowed.
    """
    try:
        with torch.serialization.safe_globals(_allowed_types()):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=not trusted)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, error)) from error
    except DAMAGE as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); use another checkpoint") from error


def check(folder: Path, paths: Iterable[Path], *, trusted: bool) -> None:
    """Raise `UserError` for a path that leads out of the folder, or a file `*.pt` that `load` refuses.

    Reads no tensors. For files that DeepSpeed's own code will unpickle without limits.
    """
    if trusted:
        return
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: a link that leads out of the checkpoint; {TRUST} follows it")
        if path.suffix == ".pt" and not path.is_dir():
            load(path)


def stored(folder: Path) -> list[Path]:
    """List everything below a folder; links are not followed, but listed."""
    return [
        Path(parent) / name for parent, folders, files in os.walk(folder) for name in (*sorted(folders), *sorted(files))
    ]


@contextmanager
def loading(engine: Engine, *, trusted: bool) -> Iterator[None]:
    """Let DeepSpeed's engine load files through `load` inside the block."""
    inner = engine.checkpoint_engine
    engine.checkpoint_engine = _Loader(inner, trusted)
    try:
        yield
    finally:
        engine.checkpoint_engine = inner


class _Loader:
    """Wraps DeepSpeed's checkpoint engine: the same, but for how it loads a file."""

    def __init__(self, inner: Any, trusted: bool) -> None:
        self._inner = inner
        self._trusted = trusted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load one file; DeepSpeed asks for the host."""
        return load(Path(path), trusted=self._trusted)


def _member(kind: Any, name: str) -> Any:
    """Stand in for `getattr`, by which Python 3.11.0 to 3.11.3 pickles a member of an enumeration."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if kind is not ZeroStageEnum:
        raise pickle.UnpicklingError(f"getattr of {kind!r}, which no checkpoint of this program does")
    return ZeroStageEnum[name]


def _allowed_types() -> list[Any]:
    """List what DeepSpeed's files name besides tensors: its loss scaler, its ZeRO stage, and NumPy's RNG state."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    rebuild = np.zeros(0).__reduce__()[0]
    return [
        DynamicLossScaler, LossScaler, ZeroStageEnum, (_member, "builtins.getattr"),
        np.ndarray, np.dtype, type(np.dtype(np.uint32)),
        (rebuild, "numpy._core.multiarray._reconstruct"), (rebuild, "numpy.core.multiarray._reconstruct"),
    ]  # fmt: skip


def _refusal(path: Path, error: Exception) -> str:
    with torch.serialization.safe_globals(_allowed_types()):
        try:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except DAMAGE:  # `error` is then the reason for the refusal
            names = []
    if not names:
        return f"{path}: cannot be read ({first_line(error)}); use another checkpoint"
    return (
        f"{path}: holds {', '.join(names)}, which no checkpoint of this program does, and which could run code when it "
        f"is loaded; if you trust where it comes from, add {TRUST}"
    )
