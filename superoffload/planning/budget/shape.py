"""The shape of a model: what the memory and the time of training it depend on. Imports no torch by itself."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from superoffload.model.flops import ModelShape, numel, setting, shape_of
from superoffload.model.leaf_modules import sparse_blocks
from superoffload.model.parameter_groups import parameter_groups
from superoffload.protocols import Model

BUILT_IN = Path(__file__).with_name("shapes.json")
HEAD_NORMS = ("q_norm.weight", "q_layernorm.weight")  # names of the norms of queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model without its weights. Sizes of parameters are in elements.

    groups: the trained parameters, in the order of the optimizer's groups (weight decay first), which is the order in
        which DeepSpeed cuts them into sub-groups.
    frozen: elements that are not trained.
    layer: elements of the largest decoder layer.
    unit: elements of the largest module that ZeRO-3 gathers as a whole: a leaf module (a sparse block), or the largest
        parameter.
    head: elements of the output layer; vocabulary: its rows; tied: it is the input embedding too.
    intermediate: inner width of the MLP that a token passes through, summed over its experts.
    heads, kv_heads, head_dim: 0 for a model without attention.
    experts_per_token: 1 for a dense model; more means that tokens are sorted by expert.
    head_norms: queries and keys are normalised.
    sinks: attention has a sink, as in gpt-oss; its softmax is not in float32 then, and the MLP has clamps.
    flops: what the FLOPs of a token depend on.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    frozen: int
    layers: int
    layer: int
    unit: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    head: int
    tied: bool
    experts_per_token: int
    head_norms: bool
    sinks: bool
    flops: ModelShape

    @property
    def trained(self) -> int:
        """Return the number of trained elements."""
        return sum(sum(group) for group in self.groups)

    @property
    def parameters(self) -> int:
        """Return the number of elements, tied ones counted once."""
        return self.trained + self.frozen

    @property
    def largest(self) -> int:
        """Return the elements of the largest trained parameter."""
        return max((numel for group in self.groups for numel in group), default=0)


def built_in_names() -> tuple[str, ...]:
    """List the names of the shapes that need no network: short names, and the hub ids that they stand for."""
    return tuple(_entries())


def built_in(name: str) -> Shape:
    """Return the shape of a well-known model from a file of the package. Raises KeyError for any other name."""
    entry = _entries()[name]
    groups = tuple(tuple(_expand(group)) for group in entry["groups"])
    flops = {**entry["flops"], "attention_windows": tuple(_expand(entry["flops"]["attention_windows"]))}
    rest = {key: entry[key] for key in (field.name for field in fields(Shape)) if key not in ("groups", "flops")}
    return Shape(**rest, groups=groups, flops=ModelShape(**flops))


def config_of(name: str) -> dict[str, Any]:
    """Return what config.json says about a well-known model, as far as memory and time depend on it.

    Raises KeyError for any other name.
    """
    return dict(_entries()[name]["config"])


def _entries() -> dict[str, dict[str, Any]]:
    entries = json.loads(BUILT_IN.read_text(encoding="utf-8"))
    named = {entry["name"]: entry for entry in entries}
    return named | {hub_id: entry for entry in entries for hub_id in entry["hub_ids"]}


def _expand(items: Iterable[int | list[Any]]) -> list[int]:
    """Write out repeated parts: `[1, [3, [5, 6]]]` means 1, and three times 5, 6."""
    result: list[int] = []
    for item in items:
        result += [item] if isinstance(item, int) else item[0] * _expand(item[1])
    return result


def load(name: str, revision: str | None = None, trust_remote_code: bool = False, freeze: Sequence[str] = ()) -> Shape:
    """Read the shape of the model in a folder or on the hub, from its configuration alone.

    `freeze` are the patterns of `--freeze`.

    Of a model that is wrapped around a text model, what text does not reach is frozen, as in training. Raises
    `UserError` if there is no such model.
    """
    from superoffload.model import architecture, freezing
    from superoffload.model.load import load_config

    skeleton = architecture.empty_model(load_config(name, revision, trust_remote_code), trust_remote_code)
    if skeleton.config is not skeleton.config.get_text_config():
        unused = architecture.unused_parameters(skeleton)
        for path, parameter in skeleton.named_parameters():
            parameter.requires_grad_(path not in unused)
    return of_model(name, skeleton, freezing.freeze(skeleton, freeze))


def of_model(name: str, skeleton: Model, frozen: frozenset[str] = frozenset()) -> Shape:
    """Read the shape of a model on the meta device; what its configuration does not say is read from its weights.

    `frozen` names the parameters that are used, but not trained.
    """
    used = {
        id(parameter) for path, parameter in skeleton.named_parameters() if parameter.requires_grad or path in frozen
    }
    config: Any = skeleton.config.get_text_config()
    sizes = tuple(tuple(numel(p) for p in group["params"]) for group in parameter_groups(skeleton, 0.01))
    layers = _layers(skeleton, used)
    embedding = skeleton.get_input_embeddings().weight
    output = getattr(skeleton.get_output_embeddings(), "weight", embedding)
    paths = [path for path, _ in skeleton.named_parameters()]
    hidden = _number(config, "hidden_size") or embedding.shape[-1]
    heads = _number(config, "num_attention_heads") if _attends(skeleton) else 0
    return Shape(
        name=name,
        groups=sizes,
        frozen=sum(numel(p) for p in skeleton.parameters() if not p.requires_grad),
        layers=len(layers),
        layer=max((_gathered(layer, used) for layer in layers), default=0),
        unit=_unit(skeleton, used),
        hidden=hidden,
        intermediate=_intermediate(config, layers),
        heads=heads,
        kv_heads=min(_number(config, "num_key_value_heads") or heads, heads),
        head_dim=(_number(config, "head_dim") or hidden // heads) if heads else 0,
        vocabulary=output.shape[0],
        head=numel(output),
        tied=output is embedding,
        experts_per_token=_experts(config),
        head_norms=any(path.endswith(HEAD_NORMS) for path in paths),
        sinks=any(path.endswith(".sinks") for path in paths),
        flops=shape_of(skeleton, frozen),
    )


def _layers(skeleton: Model, used: set[int]) -> list[Any]:
    """Return the decoder layers: the list of modules with the most parameters in use."""
    lists = [list(module) for module in skeleton.modules() if type(module).__name__ == "ModuleList"]  # type: ignore[call-overload]
    return max(lists, key=lambda layers: sum(_gathered(layer, used) for layer in layers), default=[])


def _gathered(module: Any, used: set[int]) -> int:
    """Return the elements of a module's parameters that are in use, which are gathered when it runs."""
    return sum(numel(parameter) for parameter in module.parameters() if id(parameter) in used)


