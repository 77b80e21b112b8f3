"""Count what one optimizer step holds, over all ranks, before its first backward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from superoffload import distributed
from superoffload.data.collate import Batch


class StepCounts(NamedTuple):
    """Sums over all ranks and micro-batches of a step: float64 `[]` each, left on the device until read.

    The loss is divided by `target_tokens`; `tokens` excludes padding. `stop_votes` and `save_votes` count the ranks
    that were asked to stop and to save.
    """

    target_tokens: torch.Tensor
    tokens: torch.Tensor
    stop_votes: torch.Tensor
    save_votes: torch.Tensor


def count(micro_batches: Sequence[Batch], votes: tuple[float, float]) -> StepCounts:
    """Count a step over all ranks; `votes` are this rank's `RunControl.votes()` (collective)."""
    targets = sum(batch.target_tokens for batch in micro_batches)
    tokens = sum(sum(batch.lengths) for batch in micro_batches)
    sums = torch.tensor([targets, tokens, *votes], dtype=torch.float64, device=distributed.device())
    return StepCounts(*distributed.all_reduce_sum(sums))
