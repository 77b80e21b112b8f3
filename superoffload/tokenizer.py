"""The model's tokenizer; needs no DeepSpeed, so that looking at data starts quickly."""

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache

from superoffload import hub
from superoffload.errors import UserError


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model; a missing padding token falls back to the end-of-sequence token.

    Raises `UserError` where it cannot be had or has no end-of-sequence token to learn stopping from.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"--model_name {name}: no such folder")
        hub.check(
            "model_name", name, "model", lambda: isinstance(try_to_load_from_cache(name, "tokenizer_config.json"), str)
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"--model_name {name}: {reason}") from error
    if tokenizer.eos_token is None:
        raise UserError(
            f"--model_name {name}: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
