"""Trained models for the tests of exports."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import models
from tests.helpers.exports import KINDS, RANKS, Trained, train_several
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Train each kind of model; those with the same number of ranks share one start."""
    root = tmp_path_factory.mktemp("trained")
    runs: dict[str, Trained] = {}
    for ranks in (1, 2):
        names = [name for name, number in RANKS.items() if number == ranks]
        for name in names:
            models.write_model(root / name / "model", **{"kind": name, **KINDS[name]})
        jobs = [(str(root / name / "model"), str(root / name / "out"), name == "llama") for name in names]
        first = run_ranks(ranks, train_several, jobs)[0]
        for name, (logits, text) in zip(names, first, strict=True):
            runs[name] = Trained(root / name / "out", root / name / "model", logits, text)
    return runs


@pytest.fixture
def damaged(trained: dict[str, Trained], tmp_path: Path) -> Iterator[Path]:
    """Copy the llama's output folder, for a test to damage it; the test may leave nothing else but `target`."""
    copy = tmp_path / "out"
    shutil.copytree(trained["llama"].output_dir, copy, ignore=shutil.ignore_patterns("export"))
    yield copy
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "target"}, "something was left behind"
