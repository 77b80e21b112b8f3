import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from superoffload import checkpoint, config, distributed, ds_config, engine, model
from superoffload.errors import UserError
from superoffload.metrics import Progress, Saved
from superoffload.tokenizer import load_tokenizer
from tests.ranks import run_ranks


def shares(folder: Path, tag: str) -> list[str]:
    return sorted(path.name for path in (folder / tag).iterdir())


def make_engine(folder: str, output_dir: str) -> tuple[Any, Any, config.Config]:
    values = {"model_name": folder, "output_dir": output_dir}
    merged = ds_config.merge(ds_config.read(config.build(values)), config.build(values), distributed.world_size())
    sharded = model.load_model(merged.config.model, model.load_config(folder), merged.document, None)
    return engine.create(sharded, merged.document, merged.config.training, 10), load_tokenizer(folder), merged.config


def save_in_turn(folder: str, output_dir: str, steps: list[int], sabotages: list[str] | None = None) -> list[Saved]:
    """Save at each of `steps`, then once more at step 9 for each sabotage, done on some rank and undone after."""
    wrapped, tokenizer, chosen = make_engine(folder, output_dir)
    results = [
        checkpoint.save(wrapped, tokenizer, chosen, Progress(step=step, epoch=1, tokens=70), {}) for step in steps
    ]
    for name in sabotages or []:
        with globals()[name](wrapped, Path(output_dir)):
            distributed.barrier()
            results.append(checkpoint.save(wrapped, tokenizer, chosen, Progress(step=9), {}))
        distributed.barrier()
    return results


@contextmanager
def replaced(holder: Any, name: str, rank: int, action: Callable[..., Any]) -> Iterator[None]:
    """Put another function in a method's place on one rank."""
    if distributed.rank() == rank:
        setattr(holder, name, action)
    yield
    if distributed.rank() == rank:
        delattr(holder, name)


@contextmanager
def blocked(path: Path) -> Iterator[None]:
    """Let rank 0 find a folder where it wants to write a file."""
    if distributed.rank() == 0:
        path.unlink(missing_ok=True)
        path.mkdir()
    yield
    if distributed.rank() == 0:
        path.rmdir()


def disk_full_on_rank_1(wrapped: Any, output_dir: Path) -> Any:
    def save(state_dict: Any, path: str) -> None:
        Path(path).write_bytes(b"the beginning")
        raise OSError(28, "No space left on device", path)

    return replaced(wrapped.checkpoint_engine, "save", 1, save)


def writer_breaks_on_rank_0(wrapped: Any, output_dir: Path) -> Any:
    def save(state_dict: Any, path: str) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    return replaced(wrapped.checkpoint_engine, "save", 0, save)


def state_cannot_be_collected_on_rank_1(wrapped: Any, output_dir: Path) -> Any:
    def state_dict() -> Any:
        raise MemoryError("no memory for the state")

    return replaced(wrapped.optimizer, "state_dict", 1, state_dict)


def conversion_script_cannot_be_written(wrapped: Any, output_dir: Path) -> Any:
    return blocked(output_dir / "zero_to_fp32.py")


def latest_cannot_be_replaced(wrapped: Any, output_dir: Path) -> Any:
    return blocked(output_dir / "latest.partial")


def tokenizer_cannot_be_written(wrapped: Any, output_dir: Path) -> Any:
    return blocked(output_dir / "tokenizer.json")


@contextmanager
def tag_folder_cannot_be_made(wrapped: Any, output_dir: Path) -> Iterator[None]:
    if distributed.rank() == 0:
        (output_dir / "global_step9").symlink_to("/proc/no_such_folder/below")
    yield
    if distributed.rank() == 0:
        (output_dir / "global_step9").unlink()


@contextmanager
def disk_is_full(wrapped: Any, output_dir: Path) -> Iterator[None]:
    """Leave room for the small files of a checkpoint and not for its large ones."""
    filler = output_dir / "filler"
    if distributed.rank() == 0:
        filler.write_bytes(bytes(shutil.disk_usage(output_dir).free - 2**16))
    yield
    if distributed.rank() == 0:
        filler.unlink()


