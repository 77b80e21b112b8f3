"""`superoffload export`: what it writes, and its errors."""

import contextlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import commands
from tests.helpers.exports import STEPS, Trained, load, rank_1, same_answers, set_weight, tensors_of


def command(*arguments: str) -> tuple[Any, str]:
    """Run `superoffload` in this process and return its status and what it wrote to stderr."""
    err, before = io.StringIO(), sys.argv
    sys.argv = ["superoffload", *arguments]
    try:
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            commands.main()
    finally:
        sys.argv = before
    return ended.value.code, err.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(dtype: str, trained: dict[str, Trained], tmp_path: Path) -> None:
    run = trained["llama"]
    status, err = command(
        "export", str(run.output_dir), str(tmp_path / "target"), "--dtype", dtype, "--max_shard_size", "1MB"
    )
    assert status == 0, err
    exported = tensors_of(tmp_path / "target")
    assert {tensor.dtype for tensor in exported.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == dtype
    if dtype == "float32":
        masters = torch.load(
            run.output_dir / f"global_step{STEPS}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False
        )["optimizer_state_dict"]["fp32_flat_groups"]
        first = exported["model.embed_tokens.weight"].flatten()
        assert any(torch.equal(group[:100], first[:100]) for group in masters)
        assert same_answers(load(tmp_path / "target"), run)


def truncated(folder: Path) -> str:
    os.truncate(rank_1(folder, "optim"), rank_1(folder, "optim").stat().st_size // 2)
    return "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt: damaged or truncated"


def description_flipped(folder: Path) -> str:
    path = rank_1(folder, "model")
    content = bytearray(path.read_bytes())
    content[content.index(b"param_shapes")] ^= 1
    path.write_bytes(content)
    return "zero_pp_rank_1_mp_rank_00_model_states.pt: damaged or truncated"


def optimizer_file_missing(folder: Path) -> str:
    rank_1(folder, "optim").unlink()
    return "zero_pp_rank_1_mp_rank_*_optim_states.pt: is missing (the checkpoint has 2 ranks)"


def model_file_missing(folder: Path) -> str:
    rank_1(folder, "model").unlink()
    return "zero_pp_rank_1_mp_rank_*_model_states.pt: is missing (the checkpoint has 2 ranks)"


def latest_points_nowhere(folder: Path) -> str:
    (folder / "latest").write_text("global_step99")
    return "latest: names 'global_step99', which does not exist; use the folder of a checkpoint"


def latest_is_empty(folder: Path) -> str:
    (folder / "latest").write_text("")
    return "latest: names '', which does not exist; use the folder of a checkpoint"


def no_checkpoint(folder: Path) -> str:
    shutil.rmtree(folder / f"global_step{STEPS}")
    (folder / "latest").unlink()
    return "has no checkpoint; use a run's output folder, or global_stepN in it"


def empty_checkpoint(folder: Path) -> str:
    shutil.rmtree(folder / f"global_step{STEPS}")
    (folder / f"global_step{STEPS}").mkdir()
    return "has no checkpoint (no file *_model_states.pt)"


def saving_was_interrupted(folder: Path) -> str:
    (folder / f"global_step{STEPS}" / "incomplete").touch()
    return "incomplete: saving it was interrupted; use another checkpoint"


def weight_flipped(folder: Path) -> str:
    path = rank_1(folder, "optim")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "optim_states.pt does not match its checksum; use another checkpoint"


def not_a_number(folder: Path) -> str:
    set_weight(folder, math.nan)
    return "has NaN or Inf; training diverged: export an older checkpoint"


def another_shape(folder: Path) -> str:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "vocab_size": 300}))
    return "has the shape (264, 32), not (300, 32)"


def more_layers(folder: Path) -> str:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "num_hidden_layers": 3}))
    return "does not match LlamaForCausalLM: it lacks model.layers.2."


def fewer_layers(folder: Path) -> str:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "num_hidden_layers": 1}))
    return "does not match LlamaForCausalLM: it has an unknown model.layers.1."


DAMAGES = [
    truncated, description_flipped, weight_flipped, optimizer_file_missing, model_file_missing, latest_points_nowhere,
    latest_is_empty, no_checkpoint, saving_was_interrupted, empty_checkpoint, not_a_number, another_shape,
    more_layers, fewer_layers,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(
    damage: Callable[[Path], str], damaged: Path, tmp_path: Path
) -> None:
    text = damage(damaged)
    status, err = command("export", str(damaged), str(tmp_path / "target"))
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("Error: ")
    assert text in line
    assert "Traceback" not in err
    assert not (tmp_path / "target").exists()
