"""Memory is allocated from the given cores."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest
import torch

from superoffload.offload.shared.state import KINDS, Arena, ArenaLayout, SubGroupShape
from superoffload.offload.trainer import first_touch
from tests.helpers.offload_memory import shared_bytes

pytestmark = pytest.mark.unit

SHAPE = SubGroupShape(numel=1 << 20, master=torch.float32, moments=torch.float32, weights=torch.bfloat16)


def test_every_page_is_allocated() -> None:
    before = shared_bytes(os.getpid())
    arena, fd = Arena.create(ArenaLayout.plan({0: SHAPE}))
    os.close(fd)
    assert shared_bytes(os.getpid()) - before < 18 << 20
    first_touch.touch([getattr(arena.sub_groups[0], kind) for kind in KINDS], tuple(os.sched_getaffinity(0)))
    assert shared_bytes(os.getpid()) - before >= 18 << 20


def test_the_cores_share_the_pages_and_the_caller_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_touch, "_PIECE_BYTES", 1000)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    together, met = threading.Barrier(len(cores)), threading.local()
    touched: list[tuple[int, set[int]]] = []
    memset = ctypes.memset

    def watched(address: int, value: int, nbytes: int) -> int:
        if not hasattr(met, "others"):
            met.others = together.wait(10)
        touched.append((nbytes, os.sched_getaffinity(0)))
        return memset(address, value, nbytes)

    monkeypatch.setattr(ctypes, "memset", watched)
    tensor = torch.ones(len(cores) * 250 + 1)
    first_touch.touch([tensor], cores)
    assert sum(nbytes for nbytes, _ in touched) == tensor.nbytes and not tensor.any()
    assert {core for _, mask in touched for core in mask} == set(cores)
    assert all(len(mask) == 1 for _, mask in touched) and os.sched_getaffinity(0) == set(cores)
