"""Model shape and row lengths -> FLOPs. Pure; imports no torch.

The convention is that of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): a token costs 6 FLOPs per
parameter in a matrix product (2 forward, 4 backward), and attention costs, per layer, 12 * heads * head_dim FLOPs per
pair of a query and a visible key. PaLM counts every pair of a row; a causal model computes half of them, and so does
this module.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from superoffload.log import logger
from superoffload.protocols import Model

ATTENDING = re.compile(r"attention|full|sliding|hybrid")  # in the names of layer types
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # names in transformers configurations


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the FLOPs of a model depend on.

    `active_parameters`: parameters multiplied for a token (in a mixture of experts, only those routed to), frozen ones
    in proportion to their work.
    `attention_width`: heads times head dimension. `attention_windows`: per layer with attention, the number of
    positions visible to a query, itself included; 0 if it sees all earlier positions.
    """

    active_parameters: int
    attention_width: int
    attention_windows: tuple[int, ...]


def numel(parameter: Any) -> int:
    """Return the number of elements of a parameter, even if ZeRO-3 holds only a part of it on this rank."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def count_parameters(model: Model, trained_only: bool = False) -> int:
    """Return the number of elements of all parameters, tied ones counted once, or only of those that are trained."""
    return sum(numel(parameter) for parameter in model.parameters() if parameter.requires_grad or not trained_only)


def shape_of(model: Model, frozen: frozenset[str] = frozenset()) -> ModelShape:
    """Read from a model what its FLOPs depend on; what a model does not say is left out, with a warning.

    Parameters of experts count in proportion to the experts per token. The input embedding is a lookup, not a product:
    it counts only if it is tied to the output layer. Parameters that are not trained are not used, and do not count,
    except those named in `frozen`: their own gradient costs nothing, and backward passes through them only if there is
    a trained parameter before them. Attention counts in full.
    """
    config = model.config.get_text_config()
    try:
        active = _active_parameters(model, config, frozen)
        width, windows = _attention_of(config)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        logger.warning("FLOPs count every parameter and no attention, which this model does not describe (%s)", error)
        active, width, windows = count_parameters(model, trained_only=True), 0, ()
    return ModelShape(active_parameters=active, attention_width=width, attention_windows=windows)


def _active_parameters(model: Model, config: Any, frozen: frozenset[str]) -> int:
    active_share = _active_share(config)
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is embedding
    total, after_trained = 0.0, False
    for name, parameter in model.named_parameters():  # in the order of forward
        after_trained |= parameter.requires_grad
        work = 1.0 if parameter.requires_grad else (2 / 3 if after_trained else 1 / 3) if name in frozen else 0.0
        if parameter is not embedding or tied:
            total += work * numel(parameter) * (active_share if ".experts." in name else 1.0)
    return int(total)


def setting(config: Any, name: str) -> Any:
    """Return a setting of a model; the largest, if its layers differ (Gemma 4); None if there is none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # how transformers refuses a setting in which layers differ
        return max(getattr(layer, name, None) or 0 for layer in config.per_layer_config)


def _active_share(config: Any) -> float:
    """Return the experts of a token as a share of all, 1 without experts."""
    experts = next((count for count in (setting(config, key) for key in EXPERT_COUNTS) if count), 0)
    per_token = setting(config, "num_experts_per_tok") or experts
    return min(1.0, per_token / experts) if experts else 1.0


def _attention_of(config: Any) -> tuple[int, tuple[int, ...]]:
    """Return the width of the attention and the window of each layer that has one; `0, ()` if that is not known.

    Layers without attention (state spaces, convolutions, linear attention) cost only their parameters here.
    """
    heads, layers = setting(config, "num_attention_heads"), getattr(config, "num_hidden_layers", None)
    if not (isinstance(heads, int) and isinstance(layers, int) and heads):
        return 0, ()
    head_dim = setting(config, "head_dim") or getattr(config, "hidden_size", 0) // heads
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ["full"] * layers
    window = setting(config, "sliding_window") or 0
    attending = [str(kind) for kind in kinds if "linear" not in str(kind) and ATTENDING.search(str(kind))]
    return heads * head_dim, tuple(window if "sliding" in kind else 0 for kind in attending)


def causal_pairs(length: int, window: int = 0) -> float:
    """Count the query-key pairs of a row under a causal mask; length^2 / 2 without a window."""
    if not window or length <= window:
        return length * length / 2
    return window * window / 2 + (length - window) * window


def model_flops(shape: ModelShape, lengths: Iterable[int]) -> float:
    """Count the FLOPs of forward and backward over rows of these lengths, padding excluded."""
    rows = list(lengths)
    pairs = sum(
        layers * sum(causal_pairs(length, window) for length in rows)
        for window, layers in Counter(shape.attention_windows).items()
    )
    return 6.0 * shape.active_parameters * sum(rows) + 12.0 * shape.attention_width * pairs


def tiled_parameters(model: Model) -> int:
    """Return the parameters, multiplied for a token, of modules that run in tiles (`model/tiled_mlp.py`)."""
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "runs_in_tiles", False))
    share = _active_share(model.config.get_text_config())
    return int(
        sum(
            numel(parameter) * (share if ".experts." in name else 1.0)
            for name, parameter in model.named_parameters()
            if prefixes and name.startswith(prefixes)
        )
    )


def hardware_flops(flops: float, recomputed: bool, tiles: float = 0.0) -> float:
    """Add what backward computes again to the FLOPs of forward and backward.

    With activation checkpointing all of forward: 8 FLOPs per parameter and token instead of 6. Otherwise `tiles`, those
    of the forward of tiled MLPs, 2 per parameter and token. With both, an MLP runs in backward only once, if its layer
    has no norm behind it; where it has one, as in Gemma, the second time is not counted.
    """
    return flops * 4 / 3 if recomputed else flops + tiles
