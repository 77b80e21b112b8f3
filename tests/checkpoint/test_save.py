"""Saving on two ranks: complete or absent, with the same outcome on every rank."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from superoffload import distributed
from superoffload.checkpoint import manifest, save
from superoffload.checkpoint.manifest import HashedFile
from superoffload.log import logger
from superoffload.model.tokenizer import load_tokenizer
from superoffload.offload.trainer.process import OptimizerProcessError
from superoffload.protocols import Engine
from superoffload.training.progress import Progress, Saved, saved_in
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import make_engine

NO_SPACE = "No space left on device"


def files_of(folder: Path, tag: str) -> list[str]:
    return sorted(path.name for path in (folder / tag).iterdir())


class Errors(logging.Handler):
    """Keeps the errors that this rank logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def take(self) -> str:
        """Return the errors since the last call, one per line."""
        text = "\n".join(self.texts)
        self.texts.clear()
        return text


def save_in_turn(
    model: str, output_dir: str, steps: list[int], sabotages: list[str] | None = None
) -> list[tuple[Saved, str]]:
    """Save at each of `steps`, then once more at step 9 under each sabotage; return outcomes and logged errors."""
    engine, tokenizer, chosen = make_engine(model, output_dir)
    errors = Errors()
    logger.addHandler(errors)
    results = []
    for step in steps:
        path = save.save(engine, tokenizer, chosen, asdict(Progress(step=step, epoch=1, tokens=70)), {})
        results.append((saved_in(path), errors.take()))
    for name in sabotages or []:
        with globals()[name](engine, Path(output_dir)):
            distributed.barrier()
            path = save.save(engine, tokenizer, chosen, asdict(Progress(step=9)), {})
            results.append((saved_in(path), errors.take()))
        distributed.barrier()
    return results


def save_without_reading(model: str, output_dir: str) -> Saved:
    """Save at step 7; reading a file back for its checksum is an error."""
    engine, tokenizer, chosen = make_engine(model, output_dir)
    with mock.patch.object(manifest, "describe", side_effect=AssertionError("a file was read again")):
        return saved_in(save.save(engine, tokenizer, chosen, asdict(Progress(step=7)), {}))


@contextmanager
def replaced(holder: Any, name: str, rank: int, action: Callable[..., Any]) -> Iterator[None]:
    """Replace a method on one rank."""
    if distributed.rank() == rank:
        setattr(holder, name, action)
    yield
    if distributed.rank() == rank:
        delattr(holder, name)


@contextmanager
def blocked(path: Path) -> Iterator[None]:
    """Put a folder where rank 0 wants to write a file."""
    if distributed.rank() == 0:
        path.unlink(missing_ok=True)
        path.mkdir()
    yield
    if distributed.rank() == 0:
        path.rmdir()


Sabotage = AbstractContextManager[None]


def disk_full_on_rank_1(engine: Engine, output_dir: Path) -> Sabotage:
    def write_the_beginning(state_dict: Any, file: HashedFile) -> None:
        file.write(b"the beginning")
        file.flush()
        raise OSError(28, NO_SPACE)

    return replaced(engine.checkpoint_engine, "save", 1, write_the_beginning)


def writer_breaks_on_rank_0(engine: Engine, output_dir: Path) -> Sabotage:
    def break_off(state_dict: Any, file: HashedFile) -> None:
        file.write(b"the beginning")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    return replaced(engine.checkpoint_engine, "save", 0, break_off)


def state_cannot_be_collected_on_rank_1(engine: Engine, output_dir: Path) -> Sabotage:
    def state_dict() -> Any:
        raise MemoryError("no memory for the state")

    return replaced(engine.optimizer, "state_dict", 1, state_dict)


def conversion_script_cannot_be_written(engine: Engine, output_dir: Path) -> Sabotage:
    return blocked(output_dir / "zero_to_fp32.py")


def latest_cannot_be_replaced(engine: Engine, output_dir: Path) -> Sabotage:
    return blocked(output_dir / "latest.partial")


def tokenizer_cannot_be_written(engine: Engine, output_dir: Path) -> Sabotage:
    return blocked(output_dir / "tokenizer.json")


