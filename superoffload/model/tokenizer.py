"""Load the model's tokenizer. Needs no DeepSpeed, so that previewing data starts quickly."""

from pathlib import Path

import transformers
from huggingface_hub import try_to_load_from_cache

from superoffload import hub
from superoffload.errors import UserError, first_line
from superoffload.protocols import Tokenizer


def check_name(name: str, file: str) -> None:
    """Raise `UserError` unless `--model_name` is a folder, a cached model, or one that the hub serves.

    `file` is the file that the cache must hold if the hub cannot be used.
    """
    if Path(name).expanduser().is_dir():
        return
    if hub.looks_like_path(name):
        raise UserError(f"--model_name {name}: no such folder")
    hub.check("model_name", name, "model", lambda: isinstance(try_to_load_from_cache(name, file), str))


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer of a model; a missing padding token falls back to the end-of-sequence token.

    Raises `UserError` if it cannot be loaded, or if it has no end-of-sequence token, without which no model learns to
    stop.
    """
    check_name(name, "tokenizer_config.json")
    try:
        tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--model_name {name}: {first_line(error)}") from error
    if tokenizer.eos_token is None:
        raise UserError(
            f"--model_name {name}: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
