"""The arena: one anonymous file that trainer and optimizer process map for the whole run.

It holds five regions of `numel` elements for every sub-group that the CPU steps:

    parameters   P  master weights                 written by the optimizer process (STEP, COMMIT)
    gradients    G  summed over ranks, scaled      written by the trainer during the boundary backward;
                                                   multiplied by the factor in STEP and COMMIT
    exp_avg      M  first Adam moment              written by the optimizer process (STEP, COMMIT)
    exp_avg_sq   V  second Adam moment             written by the optimizer process (STEP, COMMIT)
    staging      S  new weights, low precision     written by the optimizer process (SPECULATE, STEP), read by
                                                   the trainer until the upload

With fp32 masters and bf16 weights that is 4 + 4 + 4 + 4 + 2 bytes per parameter. The file is a memfd, so nothing
passes through /dev/shm. Its pages are allocated when first touched and freed when neither process maps them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

REGION_ALIGNMENT_BYTES = max(1 << 16, mmap.PAGESIZE)
SUB_GROUP_ALIGNMENT_BYTES = 1 << 21
KINDS = ("parameters", "gradients", "exp_avg", "exp_avg_sq", "staging")


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """The location of one tensor in the arena: offset in bytes, number of elements, dtype by its torch name."""

    offset: int
    numel: int
    dtype: str

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.numel * getattr(torch, self.dtype).itemsize  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubGroupShape:
    """A sub-group's number of elements and the precision of its parts."""

    numel: int
    master: torch.dtype
    moments: torch.dtype
    weights: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaLayout:
    """The location of every region, `regions[sub_group][kind]`. Pure, and equal in both processes."""

    regions: dict[int, dict[str, Region]]
    nbytes: int

    @staticmethod
    def plan(shapes: dict[int, SubGroupShape]) -> ArenaLayout:
        """Place the sub-groups one after another.

        Regions share no page, whether it has 4 KiB or the 64 KiB that some ARM hosts use, so that they can be
        page-locked one by one; sub-groups start on 2 MiB, so that huge pages are possible.
        """
        offset = 0
        regions: dict[int, dict[str, Region]] = {}
        for sub_group, shape in shapes.items():
            dtypes = (shape.master, shape.master, shape.moments, shape.moments, shape.weights)
            regions[sub_group] = {}
            for kind, dtype in zip(KINDS, dtypes, strict=True):
                region = Region(offset=offset, numel=shape.numel, dtype=str(dtype).removeprefix("torch."))
                regions[sub_group][kind] = region
                offset = _round_up(offset + region.nbytes, REGION_ALIGNMENT_BYTES)
            offset = _round_up(offset, SUB_GROUP_ALIGNMENT_BYTES)
        return ArenaLayout(regions=regions, nbytes=max(offset, SUB_GROUP_ALIGNMENT_BYTES))

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and numbers for the optimizer process."""
        table = {
            str(i): {kind: [r.offset, r.numel, r.dtype] for kind, r in parts.items()}
            for i, parts in self.regions.items()
        }
        return {"nbytes": self.nbytes, "regions": table}

    @staticmethod
    def from_json(data: dict[str, Any]) -> ArenaLayout:
        """Read what to_json() wrote."""
        regions = {
            int(i): {k: Region(offset=o, numel=n, dtype=d) for k, (o, n, d) in parts.items()}
            for i, parts in data["regions"].items()
        }
        return ArenaLayout(regions=regions, nbytes=data["nbytes"])


@dataclass(frozen=True, slots=True, kw_only=True)
class SubGroupState:
    """The five flat tensors of one sub-group, each with a storage of its own.

    The separate storage lets torch.save write that piece of the arena and not its neighbours.
    """

    parameters: torch.Tensor
    gradients: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    staging: torch.Tensor


class Arena:
    """The tensors of one mapping of the shared file; they keep the mapping alive."""

    def __init__(self, layout: ArenaLayout, fd: int) -> None:
        """Map `fd`, which must be at least `layout.nbytes` long. The caller still owns `fd`."""
        self.layout = layout
        mapping = mmap.mmap(fd, layout.nbytes)
        _advise(mapping, "MADV_HUGEPAGE")  # has an effect where shmem_enabled allows it
        _advise(mapping, "MADV_DONTDUMP")
        self.sub_groups = {
            i: SubGroupState(**{kind: _tensor(mapping, region) for kind, region in parts.items()})
            for i, parts in layout.regions.items()
        }

    @staticmethod
    def create(layout: ArenaLayout) -> tuple[Arena, int]:
        """Create a zero-filled shared file; return its mapping and its descriptor, which the caller closes.

        Raises OSError if the system has no memfd or no memory for the file's page tables.
        """
        fd = os.memfd_create("superoffload", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, layout.nbytes)
            return Arena(layout, fd), fd
        except OSError:
            os.close(fd)
            raise

    def release(self) -> None:
        """Drop the tensors; the mapping ends with the last reference to one of them."""
        self.sub_groups.clear()

    def transferred(self) -> Sequence[torch.Tensor]:
        """Return the tensors that are copied between host and device, and so are worth page-locking."""
        return [t for s in self.sub_groups.values() for t in (s.gradients, s.staging) if t.numel()]


def _tensor(mapping: mmap.mmap, region: Region) -> torch.Tensor:
    """Return a tensor with its own storage on a piece of the mapping, which it keeps alive."""
    dtype = getattr(torch, region.dtype)
    if region.numel == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=region.numel, offset=region.offset)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _advise(mapping: mmap.mmap, advice: str) -> None:
    """Give the kernel a hint; a kernel that does not support it only costs speed."""
    try:
        mapping.madvise(getattr(mmap, advice))
    except (OSError, AttributeError):
        return
