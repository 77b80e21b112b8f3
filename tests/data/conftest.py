"""Fixtures of the data tests: a cache per test, a small tokenizer and files of rows."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from superoffload.data.encode import Encoded
from superoffload.protocols import Tokenizer
from tests.helpers.rows import WriteJsonLines
from tests.helpers.tokenizers import decode_targets, make_chat_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test, and the processes it starts, a data set cache of their own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer() -> Tokenizer:
    return make_chat_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> WriteJsonLines:
    """Return a function that writes records (or raw bytes) as JSON lines and returns the file's name."""

    def write(rows: Sequence[Mapping[str, Any] | bytes], name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return write


@pytest.fixture
def decoded_targets(tokenizer: Tokenizer) -> Callable[[Encoded], list[str]]:
    """Return a function that decodes the runs of targets of an encoded row."""
    return lambda encoded: decode_targets(encoded, tokenizer)
