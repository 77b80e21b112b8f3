"""Ranks that are killed while they save: the folder always resumes, and never from a mixture of steps."""

import os
import random
import time
from dataclasses import asdict
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tests.helpers.ranks import free_port, rank_context, rank_environment

RANKS = 2


def keep_saving(model: str, out: str, env: dict[str, str], started: Event) -> None:
    """Resume if there is a checkpoint, then save one step after the other until killed."""
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    from superoffload import config, distributed
    from superoffload.checkpoint import resume, save
    from superoffload.training.progress import Progress
    from tests.helpers.runs import make_engine

    distributed.init()
    asked = config.build({"model_name": model, "output_dir": out, "resume": "auto"})
    source = resume.first_intact(asked, resume.find(asked))
    engine, tokenizer, chosen = make_engine(model, out)
    progress = Progress()
    if source is not None:
        restored = resume.restore(engine, source, trusted=False)
        progress = Progress(**restored["progress"])
        assert restored["said"] == f"step {progress.step}"
        steps = {int(group["step"]) for group in engine.optimizer.optimizer.state.values()}
        assert steps == {progress.step}
    started.set()
    while True:
        progress.advance(tokens=1, packs=1)
        for state in engine.optimizer.optimizer.state.values():
            state["step"] = progress.step  # so that each rank's file tells its step
        extra = {"said": f"step {progress.step}"}
        assert save.save(engine, tokenizer, chosen, asdict(progress), extra) is not None


def one_trial(model: Path, out: Path, rng: random.Random) -> None:
    """Start the ranks, let them save for a random time, and kill them, half of the time one before the others."""
    context, port = rank_context(), free_port()
    started = [context.Event() for _ in range(RANKS)]
    ranks = [
        context.Process(
            target=keep_saving, args=(str(model), str(out), rank_environment(rank, RANKS, port), started[rank])
        )
        for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    try:
        while not all(event.wait(timeout=0.02) for event in started):
            assert all(rank.is_alive() for rank in ranks), "a rank could not resume"
        time.sleep(rng.random() * 1.5)  # any moment of a save
        if rng.random() < 0.5:
            rng.choice(ranks).kill()
            time.sleep(rng.random() * 0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def check(out: Path) -> int:
    """Check that every file of the newest complete checkpoint is intact and of one step; return the step."""
    import torch

    from superoffload.checkpoint import manifest

    newest = manifest.complete_checkpoints(out)[0]
    described = manifest.read(newest)
    assert described is not None
    for name, entry in described["files"].items():
        assert manifest.describe(newest / name) == entry
    said = {torch.load(path, weights_only=False)["said"] for path in newest.glob("*model_states.pt")}
    assert said == {f"step {described['progress']['step']}"}
    assert len(described["files"]) == 2 * RANKS
    return int(described["progress"]["step"])


@pytest.mark.parametrize("trials", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_while_saving(trials: int, model_folder: Path, tmp_path: Path) -> None:
    steps = [0]
    for trial in range(trials):
        one_trial(model_folder, tmp_path, random.Random(trial))
        steps.append(check(tmp_path))
    assert steps == sorted(steps)
    assert steps[-1] > 1
