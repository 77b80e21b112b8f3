"""The loss of causal language modelling, as a sum, so that a step can weight all its target tokens equally."""

import torch
from torch.nn import functional

from superoffload.data.encode import IGNORED


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the cross-entropy of the target tokens, float32 `[]`.

    `logits` `[batch, length, vocabulary]` of any float type; `labels` int64 `[batch, length]`, -100 for positions that
    are not targets. Position i predicts label i + 1.
    """
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED, reduction="sum"
    )