def _unit(skeleton: Model, used: set[int]) -> int:
    blocks = sparse_blocks(skeleton)
    leaves = [_gathered(module, used) for module in skeleton.modules() if type(module).__name__ in blocks]
    return max(*leaves, *(numel(parameter) for parameter in skeleton.parameters() if id(parameter) in used), 0, 0)


def _number(config: Any, *names: str) -> int:
    """Return the first of these settings that a configuration has; the largest, if it has one per layer; else 0."""
    for name in names:
        value = setting(config, name)
        if isinstance(value, (list, tuple)):
            value = max((item for item in value if isinstance(item, int)), default=None)
        if isinstance(value, int) and value:
            return value
    return 0


def _attends(skeleton: Model) -> bool:
    """Return whether any module is an attention; the configuration of a pure state space may name heads too."""
    return any("attention" in type(module).__name__.lower() for module in skeleton.modules())


def _experts(config: Any) -> int:
    return _number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k") or 1


def _intermediate(config: Any, layers: list[Any]) -> int:
    """Return the inner width of the widest MLP; without a setting for it, the largest side of a layer's weights."""
    experts = _experts(config)
    dense = _number(config, "intermediate_size", "ffn_dim", "n_inner")
    if experts > 1:
        inner = _number(config, "moe_intermediate_size") or dense
        shared = _number(config, "shared_expert_intermediate_size") or inner * _number(config, "n_shared_experts")
        alone = dense if _number(config, "first_k_dense_replace") else 0
        return max(experts * inner + shared, alone)
    weights = (parameter for layer in layers for parameter in layer.parameters() if parameter.dim() == 2)
    return dense or max((max(parameter.shape) for parameter in weights), default=0)
