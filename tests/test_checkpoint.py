import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from superoffload import checkpoint, config, distributed, ds_config, engine, model
from superoffload.errors import UserError
from superoffload.metrics import Progress, Saved
from tests.ranks import run_ranks


def shares(folder: Path, tag: str) -> list[str]:
    return sorted(path.name for path in (folder / tag).iterdir())


def make_engine(folder: str, output_dir: str) -> tuple[Any, Any, config.Config]:
    values = {"model_name": folder, "output_dir": output_dir}
    merged = ds_config.merge(ds_config.read(config.build(values)), config.build(values), distributed.world_size())
    document = ds_config.as_zero_offload(merged.document)
    sharded = model.load_model(merged.config.model, model.load_config(folder), document, None)
    return engine.create(sharded, document, merged.config.training, 10), model.load_tokenizer(folder), merged.config


def save_in_turn(folder: str, output_dir: str, steps: list[int], sabotage: Callable[..., None]) -> list[Saved]:
    """Save at each of `steps`, the last time with `sabotage(engine, output_dir)` done on this rank before."""
    wrapped, tokenizer, chosen = make_engine(folder, output_dir)
    results = []
    for step in steps:
        if step == steps[-1]:
            sabotage(wrapped, Path(output_dir))
        results.append(checkpoint.save(wrapped, tokenizer, chosen, Progress(step=step, epoch=1, tokens=70)))
    return results


def nothing(wrapped: Any, output_dir: Path) -> None:
    """Leave everything as it is."""


def disk_full_on_rank_1(wrapped: Any, output_dir: Path) -> None:
    if distributed.rank() == 1:

        def save(state_dict: Any, path: str) -> None:
            Path(path).write_bytes(b"the beginning")
            raise OSError(28, "No space left on device", path)

        wrapped.checkpoint_engine.save = save


def writer_breaks_on_rank_0(wrapped: Any, output_dir: Path) -> None:
    if distributed.rank() == 0:

        def save(state_dict: Any, path: str) -> None:
            raise RuntimeError("PytorchStreamWriter failed writing file")

        wrapped.checkpoint_engine.save = save


def conversion_script_cannot_be_written(wrapped: Any, output_dir: Path) -> None:
    if distributed.rank() == 0:
        (output_dir / "zero_to_fp32.py").unlink(missing_ok=True)
        (output_dir / "zero_to_fp32.py").mkdir()


def tag_folder_cannot_be_made(wrapped: Any, output_dir: Path) -> None:
    if distributed.rank() == 0:
        (output_dir / "global_step9").symlink_to("/proc/no_such_folder/below")


def latest_cannot_be_replaced(wrapped: Any, output_dir: Path) -> None:
    if distributed.rank() == 0:
        (output_dir / "latest.partial").mkdir()


def tokenizer_cannot_be_written(wrapped: Any, output_dir: Path) -> None:
    if distributed.rank() == 0:
        (output_dir / "tokenizer.json").unlink(missing_ok=True)
        (output_dir / "tokenizer.json").mkdir()


def state_cannot_be_gathered_on_rank_1(wrapped: Any, output_dir: Path) -> None:
    if distributed.rank() == 1:

        def state_dict() -> Any:
            raise MemoryError("no memory for the state")

        wrapped.optimizer.state_dict = state_dict


def test_a_complete_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    results = run_ranks(2, save_in_turn, str(model_folder), str(tmp_path), [7], nothing)
    assert [saved[0].path for saved in results] == [tmp_path / "global_step7"] * 2
    assert not results[0][0].failed
    assert (tmp_path / "latest").read_text() == "global_step7"
    assert shares(tmp_path, "global_step7") == [
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt",
    ]  # fmt: skip
    import torch

    state = torch.load(tmp_path / "global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    assert state["progress"] == {"step": 7, "epoch": 1, "step_in_epoch": 0, "tokens": 70}
    assert state["config"]["model_name"] == str(model_folder)
    assert state["lr_scheduler"] is not None


def test_a_checkpoint_of_the_same_step_replaces_the_older_one(model_folder: Path, tmp_path: Path) -> None:
    run_ranks(1, save_in_turn, str(model_folder), str(tmp_path), [5, 7, 7], nothing)
    assert (tmp_path / "latest").read_text() == "global_step7_2"
    assert sorted(path.name for path in tmp_path.glob("global_step*")) == ["global_step5", "global_step7_2"]


@pytest.mark.parametrize(
    "sabotage",
    [disk_full_on_rank_1, writer_breaks_on_rank_0, conversion_script_cannot_be_written, tag_folder_cannot_be_made,
     latest_cannot_be_replaced, tokenizer_cannot_be_written, state_cannot_be_gathered_on_rank_1],
)  # fmt: skip
def test_a_failed_save_ends_in_order_and_keeps_the_older(
    sabotage: Callable[..., None], model_folder: Path, tmp_path: Path
) -> None:
    results = run_ranks(2, save_in_turn, str(model_folder), str(tmp_path), [5, 9], sabotage, timeout_s=120)
    for first, second in results:
        assert first.path == tmp_path / "global_step5"
        assert second.failed
        assert second.path is None
        assert second.sentence.startswith("NO CHECKPOINT WAS SAVED")
    assert (tmp_path / "latest").read_text() == "global_step5"
    assert len(shares(tmp_path, "global_step5")) == 4
    assert not (tmp_path / "global_step9").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(model_folder: Path, small_disk: Path) -> None:
    results = run_ranks(2, save_in_turn, str(model_folder), str(small_disk), [5, 9], nothing, timeout_s=120)
    assert [[saved.failed for saved in rank] for rank in results] == [[False, True], [False, True]]
    assert (small_disk / "latest").read_text() == "global_step5"
    assert len(shares(small_disk, "global_step5")) == 4
    assert not (small_disk / "global_step9").exists()


def test_special_tokens_map_is_always_there(model_folder: Path, tmp_path: Path) -> None:
    checkpoint.save_tokenizer(model.load_tokenizer(str(model_folder)), tmp_path)
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
