"""A model, a tokenizer and rows so small that two CPU cores fine-tune them in minutes.

The model is a Llama with random weights, the vocabulary is the 256 bytes, and the rows are generated from a seed: six
kinds of small tasks. Four of them are scored on inputs that are not in the training rows, so a model that answers
those correctly has learned to spell backwards, to sort, to write in capitals and to count. The percentage of exact
answers before and after training shows in one number whether the training loop works.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from superoffload.data.encode import INPUT, INSTRUCTION, RESPONSE, alpaca_prompt
from superoffload.data.formats import Pair
from superoffload.log import hide_bars_of_transformers

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Row = dict[str, str]

EOS, PAD = "<eos>", "<pad>"

SEED = 42
N_TRAIN = 6400
N_HELD_OUT = 200
MAX_HELD_OUT = 1200
MAX_POSITIONS = 512
MAX_NEW_TOKENS = 16
SCORE_BATCH_SIZE = 128

_FIRST_SPECIAL_ID = 256  # after the bytes
_CONSONANTS, _VOWELS, _DIGITS = "bcdfghjklmnprstvwz", "aeiou", "0123456789"
_CAPITALS = (
    "Argentina Buenos Aires, Australia Canberra, Austria Vienna, Belgium Brussels, Brazil Brasilia, "
    "Canada Ottawa, Chile Santiago, China Beijing, Colombia Bogota, Cuba Havana, Denmark Copenhagen, "
    "Egypt Cairo, Finland Helsinki, France Paris, Germany Berlin, Ghana Accra, Greece Athens, "
    "Hungary Budapest, Iceland Reykjavik, India New Delhi, Iran Tehran, Iraq Baghdad, Ireland Dublin, "
    "Italy Rome, Japan Tokyo, Kenya Nairobi, Nepal Kathmandu, Norway Oslo, Peru Lima, Poland Warsaw, "
    "Portugal Lisbon, Spain Madrid, Sweden Stockholm, Turkey Ankara, Vietnam Hanoi"
)
_OPPOSITES = (
    "hot cold, big small, up down, left right, day night, black white, good bad, fast slow, wet dry, "
    "old new, high low, long short, open closed, full empty, early late, rich poor, hard soft, loud quiet, "
    "near far, love hate"
)


def _entries(table: str) -> list[tuple[str, str]]:
    return [(key, value) for key, _, value in (entry.partition(" ") for entry in table.split(", "))]


def _word(rng: random.Random) -> str:
    syllables = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))
    return "".join(syllables)[: rng.choice((4, 5, 6))]


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return word, word[::-1]


def _uppercase(rng: random.Random) -> tuple[str, str]:
    word = _word(rng)
    return word, word.upper()


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = [rng.choice(_DIGITS) for _ in range(rng.choice((3, 4, 5)))]
    return "".join(digits), "".join(sorted(digits))


def _count(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(10, 997)
    return str(number), f"{number + 1} {number + 2} {number + 3}"


def _capital(rng: random.Random) -> tuple[str, str]:
    return rng.choice(_entries(_CAPITALS))


def _opposite(rng: random.Random) -> tuple[str, str]:
    first, second = rng.choice(_entries(_OPPOSITES))
    return (first, second) if rng.random() < 0.5 else (second, first)


@dataclass(frozen=True)
class Task:
    """One kind of row: its instruction, how to draw an input and its answer, and how often it is drawn."""

    instruction: str
    draw: Callable[[random.Random], tuple[str, str]]
    weight: int
    is_lookup: bool = False


TASKS = (
    Task("Reverse the word.", _reverse, 4),
    Task("Sort the digits.", _sort, 5),
    Task("Write in capitals.", _uppercase, 2),
    Task("Count on.", _count, 3),
    Task("Name the capital.", _capital, 2, is_lookup=True),
    Task("Give the opposite.", _opposite, 2, is_lookup=True),
)


def make_rows(seed: int, n_train: int, n_held_out: int) -> tuple[list[Row], list[Row]]:
    """Make training rows and held-out rows, the same for the same arguments.

    The kinds of task take turns in the held-out rows and are drawn by weight in the training rows. No held-out input
    is in the training rows, except in lookups: a capital has to be seen to be known. Raises ValueError if
    `n_held_out` is above `MAX_HELD_OUT`.
    """
    if n_held_out > MAX_HELD_OUT:
        raise ValueError(f"n_held_out is {n_held_out}; at most {MAX_HELD_OUT} leave enough inputs to train on")
    rng = random.Random(seed)
    held_out: list[Row] = []
    reserved: set[tuple[str, str]] = set()
    while len(held_out) < n_held_out:
        task = TASKS[len(held_out) % len(TASKS)]
        row = _draw(task, rng)
        key = (row["instruction"], row["input"])
        if key not in reserved:
            held_out.append(row)
            if not task.is_lookup:
                reserved.add(key)
    train: list[Row] = []
    weights = [task.weight for task in TASKS]
    while len(train) < n_train:
        row = _draw(rng.choices(TASKS, weights)[0], rng)
        if (row["instruction"], row["input"]) not in reserved:
            train.append(row)
    return train, held_out


def _draw(task: Task, rng: random.Random) -> Row:
    question, answer = task.draw(rng)
    return {"instruction": task.instruction, "input": question, "output": answer}


def prompt_of(row: Row) -> str:
    """Return the prompt of a row, as in training."""
    return alpaca_prompt(Pair(prompt=row["instruction"], context=row["input"], answer=""))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte, which decodes every text back to the original.

    Each of the three headings of the prompt is one token. Spelled out, they would be more than half of every row and
    more than half of the arithmetic, with nothing to learn from.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS), AddedToken(PAD)])
    backend.add_tokens([AddedToken(heading, normalized=False) for heading in (INSTRUCTION, INPUT, RESPONSE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(vocab_size: int, seed: int = SEED) -> LlamaForCausalLM:
    """Make a Llama with random weights, the same for the same seed; torch's random state is left unchanged."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=3,
        # Few heads: on rows this short, the cost of attention is the number of its products, not their size.
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        # About 1 / sqrt(hidden_size). The usual 0.02 suits wide models; here it takes twice the steps.
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_FIRST_SPECIAL_ID,
        pad_token_id=_FIRST_SPECIAL_ID + 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def write(folder: Path, seed: int = SEED) -> None:
    """Write the model and its tokenizer to folder/model, and the rows to folder/train.json and folder/held_out.json."""
    hide_bars_of_transformers()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    make_model(len(tokenizer), seed).bfloat16().save_pretrained(folder / "model")
    train, held_out = make_rows(seed, N_TRAIN, N_HELD_OUT)
    for name, rows in (("train.json", train), ("held_out.json", held_out)):
        (folder / name).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[str]:
    """Return the model's greedy answer to each row, white space included."""
    answers: list[str] = []
    for start in range(0, len(rows), SCORE_BATCH_SIZE):
        prompts = [prompt_of(row) for row in rows[start : start + SCORE_BATCH_SIZE]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new_tokens = tokens[:, batch["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return answers


def share_right(rows: Sequence[Row], answers: Sequence[str]) -> float:
    """Return the fraction of rows that are answered exactly, from 0 to 1. Raises ValueError if there are no rows."""
    if not rows:
        raise ValueError("there are no rows to score")
    return sum(row["output"] == answer for row, answer in zip(rows, answers, strict=True)) / len(rows)
