"""The trainer's side of an optimizer step. Knows sub-groups and tasks; knows nothing of DeepSpeed.

A *round* is everything between two optimizer steps. In a round every sub-group passes through

    idle -> speculating -> speculated -> uploaded -> committing -> idle      the usual case
    idle -> speculating -> stepped -> uploaded -> idle                        the norm was known before its turn
    idle -> speculating -> speculated -> stepping -> stepped -> uploaded      clipped, so the speculation was refused
    idle -> stepping -> stepped -> uploaded -> idle                           nothing was speculated

A speculation reads P, G, M and V and writes only S, so there is never anything to roll back: refusing a
speculation means ignoring it. G belongs to the trainer, except between the sending of a STEP or COMMIT and its
confirmation; `gradient_changes` waits for that before the trainer writes the next gradient. P, M and V belong to
the optimizer process; the trainer may read or write them after `flush`. S belongs to the optimizer process until
it replies, then to the trainer until the next backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from logging import getLogger
from typing import Protocol

from ..shared.bias import ProductHistory
from ..shared.messages import AdamHyper, Reply, ReplyKind, Task, TaskKind
from .bookkeeping import Stage, Statistics, Work
from .trials import SpeculationTrials

_log = getLogger(__name__)

CLIPPED_STEPS_BEFORE_PAUSE = 2


class Channel(Protocol):
    """What the coordinator uses of OptimizerProcess."""

    @property
    def pid(self) -> int:
        """Return the process id of the optimizer process."""

    def send(self, task: Task, relieve: Callable[[], None] | None = None) -> None:
        """Send a task; while the socket is full, call `relieve`."""

    def receive(self, timeout_s: float, doing: str) -> Reply | None:
        """Return the next reply, or None if none arrives within `timeout_s`."""


class Coordinator:
    """Decides what the optimizer process computes, and keeps track of what it has done."""

    def __init__(
        self,
        process: Channel,
        members: Mapping[int, int],
        hyper_of: Callable[[int], AdamHyper],
        history: ProductHistory,
        notice_interval_s: float = 60.0,
    ) -> None:
        """Coordinate the sub-groups in `members` (sub-group -> number of its parameters).

        hyper_of: returns the hyper-parameters that a sub-group has in DeepSpeed's param groups at the time of the call.
        history: what ZeRO-Offload's Adam object would hold now.
        """
        self._process = process
        self._members = dict(members)
        self._order = sorted(members)
        self._hyper_of = hyper_of
        self._notice_interval_s = notice_interval_s
        self.history = history
        self.steps = dict.fromkeys(self._order, 0)
        self.statistics = Statistics()
        self.send_speculation: Callable[[Task], None] = self._send
        """Sends a speculation; replaced, together with `settle`, where gradients arrive asynchronously."""
        self.settle: Callable[[], None] = lambda: None
        """Called before a decision: returns once every speculation has been sent and every gradient has arrived."""
        self.verify_decision: Callable[[Mapping[int, Task]], bool] | None = None
        """Called with the decided updates before they are sent, and with no commit pending, until it returns False."""
        self.trials: SpeculationTrials | None = None
        """Decide whether to speculate; None: always, except after clipped steps."""
        self._round = 0
        self._version = 0
        self._uncommitted: set[int] = set()
        self._clipped_in_a_row = 0
        self._ready = False
        self._work: dict[int, Work] = {}
        self._seen: dict[int, set[Hashable]] = {}
        self._decided_factor: float | None = None
        self._decided_hypers: dict[int, AdamHyper] = {}
        self._decided_anchors: dict[int, int] = {}
        self._speculated_in_round = False
        self._speculative_plan: tuple[dict[int, AdamHyper], dict[int, int]] | None = None
        self._history_after = history
        self._begin_round()

    # ---------------------------------------------------------------- during the boundary backward

    def gradient_changes(self, sub_group: int) -> None:
        """Wait until the trainer may write this sub-group's gradient; cancel a speculation on the old one."""
        if sub_group in self._uncommitted:
            self._wait_for_commit(sub_group)
        self.cancel(sub_group)

    def arrived(self, sub_group: int, parameter: Hashable, speculation_factor: float | None) -> None:
        """Record that the final gradient of one parameter is in place; once all have arrived, speculate.

        A parameter that arrives a second time in a round restarts the count of its sub-group.
        `speculation_factor` None means not to speculate.
        """
        seen = self._seen[sub_group]
        if parameter in seen:
            seen.clear()
        seen.add(parameter)
        if len(seen) == self._members[sub_group] and speculation_factor is not None:
            self._speculate(sub_group, speculation_factor)

    def cancel(self, sub_group: int) -> None:
        """Cancel the speculation on this sub-group, if there is one."""
        work = self._work.pop(sub_group, None)
        if work is not None:
            self.statistics.cancelled += 1
            self._send(self._task(TaskKind.CANCEL, sub_group=sub_group, version=work.version))

    def pump(self) -> None:
        """Process the replies that have arrived. Raises OptimizerProcessError if the process has died."""
        while (reply := self._process.receive(0.0, "training")) is not None:
            self._process_reply(reply)

    @property
    def worth_speculating(self) -> bool:
        """Return False while the last steps were all clipped, and in rounds in which the trials choose to step.

        The norm is known at every step, speculated or not, so after clipped steps speculation resumes without a trial.
        """
        chosen = self.trials is None or self.trials.speculate
        return chosen and self._clipped_in_a_row < CLIPPED_STEPS_BEFORE_PAUSE

    # ------------------------------------------------------------------------------ inside step()

    def decide(self, factor: float, unclipped_factor: float) -> None:
        """Fix the factor of this round once the norm is known; request every step that was not speculated."""
        if self._decided_factor is not None:
            return
        self.settle()
        self._decided_factor = factor
        self._clipped_in_a_row = self._clipped_in_a_row + 1 if factor != unclipped_factor else 0
        self.statistics.clipped_steps += factor != unclipped_factor
        hypers = self._hypers()
        anchors, self._history_after = self._plan(hypers)
        stale = [
            i for i, w in self._work.items() if (w.hyper, w.anchor_step) != (hypers[i], anchors[i])
        ]  # the schedule or the user changed a hyper-parameter between backward and step
        for i in stale:
            self.cancel(i)
        self._decided_hypers, self._decided_anchors = hypers, anchors
        if self.verify_decision is not None:
            self.flush()
            if not self.verify_decision({i: self._final_task(TaskKind.STEP, i) for i in self._order}):
                self.verify_decision = None
        self._send(self._task(TaskKind.DECIDE, factor=factor))
        self.pump()
        for i in self._order:  # the next forward needs the first sub-group first
            if i not in self._work or self._is_refused(self._work[i]):
                self._request_step(i)

    def collect(self, upload: Callable[[int], None]) -> None:
        """Wait for the new weights of all sub-groups, upload each as it arrives, then request the commits.

        Of those that have arrived, the first sub-group is uploaded first, because the next forward begins with it.
        `upload(sub_group)` copies the staging region to the device, in stream order. Afterwards the step
        counts are those after this step. Raises RuntimeError without a preceding decide().
        """
        if self._decided_factor is None:
            raise RuntimeError("collect() before decide()")
        started = time.perf_counter()
        pending, accepted = list(self._order), []
        while pending:
            self.pump()
            waiting = []
            for i in pending:
                if self._is_refused(self._work[i]):
                    self._request_step(i)
                stage = self._work[i].stage
                if stage in (Stage.SPECULATED, Stage.STEPPED):
                    upload(i)
                    accepted += [i] if stage is Stage.SPECULATED else []
                else:
                    waiting.append(i)
            if len(waiting) == len(pending):
                self._receive_one("waiting for the optimizer step", started)
            pending = waiting
        for i in self._order:
            self.steps[i] += 1
        for i in sorted(accepted, reverse=True):  # the next backward needs the last gradient region first
            self._uncommitted.add(i)
            self._send(self._final_task(TaskKind.COMMIT, i))
        self.history = self._history_after
        self.statistics.accepted += len(accepted)
        self.statistics.steps += 1
        self.statistics.wait_s += time.perf_counter() - started

    def end_round(self) -> None:
        """Begin the next round."""
        if self.trials is not None:
            chosen, stepped = self.trials.speculate, self._decided_factor is not None
            self.statistics.stepping_rounds += stepped and not chosen
            self.trials.end_round(counts=stepped and chosen == self._speculated_in_round)
        self._round += 1
        self._begin_round()

    def discard(self) -> None:
        """Abandon this round: overflow, NaN, a dropped batch, or values replaced from outside."""
        if not self._work and not any(self._seen.values()):
            return
        self.settle()
        self._send(self._task(TaskKind.DROP))
        self.statistics.discarded_rounds += 1
        self.end_round()

    # ------------------------------------------------------------------------------ between steps

    def flush(self) -> None:
        """Wait until P, M, V and G are those after the last step()."""
        for i in list(self._uncommitted):
            self._wait_for_commit(i)

    @property
    def has_uncommitted(self) -> bool:
        """Return whether a commit has not been confirmed yet."""
        return bool(self._uncommitted)

    def wait_until_ready(self) -> None:
        """Wait until the optimizer process is ready. Raises OptimizerProcessError if it cannot start."""
        started = time.perf_counter()
        while not self._ready:
            self._receive_one("waiting for the optimizer process to start", started)

    # ---------------------------------------------------------------------------------- internals

    def _begin_round(self) -> None:
        self._work = {}
        self._seen = {i: set() for i in self._order}
        self._decided_factor = None
        self._speculated_in_round = False
        self._decided_hypers, self._decided_anchors = {}, {}
        self._speculative_plan = None

    def _hypers(self) -> dict[int, AdamHyper]:
        return {i: self._hyper_of(i) for i in self._order}

    def _plan(self, hypers: Mapping[int, AdamHyper]) -> tuple[dict[int, int], ProductHistory]:
        """Return the anchors of this round's updates, made in the order in which ZeRO-Offload would make them."""
        updates: Sequence[tuple[int, float, float]] = [
            (self.steps[i] + 1, hypers[i].beta1, hypers[i].beta2) for i in self._order
        ]
        anchors, after = self.history.plan(updates)
        return dict(zip(self._order, anchors, strict=True)), after

    def _speculate(self, sub_group: int, factor: float) -> None:
        self.cancel(sub_group)
        if self._speculative_plan is None:
            hypers = self._hypers()
            self._speculative_plan = hypers, self._plan(hypers)[0]
        hypers, anchors = self._speculative_plan
        self._version += 1
        self._speculated_in_round = True
        work = Work(
            version=self._version,
            hyper=hypers[sub_group],
            anchor_step=anchors[sub_group],
            factor=factor,
            stage=Stage.SPECULATING,
        )
        self._work[sub_group] = work
        self.statistics.speculated += 1
        self.send_speculation(
            Task(
                kind=TaskKind.SPECULATE,
                sub_group=sub_group,
                round=self._round,
                version=work.version,
                step=self.steps[sub_group] + 1,
                anchor_step=work.anchor_step,
                hyper=work.hyper,
                factor=factor,
            )
        )

    def _is_refused(self, work: Work) -> bool:
        """Return whether a finished speculation has another factor than the one that was decided."""
        return work.stage is Stage.SPECULATED and work.factor != self._decided_factor

    def _request_step(self, sub_group: int) -> None:
        self.statistics.refused += sub_group in self._work
        task = self._final_task(TaskKind.STEP, sub_group)
        self._work[sub_group] = Work(
            version=0,
            hyper=task.hyper,
            anchor_step=task.anchor_step,
            factor=task.factor,
            stage=Stage.STEPPING,
        )
        self.statistics.stepped_on_request += 1
        self._send(task)

    def _final_task(self, kind: TaskKind, sub_group: int) -> Task:
        """Build the task that makes the decided update; for a COMMIT the step counts are already incremented."""
        if self._decided_factor is None:
            raise RuntimeError(f"{kind.name} before decide()")
        return Task(
            kind=kind,
            sub_group=sub_group,
            round=self._round,
            step=self.steps[sub_group] + (kind is TaskKind.STEP),
            anchor_step=self._decided_anchors[sub_group],
            hyper=self._decided_hypers[sub_group],
            factor=self._decided_factor,
        )

    def _task(self, kind: TaskKind, sub_group: int = -1, version: int = 0, factor: float = 1.0) -> Task:
        return Task(kind=kind, sub_group=sub_group, round=self._round, version=version, factor=factor)

    def _send(self, task: Task) -> None:
        self._process.send(task, relieve=self.pump)

    def _process_reply(self, reply: Reply) -> None:
        if reply.kind is ReplyKind.READY:
            self._ready = True
            _log.debug("start-up: loading the optimizer process took %.2f s", reply.busy_s)
            if reply.text:
                _log.warning("Optimizer process: %s", reply.text)
            return
        busy = self.statistics.busy_s
        busy[reply.kind.name.lower()] = busy.get(reply.kind.name.lower(), 0.0) + reply.busy_s
        if reply.kind is ReplyKind.COMMITTED:
            self._uncommitted.discard(reply.sub_group)
        elif reply.kind in (ReplyKind.SPECULATED, ReplyKind.STEPPED):
            work = self._work.get(reply.sub_group)
            if work is None or (work.version, self._round) != (reply.version, reply.round):
                return  # a reply to a speculation that has been abandoned since
            if reply.kind is ReplyKind.SPECULATED:
                work.stage = Stage.SPECULATED
            else:
                self.statistics.stepped_in_turn += work.stage is Stage.SPECULATING
                work.stage = Stage.STEPPED

    def _wait_for_commit(self, sub_group: int) -> None:
        started = time.perf_counter()
        self.pump()
        while sub_group in self._uncommitted:
            self._receive_one("waiting for the commit of the last step", started)
        self.statistics.commit_wait_s += time.perf_counter() - started

    def _receive_one(self, doing: str, started: float) -> None:
        """Wait for a reply as long as the process lives; warn at every notice interval."""
        while True:
            slice_s = min(1.0, self._notice_interval_s)
            waited_before = time.perf_counter() - started
            reply = self._process.receive(slice_s, doing)
            if reply is not None:
                self._process_reply(reply)
                return
            waited = time.perf_counter() - started
            if waited // self._notice_interval_s > waited_before // self._notice_interval_s:
                _log.warning(
                    "%s for %.0f s; the optimizer process (pid %d) is alive, but stopped or slow",
                    doing,
                    waited,
                    self._process.pid,
                )
