"""What one optimizer step contains, counted over all ranks before its first backward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from superoffload import distributed
from superoffload.data.collate import Batch


class StepCounts(NamedTuple):
    """Sums over all ranks and micro-batches of a step.

    `target_tokens` is what the loss is divided by; `tokens` excludes padding. `stop_votes` and `save_votes` count the
    ranks that were asked to stop and to save.
    """

    target_tokens: int
    tokens: int
    stop_votes: int
    save_votes: int


def sum_over_ranks(micro_batches: Sequence[Batch], votes: tuple[float, float]) -> torch.Tensor:
    """Sum the fields of `StepCounts` over all ranks (collective); `votes` are this rank's `RunControl.votes()`.

    Returns float64 `[4]`, left on the device, so that the first micro-batch does not wait for it.
    """
    targets = sum(batch.target_tokens for batch in micro_batches)
    tokens = sum(sum(batch.lengths) for batch in micro_batches)
    sums = torch.tensor([targets, tokens, *votes], dtype=torch.float64, device=distributed.device())
    return distributed.all_reduce_sum(sums)


def read(sums: torch.Tensor) -> StepCounts:
    """Read the sums back from the device (waits for it)."""
    return StepCounts(*map(int, sums.tolist()))
