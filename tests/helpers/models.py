"""Small random models, tokenizers and rows, generated without access to a hub."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from or".split()


def make_rows(count: int, seed: int = 0, longest: int = 20) -> list[dict[str, str]]:
    """Make Alpaca rows of random words, of different lengths."""
    rng = random.Random(seed)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, n)))

    return [
        {"instruction": words(8), "input": words(4) if i % 3 == 0 else "", "output": words(longest)}
        for i in range(count)
    ]


def write_rows(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Write rows as a JSON list."""
    path.write_text(json.dumps(make_rows(count, seed)), encoding="utf-8")
    return path


def make_tokenizer() -> Any:
    """Make a byte-level tokenizer with the end-of-sequence token `<eos>` and no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: index for index, letter in enumerate(alphabet, 1)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def make_model(kind: str = "llama", dtype: str = "bfloat16", **changes: Any) -> Any:
    """Make a random model of a type such as llama, qwen3_moe, mixtral or gpt_oss."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))


def write_model(folder: Path, kind: str = "llama", dtype: str = "bfloat16", **changes: Any) -> Path:
    """Write a random model and its tokenizer to a folder, for `--model_name`."""
    make_model(kind, dtype, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
