"""Fused kernels for norms, SwiGLU and rotary embeddings: choose them by trying them, and use them in one model.

They replace what lies between the matrix products of a layer. No weight is touched and no class is changed: the modules
of this model get a `forward` of their own, which runs inside their hooks, where ZeRO-3 has gathered their weights.
"""

import inspect
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

from superoffload import distributed
from superoffload.errors import UserError, first_line
from superoffload.log import logger
from superoffload.protocols import Model

ROTARY = "apply_rotary_pos_emb"  # the function's name in the files of transformers
ROWS, LENGTH, INNER_WIDTH = 2, 24, 96  # of the trial: rows, tokens in each, width of its MLP
NO_CUDA = "they need a CUDA device"
# The largest difference between two kernels, as a share of the largest element.
TOLERANCE = {torch.float32: 1e-4}
HALF_TOLERANCE = 2e-2
# What a kernel that cannot run raises, and a module whose forward is not the one that is looked for.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)


class Kernels(NamedTuple):
    """The three functions; all tensors of a call have one float type.

    norm: states `[..., width]`, weight `[width]`, epsilon -> `[..., width]`. swiglu: gate and up, `[..., width]`, ->
    `[..., width]`. rotary: queries and keys `[batch, heads, length, width]`, cosines and sines `[batch, length, width]`
    -> queries and keys.
    """

    norm: Callable[..., Any]
    swiglu: Callable[..., Any]
    rotary: Callable[..., Any]


def rms_norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Divide states by their root mean square, in float32 (transformers, LlamaRMSNorm)."""
    wide = states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(states.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Gate the states of an MLP (transformers, LlamaMLP)."""
    return torch.nn.functional.silu(gate) * up


def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """Rotate queries and keys by their positions (transformers, models/llama, apply_rotary_pos_emb)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    halves = [(states, *states.chunk(2, dim=-1)) for states in (query, key)]
    return tuple(states * cos + torch.cat((-second, first), dim=-1) * sin for states, first, second in halves)


def compiled() -> Kernels:
    """Return kernels that torch.compile makes on first use, once for packs of all lengths.

    A batch of one row would be compiled apart from one of several: norm and SwiGLU see no rows.
    """
    norm, gated, rotary = (torch.compile(function, dynamic=True) for function in (rms_norm, swiglu, rotate))
    return Kernels(
        lambda states, *others: norm(states.flatten(0, -2), *others).view_as(states),
        lambda gate, up: gated(gate.flatten(0, -2), up.flatten(0, -2)).view_as(gate),
        rotary,
    )


def liger() -> Kernels:
    """Return the kernels of Liger; its loss kernels are not used.

    Its norm could overwrite the gradient of its output, which a model that adds the output to a residual still needs.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> Any:
        return LigerRMSNormFunction.apply(states, weight, epsilon, 0.0, "llama", False)

    return Kernels(norm, LigerSiLUMulFunction.apply, LigerRopeFunction.apply)


def use(requested: str, model: Model) -> None:
    """Put the kernels for `--kernels` `requested` into the modules of a loaded model that they suit (collective).

    Raises `UserError` if they were requested by name and cannot run, or suit no module.
    """
    missing = problem = _liger_is_missing() if requested in ("auto", "liger") else None
    if requested == "none" or (requested == "auto" and missing == NO_CUDA):
        return
    places: list[_Place] = []
    if problem is None:
        places, problem = _fitting(compiled if requested == "compiled" else liger, model)
    if distributed.all_ranks_ok(problem is None):
        for place in places:
            for module in place.modules:
                place.replace(place, module)
        counts: Counter[str] = Counter()
        for place in places:
            counts[place.name] += len(place.modules)
        served = ", ".join(f"{count} {name}" for name, count in counts.items())
        logger.info("Kernels: %s, in %s", "compiled" if requested == "compiled" else "liger", served)
        return
    if requested == "auto" and missing:  # on this node: another may have it, so the ranks had to agree
        return
    problem = problem or "another rank rejected them"
    if requested != "auto":
        raise UserError(f"--kernels {requested}: {problem}; use auto or none")
    logger.info("Kernels: the model's own, because liger's do not suit (%s)", problem)


def _liger_is_missing() -> str | None:
    if get_accelerator().device_name() != "cuda":
        return NO_CUDA
    if find_spec("liger_kernel") is None:
        return 'liger-kernel is not installed; `pip install "superoffload[liger]"`'
    return None


@dataclass(slots=True, kw_only=True)
class _Place:
    """Modules of one kind that a kernel may serve.

    `own` is what they compute, as a function like the kernel. Both are tried on `tensors`, which get gradients, and
    `constants`. `replace` gives one of the modules a forward that calls the kernel.
    """

    name: str
    kernel: Callable[..., Any]
    own: Callable[..., Any]
    tensors: list[torch.Tensor]
    constants: list[Any]
    replace: Callable[[Any, Any], None]
    modules: list[Any] = field(default_factory=list)


def _fitting(make: Callable[[], Kernels], model: Model) -> tuple[list[_Place], str | None]:
    """Return the places where the kernels give the model's own numbers, or why there is none."""
    try:
        places = _places(make(), model)
    except (ImportError, RuntimeError) as error:
        return [], f"they cannot be loaded: {first_line(error)}"
    result, reasons = [], []
    for place in places:
        reason = _problem(place)
        if reason is None:
            result.append(place)
        else:
            reasons.append(f"{place.name}: {reason}")
            logger.debug("No kernel for %s", reasons[-1])
    nothing = f"{type(model).__name__} has no RMSNorm, SwiGLU or rotary embedding as they compute it"
    return result, None if result else "; ".join(reasons) or nothing


