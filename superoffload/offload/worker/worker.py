"""The optimizer process: receive a task, compute, reply.

It is started as a separate program (`python -m`), neither forked nor through multiprocessing. So the training
script is never run a second time, this process has no CUDA context, and the trainer's threads are not copied.
It ends when the trainer sends EXIT, when the trainer's end of the socket closes, or, if another child of a dead
trainer keeps that end open, within two seconds.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..shared.messages import MAX_RECORD_BYTES, Reply, ReplyKind, Task, TaskKind, wait_for

if TYPE_CHECKING:
    from ..shared.state import SubGroupState
    from .adam import SubGroupAdam

_CHECK_TRAINER_INTERVAL_S = 2.0


class TrainerGone(Exception):
    """The trainer has sent EXIT, closed its end of the socket, or died."""


class Inbox:
    """Receives tasks; applies DECIDE, CANCEL and DROP immediately, and queues the others in order."""

    def __init__(self, sock: socket.socket, trainer_pid: int) -> None:
        self._sock = sock
        self._trainer_pid = trainer_pid
        self._queue: deque[Task] = deque()
        self._decided_factor: dict[int, float] = {}
        self._dropped_round = -1
        self._void_version: dict[int, int] = {}

    def next(self) -> Task:
        """Wait for the next task and return it. Raises TrainerGone."""
        self.take_in()
        while not self._queue:
            ready = wait_for(self._sock, select.POLLIN, _CHECK_TRAINER_INTERVAL_S)
            if not ready and os.getppid() != self._trainer_pid:
                raise TrainerGone
            self.take_in()
        return self._queue.popleft()

    def take_in(self) -> None:
        """Receive everything that has arrived, without waiting. Raises TrainerGone."""
        while True:
            try:
                record = self._sock.recv(MAX_RECORD_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionError as error:
                raise TrainerGone from error
            if not record:
                raise TrainerGone
            self._sort(Task.unpack(record))

    def has_more(self) -> bool:
        """Return whether another task has arrived. Raises TrainerGone."""
        self.take_in()
        return bool(self._queue)

    def is_void(self, task: Task) -> bool:
        """Return whether this speculation has been cancelled or dropped."""
        return task.round <= self._dropped_round or task.version <= self._void_version.get(task.sub_group, -1)

    def decided_factor(self, round_: int) -> float | None:
        """Return the final factor of this round, or None if the trainer has not sent it yet."""
        return self._decided_factor.get(round_)

    def _sort(self, task: Task) -> None:
        if task.kind is TaskKind.EXIT:
            raise TrainerGone
        if task.kind is TaskKind.DECIDE:
            self._decided_factor = {task.round: task.factor}
        elif task.kind is TaskKind.CANCEL:
            self._void_version[task.sub_group] = task.version
        elif task.kind is TaskKind.DROP:
            self._dropped_round = task.round
        else:
            self._queue.append(task)


class Outbox:
    """Sends replies. On shared cores, holds those to steps back while there is more to do.

    The trainer waits for all steps, and each reply would wake it on a core that the next step uses.
    """

    def __init__(self, sock: socket.socket, *, holds_steps: bool) -> None:
        self._sock = sock
        self._holds_steps = holds_steps
        self._held: list[bytes] = []

    def add(self, reply: Reply, more: Callable[[], bool]) -> None:
        """Send a reply and those held back before it, or hold it back; `more` returns whether another task waits."""
        self._held.append(reply.pack())
        if self._holds_steps and reply.kind is ReplyKind.STEPPED and more():
            return
        for record in self._held:
            self._sock.send(record)
        self._held.clear()


class Worker:
    """Executes tasks."""

    def __init__(self, inbox: Inbox, adam: SubGroupAdam, sub_groups: dict[int, SubGroupState]) -> None:
        self._inbox = inbox
        self._adam = adam
        self._sub_groups = sub_groups

    def handle(self, task: Task) -> ReplyKind:
        """Execute one SPECULATE, STEP or COMMIT; return the kind of the reply. Raises TrainerGone."""
        state = self._sub_groups[task.sub_group]
        if task.kind is TaskKind.SPECULATE:
            return self._speculate(task, state)
        stage = task.kind is TaskKind.STEP
        self._adam.step(task, state, stage=stage)
        return ReplyKind.STEPPED if stage else ReplyKind.COMMITTED

    def _speculate(self, task: Task, state: SubGroupState) -> ReplyKind:
        """Speculate; if the norm is known by now, make the final step instead."""
        inbox = self._inbox
        finished = False
        if inbox.decided_factor(task.round) is None and not inbox.is_void(task):
            finished = self._adam.speculate(task, state, lambda: self._is_futile(task))
        if inbox.is_void(task):
            return ReplyKind.VOID
        if finished:
            return ReplyKind.SPECULATED
        factor = inbox.decided_factor(task.round)
        if factor is None:
            raise AssertionError("a speculation was abandoned although it is neither void nor decided")
        self._adam.step(replace(task, factor=factor), state, stage=True)
        return ReplyKind.STEPPED

    def _is_futile(self, task: Task) -> bool:
        self._inbox.take_in()
        factor = self._inbox.decided_factor(task.round)
        return self._inbox.is_void(task) or (factor is not None and factor != task.factor)


def run(sock: socket.socket, setup: dict[str, Any], arena_fd: int) -> None:
    """Map the arena, load the op, and execute tasks forever. Raises TrainerGone at the end."""
    started = time.perf_counter()
    import torch

    from ..shared.state import Arena, ArenaLayout
    from .adam import SubGroupAdam, Threads, load_op
    from .fused import Arithmetic, FusedAdam

    torch.set_num_threads(len(setup["cores"]))
    threads = Threads(beside_trainer=setup["threads_beside_trainer"], while_trainer_waits=len(setup["cores"]))
    mode = setup["adamw_mode"]
    try:
        op = load_op(setup["op_name"], setup["op_path"])
        arena = Arena(ArenaLayout.from_json(setup["layout"]), arena_fd)
        adam = SubGroupAdam(op, adamw_mode=mode, chunk_numel=setup["chunk_numel"], threads=threads)
        path = setup["fused_path"]
        kernels = [FusedAdam(path, adamw_mode=mode, arithmetic=a) for a in Arithmetic] if path else []
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sock.send(Reply(kind=ReplyKind.ERROR, text=f"could not start: {error!r}").pack())
        raise
    os.close(arena_fd)
    inbox = Inbox(sock, setup["trainer_pid"])
    worker = Worker(inbox, adam, arena.sub_groups)
    warning = ""
    if kernels and not adam.adopt(*kernels):
        warning = "the fused kernel is not used because its results differ from DeepSpeed's cpu_adam on this CPU"
    sock.send(Reply(kind=ReplyKind.READY, busy_s=time.perf_counter() - started, text=warning).pack())
    outbox = Outbox(sock, holds_steps=setup["shares_cores"])
    while True:
        task = inbox.next()
        started = time.perf_counter()
        try:
            kind = worker.handle(task)
        except (RuntimeError, MemoryError, ValueError) as error:
            what = f"{task.kind.name} of sub-group {task.sub_group}"
            text = f"failed in {what} ({error!r}). Resume from the last checkpoint."
            sock.send(Reply(kind=ReplyKind.ERROR, sub_group=task.sub_group, text=text).pack())
            raise
        reply = Reply(
            kind=kind,
            sub_group=task.sub_group,
            round=task.round,
            version=task.version,
            busy_s=time.perf_counter() - started,
        )
        outbox.add(reply, inbox.has_more)


def main(arguments: list[str]) -> int:
    """Run the optimizer process. The arguments are three inherited descriptors: socket, setup (JSON), arena."""
    # A terminal or a scheduler signals every process of a job, and DeepSpeed's launcher every process below a rank. The
    # trainer handles the signal and may still save, which needs this process. This process ends with the trainer.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    socket_fd, setup_fd, arena_fd = (int(a) for a in arguments)
    with os.fdopen(setup_fd, "rb") as file:
        setup = json.load(file)
    os.nice(setup["niceness"])
    os.sched_setaffinity(0, setup["cores"])  # before torch starts its threads, which inherit it
    with socket.socket(fileno=socket_fd) as sock:
        try:
            run(sock, setup, arena_fd)
        except (TrainerGone, BrokenPipeError, ConnectionResetError):
            return 0
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # there is nothing to clean up, and torch's exit handlers take time
