"""What the optimizer process may do to the arena between a task and its reply, for the race detector."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from superoffload.offload.shared.messages import Reply, ReplyKind, Task, TaskKind
from superoffload.offload.shared.state import KINDS
from tests.helpers.happens_before import Actor, Clock, Memory, Span

_ADAM = ("parameters", "gradients", "exp_avg", "exp_avg_sq")
_ANSWERED = (TaskKind.SPECULATE, TaskKind.STEP, TaskKind.COMMIT)
_ANSWERS = (ReplyKind.SPECULATED, ReplyKind.STEPPED, ReplyKind.COMMITTED, ReplyKind.VOID)


class Device(Protocol):
    """What this module uses of AsyncDevice."""

    memory: Memory
    lock: Any

    @property
    def host(self) -> Actor: ...

    def host_waits_for(self, clock: Clock) -> None: ...


class _Watched:
    """One optimizer process: an actor that has seen what the sender of its last task had seen."""

    def __init__(self, device: Device, spans: dict[tuple[int, str], Span]) -> None:
        self._device = device
        self._spans = spans
        self._agent = Actor("the optimizer process")
        self._unanswered: deque[Clock] = deque()
        self._speculations: dict[int, Task] = {}
        self._void_version: dict[int, int] = {}
        self._dropped_round = -1
        self.order = threading.RLock()

    def is_asked(self, task: Task) -> None:
        """Note every access that the task allows."""
        with self._device.lock:
            self._agent.join(self._device.host.clock)
            if task.kind is TaskKind.CANCEL:
                self._void_version[task.sub_group] = task.version
                self._forget(task.sub_group)
            elif task.kind is TaskKind.DROP:
                self._dropped_round = task.round
                for sub_group in list(self._speculations):
                    self._forget(sub_group)
            elif task.kind is TaskKind.DECIDE:  # speculations become steps
                for speculation in self._speculations.values():
                    self._device.memory.change(self._agent, _name(speculation), forget=False)
            elif task.kind in _ANSWERED:
                self._compute(task)
                self._unanswered.append(dict(self._agent.clock))

    def answers(self) -> Clock:
        """Return what the process had seen, and done, when it sent its next reply."""
        return self._unanswered.popleft()

    def _compute(self, task: Task) -> None:
        speculates = task.kind is TaskKind.SPECULATE
        if speculates:
            void = task.version <= self._void_version.get(task.sub_group, -1) or task.round <= self._dropped_round
            if void:
                return
            self._speculations[task.sub_group] = task
        else:
            self._speculations.pop(task.sub_group, None)
        for kind in KINDS:
            if kind in _ADAM or task.kind is not TaskKind.COMMIT:
                span = self._spans.get((task.sub_group, kind))
                if span is not None:
                    write = kind == "staging" or not speculates
                    self._device.memory.access(self._agent, span, write, _name(task))

    def _forget(self, sub_group: int) -> None:
        """Forgive a void speculation its accesses: its results are not used, so what it reads may change."""
        speculation = self._speculations.pop(sub_group, None)
        if speculation is not None:
            self._device.memory.change(self._agent, _name(speculation), forget=True)


def _name(task: Task) -> str:
    return f"{task.kind.name} {task.version} of sub-group {task.sub_group} in round {task.round}"


class ProcessWatch:
    """Wraps the arena and the handle on the optimizer process, so that the device knows of both."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._spans: dict[tuple[int, str], Span] = {}
        self._processes: weakref.WeakKeyDictionary[Any, _Watched] = weakref.WeakKeyDictionary()

    def mapping(self, init: Callable[..., None]) -> Callable[..., None]:
        """Return Arena.__init__, which makes the arena known as memory of the host."""

        def mapped(arena: Any, *args: Any) -> None:
            init(arena, *args)
            self._spans = {}
            for sub_group, state in arena.sub_groups.items():
                for kind in KINDS:
                    tensor = getattr(state, kind)
                    if tensor.numel():
                        self._device.memory.add(tensor, None, f"{kind} of sub-group {sub_group}")
                        self._spans[sub_group, kind] = self._device.memory.span(tensor)

        return mapped

    def sending(self, send: Callable[..., None]) -> Callable[..., None]:
        """Return OptimizerProcess.send, which hands over what the calling thread has seen."""

        def sent(process: Any, task: Task, relieve: Callable[[], None] | None = None) -> None:
            watched = self._watched(process)
            with watched.order:
                watched.is_asked(task)
                send(process, task, relieve)

        return sent

    def receiving(self, receive: Callable[..., Reply | None]) -> Callable[..., Reply | None]:
        """Return OptimizerProcess.receive, after which the calling thread has seen the answered task's work."""

        def received(process: Any, timeout_s: float, doing: str) -> Reply | None:
            reply = receive(process, timeout_s, doing)
            if reply is not None and reply.kind in _ANSWERS:
                self._device.host_waits_for(self._watched(process).answers())
            return reply

        return received

    def _watched(self, process: Any) -> _Watched:
        if process not in self._processes:
            self._processes[process] = _Watched(self._device, self._spans)
        return self._processes[process]
