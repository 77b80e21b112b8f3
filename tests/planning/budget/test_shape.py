"""The shape of a model: of every family, from a folder, and of the well-known ones without a network."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from superoffload.errors import UserError
from superoffload.model import architecture
from superoffload.planning.budget import shape
from tests.helpers import builtin_shapes
from tests.helpers.families import FAMILIES
from tests.helpers.models import SIZES, write_model

pytestmark = pytest.mark.unit

WITHOUT_ATTENTION = {"mamba", "mamba2"}
HEAD_NORMS = {
    "qwen3", "gemma3_text", "olmo2", "olmo3", "exaone4", "apertus", "persimmon", "qwen3_moe", "olmoe", "dots1",
    "qwen3_next", "lfm2", "gemma3",
}  # fmt: skip
# Two experts of 48 or of 16; all others have 48 in all.
INTERMEDIATE = {
    **dict.fromkeys(("mixtral", "gpt_oss", "granitemoe", "phimoe", "granitemoehybrid", "jamba"), 96),
    **dict.fromkeys(("qwen3_moe", "olmoe", "ernie4_5_moe"), 32),
}


def skeleton_of(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy({**SIZES, **FAMILIES[kind]}))
    return architecture.empty_model(config)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_has_a_shape(kind: str) -> None:
    skeleton = skeleton_of(kind)
    found = shape.of_model(kind, skeleton)
    assert found.parameters == sum(parameter.numel() for parameter in skeleton.parameters())
    assert (found.layers, found.hidden, found.vocabulary) == (2, 32, 264)
    assert found.head == 264 * 32
    assert 0 < found.layer < found.trained
    assert found.largest <= found.unit < found.trained
    assert found.intermediate == INTERMEDIATE.get(kind, 48)
    assert found.head_norms == (kind in HEAD_NORMS)
    if kind in WITHOUT_ATTENTION:
        assert (found.heads, found.kv_heads, found.head_dim) == (0, 0, 0)
    else:
        assert (found.heads, found.head_dim) == (4, 8)
        assert 1 <= found.kv_heads <= 4


@pytest.mark.parametrize(
    ("kind", "values", "missing", "expected"),
    [
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64}, "num_attention_heads", (3, 0, 64)),
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64}, "intermediate_size", (3, 4, 128)),
        ("opt", {"hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 80, "word_embed_proj_dim": 32,
                 "num_attention_heads": 4, "vocab_size": 64}, "intermediate_size", (3, 4, 80)),
    ],
)  # fmt: skip
def test_what_a_configuration_does_not_say_is_found(
    kind: str, values: dict[str, int], missing: str, expected: tuple[int, int, int]
) -> None:
    config = transformers.AutoConfig.for_model(kind, **values)
    assert not hasattr(config, missing)
    found = shape.of_model(kind, architecture.empty_model(config))
    assert (found.layers, found.heads, found.intermediate) == expected


def test_settings_per_layer_count_with_their_largest() -> None:
    config = SimpleNamespace(intermediate_size=[16, 64, None, 48], ffn_dim=7)
    assert shape._number(config, "intermediate_size", "ffn_dim") == 64
    assert shape._number(config, "n_inner", "ffn_dim") == 7
    assert shape._number(config, "n_inner") == 0


@pytest.mark.parametrize(
    ("kind", "experts", "unit"), [("mixtral", 2, "block"), ("gpt_oss", 2, "experts"), ("llama", 1, "")]
)
def test_a_sparse_block_is_gathered_as_a_whole(kind: str, experts: int, unit: str) -> None:
    skeleton = skeleton_of(kind)
    found = shape.of_model(kind, skeleton)
    assert found.experts_per_token == experts
    if unit:
        blocks = [m for m in skeleton.modules() if type(m).__name__ in ("MixtralSparseMoeBlock", "GptOssExperts")]
        assert found.unit == sum(parameter.numel() for parameter in blocks[0].parameters())
    else:
        assert found.unit == found.largest == found.head


def test_what_text_does_not_reach_is_frozen(tmp_path: Path) -> None:
    write_model(tmp_path, "gemma3", **FAMILIES["gemma3"])
    found, text = shape.load(str(tmp_path)), shape.of_model("text", skeleton_of("gemma3_text"))
    assert found.frozen > 0
    assert (found.trained, found.layers, found.layer) == (text.trained, text.layers, text.layer)


def test_a_folder_is_read_without_its_weights(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3_moe", **FAMILIES["qwen3_moe"])
    (tmp_path / "model.safetensors").unlink()
    assert shape.load(str(tmp_path)) == shape.of_model(str(tmp_path), skeleton_of("qwen3_moe"))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"--model_name .*no config\.json"):
        shape.load(str(tmp_path))


@pytest.mark.parametrize("name", builtin_shapes.MODELS)
def test_built_in_shapes_are_those_of_the_models(name: str) -> None:
    hub_ids, _, _, parameters = builtin_shapes.MODELS[name]
    expected = shape.of_model(name, builtin_shapes.skeleton(name))
    assert expected.parameters == parameters, "not the number of parameters that its authors publish"
    for alias in (name, *hub_ids):
        assert shape.built_in(alias) == expected
        assert alias in shape.built_in_names()


def test_the_file_of_built_in_shapes_is_what_its_program_writes() -> None:
    assert shape.BUILT_IN.read_text(encoding="utf-8") == builtin_shapes.text()


def test_an_unknown_name_is_no_built_in_shape() -> None:
    with pytest.raises(KeyError):
        shape.built_in("llama-9b")


@pytest.mark.parametrize(
    "numbers",
    [(), (1,), (1, 1, 1), (7, 1, 2, 3, 1, 2, 3, 7), (1, 2, 1, 2, 2, 2, 2), tuple(range(9)), (5,) * 3 + (6,) * 2],
)
def test_repeated_parts_come_back(numbers: tuple[int, ...]) -> None:
    assert tuple(shape._expand(builtin_shapes.compressed(numbers))) == numbers
