"""The MLP of every decoder layer in tiles over the tokens: find it by trying, and let it run so.

What an MLP computes in between is several times as wide as its input. In tiles, it exists for one tile at a time:
forward keeps the input alone, and backward computes each tile again. DeepSpeed's TiledMLP does the same, but its tiles
gather the weights once each under ZeRO-3, and add the gradients of the weights in bf16. Here a tiled MLP is a leaf
module, which ZeRO-3 gathers once for forward and once for backward, and autograd gets one gradient for each weight: the
sum over the tiles in float32, rounded at the end.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from deepspeed.runtime.zero import GatheredParameters
from torch.autograd.function import once_differentiable

from superoffload import distributed
from superoffload.errors import UserError, first_line
from superoffload.log import logger
from superoffload.model.kernels import FAILURES, HALF_TOLERANCE, TOLERANCE
from superoffload.model.leaf_modules import make_leaf
from superoffload.model.tiles import tile_tokens
from superoffload.protocols import Model

ROWS, LENGTH, TILE = 2, 24, 2  # of the trial: rows, tokens in each, tokens of a tile
# The share of the trial's tokens that must agree: a near-tie between experts may resolve differently for a few. What
# mixes neighbouring tokens differs in the first token of each tile at least, in half of them.
AGREEING = 0.6

Tiles = int | Literal["auto"]
Forward = Callable[[torch.Tensor], Any]


def use(tiles: Tiles, model: Model) -> None:
    """Let the MLPs of a loaded model run in tiles for `--tiled_mlp` `tiles` (collective); before the engine is made.

    Raises `UserError` if a number of tiles is requested and a layer has no module that can run in tiles.
    """
    if not tiles:
        return
    found, problem = _find(model)
    if problem is None:
        for module in found:
            _tile(module, tiles)
        counts = Counter(type(module).__name__ for module in found)
        names = ", ".join(f"{count} {name}" for name, count in counts.items())
        logger.info("MLP: in %s, in %s", "tiles" if tiles == "auto" else f"{tiles} tiles", names)
        return
    if tiles != "auto":
        raise UserError(f"--tiled_mlp {tiles}: does not suit {type(model).__name__} ({problem}); use auto or 0")
    logger.info("MLP: not in tiles, because they do not suit %s (%s)", type(model).__name__, problem)


def _find(model: Model) -> tuple[list[Any], str | None]:
    """Return the modules to tile, and why that is not possible, None if it is (collective).

    Of every decoder layer, those are the children that have matrices in modules of their own and pass the trial.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return [], "output_router_logits is set: the loss of a router is taken over all tokens, not those of a tile"
    results: dict[Any, str | None] = {}
    found: list[Any] = []
    for number, layer in enumerate(_layers(model)):
        reasons = []
        suitable = []
        for name, child in layer.named_children():
            sizes = tuple(tuple(getattr(p, "ds_shape", p.shape)) for p in child.parameters())
            if next(child.children(), None) is None or not any(len(size) > 1 for size in sizes):
                continue
            key = type(child), sizes, tuple(parameter.requires_grad for parameter in child.parameters())
            if key not in results:
                problem = _problem(child, int(model.config.get_text_config().hidden_size))
                # Ranks that took different modules would wait for each other forever.
                agreed = distributed.all_ranks_ok(problem is None)
                results[key] = None if agreed else problem or "another rank rejected it"
            if results[key] is None:
                suitable.append(child)
            else:
                reasons.append(f"{name}: {results[key]}")
        if not suitable:
            return [], f"layer {number} has no MLP that works token by token; " + "; ".join(reasons)
        found += suitable
    return found, None if found else "it has no decoder layers"


def _layers(model: Model) -> list[Any]:
    """Return the decoder layers: the list of modules with the most parameters."""

    def size(layers: Any) -> int:
        return sum(int(getattr(p, "ds_numel", p.numel())) for p in layers.parameters())

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=size, default=[]))


def _problem(module: Any, width: int) -> str | None:
    """Run a module whole and in tiles, forward and backward; return why they differ, None if not (collective).

    A module that may get more than its input is not tried: what the layer passes on is not known here.
    """
    if len(inspect.signature(module.forward).parameters) != 1:
        return "it takes more than its input"
    parameters = list(module.parameters())
    was_training = module.training
    with GatheredParameters(parameters):
        numbers = torch.randn(ROWS, LENGTH, width, generator=torch.Generator().manual_seed(0))
        states = numbers.to(parameters[0].device, parameters[0].dtype)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        results = []
        try:
            module.train()
            own = module.forward
            for forward in (own, partial(_run, own, parameters, size=TILE)):
                leaf = states.clone().requires_grad_()
                output = _first(forward(leaf))
                if (output.shape, output.dtype) != (states.shape, states.dtype):
                    return f"it returns {output.dtype} {list(output.shape)} for {states.dtype} {list(states.shape)}"
                given = numbers.roll(1).to(output)
                gradients = torch.autograd.grad(output, [leaf, *trained], given, allow_unused=True)
                results.append((output.detach(), *gradients))
        except FAILURES as error:
            return first_line(error)
        finally:
            module.train(was_training)
        return _difference(*results)


