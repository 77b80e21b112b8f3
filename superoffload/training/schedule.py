"""The learning rate schedule; pure."""

import math


def warmup_steps(total_steps: int, ratio: float) -> int:
    """Return the number of warm-up steps, a fraction of all steps, rounded up."""
    return min(total_steps, math.ceil(total_steps * ratio))


def factor(kind: str, step: int, warmup: int, total_steps: int) -> float:
    """Return the learning rate of a step (the first is 0) as a fraction of the peak.

    It rises linearly over `warmup` steps and reaches the peak with the last of them. After that `cosine` and `linear`
    fall and would reach 0 one step after the last; `constant` stays at the peak.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done
