"""The loss of each source, if the rows come from several."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from superoffload import distributed
from superoffload.data.collate import Batch


class SourceLosses:
    """Sums the losses and the target tokens of each source on this rank; without sources, it does nothing.

    A micro-batch costs one addition on the device; nothing waits for it.
    """

    def __init__(self, sources: Sequence[str], state: Mapping[str, Sequence[float]] | None = None) -> None:
        """Start at zero, or where `state` says, the result of `state()`; sources that it lacks start at zero."""
        self.sources = tuple(sources)
        before = [(state or {}).get(label, (0.0, 0.0)) for label in self.sources]
        self._losses = torch.tensor([loss for loss, _ in before], dtype=torch.float64, device=distributed.device())
        self._targets = [float(targets) for _, targets in before]

    def state(self) -> dict[str, tuple[float, float]]:
        """Return the sum of losses and the number of target tokens of each source."""
        return dict(zip(self.sources, zip(self._losses.tolist(), self._targets, strict=True), strict=True))

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        """Add the sums of a micro-batch's losses by source, `[sources]`."""
        if self.sources and batch.by_source is not None:
            self._losses += losses
            self._targets = [sum(pair) for pair in zip(self._targets, batch.by_source.counts, strict=True)]

    def take(self) -> torch.Tensor:
        """Return the sums, float64 `[2 * sources]` on the device, for a sum over all ranks, and start at zero again."""
        targets = torch.tensor(self._targets, dtype=torch.float64, device=self._losses.device)
        taken = torch.cat([self._losses, targets])
        self._losses = torch.zeros_like(self._losses)
        self._targets = [0.0] * len(self.sources)
        return taken

    def numbers(self, sums: Sequence[float], prefix: str = "") -> dict[str, Any]:
        """Name what `take` returned, summed over all ranks: the mean loss per target token, and the target tokens.

        The loss of a source without target tokens is NaN.
        """
        count = len(self.sources)
        by_source = list(zip(self.sources, sums[:count], sums[count:], strict=True))
        means = {f"{prefix}loss/{label}": loss / n if n else math.nan for label, loss, n in by_source}
        return {**means, **{f"{prefix}target_tokens/{label}": int(n) for label, _, n in by_source}}
