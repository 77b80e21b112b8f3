"""Model shape and row lengths -> FLOPs; pure.

The convention is that of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): a token costs 6 FLOPs per
parameter that takes part in a matrix product (2 forward, 4 backward), and attention costs, per layer,
12 * heads * head_dim FLOPs per pair of a query and a key it may see. PaLM counts every pair of a row; a causal
model computes half of them, and so does the figure here.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the FLOPs of a model depend on.

    `active_parameters`: parameters multiplied for a token (of a mixture of experts: those routed to).
    `attention_width`: heads times head dimension. `attention_windows`: for each layer the number of positions
    that a query looks back over, itself included; 0 where it sees all before it.
    """

    active_parameters: int
    attention_width: int
    attention_windows: tuple[int, ...]


def causal_pairs(length: int, window: int = 0) -> float:
    """Count the query-key pairs of a row under a causal mask, as length^2 / 2 without a window."""
    if not window or length <= window:
        return length * length / 2
    return window * window / 2 + (length - window) * window


def model_flops(shape: ModelShape, lengths: Iterable[int]) -> float:
    """Count the FLOPs of forward and backward over rows of these lengths (padding left out)."""
    rows = list(lengths)
    pairs = sum(
        layers * sum(causal_pairs(length, window) for length in rows)
        for window, layers in Counter(shape.attention_windows).items()
    )
    return 6.0 * shape.active_parameters * sum(rows) + 12.0 * shape.attention_width * pairs


def hardware_flops(flops: float, recomputed: bool) -> float:
    """Add the second forward of activation checkpointing: 8 FLOPs where the model needs 6."""
    return flops * 4 / 3 if recomputed else flops