@contextmanager
def manifest_cannot_be_built(engine: Engine, output_dir: Path) -> Iterator[None]:
    """Let rank 0 find a library that was not installed as a package, such as a source checkout."""
    error = PackageNotFoundError("deepspeed") if distributed.rank() == 0 else None
    with mock.patch.object(manifest, "version", side_effect=error):
        yield


@contextmanager
def tag_folder_cannot_be_made(engine: Engine, output_dir: Path) -> Iterator[None]:
    if distributed.rank() == 0:
        (output_dir / "global_step9").symlink_to("/proc/no_such_folder/below")
    yield
    if distributed.rank() == 0:
        (output_dir / "global_step9").unlink()


@contextmanager
def disk_is_full(engine: Engine, output_dir: Path) -> Iterator[None]:
    """Leave room for the small files of a checkpoint and not for its large ones."""
    filler = output_dir / "filler"
    if distributed.rank() == 0:
        filler.write_bytes(bytes(shutil.disk_usage(output_dir).free - 2**16))
    yield
    if distributed.rank() == 0:
        filler.unlink()


@contextmanager
def disk_fills_up(engine: Engine, output_dir: Path) -> Iterator[None]:
    """Let the disk be full only when the files are written: before, there seems to be enough space."""
    usage = shutil.disk_usage(output_dir)._replace(free=2**40)
    with disk_is_full(engine, output_dir), mock.patch.object(shutil, "disk_usage", return_value=usage):
        yield


# What the failing rank logs under each sabotage.
SABOTAGES = {
    "disk_full_on_rank_1": (1, NO_SPACE),
    "writer_breaks_on_rank_0": (0, "PytorchStreamWriter failed writing file"),
    "state_cannot_be_collected_on_rank_1": (1, "no memory for the state"),
    "conversion_script_cannot_be_written": (0, "zero_to_fp32.py"),
    "manifest_cannot_be_built": (0, "No package metadata was found for deepspeed"),
    "latest_cannot_be_replaced": (0, "latest.partial"),
    "tokenizer_cannot_be_written": (0, "Is a directory (os error 21)"),  # the library names no file
    "tag_folder_cannot_be_made": (0, "global_step9"),
}


