"""The modules that ZeRO-3 fetches as a whole: sparse blocks. Pure; imports no torch."""

import re

from superoffload.protocols import Model

# Sparse blocks as transformers names them. Ranks may route to different experts, so ZeRO-3 must fetch such a block as a
# whole; otherwise the ranks wait for different parameters forever.
SPARSE_BLOCK = re.compile(r"(SparseMoeBlock|MoELayer|MoE|Moe|Experts)$")


def class_names(model: Model) -> list[str]:
    """List the names of the classes of a model's modules, sorted, each once."""
    return sorted({type(module).__name__ for module in model.modules()})


def sparse_blocks(model: Model) -> list[str]:
    """List the classes of a model's sparse blocks, without those that only occur inside another of them."""
    return _outermost(model, [name for name in class_names(model) if SPARSE_BLOCK.search(name)])


def _outermost(model: Model, names: list[str]) -> list[str]:
    """Drop the classes that also occur inside another of them, such as the experts inside their block."""
    inside = {
        type(inner).__name__
        for module in model.modules()
        if type(module).__name__ in names
        for inner in module.modules()
        if inner is not module
    }
    return [name for name in names if name not in inside]
