"""Ranks that are killed while they save: the folder always resumes, and never to a mixture of steps."""

import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import free_port

SERVER = multiprocessing.get_context("forkserver")  # each trial starts with everything imported
SERVER.set_forkserver_preload(["tests.test_checkpoint", "superoffload.resume"])
RANKS = 2


def keep_saving(model: str, out: str, env: dict[str, str], started: Any) -> None:
    """Go on from what is there, then save one step after the other until killed."""
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    from superoffload import checkpoint, config, distributed, resume
    from superoffload.metrics import Progress
    from tests.test_checkpoint import make_engine

    distributed.init()
    values = {"model_name": model, "output_dir": out, "resume": "auto"}
    source = resume.find(config.build(values))
    wrapped, tokenizer, chosen = make_engine(model, out)
    progress = Progress()
    if source is not None:
        progress, state = resume.restore(wrapped, source)
        assert state["said"] == f"step {progress.step}"
        steps = {int(group["step"]) for group in wrapped.optimizer.optimizer.state.values()}
        assert steps == {progress.step}
    started.set()
    while True:
        progress.advance(1)
        for state in wrapped.optimizer.optimizer.state.values():
            state["step"] = progress.step  # each rank's file tells which step it is of
        saved = checkpoint.save(wrapped, tokenizer, chosen, progress, {"said": f"step {progress.step}"})
        assert not saved.failed


def one_trial(model: Path, out: Path, rng: random.Random) -> None:
    shared = {"WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # fmt: skip
    started = [SERVER.Event() for _ in range(RANKS)]
    ranks = [
        SERVER.Process(target=keep_saving, args=(str(model), str(out), {**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
                                                 started[r]))
        for r in range(RANKS)
    ]  # fmt: skip
    for rank in ranks:
        rank.start()
    try:
        deadline = time.monotonic() + 90
        while not all(event.is_set() for event in started):
            assert all(rank.is_alive() for rank in ranks), "a rank could not go on from what was there"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(rng.random() * 1.5)
        if rng.random() < 0.5:
            rng.choice(ranks).kill()
            time.sleep(rng.random() * 0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def check(out: Path) -> int:
    """Every rank's file of the newest complete checkpoint is whole and of one step; return the step."""
    import torch

    from superoffload import checkpoint

    newest = checkpoint.complete_checkpoints(out)[0]
    manifest = checkpoint.read_manifest(newest)
    assert manifest is not None
    for name, entry in manifest["files"].items():
        assert checkpoint.describe(newest / name) == entry
    said = {torch.load(path, weights_only=False)["said"] for path in newest.glob("*model_states.pt")}
    assert said == {f"step {manifest['progress']['step']}"}
    assert len(manifest["files"]) == 2 * RANKS
    return int(manifest["progress"]["step"])


@pytest.mark.parametrize("trials", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_while_saving(trials: int, model_folder: Path, tmp_path: Path) -> None:
    steps = [0]
    for trial in range(trials):
        one_trial(model_folder, tmp_path, random.Random(trial))
        steps.append(check(tmp_path))
    assert steps == sorted(steps)
    assert steps[-1] > 1
