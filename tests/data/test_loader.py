"""Batches: an order that is a function of (seed, epoch), equal work, every row once."""

import numpy as np
import pytest

from superoffload.config import DataSettings, TrainingSettings
from superoffload.data import loader
from superoffload.data.collate import Layout
from superoffload.data.loader import Batches, split_off
from superoffload.data.rows import Counts, TokenisedRows
from superoffload.errors import UserError


class Table:
    """Rows made on the spot: row n has the token n + 1000 in front."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __getitem__(self, indices):
        ids = [np.concatenate([[i + 1000], np.arange(1, self.lengths[i])]) for i in indices]
        return {"input_ids": ids, "labels": ids}


def make_rows(count=103, seed=0):
    lengths = np.random.default_rng(seed).integers(2, 30, size=count)
    counts = Counts(given=count, dropped=0, truncated=0, bad=0)
    return TokenisedRows(table=Table(lengths), lengths=lengths, targets=lengths - 1, counts=counts)


def make(rows, ranks=1, rank=0, packs=True, **training):
    how = Layout(packs=packs, full_length=False, max_length=64, pad_token_id=0)
    settings = TrainingSettings(**{"batch_size": 2, "gradient_accumulation_steps": 3, **training})
    return Batches(rows, how, settings, (rank, ranks))


def row_numbers(batches):
    found = np.concatenate([batch.inputs["input_ids"].flatten().numpy() for batch in batches])
    return (found[found >= 1000] - 1000).tolist()


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_row_once_an_epoch_and_equal_work(ranks, packs):
    rows = make_rows()
    seen = []
    steps = set()
    for rank in range(ranks):
        batches = make(rows, ranks, rank, packs)
        epoch = list(batches.epoch(0))
        steps.add(len(epoch))
        assert len(epoch) == batches.steps_per_epoch
        assert all(len(micro_batches) == 3 for micro_batches in epoch)
        assert all(batch.inputs["input_ids"].shape[0] == 2 for step in epoch for batch in step)
        seen += [number for step in epoch for number in row_numbers(step)]
    assert sorted(seen) == list(range(103))
    assert len(steps) == 1


def test_target_tokens_are_those_of_the_rows():
    rows = make_rows()
    total = sum(batch.target_tokens for step in make(rows).epoch(0) for batch in step)
    assert total == rows.targets.sum()


@pytest.mark.parametrize("packs", [True, False])
def test_entering_at_any_step_gives_what_follows(packs):
    batches = make(make_rows(), packs=packs)
    whole = [[row_numbers([batch]) for batch in step] for step in batches.epoch(3)]
    for start in range(batches.steps_per_epoch + 1):
        again = make(make_rows(), packs=packs)
        assert [[row_numbers([batch]) for batch in step] for step in again.epoch(3, start)] == whole[start:]


def test_seed_and_epoch_alone_decide_the_order():
    rows = make_rows()

    def order(epoch, **training):
        return [row_numbers(step) for step in make(rows, **training).epoch(epoch)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)


def test_same_rows_in_a_step_for_any_number_of_ranks():
    rows = make_rows()
    alone = [sorted(row_numbers(step)) for step in make(rows, gradient_accumulation_steps=4).epoch(1)]
    pairs = [make(rows, 2, rank, gradient_accumulation_steps=2).epoch(1) for rank in (0, 1)]
    together = [sorted(row_numbers(a) + row_numbers(b)) for a, b in zip(*pairs, strict=True)]
    assert together == alone


def test_steps_of_a_run():
    batches = make(make_rows(), packs=False, num_train_epochs=3)
    assert batches.steps_per_epoch == 18
    assert batches.total_steps == 54
    assert make(make_rows(), packs=False, num_train_epochs=3, max_steps=20).total_steps == 20


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_held_out_rows_count_once_on_any_number_of_ranks(ranks, packs):
    rows = make_rows(41)
    per_rank = [list(make(rows, ranks, rank, packs).held_out()) for rank in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    assert sorted(number for batches in per_rank for number in row_numbers(batches)) == list(range(41))
    assert sum(batch.target_tokens for batches in per_rank for batch in batches) == rows.targets.sum()
    again = [list(make(rows, ranks, rank, packs, seed=9).held_out()) for rank in range(ranks)]
    orders = [[[row_numbers([batch]) for batch in part] for part in parts] for parts in (per_rank, again)]
    assert orders[0] == orders[1]


class TestSplitOff:
    def test_parts_are_disjoint_complete_and_repeatable(self, monkeypatch):
        taken = []
        monkeypatch.setattr(TokenisedRows, "select", lambda self, indices: taken.append(indices.tolist()))
        split_off(make_rows(50), 10, 7)
        split_off(make_rows(50), 10, 7)
        split_off(make_rows(50), 10, 8)
        assert len(taken[1]) == 5 and sorted(taken[0] + taken[1]) == list(range(50))
        assert taken[:2] == taken[2:4] != taken[4:]

    def test_one_row_at_least_on_each_side(self, monkeypatch):
        monkeypatch.setattr(TokenisedRows, "select", lambda self, indices: len(indices))
        assert split_off(make_rows(3), 0.1, 0) == (2, 1)
        with pytest.raises(UserError, match="--eval_percentage 50"):
            split_off(make_rows(1), 50, 0)


def test_load_from_files(jsonl, tokenizer):
    name = jsonl([{"prompt": f"q{n}", "completion": "a"} for n in range(20)])
    other = jsonl([{"prompt": f"x{n}", "completion": "a"} for n in range(3)], "other.jsonl")
    rows, held_out = loader.load(tokenizer, DataSettings(dataset_name=name, eval_percentage=10), 0)
    assert (len(rows), len(held_out)) == (18, 2)
    texts = {tokenizer.decode(ids) for part in (rows, held_out) for ids, _ in part.read(range(len(part)))}
    assert len(texts) == 20
    rows, held_out = loader.load(tokenizer, DataSettings(dataset_name=name, eval_dataset=other), 0)
    assert (len(rows), len(held_out)) == (20, 3)
    assert loader.load(tokenizer, DataSettings(dataset_name=name), 0)[1] is None
    with pytest.raises(UserError, match=r"--eval_dataset .*--eval_percentage"):
        DataSettings(dataset_name=name, eval_dataset=other, eval_percentage=5)


def test_statistics(jsonl, tokenizer):
    name = jsonl([{"prompt": f"q{n}", "completion": "a" * n} for n in range(20)])
    rows, _ = loader.load(tokenizer, DataSettings(dataset_name=name), 0)
    found = make_batches(rows).statistics()
    assert found.tokens == rows.lengths.sum() and found.target_tokens == rows.targets.sum()
    assert sum(count for _, count in found.histogram) == found.rows == 20
    assert "packs" in found.short() and "steps per epoch" in found.short() and "\n" not in found.short()
    assert any("up to" in line for line in found.lines())


def make_batches(rows):
    how = Layout(packs=True, full_length=False, max_length=2048, pad_token_id=0)
    return Batches(rows, how, TrainingSettings(), (0, 1))
