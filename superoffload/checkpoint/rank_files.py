"""Read a ZeRO-3 checkpoint from the files of its ranks, with one tensor in memory at a time."""

import contextlib
import ctypes
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from superoffload.checkpoint import manifest, trust
from superoffload.errors import UserError, first_line

MODEL_STATES = "*zero_pp_rank_{rank}_mp_rank_*_model_states.pt"
OPTIM_STATES = "*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt"
PIECE = 4 * 2**20  # elements
MADV_PAGEOUT = 21  # Linux 5.4 and later; evicts pages from memory, never changes their content


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFiles:
    """A checkpoint with all its files: its folder, the run's output folder, and the content.

    `tensors` maps names in the model to lazy fp32 weights for `gather`, memory-mapped from the files, and to buffers in
    the dtype in which they were saved; tied weights appear under each of their names. `config` (flat settings),
    `progress` and `data` (`Batches.extent`) are those of the run, empty if the checkpoint has none.
    """

    folder: Path
    output_dir: Path
    tensors: dict[str, Any]
    config: dict[str, Any]
    progress: dict[str, Any]
    data: dict[str, Any]


def locate(source: Path) -> tuple[Path, Path]:
    """Find the checkpoint's folder and the run's output folder, given either of them.

    Raises `UserError` if there is no checkpoint.
    """
    tag = manifest.read_latest(source)
    if tag is not None:
        if not tag or not (source / tag).is_dir():
            raise UserError(
                f"{source / manifest.LATEST}: names {tag!r}, which does not exist; use the folder of a checkpoint"
            )
        return source / tag, source
    if source.is_dir() and any(source.glob("*_model_states.pt")):
        return source, source.resolve().parent
    raise UserError(f"{source}: has no checkpoint; use a run's output folder, or global_stepN in it")


def read(source: Path, *, trusted: bool = False) -> RankFiles:
    """Open the checkpoint at `source`, an output folder or a checkpoint's own.

    trusted: load files that name types no checkpoint of this program has, and follow links out of the folder. Raises
    `UserError` if there is no checkpoint, or if one of its files is missing, damaged or not to be trusted.
    """
    folder, output_dir = locate(source)
    if manifest.is_incomplete(folder):
        raise UserError(f"{folder}: incomplete: saving it was interrupted; use another checkpoint")
    if (manifest.read(folder) or {}).get("universal"):
        raise UserError(
            f"{folder}: was converted for any number of ranks; use the checkpoint that it was made from, or resume it "
            "with --save_checkpoint first"
        )
    known = sorted(folder.glob("*_model_states.pt"))
    if not known:
        raise UserError(f"{folder}: has no checkpoint (no file *_model_states.pt)")
    files = [*known, *sorted(folder.glob("*_optim_states.pt"))]
    for path in files:
        check_readable(path)
    trust.check(folder, files, trusted=trusted)
    try:
        ranks = int(trust.load(known[0], trusted=trusted)["dp_world_size"])
    except (LookupError, TypeError, ValueError) as error:
        raise _unreadable(folder, error) from error
    states = [_file_of(folder, MODEL_STATES, rank, ranks) for rank in range(ranks)]
    for rank in range(ranks):
        _file_of(folder, OPTIM_STATES, rank, ranks)
    state = trust.load(states[0], trusted=trusted)
    try:
        buffers = {name: state["module"][name] for name in state["buffer_names"]}
        described = {key: dict(state.get(key) or {}) for key in ("config", "progress", "data")}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(folder, error) from error
    return RankFiles(folder=folder, output_dir=output_dir, tensors={**_lazy_weights(folder), **buffers}, **described)


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder}: not a readable ZeRO-3 checkpoint ({first_line(error)}); use another checkpoint")


def _file_of(folder: Path, pattern: str, rank: int, ranks: int) -> Path:
    found = sorted(folder.glob(pattern.format(rank=rank)))
    if len(found) != 1:
        name = pattern.format(rank=rank)
        what = "is missing" if not found else "exists more than once"
        raise UserError(f"{folder}/{name}: {what} (the checkpoint has {ranks} ranks); use another checkpoint")
    return found[0]


def check_readable(path: Path) -> None:
    """Raise `UserError` for a file that is truncated, or whose description of its tensors is damaged.

    Does not read the tensors themselves.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (description,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            archive.read(description)  # verifies the checksum
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); use another checkpoint") from error


def _lazy_weights(folder: Path) -> dict[str, Any]:
    """Map all ranks' fp32 weights with DeepSpeed's helper, which prints as it works."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, lazy_mode=True)
    except (
        OSError, RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError, AssertionError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise _unreadable(folder, error) from error
    return dict(weights)


@torch.no_grad()
def gather(lazy: Any, dtype: torch.dtype) -> torch.Tensor:
    """Assemble one tensor from the partitions of all ranks, in `dtype`.

    Needs memory for the tensor itself and one piece: pages that were read are evicted piece by piece. DeepSpeed's own
    `contiguous()` needs memory for the whole tensor in fp32 too.
    """
    if isinstance(lazy, torch.Tensor):
        return lazy.to(dtype)
    whole = torch.empty(lazy.shape.numel(), dtype=dtype)
    done = 0
    for piece in _pieces(lazy):
        piece = piece[: whole.numel() - done]  # the partitions are padded to equal sizes
        whole[done : done + piece.numel()] = piece
        done += piece.numel()
        _drop_pages(piece)
    return whole.view(lazy.shape)


def _pieces(lazy: Any) -> Iterator[torch.Tensor]:
    """Yield the pieces of the mapped files that make up a tensor, in order."""
    for flat_groups in lazy.flat_groups:
        start = 0
        for group in flat_groups:
            low, high = max(lazy.offset, start), min(lazy.offset + lazy.partitioned_numel, start + group.numel())
            if low < high:
                yield from group[low - start : high - start].split(PIECE)
                _drop_pages(group)  # again, for pages that the system had read ahead
            start += group.numel()


def _drop_pages(mapped: torch.Tensor) -> None:
    """Evict a piece of a mapped file from memory; does nothing on systems without madvise."""
    page = os.sysconf("SC_PAGE_SIZE")
    start = mapped.data_ptr() // page * page
    length = mapped.data_ptr() + mapped.nbytes - start
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)