def _difference(whole: Any, tiled: Any) -> str | None:
    """Return in words how results differ, None if they agree: output and gradient by token, weights as a whole."""
    tolerance = TOLERANCE.get(whole[0].dtype, HALF_TOLERANCE)
    for number, (expected, found) in enumerate(zip(whole, tiled, strict=True)):
        if expected is None or found is None:
            if expected is not found:
                return "a weight gets no gradient"
            continue
        distance = (found.float() - expected.float()).nan_to_num(torch.inf)
        if number < 2:  # output, gradient of the input
            shares = (distance.abs().amax(-1) / expected.float().abs().max()).flatten().sort().values
            largest = float(shares[int(AGREEING * len(shares))])
        else:
            largest = float(distance.norm() / expected.float().norm().clamp_min(1e-30))
        if not largest <= tolerance:
            return f"the results of tiles differ by {largest:.1%}"
    return None


def _tile(module: Any, tiles: Tiles) -> None:
    """Let a module run in tiles, inside its hooks, and let ZeRO-3 gather it as a whole."""
    own, parameters = module.forward, list(module.parameters())

    def forward(states: torch.Tensor) -> Any:
        count = states.shape[:-1].numel()
        size = tile_tokens(count, states.shape[-1], tiles)
        return _run(own, parameters, states, size) if size < count else own(states)

    module.forward = forward
    module.runs_in_tiles = True
    make_leaf(module)


def _run(own: Forward, parameters: list[Any], states: torch.Tensor, size: int) -> Any:
    """Return what a module computes from states `[rows, length, width]`, `size` tokens at a time."""
    kept = _Keep.apply(states)  # type: ignore[no-untyped-call]  # torch is partly untyped
    results = _Tiled.apply(own, kept.grad_fn, size, kept, *parameters)  # type: ignore[no-untyped-call]
    return results[0] if len(results) == 1 else results


def _split(states: torch.Tensor, size: int) -> Any:
    """Cut states `[rows, length, width]` into tiles `[1, size, width]` over all rows; the last may be shorter."""
    return torch.split(states.reshape(1, -1, states.shape[-1]), size, dim=1)


def _first(output: Any) -> Any:
    """Return the states in the output of an MLP; a sparse block may also return what its router chose."""
    return output[0] if isinstance(output, tuple) else output


class _Keep(torch.autograd.Function):
    """Keeps the states of an MLP for backward, before they run through it.

    With activation checkpointing, torch stops to recompute a layer at the last tensor that is kept
    (torch.utils.checkpoint, set_checkpoint_early_stop). Where nothing behind the MLP keeps one, that is this one, and
    the recomputation leaves the MLP to `_Tiled.backward`.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
        """Return the states."""
        ctx.save_for_backward(states)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient."""
        return gradient


class _Tiled(torch.autograd.Function):
    """Runs a module on tiles of its input, and again in backward, where a tile's activations are needed."""

    @staticmethod
    def forward(
        ctx: Any, own: Forward, keeper: Any, size: int, states: torch.Tensor, *parameters: torch.nn.Parameter
    ) -> tuple[torch.Tensor, ...]:
        """Return the outputs of all tiles together, as a tuple; only the first has a gradient.

        The others, of a sparse block, have one row per token.
        """
        ctx.own, ctx.keeper, ctx.size, ctx.parameters = own, keeper, size, parameters
        result, others, start = torch.empty_like(states, memory_format=torch.contiguous_format), [], 0
        rows = result.view(1, -1, states.shape[-1])
        for tile in _split(states, size):
            output = own(tile)
            first = _first(output)
            rows[:, start : start + tile.shape[1]] = first
            start += tile.shape[1]
            others.append(output[1:] if isinstance(output, tuple) else ())
        more = [torch.cat(parts) for parts in zip(*others, strict=True)]
        ctx.mark_non_differentiable(*more)
        return result, *more

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        """Compute each tile again, and return the gradients of states and parameters.

        Those of the parameters are summed over the tiles in float32. Each tile's comes from its matrix product rounded
        to its type, so the error of a sum is at most half an eps of the sum of their sizes, and half an eps of its own.
        """
        (states,) = ctx.keeper.saved_tensors
        trained = [parameter for parameter in ctx.parameters if parameter.requires_grad]
        sums: list[torch.Tensor | None] = [None] * len(trained)
        result = torch.empty_like(states, memory_format=torch.contiguous_format)
        rows, start = result.view(1, -1, states.shape[-1]), 0
        for tile, given in zip(_split(states, ctx.size), _split(gradient, ctx.size), strict=True):
            with torch.enable_grad():
                leaf = tile.detach().requires_grad_()
                output = _first(ctx.own(leaf))
            of_tile, *found = torch.autograd.grad(output, [leaf, *trained], given, allow_unused=True)
            rows[:, start : start + tile.shape[1]] = of_tile
            start += tile.shape[1]
            del output
            _add(sums, found)
        return None, None, None, result, *_as_gradients(ctx.parameters, sums)


def _add(sums: list[torch.Tensor | None], found: list[Any]) -> None:
    """Add gradients to their sums in float32, and drop each."""
    for number, total in enumerate(sums):
        gradient, found[number] = found[number], None
        if gradient is not None:
            sums[number] = gradient.float() if total is None else total.add_(gradient)


def _as_gradients(parameters: Any, sums: list[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    """Yield the gradient of each parameter, in its type; None where it has none. Drops each sum."""
    position = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            yield None
            continue
        total, sums[position] = sums[position], None
        position += 1
        yield None if total is None else total.to(parameter.dtype)
