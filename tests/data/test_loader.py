"""Batches: an order determined by (seed, epoch), equal work, every row once."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from superoffload.config import DataSettings, TrainingSettings
from superoffload.data import loader
from superoffload.data.collate import Batch, Layout
from superoffload.data.loader import Batches, split_off
from superoffload.data.packing import Indices
from superoffload.data.rows import RowCounts, TokenizedRows
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer
from tests.helpers.rows import WriteJsonLines
from tests.helpers.tokenizers import make_chat_tokenizer

pytestmark = pytest.mark.unit


class Table:
    """Generated rows: row n begins with the token n + 1000."""

    def __init__(self, lengths: Indices) -> None:
        self.lengths = lengths

    def __getitem__(self, indices: Sequence[int]) -> dict[str, list[Indices]]:
        ids = [np.concatenate([[i + 1000], np.arange(1, self.lengths[i])]) for i in indices]
        return {"input_ids": ids, "labels": ids}


def make_rows(count: int = 103, seed: int = 0) -> TokenizedRows:
    lengths = np.random.default_rng(seed).integers(2, 30, size=count)
    counts = RowCounts(given=count, dropped=0, truncated=0, bad=0)
    return TokenizedRows(
        table=Table(lengths),
        lengths=lengths,
        targets=lengths - 1,
        numbers=np.arange(count),
        pieces=np.zeros(count, dtype=np.int64),
        counts=counts,
    )


def make(rows: TokenizedRows, world_size: int = 1, rank: int = 0, packs: bool = True, **training: Any) -> Batches:
    layout = Layout(packs=packs, full_length=False, max_length=64, pad_token_id=0)
    settings = TrainingSettings(**{"batch_size": 2, "gradient_accumulation_steps": 3, **training})
    return Batches(rows, layout, settings, rank=rank, world_size=world_size)


def row_numbers(batches: Sequence[Batch]) -> list[int]:
    found = np.concatenate([batch.inputs["input_ids"].flatten().numpy() for batch in batches])
    return [int(token) - 1000 for token in found if token >= 1000]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_row_once_an_epoch_and_equal_work(world_size: int, packs: bool) -> None:
    rows = make_rows()
    seen: list[int] = []
    steps: set[int] = set()
    for rank in range(world_size):
        batches = make(rows, world_size, rank, packs)
        epoch = list(batches.epoch(0))
        steps.add(len(epoch))
        assert len(epoch) == batches.steps_in(0)
        assert all(len(micro_batches) == 3 for micro_batches in epoch)
        assert all(batch.inputs["input_ids"].shape[0] == 2 for step in epoch for batch in step)
        seen += [number for step in epoch for number in row_numbers(step)]
    assert sorted(seen) == list(range(103))
    assert len(steps) == 1


@pytest.mark.parametrize("packs", [True, False])
def test_ranks_that_share_rows_count_as_one(packs: bool) -> None:
    rows = make_rows()
    shared = Layout(packs=packs, full_length=False, max_length=64, pad_token_id=0, varlen=True, parts=2)
    settings = TrainingSettings(batch_size=2, gradient_accumulation_steps=3)
    ranks = [Batches(rows, shared, settings, rank=rank, world_size=4) for rank in range(4)]
    alone = make(rows, 2, packs=packs)
    assert {batches.total_steps for batches in ranks} == {alone.total_steps}
    assert {batches.packs_per_step for batches in ranks} == {alone.packs_per_step}
    seen: list[int] = []
    for steps in (
        zip(*(batches.epoch(0) for batches in ranks), strict=True),
        zip(*([[batch] for batch in batches.held_out()] for batches in ranks), strict=True),
    ):
        tokens = targets = 0
        for step in steps:
            assert len({tuple(batch.positions for batch in own) for own in step[:2]}) == 1
            seen += [number for own in step for number in row_numbers(own)]
            tokens += sum(sum(batch.lengths) for own in step for batch in own)
            targets += sum(batch.target_tokens for own in step for batch in own)
        assert (tokens, targets) == (rows.lengths.sum(), rows.targets.sum())
    assert sorted(seen) == sorted([*range(103)] * 2)


def test_target_tokens_are_those_of_the_rows() -> None:
    rows = make_rows()
    total = sum(batch.target_tokens for step in make(rows).epoch(0) for batch in step)
    assert total == rows.targets.sum()


@pytest.mark.parametrize("packs", [True, False])
def test_entering_at_any_step_gives_what_follows(packs: bool) -> None:
    batches = make(make_rows(), packs=packs)
    whole = [[row_numbers([batch]) for batch in step] for step in batches.epoch(3)]
    for start in range(batches.steps_in(0) + 1):
        again = make(make_rows(), packs=packs)
        resumed = again.epoch(3, start * again.packs_per_step)
        assert [[row_numbers([batch]) for batch in step] for step in resumed] == whole[start:]


def test_seed_and_epoch_alone_decide_the_order() -> None:
    rows = make_rows()

    def order(epoch: int, **training: Any) -> list[list[int]]:
        return [row_numbers(step) for step in make(rows, **training).epoch(epoch)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)


def test_same_rows_in_a_step_for_any_number_of_ranks() -> None:
    rows = make_rows()
    alone = [sorted(row_numbers(step)) for step in make(rows, gradient_accumulation_steps=4).epoch(1)]
    pairs = [make(rows, 2, rank, gradient_accumulation_steps=2).epoch(1) for rank in (0, 1)]
    together = [sorted(row_numbers(a) + row_numbers(b)) for a, b in zip(*pairs, strict=True)]
    assert together == alone


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("ranks", "batch_size", "accumulation"), [(1, 1, 1), (1, 5, 3), (2, 2, 1), (4, 1, 2)])
def test_an_epoch_resumed_with_other_batches_visits_what_is_left_once(
    packs: bool, ranks: int, batch_size: int, accumulation: int
) -> None:
    first = make(make_rows(), packs=packs, batch_size=3)
    before = [row for step in itertools.islice(first.epoch(1), 4) for row in row_numbers(step)]
    values = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "num_train_epochs": 3}
    resumed = [make(make_rows(), ranks, rank, packs=packs, **values) for rank in range(ranks)]
    after, steps = [], set()
    for batches in resumed:
        batches.start_at(step=20, epoch=1, start_pack=4 * first.packs_per_step)
        rest = list(batches.epoch(1, 4 * first.packs_per_step))
        after += [row for step in rest for row in row_numbers(step)]
        steps.add(len(rest))
        assert batches.total_steps == 20 + len(rest) + batches.steps_in(2)
    assert len(steps) == 1  # every rank runs as many
    assert sorted(before + after) == sorted(row for step in first.epoch(1) for row in row_numbers(step))


def test_steps_of_a_run() -> None:
    batches = make(make_rows(), packs=False, num_train_epochs=3)
    assert batches.steps_in(0) == 18
    assert batches.total_steps == 54
    assert make(make_rows(), packs=False, num_train_epochs=3, max_steps=20).total_steps == 20


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_held_out_rows_appear_once_on_any_number_of_ranks(world_size: int, packs: bool) -> None:
    rows = make_rows(41)
    per_rank = [list(make(rows, world_size, rank, packs).held_out()) for rank in range(world_size)]
    assert len({len(batches) for batches in per_rank}) == 1
    assert sorted(number for batches in per_rank for number in row_numbers(batches)) == list(range(41))
    assert sum(batch.target_tokens for batches in per_rank for batch in batches) == rows.targets.sum()
    again = [list(make(rows, world_size, rank, packs, seed=9).held_out()) for rank in range(world_size)]
    orders = [[[row_numbers([batch]) for batch in part] for part in parts] for parts in (per_rank, again)]
    assert orders[0] == orders[1]


class TestSplitOff:
    def test_parts_are_disjoint_complete_and_repeatable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        taken: list[list[int]] = []
        monkeypatch.setattr(TokenizedRows, "select", lambda self, indices: taken.append(indices.tolist()))
        split_off(make_rows(50), 10, 7)
        split_off(make_rows(50), 10, 7)
        split_off(make_rows(50), 10, 8)
        assert len(taken[1]) == 5 and sorted(taken[0] + taken[1]) == list(range(50))
        assert taken[:2] == taken[2:4] != taken[4:]

    def test_rows_that_are_dropped_do_not_move_others_to_the_other_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        taken: list[set[int]] = []
        monkeypatch.setattr(TokenizedRows, "select", lambda self, indices: taken.append(set(self.numbers[indices])))
        rows, kept = make_rows(50), np.flatnonzero(np.arange(50) % 7)
        split_off(rows, 20, 0)
        parts: dict[str, Any] = {
            "lengths": rows.lengths[kept],
            "targets": rows.targets[kept],
            "pieces": rows.pieces[kept],
        }
        split_off(replace(rows, numbers=kept, **parts), 20, 0)
        assert taken[3] == taken[1] & set(kept) and taken[2] == taken[0] & set(kept)

    def test_one_row_at_least_on_each_side(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TokenizedRows, "select", lambda self, indices: indices)
        assert [len(part) for part in split_off(make_rows(3), 0.1, 0)] == [2, 1]
        with pytest.raises(UserError, match="--eval_percentage 50"):
            split_off(make_rows(1), 50, 0)

    def test_no_other_row_takes_the_place_of_one_that_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TokenizedRows, "select", lambda self, indices: self.numbers[indices])
        rows: Any = make_rows(40)
        trained_on: Any = split_off(rows, 5, 42)[0]
        left = {name: getattr(rows, name)[trained_on] for name in ("lengths", "targets", "numbers", "pieces")}
        with pytest.raises(UserError, match="--eval_percentage 5: each of the rows that it draws is dropped"):
            split_off(replace(rows, **left), 5, 42)


def test_load_from_files(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    name = jsonl([{"prompt": f"q{n}", "completion": "a"} for n in range(20)])
    other = jsonl([{"prompt": f"x{n}", "completion": "a"} for n in range(3)], "other.jsonl")
    rows, held_out = loader.load(tokenizer, DataSettings(dataset_name=(name,), eval_percentage=10), 0)
    assert held_out is not None and (len(rows), len(held_out)) == (18, 2)
    texts = {tokenizer.decode(ids) for part in (rows, held_out) for ids, _ in part.read(range(len(part)))}
    assert len(texts) == 20
    rows, held_out = loader.load(tokenizer, DataSettings(dataset_name=(name,), eval_dataset=other), 0)
    assert held_out is not None and (len(rows), len(held_out)) == (20, 3)
    assert loader.load(tokenizer, DataSettings(dataset_name=(name,)), 0)[1] is None
    with pytest.raises(UserError, match=r"--eval_dataset .*--eval_percentage"):
        DataSettings(dataset_name=(name,), eval_dataset=other, eval_percentage=5)


def test_columns_that_do_not_fit_the_evaluation_set(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    name = jsonl([{"q": "q", "a": "a"}])
    other = jsonl([{"prompt": "q", "completion": "a"}], "other.jsonl")
    settings = DataSettings(dataset_name=(name,), eval_dataset=other, columns="prompt=q,completion=a")
    with pytest.raises(
        UserError, match=r"--columns .*: /.*/other\.jsonl has no column q; its columns are prompt, comp"
    ):
        loader.load(tokenizer, settings, 0)


CONFIGS = "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: nb\n  data_files: nb.jsonl\n---\n"


@pytest.mark.parametrize("part", [":0.5", "#5"])
def test_a_part_of_the_evaluation_set_is_chosen_by_its_split(
    part: str, jsonl: WriteJsonLines, tokenizer: Tokenizer
) -> None:
    name = jsonl([{"text": "a"}] * 9)
    with pytest.raises(UserError, match=r"--eval_dataset .*: takes no share .*--eval_split test\[:500\] takes"):
        loader.load(tokenizer, DataSettings(dataset_name=(name,), eval_dataset=name + part), seed=0)


def test_configs_of_both_data_sets(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    folder = Path(jsonl([{"prompt": "q", "completion": "a"}] * 3, "en.jsonl")).parent
    jsonl([{"prompt": "q", "completion": "a"}] * 2, "nb.jsonl")
    (folder / "README.md").write_text(CONFIGS)
    chosen: dict[str, Any] = {"dataset_config": "en", "eval_config": "nb", "eval_split": "train[:1]"}
    settings = DataSettings(dataset_name=(str(folder),), eval_dataset=str(folder), **chosen)
    rows, held_out = loader.load(tokenizer, settings, 0)
    assert held_out is not None and (len(rows), len(held_out)) == (3, 1)


@pytest.mark.parametrize(
    ("row", "in_turns"),
    [
        ({"prompt": "q", "completion": "a"}, False),
        ({"messages": [{"role": "user", "content": "q"}]}, True),
        ({"prompt": "q", "completion": "a", "system": "s"}, True),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, True),
    ],
)
def test_sample_prompts_are_turns_if_the_rows_are_chats(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, row: dict[str, Any], in_turns: bool
) -> None:
    settings = DataSettings(dataset_name=(jsonl([b"{broken", row]),))
    [ids] = loader.tokenize_prompts(["Say it."], tokenizer, settings).ids
    heading = "### User:" if in_turns else "### Instruction:"
    assert tokenizer.decode(ids).startswith(f"{heading}\nSay it.")


def test_answers_to_sample_prompts_end_as_those_of_the_rows(jsonl: WriteJsonLines) -> None:
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer = make_chat_tokenizer(template)
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    prompts = loader.tokenize_prompts(["hi"], tokenizer, DataSettings(dataset_name=(jsonl(rows),)))
    assert prompts.end_ids == tokenizer.convert_tokens_to_ids(["<eos>", "<|end|>"])


def test_a_sample_prompt_that_the_template_rejects(jsonl: WriteJsonLines) -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn, please') }}{% endif %}"
    tokenizer = make_chat_tokenizer(template)
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    settings = DataSettings(dataset_name=(jsonl(rows),))
    with pytest.raises(UserError, match="--sample_prompts: 'hi': the chat template rejects it: a system turn"):
        loader.tokenize_prompts(["hi"], tokenizer, settings)


def test_statistics(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    name = jsonl([{"prompt": f"q{n}", "completion": "a" * (n + 1)} for n in range(20)])
    rows, _ = loader.load(tokenizer, DataSettings(dataset_name=(name,)), 0)
    found = make_batches(rows).statistics()
    assert found.tokens == rows.lengths.sum() and found.target_tokens == rows.targets.sum()
    assert sum(count for _, count in found.histogram) == found.rows == 20
    assert "packs" in found.short() and "steps per epoch" in found.short() and "\n" not in found.short()
    assert any("up to" in line for line in found.lines())
    assert not any("empty answers" in line for line in (found.short(), *found.lines()))


def test_what_is_left_out_of_the_loss_is_in_the_statistics(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    said = {"role": "assistant", "content": "a"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    empty = {"role": "assistant", "content": ""}
    rows = [
        {"messages": [{"role": "user", "content": "q"}, *turns]} for turns in ([said, empty], [said, call], [empty])
    ]
    name = jsonl([*rows, *rows[:1] * 3])
    found, _ = loader.load(tokenizer, DataSettings(dataset_name=(name,), drop_unrendered=True), 0)
    assert (found.counts.empty_answers, found.counts.dropped_fields, found.counts.dropped) == (6, 1, 1)
    shown = make_batches(found).statistics()
    assert "1 dropped, 0 malformed, 6 empty answers, 1 dropped fields |" in shown.short()
    assert "empty answers    6" in shown.lines() and "dropped fields   1" in shown.lines()


def make_batches(rows: TokenizedRows) -> Batches:
    layout = Layout(packs=True, full_length=False, max_length=2048, pad_token_id=0)
    return Batches(rows, layout, TrainingSettings(), rank=0, world_size=1)


@pytest.mark.parametrize("weights", [(), (1.0,)])
def test_the_largest_token_is_found_in_every_row(weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in those that the first epoch, which draws with replacement, leaves out."""
    monkeypatch.setattr(loader, "ROWS_AT_A_TIME", 10)
    rows = replace(make_rows(), weights=weights)
    for world_size in (1, 2, 5):
        assert max(make(rows, world_size, rank).largest_id() for rank in range(world_size)) == 1000 + len(rows) - 1
    assert make(rows, 200, 150).largest_id() == 0
