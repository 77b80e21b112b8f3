"""The benchmark of start-up, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import startup
from tests.helpers.ranks import REPOSITORY


@pytest.mark.slow
def test_every_phase_has_a_time(tmp_path: Path) -> None:
    script = REPOSITORY / "tests" / "benchmarks" / "startup.py"
    command = [sys.executable, str(script), "--rounds", "1", "--port", "29741", "--results", str(tmp_path)]
    subprocess.run(command, check=True, cwd=REPOSITORY, timeout=600)
    found = json.loads((tmp_path / "startup.json").read_text(encoding="utf-8"))
    assert set(found) == {"one process", "launcher"}
    for phases in found.values():
        assert set(phases) == {*startup.PHASES, "sum"}
        assert all(times["wall_s"] > 0 and times["cpu_s"] > 0 for times in phases.values())
    assert (tmp_path / "startup.md").read_text(encoding="utf-8").count(" s |") == 4 * (len(startup.PHASES) + 1)
