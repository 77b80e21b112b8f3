"""The loss of causal language modelling, as a sum, so that a step can weight all its target tokens equally.

There are two kernels. `PlainLoss` takes the model's logits. `ChunkedLoss` works inside the output head, on the hidden
states of target positions only, and holds one tile of logits at a time, `[targets, part of the vocabulary]`. It keeps
none of them, but computes each a second time in backward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from superoffload.config import TrainingSettings
from superoffload.data.collate import Batch, following, take_targets
from superoffload.data.encode import IGNORED
from superoffload.protocols import Engine, Model

TILE = 2**24  # logits per tile, 64 MiB in float32
MULTIPLE = 128  # a tile's share of the vocabulary, for the matrix kernels

Loss = Callable[[Engine, Batch], torch.Tensor]
"""Run the model on a micro-batch and sum the losses of its target tokens (collective).

Returns float32 `[]`, or `[sources]` for a batch with rows of several sources.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What training minimises; evaluation is always the plain cross-entropy.

    label_smoothing: the share of each target that is spread evenly over the vocabulary (arXiv:1512.00567, equation 3).
    dft: the loss of a target token is weighted by its probability, as a constant (arXiv:2508.05629, equation 9).
    """

    label_smoothing: float = 0.0
    dft: bool = False

    @classmethod
    def of(cls, training: TrainingSettings) -> "Objective":
        """Return what the settings ask for."""
        return cls(label_smoothing=training.label_smoothing, dft=training.loss == "dft")

    def weighted(self, losses: torch.Tensor) -> torch.Tensor:
        """Weight the losses of target tokens, of any shape; a loss of 0 stays 0."""
        return losses * losses.detach().neg().exp() if self.dft else losses


PLAIN = Objective()


def _objective_now(objective: Objective, model_engine: Engine) -> Objective:
    """Return the plain cross-entropy in evaluation; `training` of DeepSpeed's engine itself stays true there."""
    return objective if model_engine.module.training else PLAIN


def summed_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Sum the cross-entropy of the target tokens, float32 `[]`.

    `logits` `[batch, length, vocabulary]` of any float type; `labels` int64 `[batch, length]`, -100 for positions that
    are not targets. Position i predicts label i + 1.
    """
    return _cross_entropy(logits, following(labels), label_smoothing, "sum")


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, reduction: str) -> torch.Tensor:
    """Compute the loss of each position, or their sum, given what each of them predicts."""
    return functional.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


class PlainLoss:
    """Sums the losses of a micro-batch's target tokens from the model's logits."""

    def __init__(self, objective: Objective = PLAIN) -> None:
        """Take what training minimises."""
        self._objective = objective

    def __call__(self, model_engine: Engine, batch: Batch) -> torch.Tensor:
        """Return the sums; see `Loss` (collective)."""
        objective = _objective_now(self._objective, model_engine)
        inputs = batch.on(model_engine.device)
        targets = take_targets(inputs)
        logits = model_engine(**inputs).logits
        if batch.by_source is None and not objective.dft:
            return _cross_entropy(logits, targets, objective.label_smoothing, "sum")
        every = _cross_entropy(logits, targets, objective.label_smoothing, "none")
        positions, _ = _targets(batch)
        losses = objective.weighted(every.index_select(0, positions.to(every.device, non_blocking=True)))
        return sums_by_source(losses, batch)


def sums_by_source(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum the losses of a batch's target tokens, float32 `[targets]`, as `Loss` returns them."""
    if batch.by_source is None:
        return losses.sum()
    grouped = losses.index_select(0, batch.by_source.order.to(losses.device, non_blocking=True))
    return torch.stack([part.sum() for part in torch.split(grouped, list(batch.by_source.counts))])


