"""The choice between speculating and stepping, with a clock that the test sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from superoffload.offload.trainer.trials import (
    BLOCK_ROUNDS,
    ROUNDS_BETWEEN_TRIALS,
    TRIAL,
    WARM_UP_ROUNDS,
    SpeculationTrials,
)

pytestmark = pytest.mark.unit

TRIAL_ROUNDS = BLOCK_ROUNDS * len(TRIAL)


class Run:
    """Take rounds whose times depend on whether they speculate."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rounds = 0
        self.trials = SpeculationTrials(lambda: self.now)

    def take(self, rounds: int, time_s: Callable[[bool], float], counts: bool = True) -> list[bool]:
        """Return which of them speculated."""
        ways = []
        for _ in range(rounds):
            ways.append(self.trials.speculate)
            self.now += time_s(ways[-1])
            self.rounds += 1
            self.trials.end_round(counts=counts)
        return ways


def faster_by(share: float) -> Callable[[bool], float]:
    """Return the times of rounds that are faster by `share` if they do not speculate."""
    return lambda speculates: 1.0 if speculates else 1.0 - share


@pytest.mark.parametrize(("share", "speculates"), [(0.05, False), (0.002, True), (-0.05, True)])
def test_the_faster_way_is_chosen_and_kept(share: float, speculates: bool) -> None:
    run = Run()
    assert run.take(WARM_UP_ROUNDS, faster_by(share)) == [True] * WARM_UP_ROUNDS
    assert run.take(TRIAL_ROUNDS, faster_by(share)) == [way for way in TRIAL for _ in range(BLOCK_ROUNDS)]
    between = run.take(ROUNDS_BETWEEN_TRIALS, faster_by(-share))  # what happens outside of a trial is not measured
    assert between == [speculates] * ROUNDS_BETWEEN_TRIALS


def test_a_later_trial_revises_the_choice_only_if_the_other_way_is_clearly_faster() -> None:
    run = Run()
    run.take(WARM_UP_ROUNDS + TRIAL_ROUNDS + ROUNDS_BETWEEN_TRIALS, faster_by(0.05))
    assert run.take(TRIAL_ROUNDS, faster_by(-0.002))[0] is True
    assert not any(run.take(ROUNDS_BETWEEN_TRIALS, faster_by(-0.002)))
    run.take(TRIAL_ROUNDS, faster_by(-0.05))
    assert all(run.take(ROUNDS_BETWEEN_TRIALS, faster_by(-0.05)))


def test_a_pause_between_two_rounds_does_not_decide() -> None:
    run = Run()

    def time_s(speculates: bool) -> float:
        return (1.0 if speculates else 0.9) + (100.0 if not speculates and run.rounds % BLOCK_ROUNDS == 2 else 0.0)

    run.take(WARM_UP_ROUNDS + TRIAL_ROUNDS, time_s)
    assert not run.trials.speculate


def test_rounds_that_do_not_count_leave_the_choice_unchanged() -> None:
    run = Run()
    run.take(WARM_UP_ROUNDS + TRIAL_ROUNDS, faster_by(0.5), counts=False)
    assert run.trials.speculate
