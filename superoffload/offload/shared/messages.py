"""The messages between trainer and optimizer process: fixed-size records over a SOCK_SEQPACKET socket.

No tensor is ever sent. A record names a sub-group, and both processes know where its tensors lie in the arena
(state.py). Every task carries the hyper-parameters it is to use, so schedules need no other channel.
"""

from __future__ import annotations

import select
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

_TASK = struct.Struct("<Biqqqqddddd?d")
_REPLY = struct.Struct("<Biqqd")

MAX_RECORD_BYTES = 8192
"""Upper limit for a record; longer error texts are truncated."""


class TaskKind(IntEnum):
    """What the trainer asks for.

    SPECULATE: write the new low-precision weights to the staging region and nothing else. Becomes a STEP if
        DECIDE for its round arrives first.
    STEP: update parameters and moments in place with gradient * factor, and write the staging region.
    COMMIT: the same without staging, after a speculation was accepted.
    DECIDE: the norm of this round is known; `factor` is final. Takes effect ahead of queued tasks.
    CANCEL: speculations on this sub-group up to `version` are void. Takes effect ahead of queued tasks.
    DROP: speculations of all rounds up to this one are void. Takes effect ahead of queued tasks.
    EXIT: end the process.
    """

    SPECULATE = 1
    STEP = 2
    COMMIT = 3
    DECIDE = 4
    CANCEL = 5
    DROP = 6
    EXIT = 7


class ReplyKind(IntEnum):
    """What the optimizer process reports; every SPECULATE, STEP and COMMIT gets one reply.

    The text of READY, if any, is a warning; the text of ERROR says what failed.
    """

    READY = 1
    SPECULATED = 2
    STEPPED = 3
    COMMITTED = 4
    VOID = 5
    ERROR = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamHyper:
    """The hyper-parameters of one update, as DeepSpeed's param group holds them at that moment."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bias_correction: bool = True


NO_HYPER = AdamHyper(lr=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One message from the trainer.

    step: the Adam step number t of this update, 1 for the first.
    anchor_step: the step at which the running product beta^t starts (see bias.py).
    factor: what the gradient is multiplied by, 1 / (loss scale * clip coefficient).
    round: counts the optimizer steps of the run, including skipped ones. version: counts its speculations.
    """

    kind: TaskKind
    sub_group: int = -1
    round: int = 0
    version: int = 0
    step: int = 0
    anchor_step: int = 0
    hyper: AdamHyper = NO_HYPER
    factor: float = 1.0

    def pack(self) -> bytes:
        """Return the record as bytes."""
        h = self.hyper
        return _TASK.pack(
            self.kind,
            self.sub_group,
            self.round,
            self.version,
            self.step,
            self.anchor_step,
            h.lr,
            h.beta1,
            h.beta2,
            h.eps,
            h.weight_decay,
            h.bias_correction,
            self.factor,
        )

    @staticmethod
    def unpack(record: bytes) -> Task:
        """Read a record written by pack(). Raises struct.error if its length is wrong."""
        kind, sub_group, round_, version, step, anchor, *hyper, factor = _TASK.unpack(record)
        lr, beta1, beta2, eps, weight_decay, bias_correction = hyper
        return Task(
            kind=TaskKind(kind),
            sub_group=sub_group,
            round=round_,
            version=version,
            step=step,
            anchor_step=anchor,
            hyper=AdamHyper(
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                bias_correction=bias_correction,
            ),
            factor=factor,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One message from the optimizer process; `busy_s` is the time that the task took there, in seconds."""

    kind: ReplyKind
    sub_group: int = -1
    round: int = 0
    version: int = 0
    busy_s: float = 0.0
    text: str = ""

    def pack(self) -> bytes:
        """Return the record as bytes, followed by the text, truncated to the maximum length."""
        head = _REPLY.pack(self.kind, self.sub_group, self.round, self.version, self.busy_s)
        return head + self.text.encode()[: MAX_RECORD_BYTES - len(head)]

    @staticmethod
    def unpack(record: bytes) -> Reply:
        """Read a record written by pack()."""
        kind, sub_group, round_, version, busy_s = _REPLY.unpack(record[: _REPLY.size])
        return Reply(
            kind=ReplyKind(kind),
            sub_group=sub_group,
            round=round_,
            version=version,
            busy_s=busy_s,
            text=record[_REPLY.size :].decode(errors="replace"),
        )


def wait_for(sock: socket.socket, event: int, timeout_s: float) -> bool:
    """Wait until a socket is ready for `event` (select.POLLIN or POLLOUT) or closed; return False after `timeout_s`.

    select.select would refuse descriptors of 1024 and more.
    """
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(timeout_s * 1000))