def _targets(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions that predict a target token, in the flattened batch, and those tokens; int64 `[targets]`.

    Found on the host, where the labels are: on the device, finding them would wait for it.
    """
    every = take_targets(dict(batch.inputs)).flatten()
    positions = (every != IGNORED).nonzero().squeeze(1)
    return positions, every[positions]


@dataclass(frozen=True, slots=True)
class Transform:
    """What a model does to the output of its head: `softcap * tanh(scale * x / softcap)`, or `scale * x`."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """Transform float32 logits of any shape in place."""
        if self.softcap is not None:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def apply_with_slope_(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float | None]:
        """Transform float32 logits of any shape in place; return them and the derivative there, None if it is 1."""
        if self.softcap is None:
            return self.apply_(logits), None if self.scale == 1.0 else self.scale
        capped = logits.mul_(self.scale / self.softcap).tanh_()
        slope = capped.square().neg_().add_(1.0).mul_(self.scale)
        return capped.mul_(self.softcap), slope


class ChunkedLoss:
    """Sums the losses of a micro-batch's target tokens inside the model's output head, a `torch.nn.Linear`.

    ZeRO-3's hooks around the head gather its weight once in forward and once in backward, whatever the number of
    targets and tiles of this rank.
    """

    def __init__(self, transform: Transform, objective: Objective = PLAIN) -> None:
        """Take what the model does to the output of its head, and what training minimises."""
        self._transform = transform
        self._objective = objective

    def __call__(self, model_engine: Engine, batch: Batch) -> torch.Tensor:
        """Return the sums; see `Loss` (collective)."""
        return sums_by_source(self.token_losses(model_engine, batch), batch)

    def token_losses(self, model_engine: Engine, batch: Batch) -> torch.Tensor:
        """Return the loss of each target token, float32 `[targets]` (collective)."""
        objective = _objective_now(self._objective, model_engine)
        positions, targets = _targets(batch)
        size = model_engine.module.get_output_embeddings().out_features
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < size:
            raise IndexError(f"a label is outside the vocabulary of {size}: {targets.min()} to {targets.max()}")
        targets = targets.to(model_engine.device, non_blocking=True)
        positions = positions.to(model_engine.device, non_blocking=True)

        def losses(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
            states = hidden.flatten(0, 1).index_select(0, positions)
            found = token_losses(
                states, head.weight, head.bias, targets, self._transform, label_smoothing=objective.label_smoothing
            )
            return objective.weighted(found)

        inputs = batch.on(model_engine.device)
        take_targets(inputs)
        with _returning(losses, model_engine.module):
            result: torch.Tensor = model_engine(**inputs)
        return result


@contextmanager
def _returning(compute: Callable[[torch.nn.Linear, torch.Tensor], torch.Tensor], model: Model) -> Iterator[None]:
    """Within the block, make the model return `compute(head, hidden states)`, computed in the forward of its head.

    The model itself gets logits of no position from its head. The result takes their place on the way out: after the
    hooks of the head and before those of the model, so that ZeRO-3 sees it in both.
    """
    head = model.get_output_embeddings()
    results: list[torch.Tensor] = []

    def after_head(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        results.append(output)
        return inputs[0].new_empty((inputs[0].shape[0], 0, head.out_features))

    def after_model(module: Any, inputs: Any, output: Any) -> torch.Tensor:
        if len(results) != 1:
            raise RuntimeError(f"the model called its output layer {len(results)} times; use --loss_kernel plain")
        return results[0]

    hooks = (head.register_forward_hook(after_head), model.register_forward_hook(after_model, prepend=True))
    try:
        with replaced_forward(head, lambda hidden: compute(head, hidden)):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced_forward(module: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Replace a module's forward within the block; its hooks run as before."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def token_losses(  # noqa: PLR0913
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: Transform = Transform(),
    tile: int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the cross-entropy of each target token, float32 `[targets]`, without holding all logits at once.

    `hidden` `[targets, width]`, `weight` `[vocabulary, width]`, `bias` `[vocabulary]`, all of one float type; `targets`
    int64 `[targets]`; `tile` is the number of logits to hold at a time (default `TILE`).
    """
    losses: torch.Tensor = _TokenLosses.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, transform, tile or TILE, label_smoothing
    )
    return losses


