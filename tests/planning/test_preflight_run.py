"""The preflight of real runs: all ranks stop together before any weight is read, or start anyway if told to."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.forked import launch


@pytest.fixture(scope="module")
def huge_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the small model without its weights, and let its configuration say that it has 100 billion parameters."""
    folder = tmp_path_factory.mktemp("huge") / "model"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    described = json.loads((folder / "config.json").read_text())
    described |= {"hidden_size": 2**14, "intermediate_size": 2**20, "num_hidden_layers": 2, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_cannot_fit_stops_before_it_reads_weights(
    ranks: int, huge_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    flags = ["--model_name", str(huge_model), "--dataset_name", str(rows_file), "--output_dir", str(tmp_path / "out")]
    result = launch(ranks, *flags, "--offload_ratio", "auto")
    assert result.returncode == 2, result.stderr[-3000:]
    (line,) = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert line.startswith(f"Error: --model_name {huge_model}: this run needs more than there is: host ")
    assert line.endswith("; --no_preflight runs it anyway")
    assert "One machine's host memory, GiB" in result.stderr
    assert "--offload_ratio auto: 1.0, because there is no GPU" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.index("Data: ") < result.stderr.index("ERROR Memory: ")
    if ranks == 1:
        told = launch(ranks, *flags, "--no_preflight", "--max_length", "64")
        assert "WARNING Memory: host " in told.stderr
        (line,) = [line for line in told.stderr.splitlines() if "Error: " in line]
        assert "weights" in line


def test_a_run_resumed_with_auto_keeps_the_ratio_of_its_checkpoint(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    flags = ["--model_name", str(model_folder), "--dataset_name", str(rows_file), "--output_dir", str(tmp_path),
             "--max_length", "128", "--save_steps", "1", "--resume", "auto", "--sub_group_size", "5000"]  # fmt: skip
    first = launch(1, *flags, "--bench_steps", "1", "--offload_ratio", "0.5")
    assert first.returncode == 0, first.stderr[-3000:]
    second = launch(1, *flags, "--bench_steps", "2", "--offload_ratio", "auto")
    assert second.returncode == 0, second.stderr[-3000:]
    assert "--offload_ratio auto: 0.5, as in the checkpoint" in second.stderr
    saved = json.loads((tmp_path / "global_step2" / "manifest.json").read_text())
    assert saved["config"]["offload_ratio"] == 0.5
