"""Page-lock arena regions in place, so that copies to and from the device run at full speed, asynchronously."""

from __future__ import annotations

from collections.abc import Iterable
from logging import getLogger
from typing import Any

import torch

_log = getLogger(__name__)


def page_lock(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Register the tensors' memory with CUDA; return the addresses for page_unlock.

    Does nothing without CUDA. A region that cannot be locked stays pageable, with a warning: its copies are
    slower, the results are the same.
    """
    if not torch.cuda.is_available():
        return []
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    locked = []
    for tensor in tensors:
        error = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        if int(error) == 0:
            locked.append(tensor.data_ptr())
        else:
            _log.warning(
                "page-locking %.1f MiB failed (%s): copies of this region will be slower; check `ulimit -l`",
                tensor.nbytes / 2**20,
                error,
            )
    return locked


def page_unlock(addresses: Iterable[int]) -> None:
    """Undo page_lock."""
    for address in addresses:
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
