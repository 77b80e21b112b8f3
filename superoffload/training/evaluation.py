"""Evaluate during training: loss and perplexity of held-out rows, and generated answers to prompts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from superoffload import distributed
from superoffload.data.loader import Batches, Prompts
from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.model import attention
from superoffload.model.head import Loss
from superoffload.protocols import Engine, Model, Tokenizer
from superoffload.training.source_losses import SourceLosses

SAMPLE_TOKENS = 64


def read_prompts(path: str | None) -> tuple[str, ...]:
    """Read `--sample_prompts`: one prompt per line, empty lines ignored; raises `UserError`."""
    if path is None:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample_prompts {path}: cannot be read ({error})") from error
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise UserError(f"--sample_prompts {path}: has no prompts")
    return prompts


class Evaluation:
    """Evaluates held-out rows and prompts, either of which may be missing."""

    def __init__(self, held_out: Batches | None, prompts: Prompts, every: int) -> None:
        """Take the held-out rows, the prompts, and the number of steps between evaluations."""
        self._held_out = held_out
        self._prompts = prompts
        self._every = every
        self._answers: list[str] = []
        self._done_at = -1

    def samples(self) -> dict[str, list[str]]:
        """Return the prompts, and the answers of the last evaluation; empty if there are none."""
        return {"prompts": list(self._prompts.texts), "answers": self._answers} if self._answers else {}

    def ids(self, training: Batches) -> tuple[list[Batches], Sequence[Sequence[int]]]:
        """Return all that a run gives the model: the rows to train on and those held out, and the prompts."""
        return [training] if self._held_out is None else [training, self._held_out], self._prompts.ids

    @property
    def end_ids(self) -> Sequence[int]:
        """Return the tokens that end an answer."""
        return self._prompts.end_ids

    def due(self, step: int, last: bool) -> bool:
        """Return whether to evaluate after a step: every `every` steps, and after the last one."""
        if self._held_out is None and not self._prompts.ids:
            return False
        return step != self._done_at and (last or (self._every > 0 and step % self._every == 0))

    def run(self, model_engine: Engine, loss: Loss, tokenizer: Tokenizer, step: int) -> dict[str, float]:
        """Evaluate, log the results, and return the numbers by name (collective)."""
        self._done_at = step
        model_engine.eval()
        numbers: dict[str, float] = {}
        with torch.no_grad():
            if self._held_out is not None:
                numbers = held_out_loss(model_engine, loss, self._held_out)
                logger.info(
                    "Step %d | Held-out loss: %.4f | Perplexity: %.3f | Target tokens: %d",
                    step, numbers["eval_loss"], numbers["eval_perplexity"], numbers["eval_target_tokens"],
                )  # fmt: skip
                for label in self._held_out.sources:
                    logger.info(
                        "Step %d | Held-out loss of %s: %.4f | Target tokens: %d",
                        step, label, numbers[f"eval_loss/{label}"], numbers[f"eval_target_tokens/{label}"],
                    )  # fmt: skip
            self._answers = []
            for prompt in self._prompts.ids:
                answer = generate(model_engine, tokenizer, prompt, self._prompts.end_ids)
                self._answers.append(answer)
                logger.info("Sample | %s | %s", tokenizer.decode(prompt), answer)
        model_engine.train()
        return numbers


def held_out_loss(model_engine: Engine, loss: Loss, held_out: Batches) -> dict[str, float]:
    """Return loss and perplexity over all target tokens of the held-out rows, and the loss of each source (collective).

    The sum of the tokens' losses over all ranks divided by their number, equal for any number of ranks.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=distributed.device())
    by_source = SourceLosses(held_out.sources)
    for batch in held_out.held_out():
        losses = loss(model_engine, batch)
        sums[0] += losses.sum()
        sums[1] += batch.target_tokens
        by_source.add(batch, losses)
    sums = distributed.all_reduce_sum(torch.cat([sums, by_source.take()]))
    loss_sum, targets, *of_sources = sums.tolist()
    mean = loss_sum / targets
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(mean) if mean < 700 else math.inf,
        "eval_target_tokens": int(targets),
        **by_source.numbers(of_sources, "eval_"),
    }


def generate(model_engine: Engine, tokenizer: Tokenizer, prompt: Sequence[int], end_ids: Sequence[int]) -> str:
    """Continue a prompt greedily until one of `end_ids`.

    Collective: every rank generates the same tokens, and so runs the same forwards.
    """
    with attention.without_packs(model_engine.module):
        tokens = generate_ids(model_engine.module, tokenizer, prompt, end_ids=end_ids, max_new_tokens=SAMPLE_TOKENS)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def generate_ids(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    **options: Any,
) -> list[int]:
    """Continue a prompt until one of `end_ids`, greedily unless `options` say how to sample; return the new tokens.

    `options` go to transformers' `generate`.
    """
    ids = torch.tensor([list(prompt)], device=distributed.device())
    tokens = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        eos_token_id=list(end_ids),
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        **{"do_sample": False, **options},
    )
    return [int(token) for token in tokens[0, ids.shape[1] :]]
