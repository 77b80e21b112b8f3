"""The output folder: created, written to, and locked."""

import fcntl
import os
import subprocess
import time
from pathlib import Path

import pytest

from superoffload.checkpoint import folder_lock, output_folder
from superoffload.errors import UserError


@pytest.mark.unit
@pytest.mark.parametrize("folder", ["/proc/no/such/place", "/dev/null/below"])
def test_an_output_folder_that_cannot_be_written(folder: str) -> None:
    with pytest.raises(UserError, match=f"--output_dir {folder}: cannot be written"):
        output_folder.prepare(folder)


@pytest.mark.unit
def test_preparing_leaves_only_the_locked_file(tmp_path: Path) -> None:
    output_folder.prepare(str(tmp_path / "a" / "b"))
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run.log"]


@pytest.mark.unit
def test_the_folder_of_the_model_or_the_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for flag in ("model_name", "dataset_name", "eval_dataset"):
        for name in ("model", "link", "model/../model"):
            with pytest.raises(UserError, match=f"--output_dir {tmp_path}/{name}: is the folder of --{flag}"):
                output_folder.prepare(str(tmp_path / name), [(flag, str(tmp_path / "model"))])
    for part in (":0.5", "#10"):
        with pytest.raises(UserError, match="is the folder of --dataset_name"):
            output_folder.prepare(str(tmp_path / "model"), [("dataset_name", f"{tmp_path / 'model'}{part}")])
    assert list((tmp_path / "model").iterdir()) == []
    output_folder.prepare(str(tmp_path / "model" / "out"), [("model_name", str(tmp_path / "model"))])
    for name in ("model:0.5", "model#20"):  # a share or a number of its rows
        with pytest.raises(UserError, match=f"--output_dir {tmp_path}/model: is the folder of --dataset_name"):
            output_folder.prepare(str(tmp_path / "model"), [("dataset_name", str(tmp_path / name))])
    output_folder.prepare(str(tmp_path / "new"), [("model_name", "owner/name")])


def test_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="cannot be written \\(Read-only file system\\)"):
        output_folder.prepare(str(small_disk))


@pytest.mark.unit
def test_one_run_at_a_time(tmp_path: Path) -> None:
    handle = folder_lock.lock(str(tmp_path))
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}: another run is writing there"):
        folder_lock.lock(str(tmp_path))
    folder_lock.unlock(handle)
    folder_lock.unlock(folder_lock.lock(str(tmp_path)))


@pytest.mark.unit
def test_a_lock_can_be_looked_at(tmp_path: Path) -> None:
    assert not folder_lock.is_locked(tmp_path / "missing") and not folder_lock.is_locked(tmp_path)
    handle = folder_lock.lock(str(tmp_path))
    assert folder_lock.is_locked(tmp_path)
    folder_lock.unlock(handle)
    assert not folder_lock.is_locked(tmp_path)


@pytest.mark.unit
def test_what_is_locked_is_open_for_writing(tmp_path: Path) -> None:
    """NFS locks nothing else."""
    handle = folder_lock.lock(str(tmp_path))
    assert handle is not None and os.write(handle, b"") == 0
    folder_lock.unlock(handle)


@pytest.mark.unit
def test_a_look_at_the_lock_refuses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.log").touch()
    look = os.open(tmp_path / "run.log", os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.close(look))  # the look is over
    folder_lock.unlock(folder_lock.lock(str(tmp_path)))


@pytest.mark.unit
def test_a_file_system_without_locks_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert folder_lock.lock(str(tmp_path)) is None
    assert f"{tmp_path} cannot be locked (Operation not supported)" in caplog.text
    folder_lock.unlock(None)
