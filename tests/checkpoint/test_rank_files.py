"""Find a checkpoint, check its files, and assemble a tensor from the partitions of several ranks."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload.checkpoint import manifest, rank_files
from superoffload.errors import UserError

pytestmark = pytest.mark.unit

STATES = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def write_states(folder: Path) -> Path:
    """Write one file of a checkpoint."""
    folder.mkdir(parents=True)
    torch.save({"dp_world_size": 1, "weights": torch.arange(1000.0)}, folder / STATES)
    return folder / STATES


def test_an_output_folder_leads_to_its_latest_checkpoint(tmp_path: Path) -> None:
    write_states(tmp_path / "global_step3")
    write_states(tmp_path / "global_step6")
    (tmp_path / "latest").write_text("global_step3")
    assert rank_files.locate(tmp_path) == (tmp_path / "global_step3", tmp_path)
    assert rank_files.locate(tmp_path / "global_step6") == (tmp_path / "global_step6", tmp_path)


@pytest.mark.parametrize("tag", ["global_step9", ""])
def test_latest_that_names_no_checkpoint_is_an_error(tag: str, tmp_path: Path) -> None:
    write_states(tmp_path / "global_step3")
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(UserError, match=f"latest: names '{tag}', which does not exist; use the folder of a checkpoint"):
        rank_files.locate(tmp_path)


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=f"{folder}: has no checkpoint; use a run's output folder, or global_stepN"):
            rank_files.read(folder)


def test_an_interrupted_save_is_an_error(tmp_path: Path) -> None:
    folder = write_states(tmp_path / "global_step3").parent
    (folder / "incomplete").touch()
    with pytest.raises(UserError, match=f"{folder}: incomplete: saving it was interrupted; use another checkpoint"):
        rank_files.read(folder)


def test_an_intact_file_is_readable(tmp_path: Path) -> None:
    rank_files.check_readable(write_states(tmp_path / "global_step3"))


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    path = write_states(tmp_path / "global_step3")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"{STATES}: damaged or truncated \(.*\); use another checkpoint"):
        rank_files.check_readable(path)


def test_a_damaged_description_is_an_error(tmp_path: Path) -> None:
    path = write_states(tmp_path / "global_step3")
    content = bytearray(path.read_bytes())
    content[content.index(b"dp_world_size")] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{STATES}: damaged or truncated \(.*\); use another checkpoint"):
        rank_files.check_readable(path)


def test_a_converted_checkpoint_is_an_error(tmp_path: Path) -> None:
    folder = write_states(tmp_path / "new").parent
    manifest.write(
        folder, {"universal": True, "saved_at": 1, "world_size": 1, "files": {}, "config": {}, "progress": {}}
    )
    with pytest.raises(UserError, match=f"{folder}: was converted for any number of ranks; use the checkpoint that"):
        rank_files.read(folder)


@pytest.mark.parametrize("content", [[], {}, {"dp_world_size": "two"}, {"dp_world_size": 1}])
def test_a_file_of_another_form_is_an_error(content: Any, tmp_path: Path) -> None:
    folder = write_states(tmp_path / "global_step3").parent
    for path in (folder / STATES, folder / STATES.replace("model", "optim")):
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"{folder}: not a readable ZeRO-3 checkpoint \(.+\); use another checkpoint"):
        rank_files.read(folder)


@dataclass
class Lazy:
    """A partitioned tensor as DeepSpeed's `zero_to_fp32` describes it: where it starts in the groups of each rank."""

    flat_groups: list[list[torch.Tensor]]
    offset: int
    partitioned_numel: int
    shape: torch.Size


def partitioned(whole: torch.Tensor, ranks: int, offset: int, group_sizes: list[int], folder: Path) -> Lazy:
    """Write a tensor's partitions into the mapped groups of each rank, at `offset`, padded to equal sizes."""
    numel = -(-whole.numel() // ranks)
    padded = torch.cat([whole.flatten(), torch.full((numel * ranks - whole.numel(),), -1.0)])
    flat_groups = []
    for rank in range(ranks):
        flat = torch.full((sum(group_sizes),), -2.0)
        flat[offset : offset + numel] = padded[rank * numel : (rank + 1) * numel]
        torch.save(list(torch.split(flat, group_sizes)), folder / f"rank_{rank}.pt")
        flat_groups.append(torch.load(folder / f"rank_{rank}.pt", mmap=True))
    return Lazy(flat_groups, offset, numel, whole.shape)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("offset", "group_sizes"), [(0, [60]), (10, [15, 5, 80]), (40, [40, 60])])
@pytest.mark.parametrize("piece", [4, 2**20])
def test_a_tensor_is_assembled_from_all_ranks(
    ranks: int, offset: int, group_sizes: list[int], piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_files, "PIECE", piece)
    whole = torch.randn(5, 11)
    lazy = partitioned(whole, ranks, offset, group_sizes, tmp_path)
    assert torch.equal(rank_files.gather(lazy, torch.float32), whole)
    assert torch.equal(rank_files.gather(lazy, torch.bfloat16), whole.to(torch.bfloat16))


def test_a_buffer_is_already_a_tensor() -> None:
    buffer = torch.arange(5.0)
    assert torch.equal(rank_files.gather(buffer, torch.float16), buffer.to(torch.float16))
