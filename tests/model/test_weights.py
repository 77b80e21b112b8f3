"""Weights that are missing, of another shape, damaged or not finite are an error in one line."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from superoffload.config import ModelSettings
from superoffload.errors import UserError
from superoffload.model import architecture, load, weights
from superoffload.model.tokenizer import load_tokenizer
from tests.helpers.families import FAMILIES
from tests.helpers.models import make_model, write_model
from tests.helpers.ranks import run_ranks
from tests.helpers.training import FP32

DS_CONFIG = {**FP32, "train_micro_batch_size_per_gpu": 1}

FILE = "model.safetensors"
Change = Callable[[dict[str, torch.Tensor]], Any]


def rewrite(folder: Path, change: Change) -> None:
    """Change the tensors of a model's file."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def check(folder: Path, init_missing: bool = False) -> None:
    """Check the files of a model, as a run does before it loads them."""
    skeleton = architecture.empty_model(load.load_config(str(folder)))
    weights.check(str(folder), skeleton, weights.describe(str(folder), weights.find(str(folder))), init_missing)


@pytest.mark.unit
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "mixtral", "qwen3_moe", "deepseek_v3", "gemma3", "mamba"])
def test_complete_weights_pass_in_the_form_in_which_transformers_saves_them(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, kind, **FAMILIES[kind])
    check(tmp_path)
    assert caplog.messages == []


def drop_six(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name][:6]:
        del tensors[name]


def drop_an_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".experts.3." in name]:
        del tensors[name]


def shorten(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()


@pytest.mark.unit
@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("llama", lambda t: t.pop("lm_head.weight"), r"its weights lack lm_head\.weight; use .*--init_missing"),
        ("llama", drop_six, r"lack model\.layers\.1\.(\S+, ){4}\S+ and 1 more; "),
        ("mixtral", drop_an_expert, r"experts\.\S+ has the shape \(3, .*, the configuration asks for \(4, "),
        ("llama", shorten, r"embed_tokens\.weight has the shape \(200, 32\), the configuration asks for \(264, 32\)"),
    ],
)
def test_what_does_not_fit_is_named(kind: str, change: Change, text: str, tmp_path: Path) -> None:
    write_model(tmp_path, kind, **FAMILIES[kind])
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=f"--model_name {tmp_path}: .*{text}"):
        check(tmp_path)


@pytest.mark.unit
def test_the_weights_of_a_model_without_its_head_lack_only_that(tmp_path: Path) -> None:
    make_model().model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its weights lack lm_head\.weight; "):
        check(tmp_path)
    make_model(tie_word_embeddings=True).model.save_pretrained(tmp_path)
    check(tmp_path)


@pytest.mark.unit
def test_unknown_weights_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(2) for i in range(7)}))
    check(tmp_path)
    (message,) = caplog.messages
    assert "extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more" in message


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def replace_by_pointer(path: Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 65000\n")


@pytest.mark.unit
@pytest.mark.parametrize("form", [FILE, "pytorch_model.bin", "sharded"])
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (cut, "is damaged or truncated .*; download it again"),
        (lambda path: path.write_bytes(b""), "is damaged or truncated .*; download it again"),
        (replace_by_pointer, "is a git-lfs pointer, not the file itself; run `git lfs pull` there"),
        (lambda path: path.unlink(), "is missing; download the model again|has no weights"),
    ],
)
def test_a_damaged_file_is_named(form: str, damage: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "1GB")
    if form == "pytorch_model.bin":
        torch.save(load_file(tmp_path / FILE), tmp_path / form)
        (tmp_path / FILE).unlink()
    path = sorted(tmp_path.glob("*.bin" if form.endswith(".bin") else "*.safetensors"))[-1]
    check(tmp_path)
    damage(path)
    with pytest.raises(UserError, match=f"--model_name {tmp_path}: ({path.name} )?({text})"):
        check(tmp_path)


