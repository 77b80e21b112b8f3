"""What one optimizer step contains, counted over all ranks before its first backward; what ranks are asked to do."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from superoffload import distributed
from superoffload.data.collate import Batch


class StepCounts(NamedTuple):
    """Sums over all ranks and micro-batches of a step.

    `target_tokens` is what the loss is divided by; `tokens` excludes padding. `bad_losses` counts the ranks whose loss
    of the step before is infinite or NaN: that of this step is not known yet.
    """

    target_tokens: int
    tokens: int
    bad_losses: int


class Votes(NamedTuple):
    """How many ranks have been asked to stop, and to save."""

    stop: int
    save: int


class StepSums:
    """The sums of a step: at once on the device, for the loss; later on the host, for everything else."""

    def __init__(self, sums: torch.Tensor) -> None:
        """Take the fields of `StepCounts`, float64 `[3]` on the device."""
        self.target_tokens = sums[0]
        self._on_host = distributed.HostCopy(sums)

    def read(self) -> StepCounts:
        """Return the counts on the host.

        After the optimizer step this waits for nothing: DeepSpeed has read the gradient norm by then, for which the
        device had to do everything that was queued before, including this copy.
        """
        return StepCounts(*map(int, self._on_host.tolist()))


class VoteSums:
    """The votes of all ranks, on their way to the host."""

    def __init__(self, votes: tuple[float, float]) -> None:
        """Sum this rank's `RunControl.votes()` over all ranks (collective)."""
        sums = torch.tensor(votes, dtype=torch.float64).to(distributed.device(), non_blocking=True)
        self._on_host = distributed.HostCopy(distributed.all_reduce_sum(sums))

    def read(self) -> Votes:
        """Return the votes on the host; after the optimizer step, like `StepSums.read`."""
        return Votes(*map(int, self._on_host.tolist()))


def sum_over_ranks(micro_batches: Sequence[Batch], bad_loss: torch.Tensor) -> StepSums:
    """Sum the fields of `StepCounts` over all ranks (collective); `bad_loss` is `Meter.bad_loss`, on the device."""
    targets = sum(batch.target_tokens for batch in micro_batches)
    tokens = sum(sum(batch.lengths) for batch in micro_batches)
    counted = torch.tensor([targets, tokens], dtype=torch.float64)
    sums = torch.cat([counted.to(distributed.device(), non_blocking=True), bad_loss[None]])
    return StepSums(distributed.all_reduce_sum(sums))
