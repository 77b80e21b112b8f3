"""Load the model's tokenizer. Needs no DeepSpeed, so that previewing data starts quickly."""

from pathlib import Path

import transformers
from huggingface_hub import try_to_load_from_cache

from superoffload import hub
from superoffload.errors import UserError, first_line
from superoffload.protocols import Tokenizer

POINTER = b"version https://git-lfs"  # how a file begins that git-lfs has not fetched


def check_name(name: str, file: str, revision: str | None = None) -> None:
    """Raise `UserError` unless `--model_name` is a folder, a cached model, or one that the hub serves.

    `file` is the file that the cache must hold if the hub cannot be used.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        for path in sorted(folder.glob("*.json")):
            check_not_a_pointer(name, path)
        return
    if hub.looks_like_path(name):
        raise UserError(f"--model_name {name}: no such folder")
    hub.check(
        "model_name", name, "model", lambda: isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    )


def check_not_a_pointer(name: str, path: Path) -> None:
    """Raise `UserError` if a file of a model is a git-lfs pointer instead of what it stands for."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(
                f"--model_name {name}: {path.name} is a git-lfs pointer, not the file itself; run `git lfs pull` there"
            )


def explain(error: BaseException) -> str:
    """Describe why transformers cannot load a part of a model."""
    if "trust_remote_code" in str(error):
        return "the model comes with code of its own; read it, then allow it to run with --trust_remote_code"
    return first_line(error)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a model; a missing padding token falls back to the end-of-sequence token.

    Raises `UserError` if it cannot be loaded, or if it has no end-of-sequence token, without which no model learns to
    stop.
    """
    check_name(name, "tokenizer_config.json", revision)
    try:
        tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--model_name {name}: no tokenizer can be loaded: {explain(error)}") from error
    if tokenizer.eos_token is None:
        raise UserError(
            f"--model_name {name}: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
