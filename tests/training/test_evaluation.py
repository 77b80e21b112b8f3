"""Evaluation: held-out loss, answers to prompts, and when it happens."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import config, distributed
from superoffload.data import collate, loader
from superoffload.ds_config import merge_flags
from superoffload.errors import UserError
from superoffload.model import load, loss_kernel
from superoffload.model.head import summed_loss
from superoffload.model.tokenizer import load_tokenizer
from superoffload.training import engine, evaluation
from tests.helpers.ranks import run_ranks
from tests.helpers.training import FP32


def evaluate(values: dict[str, Any]) -> tuple[dict[str, float], str, bool]:
    """Evaluate a fresh model on held-out rows and continue a prompt."""
    merged = merge_flags(FP32, config.build(values), distributed.world_size())
    chosen = merged.config
    tokenizer = load_tokenizer(chosen.model.model_name)
    _, held_out = loader.load(tokenizer, chosen.data, chosen.training.seed)
    assert held_out is not None
    layout = collate.choose_layout(chosen.data, tokenizer.pad_token_id, False)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    batches = loader.Batches(held_out, layout, chosen.training, **ranks)
    model = load.load_model(chosen.model, load.load_architecture(chosen.model), merged.ds_config, None)
    model_engine = engine.create(model, merged.ds_config, chosen, 10)
    (prompt,) = loader.tokenize_prompts(["Say the thing."], tokenizer, chosen.data)
    loss = loss_kernel.choose(chosen.model.loss_kernel, model_engine, layout)
    numbers = evaluation.Evaluation(batches, [prompt], 0).run(model_engine, loss, tokenizer, 1)
    return numbers, evaluation.generate(model_engine, tokenizer, prompt), model_engine.training


def test_the_numbers_do_not_depend_on_ranks_or_packing(model_folder: Path, rows_file: Path) -> None:
    values = {"model_name": str(model_folder), "dataset_name": str(rows_file), "output_dir": "unused",
              "max_length": 128, "eval_percentage": 30, "batch_size": 3}  # fmt: skip
    ((one, text, training),) = run_ranks(1, evaluate, {**values, "packing": False})
    both = run_ranks(2, evaluate, values)
    assert training
    assert one["eval_perplexity"] == pytest.approx(math.exp(one["eval_loss"]))
    for numbers, answer, _ in both:
        assert numbers["eval_target_tokens"] == one["eval_target_tokens"] > 100
        assert numbers["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
        assert answer == text

    loaded, tokenizer = load.load_whole(model_folder)
    whole: Any = loaded
    _, held_out = loader.load(tokenizer, config.build({**values, "packing": False}).data, 42)
    assert held_out is not None
    loss, targets = 0.0, 0
    for ids, labels in held_out.read(list(range(len(held_out)))):
        row = torch.as_tensor(ids.copy())[None].long()
        with torch.no_grad():
            loss += summed_loss(whole(row).logits, torch.as_tensor(labels.copy())[None].long()).item()
        targets += int((torch.as_tensor(labels[1:].copy()) != -100).sum())
    assert targets == one["eval_target_tokens"]
    assert one["eval_loss"] == pytest.approx(loss / targets, rel=1e-5)


@pytest.mark.unit
def test_when_to_evaluate() -> None:
    some: Any = object()
    every_third = evaluation.Evaluation(some, [], 3)
    assert [step for step in range(1, 8) if every_third.due(step, last=step == 7)] == [3, 6, 7]
    assert evaluation.Evaluation(None, [[1]], 0).due(5, last=True)
    assert not evaluation.Evaluation(some, [], 0).due(5, last=False)
    assert not evaluation.Evaluation(None, [], 3).due(3, last=True)


@pytest.mark.unit
def test_prompts_are_read_one_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text("First one.\n\nSecond one.\n", encoding=encoding)
        assert evaluation.read_prompts(str(path)) == ("First one.", "Second one.")
    assert evaluation.read_prompts(None) == ()
    path.write_text("\n\n")
    with pytest.raises(UserError, match="has no prompts"):
        evaluation.read_prompts(str(path))
    with pytest.raises(UserError, match="--sample_prompts .*cannot be read"):
        evaluation.read_prompts(str(tmp_path / "none.txt"))
