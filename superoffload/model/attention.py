"""Attention: choose the kernel; without flash attention, attend to packs document by document."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from deepspeed.accelerator import get_accelerator
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from superoffload.config import ModelSettings
from superoffload.ds_config import DsConfig, dtype_name
from superoffload.errors import UserError
from superoffload.protocols import Model

SDPA_VARLEN = "sdpa_varlen"


def choose(settings: ModelSettings, config: Any, ds_config: DsConfig, packs: bool) -> str | None:
    """Choose the attention implementation for transformers; None leaves the choice to the model (sdpa or eager).

    Raises `UserError` if flash_attention_2 was requested and cannot run.
    """
    installed = is_flash_attn_2_available()
    suitable = get_accelerator().device_name() == "cuda" and dtype_name(ds_config) != "float32"
    if settings.attn_implementation == "flash_attention_2":
        if not installed:
            raise UserError(
                "--attn_implementation flash_attention_2: the package flash-attn is not installed for this device; "
                "`pip install flash-attn`, or use auto"
            )
        if not suitable:
            raise UserError(
                "--attn_implementation flash_attention_2: needs a CUDA device and bf16 or fp16 weights; use auto"
            )
    if settings.attn_implementation != "auto":
        return settings.attn_implementation
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not getattr(model_class, "_supports_flash_attn", False):
        return None
    if installed and suitable:
        return "flash_attention_2"
    # Models that support flash attention and any attention function pass on what `attend` needs: the documents and the
    # sliding window.
    suits = model_class._supports_sdpa and model_class._supports_attention_backend
    return SDPA_VARLEN if packs and suits else None


def takes_documents(attention: str | None) -> bool:
    """Return whether an attention implementation receives the documents of a pack, so that it needs no mask."""
    return attention == SDPA_VARLEN or (attention or "").startswith("flash_attention")


def attend(module: torch.nn.Module, *states: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Attend within each document of a pack: transformers' sdpa once per document, without a mask over the pack.

    `states` are query, key and value, `[1, heads, positions, width]`, and a mask, which is None. `options` must hold
    `document_lengths`, ints whose sum is the number of positions, and may hold `sliding_window` (positions). Returns
    `[1, positions, heads, width]`, as transformers requires.
    """
    lengths, sliding_window = options.pop("document_lengths"), options.pop("sliding_window", None)
    # Split, not sliced: the gradient of each slice would be as large as the whole pack.
    documents = zip(*(torch.split(state, lengths, dim=2) for state in states[:3]), strict=True)
    attended = [
        sdpa_attention_forward(module, *document, _window(document[0], sliding_window), **options)[0]
        for document in documents
    ]
    return torch.cat(attended, dim=1), None


def _window(query: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """Return the visible pairs of a document, bool `[length, length]`; None if plain causal attention is enough."""
    length = query.shape[2]
    if not sliding_window or length <= sliding_window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)


@contextmanager
def without_packs(model: Model) -> Iterator[None]:
    """Use transformers' own sdpa instead of `attend` within the block: generation does not use packs."""
    packed = model.config._attn_implementation == SDPA_VARLEN
    if packed:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if packed:
            model.set_attn_implementation(SDPA_VARLEN)


# Registered without a mask function, so that transformers builds no mask.
transformers.AttentionInterface.register(SDPA_VARLEN, attend)
