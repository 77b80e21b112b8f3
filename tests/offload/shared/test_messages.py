"""Records survive the conversion to bytes and back."""

from __future__ import annotations

import fcntl
import resource
import select
import socket

import pytest

from superoffload.offload.shared.messages import (
    MAX_RECORD_BYTES,
    AdamHyper,
    Reply,
    ReplyKind,
    Task,
    TaskKind,
    wait_for,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", list(TaskKind))
def test_task_round_trip(kind: TaskKind) -> None:
    hyper = AdamHyper(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, bias_correction=False)
    task = Task(kind=kind, sub_group=7, round=2**40, version=3, step=9, anchor_step=1, hyper=hyper, factor=1 / 3)
    assert Task.unpack(task.pack()) == task


@pytest.mark.parametrize("kind", list(ReplyKind))
def test_reply_round_trip(kind: ReplyKind) -> None:
    reply = Reply(kind=kind, sub_group=1, round=2, version=3, busy_s=0.25, text="no memory left")
    assert Reply.unpack(reply.pack()) == reply


def test_a_long_error_text_is_truncated_to_one_record() -> None:
    assert len(Reply(kind=ReplyKind.ERROR, text="x" * 100_000).pack()) == MAX_RECORD_BYTES


def test_a_descriptor_above_1023_is_waited_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    high = socket.socket(fileno=fcntl.fcntl(one.fileno(), fcntl.F_DUPFD, 2000))
    try:
        assert wait_for(high, select.POLLIN, 0) is False
        assert wait_for(high, select.POLLOUT, 0) is True
        other.send(b"x")
        assert wait_for(high, select.POLLIN, 0) is True
        assert high.recv(1) == b"x"
        other.close()
        assert wait_for(high, select.POLLIN, 0) is True  # the end of the socket is an event, too
    finally:
        for end in (one, other, high):
            end.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
