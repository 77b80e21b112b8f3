"""The arena: layout, separate storages, sharing between processes, memory per parameter."""

from __future__ import annotations

import io
import json
import mmap
import os

import pytest
import torch

from superoffload.offload.shared.state import KINDS, Arena, ArenaLayout, SubGroupShape

pytestmark = pytest.mark.unit


def shape(numel: int, weights: torch.dtype = torch.bfloat16) -> SubGroupShape:
    return SubGroupShape(numel=numel, master=torch.float32, moments=torch.float32, weights=weights)


def test_regions_share_no_page_of_4_or_64_kib() -> None:
    layout = ArenaLayout.plan({0: shape(5), 3: shape(100_003), 4: shape(1)})
    regions = [r for parts in layout.regions.values() for r in parts.values()]
    assert list(layout.regions[3]) == list(KINDS)
    end = 0
    for region in regions:
        assert region.offset >= end and region.offset % max(2**16, mmap.PAGESIZE) == 0
        end = region.offset + region.nbytes
    assert end <= layout.nbytes


def test_eighteen_bytes_per_parameter() -> None:
    numel = 40_000_000
    assert ArenaLayout.plan({0: shape(numel)}).nbytes == pytest.approx(18 * numel, rel=0.005)


def test_layout_survives_json() -> None:
    layout = ArenaLayout.plan({0: shape(5), 1: shape(7, torch.float16)})
    assert ArenaLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_two_mappings_of_one_file_show_the_same_memory() -> None:
    layout = ArenaLayout.plan({0: shape(1000)})
    arena, fd = Arena.create(layout)
    other = Arena(layout, fd)
    os.close(fd)
    arena.sub_groups[0].exp_avg.fill_(3.0)
    assert other.sub_groups[0].exp_avg.eq(3.0).all() and other.sub_groups[0].exp_avg_sq.eq(0.0).all()


def test_saving_a_tensor_writes_that_tensor_alone() -> None:
    arena, fd = Arena.create(ArenaLayout.plan({0: shape(1000), 1: shape(1_000_000)}))
    os.close(fd)
    buffer = io.BytesIO()
    torch.save(arena.sub_groups[0].parameters, buffer)
    assert buffer.tell() < 8000


def test_an_empty_arena_is_possible() -> None:
    arena, fd = Arena.create(ArenaLayout.plan({}))
    os.close(fd)
    assert not arena.sub_groups and not arena.transferred()


def test_released_memory_is_gone_with_the_last_tensor() -> None:
    arena, fd = Arena.create(ArenaLayout.plan({0: shape(1000)}))
    os.close(fd)
    kept = arena.sub_groups[0].parameters
    arena.release()
    kept.fill_(1.0)
    assert mappings() == 1
    del kept
    assert mappings() == 0


def mappings() -> int:
    with open("/proc/self/maps") as maps:
        return maps.read().count("memfd:superoffload")
