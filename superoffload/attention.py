"""Attention: which kernel a run takes, and packs attended to document by document where no kernel does it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from deepspeed.accelerator import get_accelerator
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from superoffload.config import ModelSettings
from superoffload.ds_config import Document, dtype_name
from superoffload.errors import UserError

SDPA_VARLEN = "sdpa_varlen"


def choose(settings: ModelSettings, config: Any, document: Document, packs: bool) -> str | None:
    """Choose the attention implementation to ask transformers for; None leaves it to the model (sdpa or eager).

    Raises `UserError` for an explicit flash_attention_2 that cannot be had.
    """
    installed = is_flash_attn_2_available()
    suitable = get_accelerator().device_name() == "cuda" and dtype_name(document) != "float32"
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
    # A model for flash attention that takes any attention function hands on what `attend` needs: the documents and
    # the sliding window.
    suits = model_class._supports_sdpa and model_class._supports_attention_backend
    return SDPA_VARLEN if packs and suits else None


def takes_documents(attention: str | None) -> bool:
    """Tell whether an attention implementation is told the documents of a pack, so that it needs no mask."""
    return attention == SDPA_VARLEN or (attention or "").startswith("flash_attention")


def attend(module: torch.nn.Module, *states: Any, **how: Any) -> tuple[torch.Tensor, None]:
    """Attend within each document of a pack: transformers' sdpa, once a document, without the mask over all pairs.

    `states` are query, key and value, `[1, heads, positions, width]`, and a mask that is None. `how` must hold
    `document_lengths`, ints that add up to the positions, and may hold `sliding_window` (positions). Returns
    `[1, positions, heads, width]`, as transformers asks for.
    """
    lengths, sliding_window = how.pop("document_lengths"), how.pop("sliding_window", None)
    # Not slices: the gradient of each of those would be as large as the whole.
    documents = zip(*(torch.split(state, lengths, dim=2) for state in states[:3]), strict=True)
    attended = [sdpa_attention_forward(module, *one, _window(one[0], sliding_window), **how)[0] for one in documents]
    return torch.cat(attended, dim=1), None


def _window(query: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """Return which positions of a document see which, bool `[length, length]`; None: each what is before it."""
    length = query.shape[2]
    if not sliding_window or length <= sliding_window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)


@contextmanager
def without_packs(model: Any) -> Iterator[None]:
    """Have transformers' own sdpa in place of `attend` for a while: what is generated is no pack."""
    packed = model.config._attn_implementation == SDPA_VARLEN
    if packed:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if packed:
            model.set_attn_implementation(SDPA_VARLEN)


# No mask function is registered with it: transformers then builds no mask.
transformers.AttentionInterface.register(SDPA_VARLEN, attend)
