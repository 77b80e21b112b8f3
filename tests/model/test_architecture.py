"""A model without weights: its positions, and the parameters that text does not reach."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from superoffload.errors import UserError
from superoffload.model import architecture, load
from tests.helpers.families import FAMILIES
from tests.helpers.models import make_model

pytestmark = pytest.mark.unit

TABLES = ["gpt2", "gpt_bigcode", "gptj", "codegen", "gpt_neo", "opt", "biogpt"]
ROTARY = ["llama", "gemma2", "falcon", "gpt_neox", "qwen3_next", "deepseek_v3"]


@pytest.mark.parametrize("kind", TABLES)
def test_rows_beyond_a_table_of_positions_are_refused(kind: str) -> None:
    model = make_model(kind, "float32", **FAMILIES[kind])
    architecture.check_positions(model, 512)
    with pytest.raises(
        UserError, match=r"--max_length 513: the model has a table of 512 positions \(.*--max_length 512"
    ):
        architecture.check_positions(model, 513)
    with pytest.raises((IndexError, RuntimeError)):  # what it prevents
        model(input_ids=torch.zeros((1, 513), dtype=torch.int64))


@pytest.mark.parametrize("kind", ROTARY)
def test_rows_beyond_what_a_rotary_model_was_made_for_are_a_warning(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(kind, "float32", **FAMILIES[kind])
    architecture.check_positions(model, 512)
    assert "--max_length" not in caplog.text
    architecture.check_positions(model, 513)
    assert "--max_length 513: the model was made for 512 positions; rows longer" in caplog.text
    model(input_ids=torch.zeros((1, 513), dtype=torch.int64))


@pytest.mark.parametrize("kind", ["xglm", "bloom", "mamba", "recurrent_gemma"])
def test_models_that_know_no_largest_position_run_at_any_length(kind: str) -> None:
    model = make_model(kind, "float32", **FAMILIES[kind])
    architecture.check_positions(model, 600)
    model(input_ids=torch.zeros((1, 600), dtype=torch.int64))


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "mamba", "ernie4_5_moe", "gemma3"])
def test_unused_parameters_are_those_without_a_gradient(kind: str) -> None:
    model = make_model(kind, "float32", **FAMILIES[kind])
    model(input_ids=torch.arange(20)[None]).logits.sum().backward()
    expected = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    skeleton = architecture.empty_model(model.config)
    assert architecture.unused_parameters(skeleton) == expected
    assert all(parameter.grad is None for parameter in skeleton.parameters())
    assert bool(expected) == (kind in ("ernie4_5_moe", "gemma3"))


def test_without_a_run_the_structure_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = architecture.empty_model(make_model("gemma3", **FAMILIES["gemma3"]).config)
    expected = architecture.unused_parameters(skeleton)

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("looks at numbers")

    monkeypatch.setattr(type(skeleton), "forward", fail)
    assert architecture.unused_parameters(skeleton) == expected
    plain = architecture.empty_model(make_model().config)
    monkeypatch.setattr(type(plain), "forward", fail)
    assert architecture.unused_parameters(plain) == set()


def test_an_empty_model_takes_no_memory_and_no_random_numbers() -> None:
    config = make_model("gemma3", **FAMILIES["gemma3"]).config
    before = torch.get_rng_state()
    model = architecture.empty_model(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_generates_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="vit is no causal language model"):
        architecture.empty_model(transformers.AutoConfig.for_model("vit"))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("hidden_act", "siluu", "KeyError: 'siluu'"),
        ("hidden_size", "abc", "StrictDataclassFieldValidationError: .*'hidden_size'.* expected int, got str"),
        ("num_attention_heads", 0, "ZeroDivisionError"),
        ("num_hidden_layers", None, "StrictDataclassFieldValidationError"),
        ("vocab_size", -5, ""),
    ],
)
def test_a_configuration_that_describes_no_model_is_one_line(
    key: str, value: Any, reason: str, tmp_path: Path, model_folder: Path
) -> None:
    described = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, key: value}))
    with pytest.raises(UserError, match=f"config.json describes no model \\({reason}") as caught:
        architecture.empty_model(load.load_config(str(tmp_path)))
    assert "\n" not in str(caught.value)


CODE = """
import os, transformers
open(os.environ["MARKER"], "w").close()
class OwnConfig(transformers.LlamaConfig):
    model_type = "own"
class OwnForCausalLM(transformers.LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_runs_only_when_trusted(
    trusted: bool, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from superoffload.model import load

    folder, marker = tmp_path / "model", tmp_path / "marker"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    described = json.loads((folder / "config.json").read_text())
    described |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "own.py").write_text(CODE)
    monkeypatch.setenv("MARKER", str(marker))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks a question inside a job"))
    if trusted:
        skeleton = architecture.empty_model(load.load_config(str(folder), None, True), True)
        assert type(skeleton).__name__ == "OwnForCausalLM"
    else:
        with pytest.raises(UserError, match="comes with code of its own; read it, then allow it .*--trust_remote_code"):
            load.load_config(str(folder))
    assert os.path.exists(marker) == trusted
