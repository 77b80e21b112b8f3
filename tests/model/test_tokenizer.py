"""Loading a model's tokenizer."""

import json
from pathlib import Path

import pytest

from superoffload.errors import UserError
from superoffload.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.unit


def test_the_pad_token_falls_back_to_the_end_token(model_folder: Path) -> None:
    tokenizer = load_tokenizer(str(model_folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"


def test_a_tokenizer_without_an_end_token_is_refused(model_folder: Path, tmp_path: Path) -> None:
    for file in model_folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    described["eos_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"--model_name {name}: no such folder"):
        load_tokenizer(name)


def test_a_tokenizer_that_cannot_be_read_is_named(model_folder: Path, tmp_path: Path) -> None:
    for file in model_folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for content in ('{"a":', "{}"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=f"--model_name {tmp_path}: no tokenizer can be loaded: "):
            load_tokenizer(str(tmp_path))
