"""Which power of beta the bias correction of ZeRO-Offload would use.

DeepSpeed's C++ Adam (csrc/includes/cpu_adam.h, IncrementStep) does not compute beta^t at each step. It multiplies
a running float32 product, and restarts it from pow(beta, t) whenever the betas differ from those of the previous
call or t jumps. The two methods round differently. Results must equal ZeRO-Offload's bit for bit, in whatever
order sub-groups are computed and however many speculations are discarded. Therefore the trainer tracks what
ZeRO-Offload's object would hold and sends, with each task, the step at which the product was last restarted: its
*anchor*. Anchor 0 means the product of a run without interruption.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass


def as_float32(value: float) -> float:
    """Round to the nearest float32, which is what the C++ object stores and compares."""
    return ctypes.c_float(value).value


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductHistory:
    """What determines the next product: the last step, its betas, and the step at which the product started."""

    step: int = 0
    betas: tuple[float, float] = (0.0, 0.0)
    anchor_step: int = 0

    @staticmethod
    def fresh(beta1: float, beta2: float) -> ProductHistory:
        """Return the history of an object that was just created with these betas."""
        return ProductHistory(betas=(as_float32(beta1), as_float32(beta2)))

    def after(self, step: int, beta1: float, beta2: float) -> ProductHistory:
        """Return the history after one more update, by the rules of IncrementStep."""
        betas = (as_float32(beta1), as_float32(beta2))
        continues = betas == self.betas and step in (self.step, self.step + 1)
        return ProductHistory(step=step, betas=betas, anchor_step=self.anchor_step if continues else step)

    def plan(self, updates: Iterable[tuple[int, float, float]]) -> tuple[list[int], ProductHistory]:
        """Return the anchor of each update (step, beta1, beta2), in the given order, and the history after them."""
        history, anchors = self, []
        for step, beta1, beta2 in updates:
            history = history.after(step, beta1, beta2)
            anchors.append(history.anchor_step)
        return anchors, history