SABOTAGES = [
    "disk_full_on_rank_1",
    "writer_breaks_on_rank_0",
    "state_cannot_be_collected_on_rank_1",
    "conversion_script_cannot_be_written",
    "latest_cannot_be_replaced",
    "tokenizer_cannot_be_written",
    "tag_folder_cannot_be_made",
]


def test_a_complete_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    results = run_ranks(2, save_in_turn, str(model_folder), str(tmp_path), [7])
    assert [saved[0].path for saved in results] == [tmp_path / "global_step7"] * 2
    assert not results[0][0].failed
    assert (tmp_path / "latest").read_text() == "global_step7"
    assert shares(tmp_path, "global_step7") == [
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "manifest.json",
        "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt",
    ]  # fmt: skip
    import torch

    state = torch.load(tmp_path / "global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    assert state["progress"] == {"step": 7, "epoch": 1, "step_in_epoch": 0, "tokens": 70}
    assert state["config"]["model_name"] == str(model_folder)
    assert state["lr_scheduler"] is not None


def test_the_newest_are_kept_and_pieces_cleared(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "incomplete").touch()
    (tmp_path / "global_step4").mkdir()  # somebody else's: neither a manifest nor our mark
    run_ranks(1, save_in_turn, str(model_folder), str(tmp_path), [5, 7, 7])
    assert (tmp_path / "latest").read_text() == "global_step7_2"
    left = sorted(path.name for path in tmp_path.glob("global_step*"))
    assert left == ["global_step4", "global_step7", "global_step7_2"]
    newest = [path.name for path in checkpoint.complete_checkpoints(tmp_path)]
    assert newest == ["global_step7_2", "global_step7"]


def test_the_manifest_describes_every_file(model_folder: Path, tmp_path: Path) -> None:
    run_ranks(2, save_in_turn, str(model_folder), str(tmp_path), [7])
    manifest = checkpoint.read_manifest(tmp_path / "global_step7")
    assert manifest is not None
    assert manifest["world_size"] == 2
    assert manifest["progress"]["step"] == 7
    assert manifest["config"]["model_name"] == str(model_folder)
    assert set(manifest["versions"]) == {"torch", "deepspeed", "transformers"}
    files = {path.name for path in (tmp_path / "global_step7").glob("*.pt")}
    assert set(manifest["files"]) == files
    for name, entry in manifest["files"].items():
        assert checkpoint.describe(tmp_path / "global_step7" / name) == entry


def test_a_failed_save_ends_in_order_and_keeps_the_older(model_folder: Path, tmp_path: Path) -> None:
    for saves in run_ranks(2, save_in_turn, str(model_folder), str(tmp_path), [5], SABOTAGES):
        assert saves[0].path == tmp_path / "global_step5"
        for name, saved in zip(SABOTAGES, saves[1:], strict=True):
            assert saved.failed, name
            assert saved.path is None
            assert saved.sentence.startswith("NO CHECKPOINT WAS SAVED")
    assert (tmp_path / "latest").read_text() == "global_step5"
    assert len(shares(tmp_path, "global_step5")) == 5
    assert not (tmp_path / "global_step9").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(model_folder: Path, small_disk: Path) -> None:
    results = run_ranks(2, save_in_turn, str(model_folder), str(small_disk), [5], ["disk_is_full"], timeout_s=120)
    assert [[saved.failed for saved in rank] for rank in results] == [[False, True], [False, True]]
    assert (small_disk / "latest").read_text() == "global_step5"
    assert len(shares(small_disk, "global_step5")) == 5
    assert not (small_disk / "global_step9").exists()


def test_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="cannot be written \\(Read-only file system\\)"):
        checkpoint.prepare_folder(str(small_disk))


def test_special_tokens_map_is_always_there(model_folder: Path, tmp_path: Path) -> None:
    checkpoint.save_tokenizer(load_tokenizer(str(model_folder)), tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} <= set(os.listdir(tmp_path))
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["eos_token"] == "<eos>"


@pytest.mark.parametrize("folder", ["/proc/no/such/place", "/dev/null/below"])
def test_an_output_folder_that_cannot_be_written(folder: str) -> None:
    with pytest.raises(UserError, match=f"--output_dir {folder}: cannot be written"):
        checkpoint.prepare_folder(folder)


def test_preparing_leaves_no_trace(tmp_path: Path) -> None:
    checkpoint.prepare_folder(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
    shutil.rmtree(tmp_path / "a")
