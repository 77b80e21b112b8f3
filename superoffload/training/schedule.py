"""The learning rate schedule; pure."""

import math
from dataclasses import dataclass

from superoffload.config import TrainingSettings

TIMESCALE = 10_000  # steps of inverse_sqrt without warm-up, as in transformers


def number_of_steps(total_steps: int, asked: float) -> int:
    """Return a number of steps: up to 1, `asked` is a fraction of all, rounded up; above 1 it is the number."""
    return min(total_steps, math.ceil(total_steps * asked) if asked <= 1 else int(asked))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The course of the learning rate. It rises linearly over `warmup` steps and reaches the peak with their last.

    After that
    * `constant` stays at the peak;
    * `cosine` and `linear` fall, and would reach 0 one step after the last;
    * `cosine_with_min_lr` falls as `cosine`, but to `floor`;
    * `wsd` (arXiv:2404.06395) stays at the peak, and falls to `floor` as a cosine over the last `decay` steps;
    * `inverse_sqrt` falls with the root of the step.

    From the peak on, these are the functions of transformers (transformers/optimization.py), where the warm-up is one
    step behind, because it starts at 0.
    """

    kind: str
    total: int
    warmup: int = 0
    decay: int = 0
    floor: float = 0.0

    def factor(self, step: int) -> float:
        """Return the learning rate of a step (the first is 0) as a fraction of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        if self.kind == "inverse_sqrt":
            timescale = self.warmup or TIMESCALE
            return math.sqrt(timescale / (step - self.warmup + timescale))
        start = max(self.warmup, self.total - self.decay) if self.kind == "wsd" else self.warmup
        done = min(1.0, max(0, step - start) / max(1, self.total - start))
        if self.kind == "linear":
            return 1 - done
        cosine = (1 + math.cos(math.pi * done)) / 2
        return cosine * (1 - self.floor) + self.floor if self.floor else cosine


def of(training: TrainingSettings, total_steps: int) -> Schedule:
    """Return the schedule of a run of `total_steps`."""
    return Schedule(
        kind=training.lr_scheduler,
        total=total_steps,
        warmup=number_of_steps(total_steps, training.warmup),
        decay=number_of_steps(total_steps, training.decay),
        floor=training.min_lr_ratio,
    )
