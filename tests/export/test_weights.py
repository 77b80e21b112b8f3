"""Export checkpoints of one rank and of two, and load what was exported."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from superoffload.checkpoint import rank_files
from superoffload.errors import UserError
from superoffload.export import files, weights
from superoffload.protocols import Model
from tests.helpers.exports import KINDS, Trained, load, same_answers, set_weight, tensors_of


@pytest.mark.parametrize("name", KINDS)
def test_an_exported_model_answers_like_the_trained_engine(
    name: str, trained: dict[str, Trained], tmp_path: Path
) -> None:
    run = trained[name]
    weights.export(run.output_dir, tmp_path / "target")
    assert same_answers(load(tmp_path / "target"), run)
    original = tensors_of(run.original)
    exported = tensors_of(tmp_path / "target")
    assert {key: value.shape for key, value in exported.items()} == {k: v.shape for k, v in original.items()}
    assert not all(torch.equal(exported[key], original[key].to(exported[key].dtype)) for key in original)  # it learned


def test_a_run_can_export(trained: dict[str, Trained]) -> None:
    """In the process of a run, transformers would shard the model that it builds."""
    run = trained["llama"]
    assert same_answers(load(run.output_dir / "export"), run)


def test_tied_weights_are_written_once(trained: dict[str, Trained], tmp_path: Path) -> None:
    weights.export(trained["tied"].output_dir, tmp_path / "target")
    assert "lm_head.weight" not in tensors_of(tmp_path / "target")
    loaded = load(tmp_path / "target")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_experts_are_separate_as_on_the_hub_and_buffers_keep_their_values(
    trained: dict[str, Trained], tmp_path: Path
) -> None:
    run = trained["glm4_moe"]
    weights.export(run.output_dir, tmp_path / "target")
    exported = tensors_of(tmp_path / "target")
    assert exported["model.layers.1.mlp.experts.3.gate_proj.weight"].shape == (16, 32)
    (state,) = run.output_dir.glob("global_step*/*_model_states.pt")
    buffer = "model.layers.1.mlp.gate.e_score_correction_bias"
    saved = torch.load(state, weights_only=False)["module"][buffer]
    assert exported[buffer].dtype == saved.dtype
    assert torch.equal(exported[buffer], saved)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_shards_with_an_index(name: str, trained: dict[str, Trained], tmp_path: Path) -> None:
    run = trained[name]
    weights.export(run.output_dir, tmp_path / "one")
    weights.export(run.output_dir, tmp_path / "many", max_shard_size="20KB")
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    whole, parts = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert whole.keys() == parts.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert same_answers(load(tmp_path / "many"), run)
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 20_000 or len(load_file(file)) == 1 for size, file in zip(sizes, files, strict=True))


def test_the_original_is_not_needed(trained: dict[str, Trained], tmp_path: Path) -> None:
    run = trained["qwen3_moe"]
    away = run.original.rename(tmp_path / "away")
    try:
        weights.export(run.output_dir, tmp_path / "target")
    finally:
        away.rename(run.original)
    assert same_answers(load(tmp_path / "target"), run)


def test_numbers_too_large_for_float16(damaged: Path, tmp_path: Path) -> None:
    set_weight(damaged, 1e6)
    with pytest.raises(UserError, match="too large for float16: use bfloat16"):
        weights.export(damaged, tmp_path / "target", "float16")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "int8"}, "--dtype int8: must be one of bfloat16, float32, float16"),
        ({"max_shard_size": "much"}, "--max_shard_size much: not a size such as 5GB or 500MB"),
        ({"max_shard_size": "0"}, "--max_shard_size 0: not a size such as 5GB or 500MB"),
    ],
)
def test_invalid_options(options: dict[str, Any], text: str, trained: dict[str, Trained], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        weights.export(trained["llama"].output_dir, tmp_path / "target", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_target_in_use_is_left_alone(trained: dict[str, Trained], tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        weights.export(trained["llama"].output_dir, tmp_path / "target")
    with pytest.raises(UserError, match=r"thesis\.tex: is a file"):
        weights.export(trained["llama"].output_dir, tmp_path / "target" / "thesis.tex")
    assert (tmp_path / "target" / "thesis.tex").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    weights.export(trained["llama"].output_dir, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_full_disk_is_an_error_before_anything_is_written(
    trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 0\.1 GB and the disk has 0\.0 GB free"):
        weights.export(trained["llama"].output_dir, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing(
    error: BaseException, trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def fail_once(*arguments: Any, **more: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        save_file(*arguments, **more)

    monkeypatch.setattr(weights, "save_file", fail_once)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        weights.export(trained["llama"].output_dir, tmp_path / "target", max_shard_size="20KB")
    assert list(tmp_path.iterdir()) == []


def test_written_files_are_verified(
    trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_one(tensors: dict[str, Any], *arguments: Any, **more: Any) -> None:
        save_file({name: tensors[name] for name in list(tensors)[1:]}, *arguments, **more)

    monkeypatch.setattr(weights, "save_file", lose_one)
    with pytest.raises(UserError, match=r"model\.safetensors: lacks tensors that were written to it; check the disk"):
        weights.export(trained["llama"].output_dir, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_export_are_removed(trained: dict[str, Trained], tmp_path: Path) -> None:
    (tmp_path / ".target.partial").mkdir()
    (tmp_path / ".target.partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    weights.export(trained["llama"].output_dir, tmp_path / "target")
    assert os.listdir(tmp_path) == ["target"]
    assert not list((tmp_path / "target").glob("model-*"))


def test_each_tensor_can_be_exported_on_its_own(trained: dict[str, Trained]) -> None:
    """The limit on memory depends on it: every group has one source, also for fused experts."""
    for run in trained.values():
        checkpoint = rank_files.read(run.output_dir)
        model = files.empty_model(checkpoint)
        groups = weights.plan(model, weights.wanted(model, checkpoint, torch.bfloat16))
        assert all(len(group.sources) == 1 for group in groups)


@pytest.mark.unit
def test_weights_that_are_joined_are_exported_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the saved form joins two tensors of each layer."""

    def join(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        joined = {name: tensor for name, tensor in tensors.items() if ".q" not in name and ".k" not in name}
        for name in [name for name in tensors if name.endswith(".q")]:
            joined[f"{name[:-1]}qk"] = torch.cat([tensors[name], tensors[f"{name[:-1]}k"]])
        return joined

    monkeypatch.setattr(weights, "revert_weight_conversion", join)
    names = ["embed.weight", "model.layers.0.q", "model.layers.0.k", "model.layers.10.q", "model.layers.10.k"]
    groups = weights.plan(cast(Model, None), {name: torch.empty(2, 3, device="meta") for name in names})
    assert [list(group.sources) for group in groups] == [names[:1], names[1:3], names[3:]]
    assert [list(group.targets) for group in groups] == [
        ["embed.weight"], ["model.layers.0.qk"], ["model.layers.10.qk"],
    ]  # fmt: skip
