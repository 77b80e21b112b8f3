"""Where the time of a step goes: data, forward, loss, backward, optimizer. Waits for nothing."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from superoffload import distributed
from superoffload.protocols import Engine

PARTS = ("data", "forward", "loss", "backward", "optimizer", "upload")
"""The parts in the order of a step."""


class StepParts:
    """Divides the time of steps on this rank at marks, in the order in which the device reaches them.

    A mark costs the host a reading of its clock, or on CUDA an event of the device, which is read a step later: by then
    the device has passed it, because a step waits for the norm of its gradients.

    data: the wait for the next batches. forward: up to the output head. loss: the head and the loss. backward.
    optimizer: the exposed wait for the optimizer in `engine.step()`. upload: the part of that in which new weights are
    copied to the device; known in superoffload mode on the CPU only, where it waits for the copies. On CUDA these run
    beside the next forward. What a step does besides (counting, log lines) is in no part.
    """

    def __init__(self, model_engine: Engine | None = None) -> None:
        """Tell the loss from the rest of forward by a hook on the output head, if there is one."""
        self._optimizer = getattr(model_engine, "optimizer", None)
        head = model_engine.module.get_output_embeddings() if model_engine is not None else None
        if head is not None:
            head.register_forward_pre_hook(self._before_head)
        self._marks: list[tuple[str, Any]] = []
        self._before: list[tuple[str, Any]] = []
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._steps = 0
        self._uploaded_s = self._upload_s()

    def _before_head(self, head: Any, _: Any) -> None:
        if head.training:
            self.mark("forward")

    def start(self) -> None:
        """Start a step now: what came before since the end of the last step is in no part."""
        self._marks = [("", distributed.Mark())]

    def mark(self, part: str) -> None:
        """End a part that began at the mark before. The loss that no head's hook has announced counts as forward."""
        if part == "loss" and not (self._marks and self._marks[-1][0] == "forward"):
            part = "forward"
        self._marks.append((part, distributed.Mark()))

    def waiting_for(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Pass on what `batches` yields; the time that it takes to come is data."""
        waiting = iter(batches)
        while True:
            self.mark("")
            try:
                found = next(waiting)
            except StopIteration:
                return
            self.mark("data")
            yield found

    def end_step(self) -> None:
        """End a step, and read the marks of the one before."""
        self._read(self._before)
        self._before = self._marks
        self._steps += 1
        self.start()

    def _read(self, marks: list[tuple[str, Any]]) -> None:
        for (_, begun), (part, ended) in itertools.pairwise(marks):
            if part:
                self._sums[part] += begun.seconds_until(ended)

    def take(self) -> dict[str, float]:
        """Return the seconds per step of each part since the last call; waits until the device has done the last step.

        Parts that were never marked are missing.
        """
        self._read(self._before)
        self._before = []
        found, self._sums = dict(self._sums), defaultdict(float)
        steps, self._steps = max(1, self._steps), 0
        uploaded_before_s, self._uploaded_s = self._uploaded_s, self._upload_s()
        if self._uploaded_s > uploaded_before_s and "optimizer" in found:
            found["upload"] = self._uploaded_s - uploaded_before_s
            found["optimizer"] -= found["upload"]
        return {part: found[part] / steps for part in PARTS if part in found}

    def _upload_s(self) -> float:
        return float(getattr(getattr(self._optimizer, "statistics", None), "upload_s", 0.0))
