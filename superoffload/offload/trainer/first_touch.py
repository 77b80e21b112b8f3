"""Allocate zero-filled shared memory before it is used, in parallel and on the right NUMA node."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch

from ..shared.affinity import Cores

_PIECE_BYTES = 1 << 26


def touch(tensors: Iterable[torch.Tensor], cores: Cores) -> None:
    """Write zeros to all bytes of zero-filled tensors, from one thread on each of `cores`.

    Linux takes a page from the NUMA node of the core that first writes to it. Without this, page-locking would make one
    thread of the trainer the first to touch most pages, one after another.
    """
    pieces = [
        (tensor.data_ptr() + offset, min(_PIECE_BYTES, tensor.nbytes - offset))
        for tensor in tensors
        for offset in range(0, tensor.nbytes, _PIECE_BYTES)
    ]
    free: SimpleQueue[int] = SimpleQueue()
    for core in cores:
        free.put(core)
    with ThreadPoolExecutor(len(cores), initializer=lambda: os.sched_setaffinity(0, {free.get()})) as pool:
        for _ in pool.map(lambda piece: ctypes.memset(piece[0], 0, piece[1]), pieces):
            pass