@pytest.mark.unit
def test_a_file_that_could_run_code_does_not(tmp_path: Path) -> None:
    model = make_model()
    model.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(os.mkdir, protocol=2))
    with pytest.raises(UserError, match=r"pytorch_model.bin is damaged, or holds more than tensors, .*\*.safetensors"):
        check(tmp_path)


@pytest.mark.unit
@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}'])
def test_an_index_of_another_form_is_named(content: str, tmp_path: Path) -> None:
    make_model().config.save_pretrained(tmp_path)
    (tmp_path / f"{FILE}.index.json").write_text(content)
    with pytest.raises(UserError, match=f"--model_name {tmp_path}: {FILE}.index.json lists no files of weights"):
        check(tmp_path)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_pointers_in_place_of_small_files_are_named(name: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    replace_by_pointer(tmp_path / name)
    for read in (load.load_config, load_tokenizer):
        with pytest.raises(UserError, match=f"{name} is a git-lfs pointer"):
            read(str(tmp_path))


def load_on_this_rank(folder: str, init_missing: bool = False) -> tuple[str, float, bool]:
    """Load a model; return the error, or the spread of its head, and whether the ranks hold the same one."""
    import deepspeed

    from superoffload import distributed

    settings = ModelSettings(model_name=folder, init_missing=init_missing)
    try:
        model: Any = load.load_model(settings, load.load_architecture(settings), DS_CONFIG, None)
    except UserError as error:
        return str(error), 0.0, False
    with deepspeed.zero.GatheredParameters([model.lm_head.weight]):
        head = model.lm_head.weight.float().clone()
    return "", float(head.std()), len({float(h.sum()) for h in distributed.all_gather_objects(head)}) == 1


def test_missing_weights_are_trained_knowingly(tmp_path: Path) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    for error, *_ in run_ranks(2, load_on_this_rank, str(tmp_path)):
        assert "its weights lack lm_head.weight" in error
    for error, spread, equal in run_ranks(2, load_on_this_rank, str(tmp_path), True):
        assert error == ""
        assert 0.015 < spread < 0.025  # initializer_range is 0.02
        assert equal


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][263, 31] = torch.nan  # in the part of the last rank
    tensors["model.norm.weight"][0] = torch.inf


def test_values_that_are_not_finite_are_named_on_every_rank(tmp_path: Path) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, spoil)
    for error, *_ in run_ranks(2, load_on_this_rank, str(tmp_path)):
        assert error.startswith(
            f"--model_name {tmp_path}: NaN or infinite values in lm_head.weight, model.norm.weight; "
        )


@pytest.mark.unit
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", None])
def test_quantized_weights_that_cannot_be_trained_are_refused(method: str | None, tmp_path: Path) -> None:
    write_model(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=rf"its weights are quantized \({method or 'bitsandbytes'}\), so they cannot"):
        load.load_config(str(tmp_path))


def quantize_to_fp8(tensors: dict[str, torch.Tensor]) -> None:
    """Store the linear layers in FP8, in blocks of 16 by 16 that are scaled by 0.25."""
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = torch.full((rows, columns), 2.0).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((-(-rows // 16), -(-columns // 16)), 0.25)


def load_fp8(folder: str) -> tuple[str, float, float, str]:
    import deepspeed

    settings = ModelSettings(model_name=folder)
    ds_config = {**DS_CONFIG, "bf16": {"enabled": True}}
    model: Any = load.load_model(settings, load.load_architecture(settings), ds_config, None)
    weight = model.model.layers[1].mlp.down_proj.weight
    with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_tensor")):
        return (
            str(weight.dtype),
            float(weight.min()),
            float(weight.max()),
            type(model.model.layers[1].mlp.down_proj).__name__,
        )


def test_fp8_is_dequantized(tmp_path: Path) -> None:
    write_model(tmp_path)
    rewrite(tmp_path, quantize_to_fp8)
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert run_ranks(1, load_fp8, str(tmp_path)) == [("torch.bfloat16", 0.5, 0.5, "Linear")]
