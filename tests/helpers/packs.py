"""Small models of several architectures, a stand-in for the engine, and documents in packs to run them on."""

from typing import Any

import numpy as np
import torch
import transformers

from superoffload.data.collate import Layout, Row
from superoffload.data.encode import IGNORED

PACKED = Layout(packs=True, full_length=False, max_length=48, pad_token_id=1)
PADDED = Layout(packs=False, full_length=False, max_length=48, pad_token_id=1)
VARLEN = Layout(packs=True, full_length=False, max_length=48, pad_token_id=1, varlen=True)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS: dict[str, dict[str, int]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def document(length: int, seed: int, prompt: int = 2) -> Row:
    """Make a document of random tokens whose first `prompt` tokens are no targets."""
    ids = np.random.default_rng(seed).integers(2, 64, size=length)
    labels = np.where(np.arange(length) < prompt, IGNORED, ids)
    return ids, labels


DOCUMENTS = [document(length, seed, prompt) for seed, (length, prompt) in enumerate([(9, 2), (1, 0), (17, 5), (8, 0)])]
PACKS = [DOCUMENTS[:2], DOCUMENTS[2:]]


def tiny(kind: str, attention: str = "sdpa", **changes: Any) -> Any:
    """Make a random float32 model, the same in each call: a kind of `KINDS`, or another type with its own sizes."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **KINDS.get(kind, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.config.use_cache = False
    return model.float()


class StandIn(torch.nn.Module):
    """A stand-in for DeepSpeed's engine, on the CPU."""

    device = torch.device("cpu")

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def make_engine(model: torch.nn.Module) -> Any:
    """Wrap a model in a stand-in for DeepSpeed's engine."""
    return StandIn(model)
