"""The format of a checkpoint: hashed files, the manifest, and what makes a checkpoint complete."""

import os
import shutil
from pathlib import Path
from typing import IO, cast

import pytest

from superoffload.checkpoint import manifest
from superoffload.checkpoint.manifest import HashedFile
from superoffload.errors import UserError
from tests.helpers.runs import damage, make_checkpoint

pytestmark = pytest.mark.unit

FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_file_is_hashed_while_it_is_written(zip_format: bool, tmp_path: Path) -> None:
    import torch

    state = {
        "small": torch.arange(10),
        "large": torch.randn(300, 1000),
        "empty": torch.empty(0),
        "strided": torch.randn(20, 30).to(torch.bfloat16).T,
        "step": 7,
    }
    path = tmp_path / "state.pt"
    with HashedFile(path) as file:
        torch.save(state, cast(IO[bytes], file), _use_new_zipfile_serialization=zip_format)
    assert file.entry() == manifest.describe(path)
    assert file.entry()["bytes"] == path.stat().st_size > 4 * 300_000
    loaded = torch.load(path)
    assert loaded["step"] == 7
    for name in ("small", "large", "empty", "strided"):
        assert torch.equal(loaded[name], state[name])  # type: ignore[arg-type]


def test_every_kind_of_bytes_is_counted(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "file") as file:
        assert file.write(b"abc") == 3
        assert file.write(bytearray(b"")) == 0
        assert file.write(memoryview(b"\0" * 80).cast("d")) == 80
        file.flush()
        assert (tmp_path / "file").stat().st_size == 83
    assert file.entry() == manifest.describe(tmp_path / "file")


def test_a_hashed_file_has_no_fileno(tmp_path: Path) -> None:
    """With a `fileno`, torch would write tensors past the checksum."""
    with HashedFile(tmp_path / "file") as file:
        assert not hasattr(file, "fileno")


def test_an_exception_leaves_the_hashed_file_closed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"):
        with HashedFile(tmp_path / "file") as file:
            file.write(b"the beginning")
            raise RuntimeError("in the middle")
    with pytest.raises(ValueError, match="closed file"):
        file.write(b"more")


def test_a_failed_sync_leaves_the_hashed_file_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        with HashedFile(tmp_path / "file") as file:
            file.write(b"all of it")
    with pytest.raises(ValueError, match="closed file"):
        file.write(b"more")


def test_a_large_file_is_described_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 4)
    whole = manifest.describe(tmp_path / "file")
    monkeypatch.setattr(manifest, "READ_BYTES", 100)
    assert manifest.describe(tmp_path / "file") == whole
    assert whole["bytes"] == 1024


def test_a_new_checkpoint_is_incomplete_until_it_is_published(tmp_path: Path) -> None:
    older, folder = make_checkpoint(tmp_path, 3, 1.0), tmp_path / "global_step6"
    manifest.begin(folder)
    (folder / FILE).write_bytes(b"weights")
    assert manifest.is_incomplete(folder)
    assert manifest.read(folder) is None
    assert manifest.incomplete_checkpoints(tmp_path) == [folder]
    assert manifest.complete_checkpoints(tmp_path) == [older]
    assert manifest.read_latest(tmp_path) == "global_step3"

    described = manifest.build({"seed": 42}, {"step": 6}, 1, {FILE: manifest.describe(folder / FILE)})
    manifest.publish(tmp_path, "global_step6", described)
    assert manifest.read(folder) == described
    assert not manifest.is_incomplete(folder)
    assert manifest.incomplete_checkpoints(tmp_path) == []
    assert manifest.complete_checkpoints(tmp_path) == [folder, older]
    assert manifest.read_latest(tmp_path) == "global_step6"
    assert sorted(os.listdir(tmp_path)) == ["global_step3", "global_step6", "latest"]
    assert sorted(os.listdir(folder)) == ["manifest.json", FILE]


def test_a_removed_checkpoint_is_at_no_moment_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path, 3, 1.0)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            manifest.remove(folder)
    assert manifest.complete_checkpoints(tmp_path) == []
    assert manifest.incomplete_checkpoints(tmp_path) == [folder]
    manifest.remove(folder)
    assert not folder.exists()


WITHOUT_SIZES = '{"saved_at": 1, "world_size": 1, "config": {}, "progress": {}, "files": {"a": 5}}'


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\xff", '{"files": {}}', WITHOUT_SIZES])
def test_a_manifest_that_cannot_be_read_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    assert manifest.read(tmp_path) is None
    assert manifest.read(tmp_path / "missing") is None


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest.replace_text(tmp_path / "latest", "global_step3")

    def sync(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "sync", sync)
        with pytest.raises(OSError, match="No space left"):
            manifest.replace_text(tmp_path / "latest", "global_step6")
    assert os.listdir(tmp_path) == ["latest"]  # and nothing is left of what did not fit
    assert (tmp_path / "latest").read_text() == "global_step3"
    manifest.replace_text(tmp_path / "latest", "global_step6")
    assert (tmp_path / "latest").read_text() == "global_step6"
    assert os.listdir(tmp_path) == ["latest"]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("short", f"{FILE} has 500 bytes instead of 1000"),
        ("flipped", f"{FILE} does not match its checksum"),
        ("gone", f"{FILE}: No such file or directory"),
    ],
)
def test_damage_is_described(how: str, text: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 3, 1.0)
    described = manifest.read(folder)
    assert described is not None
    assert manifest.damage(folder, described, described["files"]) == ""
    manifest.require_intact(folder)
    damage(folder, how)
    assert manifest.damage(folder, described, described["files"]) == text
    assert manifest.damage(folder, described, []) == ""
    with pytest.raises(UserError, match=f"{folder}: damaged: {text}; use another checkpoint"):
        manifest.require_intact(folder)
    (folder / "manifest.json").unlink()
    manifest.require_intact(folder)  # nothing to verify it against


def test_the_names_of_a_step_differ() -> None:
    names = manifest.tags(5)
    assert names[:3] == ["global_step5", "global_step5_2", "global_step5_3"]
    assert len(set(names)) == len(names)
