"""The checkpoint's format and its readers import no library that they do not need: reading JSON takes no seconds."""

import subprocess
import sys

import pytest

from tests.helpers.ranks import REPOSITORY, environment

PROGRAM = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("superoffload.checkpoint.manifest", {"torch", "deepspeed", "transformers"}),
        ("superoffload.checkpoint.convert", {"torch", "deepspeed", "transformers"}),
        ("superoffload.checkpoint.rank_files", {"deepspeed", "transformers"}),
        ("superoffload.export.weights", {"deepspeed"}),
        ("superoffload.commands", {"torch", "deepspeed", "transformers"}),
    ],
)
def test_what_a_module_does_not_import(module: str, unwanted: set[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, module], cwd=REPOSITORY, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.split())
    assert module in imported
    assert not unwanted & imported
