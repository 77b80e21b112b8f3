"""Whether a model keeps packed documents apart: tried at the start, not looked up in a list."""

from typing import Any

import numpy as np
import torch

from superoffload import distributed
from superoffload.data.collate import Layout, collate
from superoffload.errors import UserError
from superoffload.log import logger

LENGTH = 24  # tokens of each document: beyond the reach of the short convolutions in use
NOISE_FACTOR = 3
TOLERANCE = {torch.float32: 1e-4}
HALF_TOLERANCE = 1e-3


def check(model_engine: Any, how: Layout) -> None:
    """Raise `UserError` where a document in a pack changes with the document before it (collective).

    Two packs of three documents are run: the first and the last are the same document, and what lies between
    them differs from pack to pack. All shapes are alike, so a model that keeps documents apart computes the
    last one alike both times, and so it does, being causal, with the first one: how much the first changes is
    the noise of the kernels (a mixture of experts sorts its tokens otherwise each time), to be allowed to the last.
    Does nothing without packing.
    """
    if not how.packs:
        return
    changes = _changes(model_engine, how)
    config = model_engine.module.config
    dtype = next(model_engine.module.parameters()).dtype
    isolated = False
    if changes is not None:
        noise, leak = changes
        isolated = leak <= NOISE_FACTOR * noise + TOLERANCE.get(dtype, HALF_TOLERANCE)
    if distributed.agree(isolated):
        return
    what = f"{type(model_engine.module).__name__} with {config._attn_implementation} attention"
    way_out = "use --no_packing, or another --attn_implementation"
    if changes is None:
        raise UserError(f"--packing: {what} takes no packed rows; {way_out}")
    raise UserError(
        f"--packing: {what} lets a packed row see the one before it (its logits change by {leak:.1%}); {way_out}"
    )


def _changes(model_engine: Any, how: Layout) -> tuple[float, float] | None:
    """Return how much the first and the last document's logits change, as a share of their size (collective).

    None where the model does not take the inputs of a packed row.
    """
    vocabulary = int(model_engine.module.config.get_text_config().vocab_size)
    rng = np.random.default_rng(0)
    probe, between, other = (rng.integers(vocabulary, size=LENGTH) for _ in range(3))
    was_training = model_engine.training
    model_engine.eval()
    results = []
    try:
        for middle in (between, other):
            pack = [(document, document) for document in (probe, middle, probe)]
            inputs = collate([pack], 1, how).on(distributed.device())
            del inputs["labels"]
            with torch.no_grad():
                results.append(model_engine(**inputs).logits[0, : 3 * LENGTH].float())
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        logger.debug("The model refused a packed row: %s", error)
        return None
    finally:
        model_engine.train(was_training)
    size = results[0].square().mean().sqrt()
    # The median over a document's tokens: a near-tie of experts that falls otherwise touches few of them.
    changes = (results[0] - results[1]).square().mean(dim=-1).sqrt().unflatten(0, (3, LENGTH)).median(dim=1).values
    return float(changes[0] / size), float(changes[2] / size)
