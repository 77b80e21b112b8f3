"""How far a run has come, and how its last save ended."""

from pathlib import Path

import pytest

from superoffload.training.progress import NOT_REQUESTED, Progress, Saved, saved_in

pytestmark = pytest.mark.unit


def test_steps_tokens_and_epochs_are_counted() -> None:
    progress = Progress(step=4, epoch=1, packs_in_epoch=16, tokens=100)
    progress.advance(tokens=30, packs=8)
    assert progress == Progress(step=5, epoch=1, packs_in_epoch=24, tokens=130)
    progress.next_epoch()
    assert progress == Progress(step=5, epoch=2, packs_in_epoch=0, tokens=130)


def test_the_outcome_of_a_save_is_a_sentence() -> None:
    assert saved_in(Path("out/step")) == Saved(Path("out/step"), "Checkpoint saved in out/step")
    failure = saved_in(None)
    assert failure.failed
    assert failure.sentence.startswith("NO CHECKPOINT WAS SAVED: ")
    assert (NOT_REQUESTED.path, NOT_REQUESTED.failed) == (None, False)
