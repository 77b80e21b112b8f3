"""Sequence parallel: ranks share a row, each with a part of its positions, and attention exchanges them for heads.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509): everything but attention works on single positions, so a rank
needs no other part for it. Around attention, an all-to-all gives each rank all positions of some of the heads, and a
second one gives it back all heads of its own positions. DeepSpeed knows nothing of it: the ranks are data-parallel ones
for ZeRO-3, which shards over all of them and averages all gradients, and the loss is a sum over target tokens.
"""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from superoffload import distributed
from superoffload.data.collate import Batch, Layout, collate, take_targets
from superoffload.errors import UserError, first_line
from superoffload.log import logger
from superoffload.model.loss_kernel import FATAL
from superoffload.protocols import Engine

Kernel = Callable[..., tuple[torch.Tensor, None]]
"""Attention to documents, as in `superoffload.model.attention`."""

LENGTH = 24  # positions of each part
EDGE = 4  # first positions of a part, on which what it lacks of the part before shows most
NOISE_FACTOR, LARGEST_NOISE = 3, 0.1
TOLERANCE = {torch.float32: 1e-4}
HALF_TOLERANCE = 2e-2  # products of other shapes are rounded otherwise

_groups: dict[int, Any] = {}


def form_groups(parts: int) -> None:
    """Form groups of `parts` consecutive ranks, which share their rows (collective)."""
    if parts > 1:
        _groups[parts], _ = torch.distributed.new_subgroups(parts)  # type: ignore[no-untyped-call]


def check_config(config: Any, parts: int) -> None:
    """Raise `UserError` if a model's configuration says that ranks cannot share a row.

    Its heads must be divisible. Rotary embeddings must not depend on the largest position, which each rank has of its
    own part alone (transformers, modeling_rope_utils.py, dynamic_rope_update).
    """
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    for each in (rotary, *rotary.values()):  # for all layers, or by their type
        kind = str(each.get("rope_type")) if isinstance(each, dict) else ""
        if "dynamic" in kind or kind == "longrope":
            raise UserError(
                f"--sequence_parallel_size {parts}: the rotary embedding of {config.model_type} ({kind}) depends on "
                "the length of a row, of which each rank has a part; use 1"
            )
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or heads % parts:
        raise UserError(
            f"--sequence_parallel_size {parts}: the {heads} attention heads of {config.model_type} cannot be divided "
            f"among {parts} ranks; use a divisor of their number"
        )


def exchanging(kernel: Kernel) -> Kernel:
    """Return the kernel for a part of the positions, if the options hold `sequence_parts`; else it stays as it is.

    Takes query, key and value `[batch, heads, length / parts, width]` and returns `[batch, length / parts, heads,
    width]`; the kernel gets all positions of some of the heads. The other options describe the whole row. Collective
    among the ranks that share it.
    """

    @functools.wraps(kernel)
    def attend(module: Any, *states: Any, **options: Any) -> tuple[torch.Tensor, None]:
        parts = options.pop("sequence_parts", 1)
        if parts == 1:
            return kernel(module, *states, **options)
        query, key, value, mask = states
        # Fewer heads of key and value than ranks, or an uneven number, are repeated until they can be divided: each
        # rank then has those that its query heads attend to.
        repeats = math.lcm(key.shape[1], parts) // key.shape[1]
        if repeats > 1:
            key, value = (state.repeat_interleave(repeats, dim=1) for state in (key, value))
            grouped = query.shape[1] // key.shape[1]
            module = SimpleNamespace(num_key_value_groups=grouped, is_causal=getattr(module, "is_causal", True))
        whole = [_exchange(state, _groups[parts]) for state in (query, key, value)]
        output, _ = kernel(module, *whole, mask, **options)
        return _exchange(output, _groups[parts]), None

    return attend