def _problem(place: _Place) -> str | None:
    """Run a kernel and what it is to replace forward and backward; return why it does not suit, None if it does."""
    found = []
    try:
        for function in (place.own, place.kernel):
            leaves = [torch.nn.Parameter(tensor.clone()) for tensor in place.tensors]
            # Kernels may overwrite what another operation has computed; a weight comes as it is.
            outputs = function(*(leaf if leaf.dim() == 1 else leaf * 1 for leaf in leaves), *place.constants)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            given = [torch.linspace(-1, 1, output.numel()).to(output).view_as(output) for output in outputs]
            gradients = torch.autograd.grad(outputs, leaves, given)
            found.append([tensor.detach().float() for tensor in (*outputs, *gradients)])
        distances = [(ours - own).abs().max() / own.abs().max() for own, ours in zip(*found, strict=True)]
    except FAILURES as error:
        return first_line(error)
    largest = float(torch.stack(distances).nan_to_num(torch.inf).max())
    tolerance = TOLERANCE.get(place.tensors[0].dtype, HALF_TOLERANCE)
    return None if largest <= tolerance else f"the results differ by {largest:.1%}"


def _places(kernels: Kernels, model: Model) -> list[_Place]:
    """Find the modules that the kernels may serve, those of one kind together."""
    places: dict[Any, _Place] = {}
    rotary_widths = {2 * buffer.numel() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    numbers = _Numbers(model)
    key: tuple[Any, ...]
    module: Any
    for module in model.modules():
        kind = type(module)
        if hasattr(module, "weight") and hasattr(module, "variance_epsilon"):
            width = getattr(module.weight, "ds_shape", module.weight.shape)[-1]
            key = (kind, width, module.variance_epsilon)
            place = places.get(key) or _norm(module, width, kernels.norm, numbers)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            key = (kind, type(module.act_fn))
            place = places.get(key) or _mlp(module, kernels.swiglu, numbers)
        elif _rotates(module) and rotary_widths == {module.head_dim}:
            key = (kind,)
            place = places.get(key) or _attention(module, kernels.rotary, numbers)
        else:
            continue
        places[key] = place
        place.modules.append(module)
    return list(places.values())


class _Numbers:
    """Random numbers like a model's states, from a generator of their own: the run's stay as they are."""

    def __init__(self, model: Model) -> None:
        self._dtype = next(model.parameters()).dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self._generator)
        return numbers.to(get_accelerator().current_device_name(), self._dtype)


def _norm(module: Any, width: int, kernel: Callable[..., Any], numbers: _Numbers) -> _Place:
    def own(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> Any:
        return type(module).forward(types.SimpleNamespace(weight=weight, variance_epsilon=epsilon), states)

    def replace(place: _Place, module: Any) -> None:
        module.forward = lambda states: place.kernel(states, module.weight, module.variance_epsilon)

    return _Place(
        name=type(module).__name__,
        kernel=kernel,
        own=own,
        tensors=[numbers(ROWS, LENGTH, width), numbers(width)],
        constants=[module.variance_epsilon],
        replace=replace,
    )


def _mlp(module: Any, kernel: Callable[..., Any], numbers: _Numbers) -> _Place:
    def own(gate: torch.Tensor, up: torch.Tensor) -> Any:
        products = {"gate_proj": lambda _: gate, "up_proj": lambda _: up, "down_proj": lambda states: states}
        return type(module).forward(types.SimpleNamespace(**products, act_fn=module.act_fn), gate)

    def replace(place: _Place, module: Any) -> None:
        module.forward = lambda states: module.down_proj(place.kernel(module.gate_proj(states), module.up_proj(states)))

    return _Place(
        name=type(module).__name__,
        kernel=kernel,
        own=own,
        tensors=[numbers(ROWS, LENGTH, INNER_WIDTH), numbers(ROWS, LENGTH, INNER_WIDTH)],
        constants=[],
        replace=replace,
    )


def _rotates(module: Any) -> bool:
    """Return whether a module of transformers rotates queries and keys by the function that the kernel replaces."""
    if not type(module).__module__.startswith("transformers.") or not hasattr(module, "head_dim"):
        return False
    forward = inspect.unwrap(type(module).forward)
    return ROTARY in forward.__code__.co_names and ROTARY in forward.__globals__


def _attention(module: Any, kernel: Callable[..., Any], numbers: _Numbers) -> _Place:
    width, forward = module.head_dim, inspect.unwrap(type(module).forward)
    own = forward.__globals__[ROTARY]
    angles = numbers(ROWS, LENGTH, width // 2).float().repeat(1, 1, 2)

    def rotary(*tensors: Any, **options: Any) -> Any:
        return own(*tensors, **options) if options or len(tensors) != 4 else kernel(*tensors)

    # The same code with one other global: the module of transformers stays as it is.
    names = {**forward.__globals__, ROTARY: rotary}
    changed = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__

    def replace(_: _Place, module: Any) -> None:
        module.forward = types.MethodType(changed, module)

    return _Place(
        name=type(module).__name__,
        kernel=kernel,
        own=own,
        tensors=[numbers(ROWS, LENGTH, heads, width).transpose(1, 2) for heads in (4, 2)],
        constants=[angles.cos().to(numbers(1)), angles.sin().to(numbers(1))],
        replace=replace,
    )
