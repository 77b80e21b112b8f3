"""The shape of a model: what the memory and the time of training it depend on."""

from dataclasses import dataclass
from typing import Any

from superoffload.model.flops import ModelShape, numel, shape_of
from superoffload.model.parameter_groups import parameter_groups
from superoffload.protocols import Model


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
    experts_per_token: 1 for a dense model.
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
        return max(numel for group in self.groups for numel in group)


def of_model(name: str, skeleton: Model) -> Shape:
    """Read the shape of a model on the meta device."""
    config: Any = skeleton.config.get_text_config()
    heads = config.num_attention_heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    output = skeleton.get_output_embeddings()
    sizes = tuple(tuple(numel(p) for p in group["params"]) for group in parameter_groups(skeleton, 0.01))
    layers: dict[str, int] = {}
    for path, parameter in skeleton.named_parameters():
        prefix, found, rest = path.partition(".layers.")
        if found:
            key = f"{prefix}.{rest.split('.')[0]}"
            layers[key] = layers.get(key, 0) + numel(parameter)
    return Shape(
        name=name,
        groups=sizes,
        frozen=sum(numel(p) for p in skeleton.parameters() if not p.requires_grad),
        layers=config.num_hidden_layers,
        layer=max(layers.values(), default=0),
        unit=max(map(max, sizes)),
        hidden=config.hidden_size,
        intermediate=experts * inner,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=output.weight.shape[0],
        head=numel(output.weight),
        tied=output.weight is skeleton.get_input_embeddings().weight,
        experts_per_token=experts,
        flops=shape_of(skeleton),
    )
