"""The trainer's side of a step, against a process that answers without computing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from superoffload.offload.shared.bias import ProductHistory
from superoffload.offload.shared.messages import AdamHyper, Reply, ReplyKind, Task, TaskKind
from superoffload.offload.trainer.coordinator import CLIPPED_STEPS_BEFORE_PAUSE, Coordinator
from superoffload.offload.trainer.trials import SpeculationTrials

pytestmark = pytest.mark.unit

FACTOR, CLIPPED = 1.0, 0.25


class AnsweringProcess:
    """Answer every task immediately, as the optimizer process would; `held` kinds stay unanswered."""

    pid = 0

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.replies: deque[Reply] = deque()
        self.held: set[TaskKind] = set()

    def send(self, task: Task, relieve: Callable[[], None] | None = None) -> None:
        self.tasks.append(task)
        kinds = {
            TaskKind.SPECULATE: ReplyKind.SPECULATED,
            TaskKind.STEP: ReplyKind.STEPPED,
            TaskKind.COMMIT: ReplyKind.COMMITTED,
        }
        if task.kind in kinds and task.kind not in self.held:
            self.answer(task, kinds[task.kind])

    def answer(self, task: Task, kind: ReplyKind) -> None:
        self.replies.append(Reply(kind=kind, sub_group=task.sub_group, round=task.round, version=task.version))

    def receive(self, timeout_s: float, doing: str) -> Reply | None:
        if self.replies:
            return self.replies.popleft()
        if timeout_s:
            raise AssertionError(f"would wait forever while {doing}")
        return None

    def kinds(self) -> list[tuple[str, int]]:
        return [(t.kind.name, t.sub_group) for t in self.tasks]


class Setup:
    def __init__(self) -> None:
        self.process = AnsweringProcess()
        self.lr = 1e-3
        self.coordinator = Coordinator(
            self.process,
            {0: 1, 1: 2},
            lambda i: AdamHyper(lr=self.lr, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0),
            ProductHistory.fresh(0.9, 0.99),
        )
        self.uploaded: list[int] = []

    def backward(self, speculate: bool = True) -> None:
        for sub_group, parameter in ((1, "c"), (1, "b"), (0, "a")):
            self.coordinator.gradient_changes(sub_group)
            self.coordinator.arrived(sub_group, parameter, FACTOR if speculate else None)

    def step(self, factor: float = FACTOR) -> None:
        self.coordinator.decide(factor, FACTOR)
        self.coordinator.collect(self.uploaded.append)
        self.coordinator.end_round()


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_an_accepted_speculation_is_uploaded_then_committed(setup: Setup) -> None:
    setup.backward()
    setup.step()
    assert setup.uploaded == [0, 1]
    assert setup.process.kinds() == [
        ("SPECULATE", 1),
        ("SPECULATE", 0),
        ("DECIDE", -1),
        ("COMMIT", 1),
        ("COMMIT", 0),
    ]
    assert [t.step for t in setup.process.tasks if t.kind is not TaskKind.DECIDE] == [1, 1, 1, 1]
    assert setup.coordinator.steps == {0: 1, 1: 1}


@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize("end", ["decide", "discard"])
def test_the_end_of_a_round_waits_for_its_gradients_first(setup: Setup, speculate: bool, end: str) -> None:
    setup.backward(speculate)
    sent_before: list[int] = []
    setup.coordinator.settle = lambda: sent_before.append(len(setup.process.tasks))
    if end == "decide":
        setup.coordinator.decide(FACTOR, FACTOR)
    else:
        setup.coordinator.discard()
    assert sent_before == [2 if speculate else 0]  # neither DECIDE nor STEP nor DROP has been sent


def test_a_clipped_step_is_repeated_with_the_factor(setup: Setup) -> None:
    setup.backward()
    setup.step(CLIPPED)
    steps = [t for t in setup.process.tasks if t.kind is TaskKind.STEP]
    assert {t.sub_group for t in steps} == {0, 1} and {t.factor for t in steps} == {CLIPPED}
    assert ("COMMIT", 0) not in setup.process.kinds()
    assert setup.coordinator.statistics.refused == 2


@pytest.mark.parametrize("speculate", [True, False])
def test_a_clipped_step_is_uploaded_while_the_next_sub_group_is_stepped(setup: Setup, speculate: bool) -> None:
    process, uploaded_when_waiting = setup.process, []
    process.held = {TaskKind.STEP}
    setup.backward(speculate)

    def receive(timeout_s: float, doing: str) -> Reply | None:
        if timeout_s and not process.replies:
            uploaded_when_waiting.append(list(setup.uploaded))
            steps = [t for t in process.tasks if t.kind is TaskKind.STEP]
            assert [t.sub_group for t in steps] == [0, 1]  # the first sub-group of the next forward first
            process.answer(steps[len(setup.uploaded)], ReplyKind.STEPPED)
        return process.replies.popleft() if process.replies else None

    process.receive = receive  # type: ignore[method-assign]
    setup.step(CLIPPED)
    assert uploaded_when_waiting == [[], [0]] and setup.uploaded == [0, 1]


def test_speculation_pauses_while_steps_are_clipped(setup: Setup) -> None:
    for _ in range(CLIPPED_STEPS_BEFORE_PAUSE):
        assert setup.coordinator.worth_speculating
        setup.backward()
        setup.step(CLIPPED)
    assert not setup.coordinator.worth_speculating
    setup.backward(speculate=False)
    setup.step(FACTOR)
    assert setup.coordinator.worth_speculating


def test_a_moved_learning_rate_voids_speculations(setup: Setup) -> None:
    setup.backward()
    setup.lr = 5e-4
    setup.step()
    kinds = setup.process.kinds()
    assert kinds.index(("CANCEL", 0)) < kinds.index(("DECIDE", -1)) < kinds.index(("STEP", 0))
    assert {t.hyper.lr for t in setup.process.tasks if t.kind is TaskKind.STEP} == {5e-4}


def test_a_second_gradient_voids_the_first_speculation(setup: Setup) -> None:
    setup.backward()
    first = setup.process.tasks[0].version
    setup.backward()
    cancelled = [t for t in setup.process.tasks if t.kind is TaskKind.CANCEL and t.sub_group == 1]
    assert [t.version for t in cancelled] == [first]
    setup.step()
    assert len([t for t in setup.process.tasks if t.kind is TaskKind.COMMIT]) == 2


def test_a_second_backward_that_reaches_one_parameter_steps_on_request(setup: Setup) -> None:
    setup.backward()
    setup.coordinator.gradient_changes(1)
    setup.coordinator.arrived(1, "b", FACTOR)
    setup.step()
    assert ("STEP", 1) in setup.process.kinds() and ("COMMIT", 0) in setup.process.kinds()


def test_discarding_abandons_the_round_and_counts_no_step(setup: Setup) -> None:
    setup.backward()
    setup.coordinator.discard()
    assert setup.process.kinds()[-1] == ("DROP", -1)
    setup.coordinator.discard()
    assert setup.coordinator.statistics.discarded_rounds == 1
    setup.backward()
    setup.step()
    assert setup.coordinator.steps == {0: 1, 1: 1}


def test_late_answers_of_a_discarded_round_are_ignored(setup: Setup) -> None:
    setup.process.held = {TaskKind.SPECULATE}
    setup.backward()
    late = list(setup.process.tasks)
    setup.coordinator.discard()
    setup.process.held = set()
    setup.backward()
    for task in late:
        setup.process.answer(task, ReplyKind.STEPPED)
    setup.step()
    assert setup.coordinator.statistics.stepped_in_turn == 0
    assert setup.coordinator.statistics.accepted == 2


def test_gradients_wait_for_their_own_commit_only(setup: Setup) -> None:
    setup.process.held = {TaskKind.COMMIT}
    setup.backward()
    setup.step()
    commits = {t.sub_group: t for t in setup.process.tasks if t.kind is TaskKind.COMMIT}
    setup.process.answer(commits[1], ReplyKind.COMMITTED)
    setup.coordinator.gradient_changes(1)
    with pytest.raises(AssertionError, match="waiting for the commit"):
        setup.coordinator.gradient_changes(0)
    assert setup.coordinator.has_uncommitted
    setup.process.answer(commits[0], ReplyKind.COMMITTED)
    setup.coordinator.flush()
    assert not setup.coordinator.has_uncommitted


def test_a_step_without_any_backward_steps_everything(setup: Setup) -> None:
    setup.step()
    assert setup.process.kinds() == [("DECIDE", -1), ("STEP", 0), ("STEP", 1)]


def test_collecting_before_deciding_is_an_error(setup: Setup) -> None:
    with pytest.raises(RuntimeError, match="before decide"):
        setup.coordinator.collect(setup.uploaded.append)


class FixedTrials(SpeculationTrials):
    """Choose as the test says, and record which rounds count."""

    def __init__(self, *chosen: bool) -> None:
        super().__init__(lambda: 0.0)
        self.chosen, self.counted = list(chosen), list[bool]()

    @property
    def speculate(self) -> bool:
        return self.chosen[len(self.counted)]

    def end_round(self, *, counts: bool) -> None:
        self.counted.append(counts)


def test_trials_choose_whether_a_round_speculates(setup: Setup) -> None:
    coordinator = setup.coordinator
    trials = coordinator.trials = FixedTrials(True, False, True, True, True)
    for speculate in (True, False):
        assert coordinator.worth_speculating is speculate
        setup.backward(coordinator.worth_speculating)
        setup.step()
    assert coordinator.statistics.stepping_rounds == 1
    setup.backward()
    coordinator.discard()  # without a step, its time says nothing
    setup.backward(speculate=False)
    setup.step()  # meant to speculate, but clipped steps have paused that
    assert trials.counted == [True, True, False, False] and coordinator.statistics.stepping_rounds == 1


def test_clipped_steps_pause_speculation_that_the_trials_have_chosen(setup: Setup) -> None:
    setup.coordinator.trials = FixedTrials(*[True] * (CLIPPED_STEPS_BEFORE_PAUSE + 1))
    for _ in range(CLIPPED_STEPS_BEFORE_PAUSE):
        setup.backward()
        setup.step(CLIPPED)
    assert not setup.coordinator.worth_speculating
