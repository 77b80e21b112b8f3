"""The tokenizer's vocabulary against the rows of the embedding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import config
from superoffload.config import ModelSettings
from superoffload.data import collate, loader
from superoffload.errors import UserError
from superoffload.model import load, vocabulary
from superoffload.model.tokenizer import load_tokenizer
from tests.helpers.forked import launch
from tests.helpers.models import write_model
from tests.helpers.ranks import REPOSITORY, run_ranks
from tests.helpers.training import FP32

DS_CONFIG = {**FP32, "train_micro_batch_size_per_gpu": 1}


def needed(model: Path, rows: Path, new_tokens: int = 0, prompts: tuple[list[int], ...] = (), **flags: Any) -> int:
    """Return the rows that a run with this model and this data needs."""
    chosen = config.build({"model_name": str(model), "output_dir": "", "dataset_name": str(rows), **flags})
    tokenizer: Any = load_tokenizer(str(model))
    train, _ = loader.load(tokenizer, chosen.data, 0)
    tokenizer.add_tokens([f"<new {number}>" for number in range(new_tokens)])
    batches = loader.Batches(
        train, collate.choose_layout(chosen.data, 0, False), chosen.training, rank=0, world_size=1
    )  # fmt: skip
    return vocabulary.rows_needed(chosen.model, load.load_config(str(model)), tokenizer, [batches], prompts)


def test_only_tokens_in_use_need_a_row(
    tmp_path: Path, rows_file: Path, one_rank: None, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path)  # 264 rows, 257 tokens
    assert needed(tmp_path, rows_file) == 0
    assert needed(tmp_path, rows_file, 8) == 0
    assert "the tokenizer has 265 tokens, the embedding 264 rows; the data uses none" in caplog.text
    assert needed(tmp_path, rows_file, 7, resize_embeddings=True) == 0
    assert needed(tmp_path, rows_file, 8, resize_embeddings=True) == 320
    with pytest.raises(
        UserError, match=r"has 265 tokens, the embedding 264 rows, and token 264 \('<new 7>'\) is in use"
    ):
        needed(tmp_path, rows_file, 8, ([1, 264],))


def grow(folder: str, rows: int) -> tuple[dict[str, Any], float]:
    """Load a model with more rows; return its tables, its size in the configuration, and a loss on new tokens."""
    import deepspeed

    settings = ModelSettings(model_name=folder)
    model: Any = load.load_model(settings, load.load_architecture(settings), DS_CONFIG, None, rows)
    tables = {"in": model.get_input_embeddings().weight, "out": model.get_output_embeddings().weight}
    bias = model.get_output_embeddings().bias
    if bias is not None:
        tables["bias"] = bias
    assert all(hasattr(parameter, "ds_tensor") and parameter.numel() == 0 for parameter in tables.values())
    assert model.get_output_embeddings().out_features == model.get_input_embeddings().num_embeddings == rows
    found = {"tied": tables["in"] is tables["out"], "size": model.config.vocab_size}
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found |= {name: parameter.detach().clone() for name, parameter in tables.items()}
        loss = float(
            model(input_ids=torch.tensor([[5, rows - 1, rows - 2]]), labels=torch.tensor([[5, rows - 1, 7]])).loss
        )
    return found, loss


@pytest.mark.parametrize("kind", ["llama", "gemma", "phi"])  # two tables; one; a head with a bias
def test_new_rows_are_the_mean_of_the_others(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_model(tmp_path, kind, "float32", head_dim=8)
    names = {"in": "model.embed_tokens.weight", "out": "lm_head.weight", "bias": "lm_head.bias"}
    old = load_file(tmp_path / "model.safetensors")
    for found, loss in run_ranks(2, grow, str(tmp_path), 320):
        assert (found["size"], found["tied"]) == (320, kind == "gemma")
        for table in {"in", "out", "bias"} & found.keys():
            expected = old.get(names[table], old[names["in"]])
            assert torch.equal(found[table][:264], expected)
            mean = expected.mean(dim=0)
            assert torch.allclose(found[table][264:], mean.expand(56, *mean.shape), atol=1e-6)
        assert 0 < loss < 20


def add_tokens(folder: Path) -> None:
    """Give a model's tokenizer the token ` the`, which the data uses, beyond the embedding."""
    tokenizer: Any = load_tokenizer(str(folder))
    tokenizer.add_tokens([f"<new {number}>" for number in range(10)] + ["the"])
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["superoffload", "zerooffload"])
def test_a_run_with_more_tokens_than_rows(mode: str, tmp_path: Path, rows_file: Path) -> None:
    import transformers

    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    add_tokens(model)
    flags = [
        "--model_name", str(model), "--dataset_name", str(rows_file), "--output_dir", str(out), "--max_length", "64",
        "--max_steps", "2", "--save_checkpoint", "--export",
        "--deepspeed_config", str(REPOSITORY / "configs" / f"{mode}.json"),
    ]  # fmt: skip
    if mode == "superoffload":
        refused = launch(2, *flags)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr
        assert "has 268 tokens, the embedding 264 rows, and token 267 ('the') is in use" in refused.stderr
    done = launch(2, *flags, "--resize_embeddings")
    assert done.returncode == 0, done.stderr[-3000:]
    exported = transformers.AutoModelForCausalLM.from_pretrained(out / "model_step2")
    assert exported.get_input_embeddings().weight.shape == exported.lm_head.weight.shape == (320, 32)
    assert json.loads((out / "model_step2" / "config.json").read_text())["vocab_size"] == 320
    more = ["--resume", "auto", "--resume_anyway", "--max_steps", "3", "--resize_embeddings"]
    resumed = launch(2, *flags, *more)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "Resuming from" in resumed.stderr
