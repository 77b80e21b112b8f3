"""The comparison of both ways to step, in small."""

import sys

import pytest

from tests.helpers.ranks import REPOSITORY, run


@pytest.mark.slow
def test_both_ways_are_timed() -> None:
    script = REPOSITORY / "tests/benchmarks/trials_speed.py"
    done = run([sys.executable, str(script), "--preset", "tiny", "--seconds", "1"], 200)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[:2] for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert rows == [["| tiny", "during backward"], ["| tiny", "after backward"]]
