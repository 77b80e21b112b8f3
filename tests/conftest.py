"""What many tests need: a small model and rows on disk, and a group of one rank."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import models


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tests' data sets out of the user's cache, and look nothing up on a hub."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_rows(tmp_path_factory.mktemp("rows") / "rows.json")


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """Join a group of one rank in this process, for functions that communicate."""
    from superoffload import distributed

    distributed.init()
    yield
    distributed.close()
