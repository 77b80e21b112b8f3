"""Evaluation: held-out loss, answers to prompts, and when it happens."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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
from superoffload.use import held_out
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
    prompts = loader.tokenize_prompts(["Say the thing."], tokenizer, chosen.data)
    loss = loss_kernel.choose(chosen.model.loss_kernel, model_engine, layout)
    evaluated = evaluation.Evaluation(batches, prompts, 0)
    numbers = evaluated.run(model_engine, loss, tokenizer, 1)
    (answer,) = evaluated.samples()["answers"]
    return numbers, answer, model_engine.training


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
    none = loader.Prompts()
    every_third = evaluation.Evaluation(some, none, 3)
    assert [step for step in range(1, 8) if every_third.due(step, last=step == 7)] == [3, 6, 7]
    assert evaluation.Evaluation(None, loader.Prompts(ids=[[1]]), 0).due(5, last=True)
    assert not evaluation.Evaluation(some, none, 0).due(5, last=False)
    assert not evaluation.Evaluation(None, none, 3).due(3, last=True)


@pytest.mark.unit
def test_an_answer_ends_with_any_of_the_end_tokens(model_folder: Path) -> None:
    whole, tokenizer = load.load_whole(model_folder)
    model: Any = held_out.WholeModel(whole, torch.device("cpu"))
    prompt, eos = [5, 6, 7], tokenizer.eos_token_id
    free = evaluation.generate_ids(whole, tokenizer, prompt, end_ids=[eos], max_new_tokens=8)
    prompts = loader.Prompts(texts=["q"], ids=[prompt], end_ids=[eos, free[3]])
    evaluated = evaluation.Evaluation(None, prompts, 0)
    evaluated.run(model, Mock(), tokenizer, 1)
    expected = tokenizer.decode(free[: free.index(free[3]) + 1], skip_special_tokens=True)
    assert evaluated.samples() == {"prompts": ["q"], "answers": [expected]}


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
