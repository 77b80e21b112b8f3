"""Choose the loss kernel, by trying it at the start, not by a list of architectures."""

import math

import numpy as np
import torch

from superoffload import distributed
from superoffload.data.collate import Batch, Layout, collate, following
from superoffload.data.encode import IGNORED
from superoffload.errors import UserError, first_line
from superoffload.log import logger
from superoffload.model.head import (
    MULTIPLE,
    PLAIN,
    ChunkedLoss,
    Loss,
    Objective,
    PlainLoss,
    Transform,
    replaced_forward,
    token_losses,
)
from superoffload.protocols import Engine, Model

LENGTH = 24  # tokens per document, half of them targets
# The largest difference between the losses of a token, as a share of the spread of the losses.
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2
# Outputs of the head to try: the slope of the transform near zero, and its limit.
SMALL, LARGE = 2.0**-10, 2.0**24
SPREAD = 30.0


# Not answers of the model: one rank alone can raise them, and the others would wait for it in a collective.
FATAL = (
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
    torch.distributed.DistError,
)


class _Unsuitable(Exception):
    """The chunked kernel would not compute the model's own loss; the message says why."""


def choose(requested: str, model_engine: Engine, layout: Layout, objective: Objective = PLAIN) -> Loss:
    """Return the loss kernel for `--loss_kernel` `requested`, which minimises `objective` in training (collective).

    Runs three small forwards: one for the model's own logits, one with known numbers in place of the head's output,
    to see what the model does to them, and one with the chunked kernel. Then runs the kernel backward, on this rank
    alone. Raises `UserError` if `chunked` is requested and does not suit the model.
    """
    if requested == "plain":
        return PlainLoss(objective)
    was_training = model_engine.training
    model_engine.eval()
    chunked: ChunkedLoss | None = None
    why = "another rank rejected it"
    try:
        with torch.no_grad():
            chunked = _try(model_engine, _batch(model_engine, layout), objective)
    except _Unsuitable as error:
        why = str(error)
    except FATAL:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError) as error:
        why = f"the model rejected it: {first_line(error)}"
    finally:
        model_engine.train(was_training)
    if distributed.all_ranks_ok(chunked is not None) and chunked is not None:
        logger.info("Loss kernel: chunked")
        return chunked
    name = type(model_engine.module).__name__
    if requested == "chunked":
        raise UserError(f"--loss_kernel chunked: does not suit {name} ({why}); use auto or plain")
    logger.info("Loss kernel: plain, because chunked does not suit %s (%s)", name, why)
    return PlainLoss(objective)


def _batch(model_engine: Engine, layout: Layout) -> Batch:
    vocabulary = int(model_engine.module.config.get_text_config().vocab_size)
    ids = np.random.default_rng(0).integers(vocabulary, size=(2, LENGTH))
    labels = np.where(np.arange(LENGTH) < LENGTH // 2, IGNORED, ids)
    return collate([[row] for row in zip(ids, labels, strict=True)], 2, layout)


def _try(model_engine: Engine, batch: Batch, objective: Objective) -> ChunkedLoss:
    """Return the chunked kernel if it computes the model's own losses (collective); raises `_Unsuitable`.

    Compares the plain cross-entropy, which is what the kernel computes in evaluation, whatever the objective.
    """
    head = model_engine.module.get_output_embeddings()
    if getattr(type(head), "forward", None) is not torch.nn.Linear.forward:
        raise _Unsuitable(f"its output layer is {type(head).__name__}, not Linear")
    _check_path(model_engine.module, head)
    inputs = batch.on(model_engine.device)
    labels = following(inputs.pop("labels"))
    logits = model_engine(**inputs).logits
    if logits.shape != (*labels.shape, head.out_features):
        raise _Unsuitable("its logits are not those of its output layer")
    chunked = ChunkedLoss(_observe(model_engine, batch, head), objective)
    targets = labels != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[targets].float(), labels[targets], reduction="none")
    # The median: a near-tie between experts that resolves differently affects only a few tokens.
    difference = (chunked.token_losses(model_engine, batch) - expected).abs().sort().values[len(expected) // 2]
    if not difference <= TOLERANCE.get(logits.dtype, HALF_TOLERANCE) * expected.std():
        raise _Unsuitable(f"its losses differ by {float(difference):.2g}")
    _check_backward(head, logits, objective.label_smoothing)
    return chunked


def _check_path(model: Model, head: torch.nn.Linear) -> None:
    """Raise `_Unsuitable` if a module between the model and its head has parameters of its own.

    The result passes such a module unseen, so ZeRO-3 would not gather those parameters again for backward.
    """
    paths = [name for name, module in model.named_modules() if module is head]
    parts = paths[0].split(".") if paths else []
    for name, module in model.named_modules():
        inside = name and name in {".".join(parts[:count]) for count in range(1, len(parts))}
        if inside and next(module.parameters(recurse=False), None) is not None:
            raise _Unsuitable(f"its output layer lies in {name}, which has parameters of its own")


def _check_backward(head: torch.nn.Linear, logits: torch.Tensor, smoothing: float) -> None:
    """Run the kernel backward on small tensors like the head's, over several tiles, so that it fails now if it does.

    Nothing is communicated. The kernels that a device has for this are first needed in a step otherwise.
    """
    rows = 3 * MULTIPLE
    for count in (4, 0):
        weight = logits.new_zeros(rows, head.in_features, dtype=head.weight.dtype).requires_grad_()
        hidden = logits.new_zeros(count, head.in_features, dtype=head.weight.dtype).requires_grad_()
        bias = None if head.bias is None else weight.new_zeros(rows).requires_grad_()
        targets = torch.arange(count, device=logits.device)
        with torch.enable_grad():
            losses = token_losses(hidden, weight, bias, targets, tile=MULTIPLE, label_smoothing=smoothing)
            losses.sum().backward()  # type: ignore[no-untyped-call]


def _observe(model_engine: Engine, batch: Batch, head: torch.nn.Linear) -> Transform:
    """Find out what the model does to the output of its head, from known numbers in its place (collective)."""
    inputs = batch.on(model_engine.device)
    shape = (*inputs.pop("labels").shape, head.out_features)
    # A generator of its own: the run's random numbers stay as they are.
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * SPREAD
    numbers.view(-1)[:2] = torch.tensor([SMALL, LARGE])
    numbers = numbers.to(model_engine.device)
    seen: list[torch.Size] = []

    def give_numbers(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape)
        return numbers.clone()

    with replaced_forward(head, give_numbers):
        found = model_engine(**inputs).logits
    if seen != [(*shape[:2], head.in_features)]:
        raise _Unsuitable("its output layer gets other positions than the model")
    slope, limit = (found.flatten()[:2].double().cpu() / torch.tensor([SMALL, 1.0])).tolist()
    if not (math.isfinite(slope) and math.isfinite(limit) and slope and limit):
        raise _Unsuitable("it changes its logits in a way that is not known")
    linear = abs(limit - slope * LARGE) <= 1e-3 * abs(limit)
    transform = Transform(slope) if linear else Transform(slope, limit)
    expected = transform.apply_(numbers.clone())
    if found.shape != shape or not torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-4 * abs(slope)):
        raise _Unsuitable("it changes its logits in a way that is not known")
    return transform
