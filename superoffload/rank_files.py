"""Reads a ZeRO-3 checkpoint from the files of its ranks, one tensor in memory at a time."""

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
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from superoffload.errors import UserError

LATEST, INCOMPLETE = "latest", "incomplete"  # as `checkpoint` writes them
MODEL_STATES = "*zero_pp_rank_{rank}_mp_rank_*_model_states.pt"
OPTIM_STATES = "*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt"
PIECE = 4 * 2**20  # elements
MADV_PAGEOUT = 21  # Linux 5.4 and later; drops pages and never their content


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFiles:
    """A checkpoint whose files are all there: its folder, the run's output folder, and what it holds.

    `tensors` maps the names in the model to lazy float32 weights for `gather`, mapped from the files, and to
    buffers in the dtype in which they were saved; a tied name is there beside the one it is tied to. `config`
    (flat settings) and `progress` are those of the run, empty where it left none.
    """

    folder: Path
    output_dir: Path
    tensors: dict[str, Any]
    config: dict[str, Any]
    progress: dict[str, Any]


def locate(source: Path) -> tuple[Path, Path]:
    """Find the checkpoint's folder and the run's output folder, given either of them.

    Raises `UserError` where there is no checkpoint.
    """
    latest = source / LATEST
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
        if not tag or not (source / tag).is_dir():
            raise UserError(f"{latest}: names {tag!r}, which is not there; give the folder of a checkpoint instead")
        return source / tag, source
    if source.is_dir() and any(source.glob("*_model_states.pt")):
        return source, source.resolve().parent
    raise UserError(f"{source}: holds no checkpoint; give a run's output folder, or global_stepN in it")


def read(source: Path) -> RankFiles:
    """Open the checkpoint at `source`, an output folder or a checkpoint's own.

    The files are unpickled, as DeepSpeed's are, so they must come from somebody you trust. Raises `UserError`
    where there is no checkpoint, or a file of it is missing or damaged.
    """
    folder, output_dir = locate(source)
    if (folder / INCOMPLETE).exists():
        raise UserError(f"{folder}: saving it was cut off; use another checkpoint")
    known = sorted(folder.glob("*_model_states.pt"))
    if not known:
        raise UserError(f"{folder}: holds no checkpoint (no file *_model_states.pt)")
    for path in [*known, *sorted(folder.glob("*_optim_states.pt"))]:
        check_readable(path)
    ranks = int(_load(known[0])["dp_world_size"])
    states = [_file_of(folder, MODEL_STATES, rank, ranks) for rank in range(ranks)]
    for rank in range(ranks):
        _file_of(folder, OPTIM_STATES, rank, ranks)
    state = _load(states[0])
    buffers = {name: state["module"][name] for name in state["buffer_names"]}
    return RankFiles(
        folder=folder,
        output_dir=output_dir,
        tensors={**_lazy_weights(folder), **buffers},
        config=dict(state.get("config") or {}),
        progress=dict(state.get("progress") or {}),
    )


def _file_of(folder: Path, pattern: str, rank: int, ranks: int) -> Path:
    found = sorted(folder.glob(pattern.format(rank=rank)))
    if len(found) != 1:
        name = pattern.format(rank=rank)
        what = "is missing" if not found else "is there more than once"
        raise UserError(f"{folder}/{name}: {what} (the checkpoint is of {ranks} ranks); use another checkpoint")
    return found[0]


def check_readable(path: Path) -> None:
    """Raise `UserError` for a file that is cut short, or whose description of its tensors was altered.

    The tensors themselves are not read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (description,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            archive.read(description)  # compares the checksum
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); use another checkpoint") from error


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=False))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); use another checkpoint") from error


def _lazy_weights(folder: Path) -> dict[str, Any]:
    """Map all ranks' float32 weights; DeepSpeed's helper does it and prints as it goes."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, lazy_mode=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{folder}: not a ZeRO-3 checkpoint that can be read ({_first_line(error)}); use another checkpoint"
        ) from error
    return dict(weights)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@torch.no_grad()
def gather(lazy: Any, dtype: torch.dtype) -> torch.Tensor:
    """Put one tensor together from the shares of all ranks, in `dtype`.

    Needs memory for the tensor itself and one piece: what was read from the files is let go of piece by piece,
    where DeepSpeed's own `contiguous()` holds the whole in float32.
    """
    if isinstance(lazy, torch.Tensor):
        return lazy.to(dtype)
    whole = torch.empty(lazy.shape.numel(), dtype=dtype)
    done = 0
    for piece in _pieces(lazy):
        piece = piece[: whole.numel() - done]  # the shares are padded to one size
        whole[done : done + piece.numel()] = piece
        done += piece.numel()
        _drop_pages(piece)
    return whole.view(lazy.shape)


def _pieces(lazy: Any) -> Iterator[torch.Tensor]:
    """List the pieces of the mapped files that make up a tensor, in order."""
    for flat_groups in lazy.flat_groups:
        start = 0
        for group in flat_groups:
            low, high = max(lazy.offset, start), min(lazy.offset + lazy.partitioned_numel, start + group.numel())
            if low < high:
                yield from group[low - start : high - start].split(PIECE)
                _drop_pages(group)  # once more, for what the system had read ahead and would not part with
            start += group.numel()


def _drop_pages(mapped: torch.Tensor) -> None:
    """Let go of the memory behind a piece of a mapped file; where the system cannot, nothing happens."""
    page = os.sysconf("SC_PAGE_SIZE")
    start = mapped.data_ptr() // page * page
    length = mapped.data_ptr() + mapped.nbytes - start
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)