def test_a_complete_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    results = run_ranks(2, save_in_turn, str(model_folder), str(tmp_path), [7])
    assert results == [[(Saved(tmp_path / "global_step7", f"Checkpoint saved in {tmp_path / 'global_step7'}"), "")]] * 2
    assert (tmp_path / "latest").read_text() == "global_step7"
    assert files_of(tmp_path, "global_step7") == [
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "manifest.json",
        "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt",
    ]  # fmt: skip
    import torch

    state = torch.load(tmp_path / "global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    assert state["progress"] == {"step": 7, "epoch": 1, "packs_in_epoch": 0, "tokens": 70}
    assert state["config"]["model_name"] == str(model_folder)
    assert state["lr_scheduler"] is not None


def test_the_newest_are_kept_and_remains_removed(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "incomplete").touch()
    (tmp_path / "global_step4").mkdir()  # not ours: it has neither a manifest nor the marker
    run_ranks(1, save_in_turn, str(model_folder), str(tmp_path), [5, 7, 7])
    assert (tmp_path / "latest").read_text() == "global_step7_2"
    left = sorted(path.name for path in tmp_path.glob("global_step*"))
    assert left == ["global_step4", "global_step7", "global_step7_2"]
    newest = [path.name for path in manifest.complete_checkpoints(tmp_path)]
    assert newest == ["global_step7_2", "global_step7"]


def test_the_manifest_describes_every_file(model_folder: Path, tmp_path: Path) -> None:
    saves = run_ranks(2, save_without_reading, str(model_folder), str(tmp_path))
    assert [saved.failed for saved in saves] == [False, False]
    described = manifest.read(tmp_path / "global_step7")
    assert described is not None
    assert described["world_size"] == 2
    assert described["progress"]["step"] == 7
    assert described["config"]["model_name"] == str(model_folder)
    assert set(described["versions"]) == {"torch", "deepspeed", "transformers"}
    files = {path.name for path in (tmp_path / "global_step7").glob("*.pt")}
    assert set(described["files"]) == files
    for name, entry in described["files"].items():
        assert manifest.describe(tmp_path / "global_step7" / name) == entry


def test_a_failed_save_ends_in_order_and_keeps_the_older(model_folder: Path, tmp_path: Path) -> None:
    ranks = run_ranks(2, save_in_turn, str(model_folder), str(tmp_path), [5], list(SABOTAGES))
    for saves in ranks:
        assert saves[0][0].path == tmp_path / "global_step5"
        for name, (saved, _) in zip(SABOTAGES, saves[1:], strict=True):
            assert saved.failed, name
            assert saved.path is None
            assert saved.sentence.startswith("NO CHECKPOINT WAS SAVED")
    for number, (name, (rank, text)) in enumerate(SABOTAGES.items(), 1):
        assert text in ranks[rank][number][1], name
    assert (tmp_path / "latest").read_text() == "global_step5"
    assert len(files_of(tmp_path, "global_step5")) == 5
    assert not (tmp_path / "global_step9").exists()


def test_a_full_disk(model_folder: Path, small_disk: Path) -> None:
    """Once noticed before the first write, once in the middle of the hashed write."""
    sabotages = ["disk_is_full", "disk_fills_up"]
    results = run_ranks(2, save_in_turn, str(model_folder), str(small_disk), [5], sabotages, timeout_s=120)
    assert [[saved.failed for saved, _ in rank] for rank in results] == [[False, True, True]] * 2
    assert "the checkpoint needs" in results[0][1][1]
    assert any(f"[Errno 28] {NO_SPACE}" in rank[2][1] for rank in results)
    assert not any("the checkpoint needs" in rank[2][1] for rank in results)
    assert (small_disk / "latest").read_text() == "global_step5"
    assert len(files_of(small_disk, "global_step5")) == 5
    assert not (small_disk / "global_step9").exists()


def save_after_a_death(model: str, output_dir: str) -> None:
    """Save when rank 1's optimizer process has died before it had finished the last step."""
    engine, tokenizer, chosen = make_engine(model, output_dir)
    error = OptimizerProcessError("the optimizer process was killed") if distributed.rank() == 1 else None
    with mock.patch.object(engine.optimizer, "flush", side_effect=error):
        save.save(engine, tokenizer, chosen, asdict(Progress(step=9)), {})


def test_a_rank_whose_optimizer_process_died_ends_before_others_wait_for_it(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="OptimizerProcessError: the optimizer process was killed"):
        run_ranks(2, save_after_a_death, str(model_folder), str(tmp_path), timeout_s=30)
    assert manifest.complete_checkpoints(tmp_path) == []


class OtherEngine:
    """A checkpoint engine that is not torch's: it takes a path, writes a file, and then may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save(self, state_dict: Any, path: str) -> None:
        assert isinstance(path, str)
        Path(path).write_bytes(b"the state")
        if self.error is not None:
            raise self.error


@pytest.mark.unit
def test_another_checkpoint_engine_gets_a_path(tmp_path: Path) -> None:
    recorder = save._RecordingEngine(OtherEngine())
    recorder.save({}, str(tmp_path / "file"))
    assert recorder.files == {"file": manifest.describe(tmp_path / "file")}
    assert recorder.errors == []


@pytest.mark.unit
@pytest.mark.parametrize("error", [OSError(28, NO_SPACE), RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_partial_file_is_removed_and_nothing_written_after_it(error: Exception, tmp_path: Path) -> None:
    recorder = save._RecordingEngine(OtherEngine(error))
    recorder.save({}, str(tmp_path / "first"))
    recorder.save({}, str(tmp_path / "second"))
    assert recorder.errors == [error]
    assert recorder.files == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.unit
def test_special_tokens_map_is_always_written(model_folder: Path, tmp_path: Path) -> None:
    save.save_tokenizer(load_tokenizer(str(model_folder)), tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} <= set(os.listdir(tmp_path))
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["eos_token"] == "<eos>"