class _TokenLosses(torch.autograd.Function):
    """Tiles are cut from the vocabulary, so that each row of the weight's gradient is one product, rounded once.

    The gradient of the hidden states is a sum over the tiles, in float32. Logits are computed again in backward: then
    the incoming gradient is known before anything is rounded, and no gradient is kept between forward and backward.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  # autograd's signature
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: Transform,
        tile: int,
        smoothing: float,
    ) -> torch.Tensor:
        zeros = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        # Finite, because a tile may hold nothing but -inf. sums: of exp(logit - largest).
        target_logits, largest, sums, totals = zeros, zeros + torch.finfo(torch.float32).min, zeros, zeros
        tiles = _Tiles(hidden, weight, bias, tile)
        for part in tiles.parts:
            logits = transform.apply_(tiles.head_output(part))
            columns, inside = _columns(targets, part)
            found = logits.gather(1, columns[:, None]).squeeze(1)
            target_logits = torch.where(inside, found, target_logits)
            totals = totals + logits.sum(dim=1) if smoothing else totals
            before, largest = largest, torch.maximum(largest, logits.amax(dim=1))
            sums = sums * (before - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(dim=1)
        ctx.save_for_backward(hidden, weight, bias, targets, largest, sums)
        ctx.transform, ctx.tile, ctx.smoothing = transform, tile, smoothing
        losses = sums.log() - (target_logits - largest)
        if not smoothing:
            return losses
        return (1 - smoothing) * losses + smoothing * (sums.log() - (totals / len(weight) - largest))

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, largest, sums = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        smoothing = ctx.smoothing
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = weight.new_empty(weight.shape) if needs_weight else None
        grad_bias = bias.new_empty(bias.shape) if needs_bias else None
        rows = torch.arange(len(targets), device=hidden.device)
        tiles = _Tiles(hidden, weight, bias, ctx.tile)
        for part in tiles.parts:
            logits, slope = ctx.transform.apply_with_slope_(tiles.head_output(part))
            columns, inside = _columns(targets, part)
            grads = logits.sub_(largest[:, None]).exp_().mul_((grad_losses / sums)[:, None])
            grads[rows, columns] -= (grad_losses * (1 - smoothing)).where(inside, 0)
            if smoothing:
                grads -= (grad_losses * (smoothing / len(weight)))[:, None]
            grads = tiles.rounded(grads if slope is None else grads.mul_(slope), part)
            del logits, slope  # their memory serves the product
            if grad_hidden is not None:
                tiles.add_product(grad_hidden, grads, part)
            if grad_weight is not None:
                torch.mm(grads.t(), hidden, out=grad_weight[part])
            if grad_bias is not None:
                grad_bias[part] = grads.sum(dim=0, dtype=torch.float32)
        del tiles, grads
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


class _Tiles:
    """The parts of the vocabulary, and memory for one tile, which all parts use in turn.

    Allocating each tile would cost the CPU more time than computing it.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: int) -> None:
        """Divide the vocabulary for `hidden` `[targets, width]`, into parts of about `tile` logits."""
        self._hidden, self._weight, self._bias = hidden, weight, bias
        size = min(max(MULTIPLE, tile // max(len(hidden), 1) // MULTIPLE * MULTIPLE), len(weight))
        self.parts = _slices(len(weight), size)
        # A product with the weight takes at most as much memory as a tile.
        self._rows = _slices(len(hidden), max(MULTIPLE, tile // weight.shape[1] // MULTIPLE * MULTIPLE))
        self._narrow = hidden.new_empty(len(hidden) * size)
        # CUDA's kernels can return float32 themselves, in new memory, which its allocator keeps for the next tile.
        self._widens = _widens(hidden)
        self._wide = self._narrow.new_empty(0 if self._widens else len(self._narrow), dtype=torch.float32)

    def _shaped(self, memory: torch.Tensor, part: slice) -> torch.Tensor:
        shape = (len(self._hidden), part.stop - part.start)
        return memory[: shape[0] * shape[1]].view(shape)

    def head_output(self, part: slice) -> torch.Tensor:
        """Compute the output of the head for a part, float32 `[targets, part]`; overwrites the last one."""
        right = self._weight[part].t()
        if self._widens:
            output = torch.mm(self._hidden, right, out_dtype=torch.float32)
        else:
            product = torch.mm(self._hidden, right, out=self._shaped(self._narrow, part))
            output = self._shaped(self._wide, part).copy_(product)
        return output if self._bias is None else output.add_(self._bias[part])

    def rounded(self, grads: torch.Tensor, part: slice) -> torch.Tensor:
        """Round float32 `[targets, part]` to the type of the hidden states; overwrites the last result."""
        return self._shaped(self._narrow, part).copy_(grads)

    def add_product(self, total: torch.Tensor, grads: torch.Tensor, part: slice) -> None:
        """Add the product of `grads` `[targets, part]` and the weight to float32 `[targets, width]`."""
        for rows in self._rows:
            total[rows] += _float32_product(grads[rows], self._weight[part], exact=len(self.parts) > 1)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _widens(tensor: torch.Tensor) -> bool:
    """Return whether the device's matrix kernels can return float32 for this tensor; the CPU's cannot."""
    return tensor.device.type != "cpu" and tensor.dtype != torch.float32


def _columns(targets: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column of each target in a part of the vocabulary, and whether it lies there; any column if not."""
    columns = targets - part.start
    inside = (columns >= 0) & (targets < part.stop)
    return columns.where(inside, 0), inside


def _float32_product(left: torch.Tensor, right: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """Multiply matrices of one float type into float32.

    The CPU's kernels round the product to that type. `exact` adds what the rounding lost, which takes a second product.
    """
    if left.dtype == torch.float32:
        return torch.mm(left, right)
    if _widens(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    rounded = torch.mm(left, right)
    return rounded.float() + torch.addmm(rounded, left, right, beta=-1) if exact else rounded.float()
