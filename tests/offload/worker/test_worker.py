"""The optimizer process's loop: order of tasks, what is void, what is decided."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from superoffload.offload.shared.messages import MAX_RECORD_BYTES, Reply, ReplyKind, Task, TaskKind
from superoffload.offload.worker import worker
from superoffload.offload.worker.worker import Inbox, Outbox, TrainerGone, Worker

pytestmark = pytest.mark.unit


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Inbox]]:
    trainer, optimizer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with trainer, optimizer:
        yield trainer, Inbox(optimizer, os.getppid())


class FakeAdam:
    """Record what was asked; `during` is called in the middle of a speculation."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []
        self.during: Any = lambda: None

    def speculate(self, task: Task, state: Any, abandoned: Any) -> bool:
        self.during()
        self.calls.append(("speculate", task.factor))
        return not abandoned()

    def step(self, task: Task, state: Any, *, stage: bool) -> None:
        self.calls.append(("step" if stage else "commit", task.factor))


def send(sock: socket.socket, kind: TaskKind, **fields: Any) -> None:
    sock.send(Task(kind=kind, **{"sub_group": 0, "version": 5, "round": 3, **fields}).pack())


def work(ends: tuple[socket.socket, Inbox]) -> tuple[FakeAdam, ReplyKind]:
    adam = FakeAdam()
    return adam, Worker(ends[1], adam, {0: None}).handle(ends[1].next())  # type: ignore[arg-type,dict-item]


def test_a_speculation_is_computed(ends: tuple[socket.socket, Inbox]) -> None:
    send(ends[0], TaskKind.SPECULATE)
    adam, kind = work(ends)
    assert kind is ReplyKind.SPECULATED and adam.calls == [("speculate", 1.0)]


def test_a_speculation_after_the_decision_becomes_the_step(ends: tuple[socket.socket, Inbox]) -> None:
    send(ends[0], TaskKind.SPECULATE)
    send(ends[0], TaskKind.DECIDE, factor=0.5)
    adam, kind = work(ends)
    assert kind is ReplyKind.STEPPED and adam.calls == [("step", 0.5)]


def test_a_decision_of_another_round_is_ignored(ends: tuple[socket.socket, Inbox]) -> None:
    send(ends[0], TaskKind.SPECULATE)
    send(ends[0], TaskKind.DECIDE, factor=0.5, round=2)
    assert work(ends)[1] is ReplyKind.SPECULATED


@pytest.mark.parametrize("kind", [TaskKind.CANCEL, TaskKind.DROP])
@pytest.mark.parametrize("decided", [False, True])
def test_a_void_speculation_is_never_applied(ends: tuple[socket.socket, Inbox], kind: TaskKind, decided: bool) -> None:
    send(ends[0], TaskKind.SPECULATE)
    send(ends[0], kind)
    if decided:
        send(ends[0], TaskKind.DECIDE, factor=0.5)
    adam, reply = work(ends)
    assert reply is ReplyKind.VOID and adam.calls == []


def test_a_cancelled_version_does_not_void_the_next(ends: tuple[socket.socket, Inbox]) -> None:
    send(ends[0], TaskKind.CANCEL, version=4)
    send(ends[0], TaskKind.CANCEL, version=9, sub_group=1)
    send(ends[0], TaskKind.SPECULATE, version=5)
    assert work(ends)[1] is ReplyKind.SPECULATED


@pytest.mark.parametrize(
    ("kind", "factor", "expected"),
    [
        (TaskKind.DECIDE, 0.5, [("speculate", 1.0), ("step", 0.5)]),
        (TaskKind.DECIDE, 1.0, [("speculate", 1.0)]),
        (TaskKind.CANCEL, 1.0, [("speculate", 1.0)]),
    ],
)
def test_a_message_in_the_middle_of_a_speculation(
    ends: tuple[socket.socket, Inbox], kind: TaskKind, factor: float, expected: list[tuple[str, float]]
) -> None:
    adam = FakeAdam()
    adam.during = lambda: send(ends[0], kind, factor=factor)
    send(ends[0], TaskKind.SPECULATE)
    reply = Worker(ends[1], adam, {0: None}).handle(ends[1].next())  # type: ignore[arg-type,dict-item]
    assert adam.calls == expected
    if kind is TaskKind.CANCEL:
        assert reply is ReplyKind.VOID
    else:
        assert reply is (ReplyKind.SPECULATED if factor == 1.0 else ReplyKind.STEPPED)


def test_steps_and_commits_keep_their_order(ends: tuple[socket.socket, Inbox]) -> None:
    for kind in (TaskKind.STEP, TaskKind.COMMIT, TaskKind.STEP):
        send(ends[0], kind)
    assert [ends[1].next().kind for _ in range(3)] == [TaskKind.STEP, TaskKind.COMMIT, TaskKind.STEP]


def test_the_end_of_the_trainer_is_noticed(ends: tuple[socket.socket, Inbox]) -> None:
    ends[0].close()
    with pytest.raises(TrainerGone):
        ends[1].next()
    trainer, optimizer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with trainer, optimizer:
        send(trainer, TaskKind.EXIT)
        with pytest.raises(TrainerGone):
            Inbox(optimizer, os.getppid()).next()


def test_the_death_of_a_trainer_whose_socket_stays_open_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_CHECK_TRAINER_INTERVAL_S", 0.01)
    trainer, optimizer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with trainer, optimizer, pytest.raises(TrainerGone):
        Inbox(optimizer, trainer_pid=-1).next()


def received(sock: socket.socket) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    sock.setblocking(False)
    while True:
        try:
            reply = Reply.unpack(sock.recv(MAX_RECORD_BYTES))
        except BlockingIOError:
            return found
        found.append((reply.kind.name, reply.sub_group))


@pytest.mark.parametrize("holds_steps", [True, False])
def test_on_shared_cores_the_trainer_is_woken_once_for_all_steps(
    ends: tuple[socket.socket, Inbox], holds_steps: bool
) -> None:
    trainer, inbox = ends
    outbox = Outbox(inbox._sock, holds_steps=holds_steps)
    for sub_group in range(3):
        send(trainer, TaskKind.STEP, sub_group=sub_group)
    answered = []
    for _ in range(3):
        outbox.add(Reply(kind=ReplyKind.STEPPED, sub_group=inbox.next().sub_group), inbox.has_more)
        answered.append(received(trainer))
    one, two, three = (("STEPPED", i) for i in range(3))
    assert answered == ([[], [], [one, two, three]] if holds_steps else [[one], [two], [three]])


@pytest.mark.parametrize("kind", [ReplyKind.SPECULATED, ReplyKind.COMMITTED])
def test_other_replies_are_sent_immediately_and_bring_what_was_held(
    ends: tuple[socket.socket, Inbox], kind: ReplyKind
) -> None:
    outbox = Outbox(ends[1]._sock, holds_steps=True)
    outbox.add(Reply(kind=ReplyKind.STEPPED, sub_group=1), lambda: True)
    outbox.add(Reply(kind=kind, sub_group=2), lambda: True)
    assert received(ends[0]) == [("STEPPED", 1), (kind.name, 2)]
