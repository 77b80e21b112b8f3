"""The environment of the test session, and fixtures that many tests share."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before anything imports `datasets` or DeepSpeed, which read them on import: the CPU, no hub, and caches that are
# not the developer's own. Programs that the tests start inherit it.
_CACHE = tempfile.TemporaryDirectory(prefix="superoffload-tests-")
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Another ninja than this environment's would compile the operators again.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN"):
    os.environ.pop(name, None)

from tests.helpers import models  # noqa: E402 - imports what reads the environment
from tests.helpers.ranks import ACCELERATOR, REPOSITORY, environment  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def operators(request: pytest.FixtureRequest) -> None:
    """Compile the operators before the first test, unless only unit tests run."""
    if not all(item.get_closest_marker("unit") for item in request.session.items):
        env = environment(DS_ACCELERATOR=ACCELERATOR)  # each accelerator compiles with flags of its own
        subprocess.run([sys.executable, "-m", "tests.helpers.operators"], cwd=REPOSITORY, env=env, check=True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small random Llama and its tokenizer once."""
    return models.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write Alpaca rows once."""
    return models.write_rows(tmp_path_factory.mktemp("rows") / "rows.json")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Join a group of one rank in this process, for functions that communicate."""
    from superoffload import distributed

    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.setenv(name, "")  # recorded, so that it is restored
            environment.delenv(name)
        distributed.init()
        yield
        distributed.close()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo what a test's command has set up, so that it does not hide another test's messages."""
    logger = logging.getLogger("superoffload")
    level, handlers, propagate = logger.level, logger.handlers[:], logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture(autouse=True)
def unit_tests_start_no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test marked `unit` when it starts a process or joins a group, for which operators are compiled."""
    if request.node.get_closest_marker("unit") is None:
        return
    if "one_rank" in request.fixturenames:
        pytest.fail("a test marked `unit` joins a process group")

    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("a test marked `unit` starts a process")

    for name in ("subprocess.Popen.__init__", "multiprocessing.process.BaseProcess.start"):
        monkeypatch.setattr(name, refuse)
    for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system"):
        monkeypatch.setattr(os, name, refuse)
