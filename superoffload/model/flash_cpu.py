"""torch's flash kernel for the CPU, once per document of a pack, with the gradients of short documents in float32."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

# The kernel computes a document in blocks of 32 positions or more, by small matrix products. Without AMX, MKL converts
# the bf16 factors of each product to float32. Up to this many positions, converting the document once costs less
# backward; forward it makes no difference. Measured by tests/benchmarks/attention_cpu.py.
FLOAT32_LENGTH = 256
# The kernel's operators are not part of torch's public interface: their arguments, and the number of their results.
FORWARD, BACKWARD = (f"_scaled_dot_product_flash_attention_for_cpu{suffix}" for suffix in ("", "_backward"))
KNOWN = {
    FORWARD: (("query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"), 2),
    BACKWARD: (
        ("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal", "attn_mask", "scale"),
        3,
    ),
}


def suits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether `attend` takes these states faster than sdpa does; else sdpa computes the same by itself."""
    states = (query, key, value)
    plain = all(state.dtype == torch.bfloat16 and state.stride(-1) == 1 for state in states)  # the kernel relies on 1
    same_width = query.shape[-1] == key.shape[-1] == value.shape[-1]
    return plain and same_width and query.device.type == "cpu" and not _has_amx() and _has_known_operators()


@functools.cache
def _has_known_operators() -> bool:
    """Return whether this version of torch has the operators in the form that is known here."""
    for name, known in KNOWN.items():
        operator = getattr(getattr(torch.ops.aten, name, None), "default", None)
        if operator is None:
            return False
        schema = operator._schema
        if (tuple(argument.name for argument in schema.arguments), len(schema.returns)) != known:
            return False
    return True


def _has_amx() -> bool:
    """Return whether the CPU has matrix units for bf16, which are faster than float32 for any length."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is None or bool(supported())  # if torch does not say, sdpa decides


def attend(
    states: Sequence[torch.Tensor], lengths: Sequence[int], window: int | None, scale: float | None
) -> torch.Tensor:
    """Attend causally within each document.

    `states` are query, key and value, bf16 `[1, heads, positions, width]` on the CPU; key and value may have fewer
    heads. `lengths`, none of them 0, sum up to `positions`; `window` is the number of visible positions.

    Returns `[1, positions, heads, width]`: the output of sdpa, bit for bit. Gradients are at least as exact as its own.
    """
    plan = _Plan(tuple(lengths), window, scale)
    output: torch.Tensor = _Documents.apply(*states, plan)  # type: ignore[no-untyped-call]
    return output


class _Plan(NamedTuple):
    lengths: tuple[int, ...]
    window: int | None
    scale: float | None

    def options(self, length: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the kernel's options for a document."""
        pairs = visible_pairs(length, self.window, torch.device("cpu"))
        mask = None if pairs is None else torch.zeros(pairs.shape, dtype=dtype).masked_fill_(~pairs, -torch.inf)
        return {"is_causal": mask is None, "attn_mask": mask, "scale": self.scale}


class _Documents(torch.autograd.Function):
    """All documents in one node of the graph, so that outputs and gradients are written where they belong."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: _Plan) -> torch.Tensor:
        output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        # float32 [1, heads, length] per document, from which the kernel restores the weights backward
        log_sums = []
        for length, *states, place in _split(plan.lengths, query, key, value, output.transpose(1, 2)):
            attended, log_sum = getattr(torch.ops.aten, FORWARD)(*states, 0.0, **plan.options(length, query.dtype))
            place.copy_(attended)
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, output, *log_sums)
        ctx.plan = plan
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("attention to packs on the CPU has no second derivative")
        query, key, value, output, *log_sums = ctx.saved_tensors
        grads = [torch.empty_like(state) for state in (query, key, value)]
        given = (grad_output.transpose(1, 2), query, key, value, output.transpose(1, 2))
        documents = _split(ctx.plan.lengths, *given, *grads)
        for (length, *states), log_sum in zip(documents, log_sums, strict=True):
            dtype = torch.float32 if length <= FLOAT32_LENGTH else query.dtype
            factors = (state.to(dtype) for state in states[:5])
            found = getattr(torch.ops.aten, BACKWARD)(*factors, log_sum, 0.0, **ctx.plan.options(length, dtype))
            for grad, computed in zip(states[5:], found, strict=True):
                grad.copy_(computed)
        return *grads, None


def visible_pairs(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the visible pairs of a document, bool `[length, length]`; None if plain causal attention is enough."""
    if not window or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _split(lengths: tuple[int, ...], *states: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield each document's length and views of its part of each state, `[1, heads, positions, width]`."""
    return zip(lengths, *(torch.split(state, list(lengths), dim=2) for state in states), strict=True)
