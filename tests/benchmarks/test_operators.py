"""The profile of operators runs in small."""

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks import operators
from tests.helpers.ranks import REPOSITORY, run

SMALL = ("--hidden", "64", "--layers", "1", "--documents", "8", "--square", "256", "--rounds", "1")


@pytest.mark.unit
def test_flops_of_products_and_of_attention() -> None:
    assert operators.flops("aten::mm", [[3, 4], [4, 5]]) == 2 * 3 * 4 * 5
    assert operators.flops("aten::addmm", [[5], [3, 4], [4, 5]]) == 2 * 3 * 4 * 5
    assert operators.flops("aten::bmm", [[2, 3, 4], [2, 4, 5]]) == 2 * 2 * 3 * 4 * 5
    # Two products forward and five backward, each over the pairs on and below the diagonal.
    forward = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert operators.flops(forward, [[1, 8, 2, 64]] * 3) == 2 * 2 * 8 * 3 * 64
    assert operators.flops(forward + "_backward", [[1, 8, 2, 64]] * 3) == 5 * 2 * 8 * 3 * 64
    assert operators.flops("aten::mul", [[3], [3]]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [("operators", SMALL), ("attention_cpu", ("--heads", "2", "--rounds", "1", "--positions", "64"))],
)
def test_the_script_runs_in_small(script: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    path = REPOSITORY / "tests" / "benchmarks" / f"{script}.py"
    done = run([sys.executable, str(path), *flags, "--results", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / f"{script}.json").read_text(encoding="utf-8"))
    assert (tmp_path / f"{script}.md").read_text(encoding="utf-8").strip() == done.stdout.strip()
    if script == "operators":
        [size] = found["sizes"]
        names = [one["name"] for one in size["operators"]]
        assert "aten::mm" in names and any("flash_attention" in name for name in names)
        assert 0 < size["share_of_rate"] and size["products"]
    else:
        assert {"Alpaca", "16 tokens", "512 tokens", "one document"} == set(found["cases"])
