"""Page-lock arena regions in place, so that copies to and from the device run at full speed, asynchronously."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

_log = getLogger(__name__)


def page_lock(tensors: Iterable[torch.Tensor], device_type: str) -> list[int]:
    """Register the tensors' memory with CUDA; return the addresses for page_unlock.

    device_type: that of the accelerator in use; does nothing unless it is "cuda". A region that cannot be locked stays
    pageable, with a warning: its copies are slower, the results are the same.
    """
    if device_type != "cuda":
        return []
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    locked = []
    for tensor in tensors:
        error = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        if int(error) == 0:
            locked.append(tensor.data_ptr())
        else:
            _log.warning(
                "page-locking %.1f MiB failed (%s): copies of this region will be slower",
                tensor.nbytes / 2**20,
                _take(error, runtime),
            )
    return locked


def page_unlock(addresses: list[int], synchronize: Callable[[], None]) -> None:
    """Undo page_lock, once `synchronize()` has waited for every copy of the device that may still use the memory."""
    if not addresses:
        return
    try:
        synchronize()
    except RuntimeError as failure:  # the device copies nothing any more
        _log.warning("the device failed before its pages were unlocked: %s", failure)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for address in addresses:
        error = runtime.cudaHostUnregister(address)
        if int(error) != 0:
            _log.warning("unlocking pages failed (%s)", _take(error, runtime))


def _take(error: Any, runtime: Any) -> str:
    """Return the name and text of an error, and clear it.

    The CUDA runtime keeps the last error of a thread until cudaGetLastError is called. torch does that after it has
    launched a kernel, and would raise the old error there. torch.cuda.cudart() offers neither that function nor the
    name of an error, so both come from the library that torch has loaded.
    """
    text = f"{runtime.cudaGetErrorString(error)} ({int(error)})"
    libraries = _loaded_runtimes()
    for library in libraries:
        library.cudaGetLastError()
    with contextlib.suppress(RuntimeError):  # torch may be linked statically: a kernel raises its error and clears it
        torch.ones(1, device="cuda")
    if not libraries:
        return text
    libraries[0].cudaGetErrorName.restype = ctypes.c_char_p
    return f"{libraries[0].cudaGetErrorName(int(error)).decode()}: {text}"


def _loaded_runtimes() -> list[Any]:
    """Return every CUDA runtime library that this process has loaded, usually one."""
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = [line.split(maxsplit=5)[5] for line in mapped if "libcudart" in line]
    libraries = []
    for path in dict.fromkeys(paths):
        with contextlib.suppress(OSError):  # a file that was replaced while the process ran
            libraries.append(ctypes.CDLL(path.removesuffix(" (deleted)")))
    return libraries
