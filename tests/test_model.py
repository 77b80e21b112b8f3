import json
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import config, model
from superoffload.errors import UserError
from tests.models import make_model, write_model
from tests.ranks import run_ranks

DOCUMENT: dict[str, Any] = {
    "bf16": {"enabled": True},
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}
MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


def settings(**values: Any) -> config.ModelSettings:
    return config.ModelSettings(**{"model_name": "m", **values})


def load_sharded(folder: str, **values: Any) -> tuple[list[bool], list[str], int, bool]:
    chosen = settings(model_name=folder, activation_checkpointing=True, **values)
    loaded_config = model.load_config(folder)
    loaded = model.load_model(chosen, loaded_config, {**DOCUMENT}, None)
    sharded = [hasattr(p, "ds_tensor") and p.numel() == 0 for p in loaded.parameters()]
    leaves = sorted({type(m).__name__ for m in loaded.modules() if getattr(m, "_z3_leaf", False)})
    held = sum(p.ds_tensor.numel() for p in loaded.parameters() if hasattr(p, "ds_tensor"))
    return sharded, leaves, held, loaded.is_gradient_checkpointing and not loaded.config.use_cache


def test_weights_are_born_sharded(model_folder: Path) -> None:
    whole = model.count_parameters(make_model())
    for sharded, leaves, held, prepared in run_ranks(2, load_sharded, str(model_folder)):
        assert all(sharded)
        assert leaves == []
        assert held < 0.6 * whole
        assert prepared


@pytest.mark.parametrize(
    ("kind", "leaf"),
    [("qwen3_moe", "Qwen3MoeSparseMoeBlock"), ("mixtral", "MixtralSparseMoeBlock"), ("gpt_oss", "GptOssExperts")],
)
def test_sparse_blocks_are_found(kind: str, leaf: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, kind, **MOE[kind])
    ((sharded, leaves, _, _),) = run_ranks(1, load_sharded, str(folder))
    assert all(sharded)
    assert leaves == [leaf]


def test_an_unknown_leaf_module_lists_candidates(tmp_path: Path) -> None:
    sparse = make_model("qwen3_moe", **MOE["qwen3_moe"]).config
    model.check_leaf_module("Qwen3MoeSparseMoeBlock", sparse)
    with pytest.raises(UserError, match="--leaf_module Blok: .* candidates: .*Qwen3MoeSparseMoeBlock"):
        model.check_leaf_module("Blok", sparse)
    with pytest.raises(UserError, match="leave the flag out"):
        model.check_leaf_module("Blok", make_model().config)


def test_norms_and_biases_take_no_decay() -> None:
    qwen = make_model("qwen2", "float32")  # has biases
    decayed, plain = model.parameter_groups(qwen, 0.1)
    names = {id(parameter): name for name, parameter in qwen.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert {names[id(p)].rsplit(".", 1)[-1] for p in plain["params"]} == {"weight", "bias"}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_biases_of_experts_take_no_decay() -> None:
    experts = make_model("gpt_oss", "float32", **MOE["gpt_oss"])
    _, plain = model.parameter_groups(experts, 0.1)
    names = {id(parameter): name for name, parameter in experts.named_parameters()}
    assert any(names[id(p)].endswith("gate_up_proj_bias") for p in plain["params"])


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_does_not_exist(name: str) -> None:
    with pytest.raises(UserError, match=f"--model_name {name}: no such folder"):
        model.load_config(name)


def test_a_folder_that_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        model.load_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "of another world"}')
    with pytest.raises(UserError, match="of another world"):
        model.load_config(str(tmp_path))


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

    loaded = model.load_model(settings(model_name=folder), model.load_config(folder), {**DOCUMENT}, "eager")
    experts = loaded.model.layers[0].mlp.experts
    with deepspeed.zero.GatheredParameters([experts.down_proj], enabled=hasattr(experts.down_proj, "ds_tensor")):
        low, high = float(experts.down_proj.min()), float(experts.down_proj.max())
    return str(experts.down_proj.dtype), low, high


def test_mxfp4_experts_are_dequantized(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "gpt_oss", **{**MOE["gpt_oss"], "hidden_size": 64, "intermediate_size": 64})
    quantize_to_mxfp4(folder)
    assert run_ranks(1, load_mxfp4, str(folder)) == [("torch.bfloat16", 1.0, 1.0)]
