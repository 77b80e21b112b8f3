"""The course of the learning rate; pure."""

import math


def warmup_steps(total_steps: int, ratio: float) -> int:
    """Count the steps of the warm-up, a share of all steps, rounded up."""
    return min(total_steps, math.ceil(total_steps * ratio))


def factor(kind: str, step: int, warmup: int, total_steps: int) -> float:
    """Return the learning rate of a step (the first is 0) as a share of the peak.

    It rises linearly over `warmup` steps and reaches the peak with the last of them; after that `cosine` and
    `linear` fall towards 0, which the step after the last one would have, and `constant` stays.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done
