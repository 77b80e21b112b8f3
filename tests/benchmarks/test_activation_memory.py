"""The table of activations: the plan agrees with it, and its script runs in small."""

import json
import sys
from pathlib import Path

import pytest

from superoffload.planning.budget.shape import of_model
from tests.benchmarks import activation_memory
from tests.benchmarks.activation_memory import MODEL, Row, slope
from tests.helpers import builtin_shapes
from tests.helpers.ranks import REPOSITORY, run

FOUND = json.loads((REPOSITORY / "tests" / "benchmarks" / "results" / "activation_memory.json").read_text("utf-8"))
ROWS = [Row(**row) for row in FOUND["rows"]]


@pytest.mark.unit
def test_the_plan_is_that_of_this_code_and_agrees() -> None:
    shape = of_model(MODEL, builtin_shapes.skeleton(MODEL))
    assert [row.flags for row in ROWS[:: len(activation_memory.LENGTHS)]] == activation_memory.combinations()
    for row in ROWS:
        wanted = activation_memory._job(row.flags, row.length)
        assert row.predicted_kept == activation_memory._predicted_kept(shape, wanted)
        assert row.predicted_peak == activation_memory._predicted_peak(shape, wanted)
        assert row.predicted_peak == pytest.approx(row.peak, rel=0.02), row
        assert row.predicted_kept == pytest.approx(row.kept, rel=1e-3), row


@pytest.mark.unit
def test_the_formulas_of_the_documentation() -> None:
    """Bytes per token and layer: without recomputation 16 H + 4 (Q + K) + 4 A + 8 I, with it 2 H, on the host 0.

    Tiles keep 8 I less, if the layer is not recomputed.
    """
    tiled = 16 * 2048 + 4 * (2048 + 512) + 4 * 32
    formulas = {"none": tiled + 8 * 8192, "full": 2 * 2048, "offload": 0}
    formulas |= {f"{where}, tiled": size for where, size in {**formulas, "none": tiled}.items()}
    names = [row.flags["activation_checkpointing"] + ", tiled" * ("tiled_mlp" in row.flags) for row in ROWS]
    assert dict(zip(names, (row.predicted_kept for row in ROWS), strict=True)) == formulas


@pytest.mark.unit
def test_the_tables_are_those_of_the_rows() -> None:
    text = activation_memory.report(ROWS, FOUND["layers"])
    assert (REPOSITORY / "tests" / "benchmarks" / "results" / "activation_memory.md").read_text("utf-8") == text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    page = (REPOSITORY / "docs" / "long_context.md").read_text("utf-8")
    assert [line for line in tables if line not in page] == []


@pytest.mark.slow
def test_the_script_runs_in_small(tmp_path: Path) -> None:
    path = REPOSITORY / "tests" / "benchmarks" / "activation_memory.py"
    done = run([sys.executable, str(path), "--lengths", "1024", "4096", "--layers", "4", "--results", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Row(**row) for row in json.loads((tmp_path / "activation_memory.json").read_text("utf-8"))["rows"]]
    assert len(found) == 2 * len(activation_memory.combinations())
    kept = {row.flags["activation_checkpointing"]: row.kept for row in found if "tiled_mlp" not in row.flags}
    assert kept["none"] > 20 * kept["full"] > kept["offload"] == 0
    chunked = [row for row in found if row.flags["loss_kernel"] == "chunked"]
    assert slope(chunked[:2]) < slope(found[:2])
