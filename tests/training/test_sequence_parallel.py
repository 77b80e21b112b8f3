"""Whole runs whose ranks share rows: the numbers of a run that does without."""

import json
from pathlib import Path
from typing import Any

import pytest

from superoffload.checkpoint import manifest
from tests.helpers.forked import launch
from tests.helpers.models import write_rows
from tests.helpers.ranks import REPOSITORY
from tests.helpers.runs import logged
from tests.helpers.states import assert_equal_states

SHARED = ("--sequence_parallel_size", "2")
ROUNDED = {"padding_share"}  # parts are rounded up


@pytest.fixture
def float32_configs(tmp_path: Path) -> dict[str, str]:
    """Write ds_configs of both modes with weights in float32."""
    paths = {}
    for mode in ("superoffload", "zerooffload"):
        ds_config = json.loads((REPOSITORY / "configs" / f"{mode}.json").read_text())
        ds_config["bf16"]["enabled"] = False
        (tmp_path / f"{mode}.json").write_text(json.dumps(ds_config))
        paths[mode] = str(tmp_path / f"{mode}.json")
    return paths


def start(ranks: int, model: Path, rows: Path, out: Path, *more: str) -> str:
    """Run to the end and return what it said."""
    done = launch(
        ranks, "--model_name", str(model), "--dataset_name", str(rows), "--output_dir", str(out), "--max_length", "128",
        "--lr", "3e-3", "--deterministic", "--eval_percentage", "10", "--eval_steps", "4", "--log_interval", "2", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Compare what two runs logged, but for rounding."""
    assert len(found) == len(expected) > 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - ROUNDED:
            expected_value = theirs[name]  # None: the loss of a source without targets
            assert ours[name] == (expected_value and pytest.approx(expected_value, rel=1e-4)), name


@pytest.mark.parametrize("mode", ["superoffload", pytest.param("zerooffload", marks=pytest.mark.slow)])
def test_a_run_on_two_ranks_that_share_rows_logs_the_numbers_of_one_rank(
    mode: str, float32_configs: dict[str, str], model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say the thing.\n")
    other = write_rows(tmp_path / "other.json", 12, seed=5)
    options = ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--save_checkpoint", "--sample_prompts",
               str(prompts), "--activation_checkpointing", "--dataset_name", str(rows_file), str(other),
               "--deepspeed_config", float32_configs[mode]]  # fmt: skip
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    said = [
        start(1, model_folder, rows_file, alone, *options),
        start(2, model_folder, rows_file, shared, *options, *SHARED),
    ]
    assert "Sequence parallel: 2 ranks share each row" in said[1]
    assert_close(logged(shared), logged(alone))
    assert {"loss/rows", "loss/other", "target_tokens/other"} <= logged(shared)[0].keys()
    samples = [[line for line in text.splitlines() if "Sample |" in line][-1][24:] for text in said]
    assert samples[0] == samples[1]
    assert manifest_of(shared)["progress"] == manifest_of(alone)["progress"]  # tokens are counted once


@pytest.mark.slow
def test_with_tiles_inputs_on_the_host_and_frozen_weights(
    float32_configs: dict[str, str], model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other.json", 12, seed=5)
    options = ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--label_smoothing", "0.1", "--freeze",
               "embed_tokens", "layers.0.self_attn", "--dataset_name", str(rows_file), str(other),
               "--deepspeed_config", float32_configs["superoffload"]]  # fmt: skip
    start(1, model_folder, rows_file, tmp_path / "plain", *options)
    less = ["--tiled_mlp", "3", "--activation_checkpointing", "offload", "--loss_kernel", "chunked"]
    said = start(2, model_folder, rows_file, tmp_path / "less", *options, *less, *SHARED)
    assert "MLP: in 3 tiles" in said
    assert_close(logged(tmp_path / "less"), logged(tmp_path / "plain"))


def manifest_of(out: Path) -> dict[str, Any]:
    described = manifest.read(out / (out / "latest").read_text())
    assert described is not None
    return described


@pytest.mark.slow
def test_two_groups_of_two_ranks(
    float32_configs: dict[str, str], model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    for packing in ("--packing", "--no_packing"):
        options = ["--deepspeed_config", float32_configs["superoffload"], "--batch_size", "2", packing]
        start(2, model_folder, rows_file, tmp_path / f"two{packing}", *options)
        start(4, model_folder, rows_file, tmp_path / f"four{packing}", *options, *SHARED)
        assert_close(logged(tmp_path / f"four{packing}"), logged(tmp_path / f"two{packing}"))


@pytest.mark.slow
def test_resume_with_the_same_groups_and_with_others(
    float32_configs: dict[str, str], model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    whole, same, other = (tmp_path / name for name in ("whole", "same", "other"))
    options = ["--deepspeed_config", float32_configs["superoffload"], "--num_train_epochs", "2", "--save_checkpoint"]
    shared = [*options, *SHARED, "--batch_size", "2"]
    start(2, model_folder, rows_file, whole, *shared)
    start(2, model_folder, rows_file, same, *shared, "--bench_steps", "4")
    start(2, model_folder, rows_file, other, *options, "--batch_size", "1", "--resume", str(same))
    start(2, model_folder, rows_file, same, *shared, "--resume", "auto")
    assert logged(same) == logged(whole)
    assert_equal_states(whole, same)
    rest = [line for line in logged(other) if line["step"] > 4]
    assert_close(rest, [line for line in logged(whole) if line["step"] > 4])
