"""Test whether a model keeps packed documents apart, by running it at the start, not by a list of architectures."""

import math

import numpy as np
import torch

from superoffload import distributed
from superoffload.data.collate import Layout, collate
from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.protocols import Engine

LENGTH = 24  # tokens per document, longer than the short convolutions of current models
NOISE_FACTOR = 3
TOLERANCE = {torch.float32: 1e-4}
HALF_TOLERANCE = 1e-3
# A leak shows each time; a library that splits a product among another number of threads, on a busy machine, does not.
ATTEMPTS = 3


def check(model_engine: Engine, layout: Layout) -> None:
    """Raise `UserError` if a document in a pack changes with a document before it (collective).

    Runs three packs of three documents, of which the last is always the same. The second pack differs from the first in
    the document in the middle, the third in the first document: a model may count from the start of a pack. All shapes
    are equal, so a model that keeps documents apart computes the same last document each time. In the first two packs
    it also computes the same first document, because it is causal: any difference there is numerical noise of the
    kernels (a mixture of experts may order its tokens differently), which the last document may show too. Does nothing
    if each row of a batch holds one document.
    """
    if not (layout.packs or layout.varlen):
        return
    config = model_engine.module.config
    what = f"{type(model_engine.module).__name__} with {config._attn_implementation} attention"
    flag, advice = "packing", "use --no_packing, or another --attn_implementation"
    if layout.parts > 1:
        flag, advice = f"sequence_parallel_size {layout.parts}", "use 1"
    leak = 0.0
    for _ in range(ATTEMPTS):
        changes = _changes(model_engine, layout)
        if not distributed.all_ranks_ok(changes is not None) or changes is None:
            raise UserError(f"--{flag}: {what} does not accept packed rows; {advice}")
        if not distributed.all_ranks_ok(math.isfinite(changes[0])):
            raise UserError(f"--model_name {config.name_or_path}: its logits are infinite or NaN; use intact weights")
        if distributed.all_ranks_ok(_is_isolated(changes, model_engine)):
            return
        leak = changes[1]
    raise UserError(
        f"--{flag}: {what} lets a packed row see the one before it (its logits change by {leak:.1%}); {advice}"
    )


def _is_isolated(changes: tuple[float, float], model_engine: Engine) -> bool:
    noise, leak = changes
    dtype = next(model_engine.module.parameters()).dtype
    return leak <= NOISE_FACTOR * noise + TOLERANCE.get(dtype, HALF_TOLERANCE)


def _changes(model_engine: Engine, layout: Layout) -> tuple[float, float] | None:
    """Return the relative change of the logits of the first document, and the largest of the last (collective).

    Returns None if the model does not accept the inputs of a packed row.
    """
    vocabulary = int(model_engine.module.config.get_text_config().vocab_size)
    rng = np.random.default_rng(0)
    probe, between, other = (rng.integers(vocabulary, size=LENGTH) for _ in range(3))
    was_training = model_engine.training
    model_engine.eval()
    results = []
    try:
        for pack in ((probe, between, probe), (probe, other, probe), (other, between, probe)):
            inputs = collate([[(document, document) for document in pack]], 1, layout).on(distributed.device())
            del inputs["labels"]
            with torch.no_grad():
                results.append(model_engine(**inputs).logits[0, : 3 * LENGTH].float())
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        logger.debug("The model rejected a packed row: %s", error)
        return None
    finally:
        model_engine.train(was_training)
    size = results[0].square().mean().sqrt()
    in_second, in_third = (_median_changes(results[0], other) / size for other in results[1:])
    return float(in_second[0]), float(torch.maximum(in_second[2], in_third[2]))


def _median_changes(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return how much the logits of each of three documents change, float32 `[3]`."""
    # The median over a document's tokens: a near-tie between experts that resolves differently affects only a few.
    # Sorted, because with --deterministic CUDA refuses a median along a dimension.
    ordered = (before - after).square().mean(dim=-1).sqrt().view(3, LENGTH).sort(dim=1).values
    return torch.where(ordered[:, -1].isnan(), ordered[:, -1], ordered[:, (LENGTH - 1) // 2])
