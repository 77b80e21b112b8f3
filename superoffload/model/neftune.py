"""NEFTune (Jain et al. 2023, arXiv:2310.05914): uniform noise on the embeddings of training rows."""

from typing import Any

import torch

from superoffload import distributed
from superoffload.config import TrainingSettings
from superoffload.protocols import Engine


def install(model_engine: Engine, training: TrainingSettings) -> None:
    """Add noise to the output of the input embedding in training mode; does nothing if `--neftune_alpha` is 0.

    Each element gets a number drawn evenly from [-1, 1], times alpha / sqrt(L d), with L the length of its own
    document, also within a pack, and d the width of the embedding (algorithm 1). The numbers come from the device's
    default generator, which is seeded here, differently on each rank; a checkpoint holds its state.
    """
    alpha = training.neftune_alpha
    if not alpha:
        return
    distributed.seed_rank(training.seed)
    model: Any = model_engine.module
    lengths: list[torch.Tensor] = []

    def before_model(module: Any, positional: Any, inputs: dict[str, Any]) -> None:
        lengths[:] = [document_lengths(inputs)] if module.training else []

    def after_embedding(module: Any, positional: Any, output: torch.Tensor) -> torch.Tensor:
        if not (module.training and lengths):
            return output
        magnitude = alpha / torch.sqrt(lengths[0] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-1, 1) * magnitude[..., None].to(output.dtype)

    model.register_forward_pre_hook(before_model, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(after_embedding)


def document_lengths(inputs: dict[str, Any]) -> torch.Tensor:
    """Return the length of the document that each position belongs to, float32 `[batch, length]`.

    `inputs` are those of a `Batch`: packed rows have `position_ids` that start at 0 in each document, padded rows an
    `attention_mask`, and a part of a row the lengths of all documents. Does not wait for the device.
    """
    if parts := inputs.get("sequence_parts"):
        each = torch.tensor(inputs["document_lengths"])
        own: torch.Tensor = each.repeat_interleave(each).float().chunk(parts)[distributed.rank() % parts]
        return own[None].to(inputs["input_ids"].device, non_blocking=True)
    mask: torch.Tensor | None = inputs.get("attention_mask")
    if mask is not None:
        return mask.float().sum(dim=1, keepdim=True).expand(mask.shape)
    positions: torch.Tensor = inputs["position_ids"]
    document = (positions.flatten() == 0).cumsum(0) - 1
    ones = torch.ones(document.shape, dtype=torch.float32, device=document.device)
    lengths = torch.zeros_like(ones).index_add_(0, document, ones)
    return lengths.index_select(0, document).view(positions.shape)
