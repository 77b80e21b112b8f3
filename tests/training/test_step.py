"""What a step holds, counted over all ranks."""

import torch

from superoffload import distributed
from superoffload.data.collate import Batch
from superoffload.training import step
from tests.helpers.ranks import run_ranks


def count_on_this_rank() -> tuple[step.StepCounts, step.Votes]:
    """Count a step of two micro-batches, in which only rank 1 votes to stop, and had a bad loss."""
    rank = distributed.rank()
    inputs = {"input_ids": torch.zeros((1, 32), dtype=torch.int64)}
    batches = [Batch(inputs=inputs, lengths=(10 + rank, 3), target_tokens=targets) for targets in (5 + rank, 2)]
    sums = step.sum_over_ranks(batches, torch.tensor(float(rank == 1)).double())
    assert sums.target_tokens.dtype == torch.float64
    counts = sums.read()
    assert sums.target_tokens == counts.target_tokens
    return counts, step.VoteSums((float(rank == 1), 0.0)).read()


def test_counts_are_sums_over_ranks_and_micro_batches() -> None:
    counts = step.StepCounts(target_tokens=7 + 8, tokens=26 + 28, bad_losses=1)
    assert run_ranks(2, count_on_this_rank) == [(counts, step.Votes(stop=1, save=0))] * 2