def _exchange(states: torch.Tensor, group: Any) -> torch.Tensor:
    """Send each rank its share of dimension 1, and join what they all sent along dimension 2 (collective).

    From `[batch, heads, length / parts, width]` to `[batch, heads / parts, length, width]`, and from
    `[batch, length, heads / parts, width]` to `[batch, length / parts, heads, width]`.
    """
    sizes = (torch.distributed.get_world_size(group), -1)
    by_rank = states.unflatten(1, sizes).movedim(1, 0)  # type: ignore[no-untyped-call]
    received: torch.Tensor = _AllToAll.apply(by_rank, group)  # type: ignore[no-untyped-call]
    return received.movedim(0, 2).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Rank i gets the i-th element of dimension 0 of each rank's states; the gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        states = states.contiguous()
        received = torch.empty_like(states)
        torch.distributed.all_to_all_single(received, states, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


def check(model_engine: Engine, layout: Layout) -> None:
    """Raise `UserError` if a model does not give the logits of a whole row when ranks share it (collective).

    Finds layers that mix positions outside of the attention kernel by trying: every rank computes a small row alone,
    and then its part of it. The first part lacks nothing, because models are causal: any difference there is rounding,
    which other parts may show too. Convolutions over positions need no trial, and in a fresh model they have hardly any
    effect that it would find. Does nothing without sequence parallel.
    """
    parts = layout.parts
    if parts == 1:
        return
    what = f"--sequence_parallel_size {parts}: {type(model_engine.module).__name__}"
    for name, module in model_engine.module.named_modules():
        if isinstance(module, torch.nn.Conv1d):
            raise UserError(f"{what} mixes positions outside of its attention ({name} is a convolution); use 1")
    found = distributed.all_gather_objects(_difference(model_engine, layout))
    if refusal := next((each for each in found if isinstance(each, str)), None):
        raise UserError(f"{what} does not accept a part of a row ({refusal}); use 1")
    noise = min(max(found[::parts]), LARGEST_NOISE)
    tolerance = NOISE_FACTOR * noise + TOLERANCE.get(next(model_engine.module.parameters()).dtype, HALF_TOLERANCE)
    logger.debug("Differences of logits by rank, between parts of a row and the whole: %s", found)
    if not all(difference <= tolerance for difference in found):  # some may be NaN
        raise UserError(
            f"{what} mixes positions outside of its attention (logits of a part differ by {max(found):.1%}); use 1"
        )
    logger.info("Sequence parallel: %d ranks share each row", parts)


def _difference(model_engine: Engine, layout: Layout) -> float | str:
    """Return how far this rank's part of a small row is from the whole row, or why the model rejected it (collective).

    The relative difference of the logits of the first positions of the part; the second largest, because a near-tie
    between experts that resolves differently affects one of them, and even the shortest convolution two.
    """
    batch, index = _batch(model_engine, layout), distributed.rank() % layout.parts
    was_training = model_engine.training
    model_engine.eval()
    try:
        with torch.no_grad():
            whole, own = (_logits(model_engine, part) for part in (batch, batch.part(index, layout.parts)))
    except FATAL:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError) as error:
        return first_line(error)
    finally:
        model_engine.train(was_training)
    edge = slice(index * LENGTH, index * LENGTH + EDGE)
    expected = whole[edge]
    if own.shape[0] != LENGTH:
        return f"it returns {own.shape[0]} positions of {LENGTH}"
    differences = (own[:EDGE] - expected).square().mean(dim=-1).sqrt() / expected.square().mean(dim=-1).sqrt()
    return float(differences.sort().values[-2])


def _batch(model_engine: Engine, layout: Layout) -> Batch:
    """Make a row of two documents, the second within the last part."""
    vocabulary = int(model_engine.module.config.get_text_config().vocab_size)
    ids = np.random.default_rng(0).integers(vocabulary, size=layout.parts * LENGTH)
    return collate([[(part, part) for part in np.split(ids, [-LENGTH // 3])]], 1, layout)


def _logits(model_engine: Engine, batch: Batch) -> torch.Tensor:
    inputs = batch.on(distributed.device())
    take_targets(inputs)
    logits: torch.Tensor = model_engine(**inputs).logits
    return logits[0].float()
