"""Families of different kinds against plain transformers; tests/benchmarks/architectures.py measures them all."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import architectures as benchmark
from tests.helpers import architectures
from tests.helpers.families import FAMILIES
from tests.helpers.forked import launch
from tests.helpers.models import write_model
from tests.helpers.ranks import REPOSITORY, run_ranks

# Dense, with a table of positions, a mixture of experts, without attention, with attention and a state space, and a
# text model inside a multimodal one.
KINDS = ("gemma2", "gpt2", "qwen3_moe", "mamba", "falcon_h1", "gemma3")


def measure_all(folder: str) -> dict[str, dict[str, Any]]:
    return {kind: architectures.measure(kind, Path(folder) / kind) for kind in KINDS}


def test_six_kinds_train_and_export_as_in_plain_transformers(tmp_path: Path) -> None:
    ((results),) = run_ranks(1, measure_all, str(tmp_path), timeout_s=600)
    for kind, result in results.items():
        assert architectures.differences(result) == [], kind
        assert isinstance(result["packed"], str) == (kind == "mamba"), result["packed"]
        assert bool(result["frozen"]) == (kind == "gemma3")


@pytest.mark.unit
def test_the_table_holds_every_family() -> None:
    page = (REPOSITORY / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert sorted(row[0].removeprefix("| ") for row in rows) == sorted(FAMILIES)
    assert len(FAMILIES) >= 55


@pytest.mark.unit
def test_the_table_says_what_differs() -> None:
    good: dict[str, Any] = {"parameters": 1000, "frozen": 0, "plain": (5.0, 2.0), "unpacked": (5.0, 2.0), "export": 0.0}
    results = {
        "a": {**good, "packed": (5.0, 2.0001)},
        "b": {**good, "packed": "--packing: ...", "frozen": 10},
        "c": {**good, "packed": (5.0, 2.1), "export": 0.5},
        "d": {"error": "ended the process with status -9"},
    }
    page = benchmark.table(results)
    assert "| a | 1,000 | 5.0000 | 2.0000 | equal | equal | equal |" in page
    assert "| b | 1,000 (10 frozen) | 5.0000 | 2.0000 | equal | refused | equal |" in page
    assert "packed gradient norm 2.100000, not 2.000000; an exported weight differs by 0.5" in page
    assert "| d | | | | ended the process with status -9 | | |" in page


@pytest.mark.parametrize(
    ("mode", "ranks"), [("superoffload", 2), pytest.param("zerooffload", 1, marks=pytest.mark.slow)]
)
def test_unused_towers_stay_as_they_are(mode: str, ranks: int, rows_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, out = write_model(tmp_path / "model", "gemma3", **FAMILIES["gemma3"]), tmp_path / "out"
    done = launch(
        ranks, "--model_name", str(model), "--dataset_name", str(rows_file), "--output_dir", str(out),
        "--max_length", "64", "--max_steps", "3", "--lr", "1e-2", "--weight_decay", "0.5", "--save_checkpoint",
        "--export", "--deepspeed_config", str(REPOSITORY / "configs" / f"{mode}.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Not trained, because text does not reach it: model.vision_tower (13,424 parameters)" in done.stderr
    assert "38,080 parameters, 24,128 of them trained" in done.stderr
    assert (out / "summary.json").is_file()
    before, after = load_file(model / "model.safetensors"), load_file(out / "model_step3" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        unused = "vision_tower" in name or "multi_modal_projector" in name
        assert bool((before[name] == after[name]).all()) == unused, name


def test_a_run_without_attention(rows_file: Path, tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model", "mamba", **FAMILIES["mamba"]), tmp_path / "out"
    done = launch(
        1, "--model_name", str(model), "--dataset_name", str(rows_file), "--output_dir", str(out), "--max_length", "64",
        "--max_steps", "3", "--no_packing", "--save_checkpoint", "--export", "--warmup_steps", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "summary.json").read_text())["tflops_per_gpu"] > 0
    assert (out / "model_step3" / "model.safetensors").is_file()
