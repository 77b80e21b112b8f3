"""The modules that ZeRO-3 fetches as a whole: sparse blocks, and MLPs in tiles. A plan needs no torch from here."""

import re
from typing import Any

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


def make_leaf(module: Any) -> None:
    """Let ZeRO-3 fetch a module as a whole in each direction.

    It then takes the gradients of the weights when that of the module's input is there (torch, full backward hooks). If
    no input needs one, because everything before the module is frozen, it would take them too early, as zeros. So the
    first input, which holds the states, is made to need one if a weight does.
    """
    import torch
    from deepspeed.utils import set_z3_leaf_module  # only here: an export loads no DeepSpeed

    def require_gradient(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled() or any(getattr(value, "requires_grad", False) for value in inputs):
            return None
        trained = any(parameter.requires_grad for parameter in module.parameters())
        return (inputs[0].detach().requires_grad_(), *inputs[1:]) if trained and inputs else None

    set_z3_leaf_module(module, True)
    module.register_forward_pre_hook(require_gradient)
