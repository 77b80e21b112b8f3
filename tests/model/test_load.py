"""Loading a model: its configuration, sharded weights, leaf modules."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from superoffload.config import ModelSettings
from superoffload.ds_config import DsConfig
from superoffload.errors import UserError
from superoffload.model import architecture, load
from superoffload.model.flops import count_parameters
from tests.helpers.models import make_model, write_model
from tests.helpers.ranks import run_ranks

ZERO3: DsConfig = {
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}
MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


def load_sharded(folder: str) -> tuple[list[bool], list[str], int, bool]:
    """Load a model; return which parameters are sharded, the leaf modules, the elements held, whether it recomputes."""
    settings = ModelSettings(model_name=folder, activation_checkpointing="full")
    model: Any = load.load_model(settings, load.load_architecture(settings), {**ZERO3}, None)
    sharded = [hasattr(p, "ds_tensor") and p.numel() == 0 for p in model.parameters()]
    leaves = sorted({type(m).__name__ for m in model.modules() if getattr(m, "_z3_leaf", False)})
    held = sum(p.ds_tensor.numel() for p in model.parameters() if hasattr(p, "ds_tensor"))
    return sharded, leaves, held, _recomputes(model) and not model.config.use_cache


def _recomputes(model: Any) -> bool:
    return all(layer.gradient_checkpointing for layer in model.model.layers)


def test_weights_are_born_sharded(model_folder: Path) -> None:
    whole = count_parameters(make_model())
    for sharded, leaves, held, recomputes in run_ranks(2, load_sharded, str(model_folder)):
        assert all(sharded)
        assert leaves == []
        assert held < 0.6 * whole
        assert recomputes


@pytest.mark.parametrize(("known", "expected"), [(None, [0, 3]), (0, [0, 3]), ([3, 0], [3, 0]), ([7], [7, 0, 3])])
def test_a_model_stops_at_what_ends_answers_in_the_rows(known: int | list[int] | None, expected: list[int]) -> None:
    model = make_model()
    model.generation_config.eos_token_id = known
    load.end_answers_with(model, [0, 3])
    assert model.generation_config.eos_token_id == expected
    load.end_answers_with(model, [0])
    assert model.generation_config.eos_token_id == expected
    del model.generation_config
    load.end_answers_with(model, [0])


def buffers_sharded_and_whole(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Load a model as in a run, and whole; in ZeRO-3, torch makes every float tensor in the dtype of the weights."""
    import contextlib

    import transformers

    unchanged = contextlib.nullcontext  # as in transformers before 5.24, which did not except the frequencies
    with mock.patch.object(transformers.modeling_utils, "prevent_arange_dtype_change", unchanged, create=True):
        settings = ModelSettings(model_name=folder)
        sharded: Any = load.load_model(settings, load.load_architecture(settings), {**ZERO3}, None)
    with architecture.without_zero3():
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return dict(sharded.named_buffers()), dict(whole.named_buffers())


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss"])
def test_buffers_are_as_exact_as_without_zero3(kind: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, kind, **MOE.get(kind, {}))
    ((sharded, whole),) = run_ranks(1, buffers_sharded_and_whole, str(folder))
    assert sharded.keys() == whole.keys()
    assert any(buffer.dtype == torch.float32 for buffer in whole.values())
    for name, buffer in whole.items():
        assert sharded[name].dtype == buffer.dtype, name
        assert torch.equal(sharded[name], buffer), name


@pytest.mark.parametrize(
    ("kind", "leaf"),
    [("qwen3_moe", "Qwen3MoeSparseMoeBlock"), ("mixtral", "MixtralSparseMoeBlock"), ("gpt_oss", "GptOssExperts")],
)
def test_sparse_blocks_are_found(kind: str, leaf: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, kind, **MOE[kind])
    ((sharded, leaves, _, _),) = run_ranks(1, load_sharded, str(folder))
    assert all(sharded)
    assert leaves == [leaf]


@pytest.mark.unit
def test_an_unknown_leaf_module_lists_candidates(tmp_path: Path) -> None:
    sparse = make_model("qwen3_moe", **MOE["qwen3_moe"])
    load.check_leaf_module("Qwen3MoeSparseMoeBlock", sparse)
    with pytest.raises(UserError, match="--leaf_module NoSuchBlock: .* candidates: .*Qwen3MoeSparseMoeBlock"):
        load.check_leaf_module("NoSuchBlock", sparse)
    with pytest.raises(UserError, match="none looks like a sparse block; omit the flag"):
        load.check_leaf_module("NoSuchBlock", make_model())


@pytest.mark.unit
@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_does_not_exist(name: str) -> None:
    with pytest.raises(UserError, match=f"--model_name {name}: no such folder"):
        load.load_config(name)


@pytest.mark.unit
def test_a_folder_that_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load.load_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(UserError, match="no-such-type"):
        load.load_config(str(tmp_path))


def load_without_weights(folder: str) -> str:
    try:
        load_sharded(folder)
    except UserError as error:
        return str(error)
    return "no error"


def test_missing_weights_are_an_error(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    (answer,) = run_ranks(1, load_without_weights, str(tmp_path))
    assert f"--model_name {tmp_path}:" in answer
    assert "model.safetensors" in answer


def quantize_to_mxfp4(folder: Path) -> None:
    """Rewrite a gpt-oss checkpoint with 4-bit experts, all of value 1.0 (code 2, scale 2^0)."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = weights.pop(name).shape  # [experts, in, out]
        weights[f"{name}_blocks"] = torch.full((experts, columns, rows // 32, 16), 0x22, dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.full((experts, columns, rows // 32), 127, dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(described))


def load_mxfp4(folder: str) -> tuple[str, float, float]:
    import deepspeed

    settings = ModelSettings(model_name=folder)
    model: Any = load.load_model(settings, load.load_architecture(settings), {**ZERO3}, "eager")
    experts = model.model.layers[0].mlp.experts
    with deepspeed.zero.GatheredParameters([experts.down_proj], enabled=hasattr(experts.down_proj, "ds_tensor")):
        low, high = float(experts.down_proj.min()), float(experts.down_proj.max())
    return str(experts.down_proj.dtype), low, high


def test_mxfp4_experts_are_dequantized(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "gpt_oss", **{**MOE["gpt_oss"], "hidden_size": 64, "intermediate_size": 64})
    quantize_to_mxfp4(folder)
    assert run_ranks(1, load_mxfp4, str(folder)) == [("torch.bfloat16", 1.0, 1.0)]
