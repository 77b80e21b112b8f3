"""Best-fit decreasing."""

import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from superoffload.data import packing
from superoffload.data.packing import Indices
from tests.helpers.rows import load

pytestmark = pytest.mark.unit


def lengths_like_alpaca(count: int, seed: int = 0) -> Indices:
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(5.1, 0.75, count), 20, 1500).astype(np.int64)


def brute_force(lengths: Indices, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, members in enumerate(packs) if sum(members) + length <= capacity]
        if fitting:
            packs[min(fitting, key=lambda i: capacity - sum(packs[i]))].append(length)
        else:
            packs.append([length])
    return packs


def lines_executed(lengths: Indices, capacity: int) -> int:
    """Count the lines of `packing` that are executed to pack the lengths."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != packing.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        packing.pack(lengths, capacity)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("seed", range(5))
def test_is_best_fit_decreasing(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 64, size=200)
    packs = packing.pack(lengths, 64)
    members = packs.rows(lengths)
    sizes = sorted(int(lengths[members[a:b]].sum()) for a, b in zip(packs.bounds, packs.bounds[1:], strict=False))
    assert sizes == sorted(sum(members) for members in brute_force(lengths, 64))


def test_every_row_once_and_no_pack_too_long() -> None:
    lengths = lengths_like_alpaca(5000)
    packs = packing.pack(lengths, 2048)
    for rng in (None, np.random.default_rng(1)):
        members = packs.rows(lengths, rng)
        assert sorted(members.tolist()) == list(range(5000))
        assert np.add.reduceat(lengths[members], packs.bounds[:-1]).max() <= 2048


def test_same_packs_each_time_and_other_rows_together_in_each_epoch() -> None:
    lengths = lengths_like_alpaca(3000)
    first, again = packing.pack(lengths, 2048), packing.pack(lengths, 2048)
    assert np.array_equal(first.slots, again.slots) and np.array_equal(first.bounds, again.bounds)
    one, other = (first.rows(lengths, np.random.default_rng([7, epoch])) for epoch in (0, 1))
    assert not np.array_equal(one, other)
    assert np.array_equal(lengths[one], lengths[other])


@pytest.mark.parametrize("capacity", [2048, 131072])
def test_a_hundred_thousand_lengths_fill_their_packs(capacity: int) -> None:
    lengths = lengths_like_alpaca(100_000)
    packs = packing.pack(lengths, capacity)
    assert packing.fill(lengths, packs, capacity) >= 0.99


@pytest.mark.parametrize("capacity", [2048, 131072])
def test_work_per_row_depends_neither_on_the_number_of_rows_nor_on_the_capacity(capacity: int) -> None:
    for count in (2_000, 20_000):
        assert lines_executed(lengths_like_alpaca(count), capacity) < 32 * count


@pytest.mark.parametrize("capacity", [2048, 131072])
def test_search_for_the_best_fit_reads_short_integers(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    searched: list[int] = []
    lowest_bit = packing._lowest_bit

    def record(bits: int) -> int:
        searched.append(bits.bit_length())
        return lowest_bit(bits)

    monkeypatch.setattr(packing, "_lowest_bit", record)
    packing.pack(lengths_like_alpaca(20_000), capacity)
    assert 0 < len(searched) <= 2 * 20_000
    assert max(searched) <= packing._Rooms.BITS


@pytest.mark.parametrize("values", [[], [8], [8, 8, 8], [1] * 9])
def test_edges(values: list[int]) -> None:
    lengths = np.asarray(values, dtype=np.int64)
    packs = packing.pack(lengths, 8)
    assert len(packs) == -(-int(lengths.sum()) // 8)
    assert len(packs.rows(lengths)) == len(lengths)


@pytest.mark.parametrize("lengths", [[0, 3], [9]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="from 1 to 8"):
        packing.pack(np.asarray(lengths), 8)


def test_one_per_row_gives_each_row_its_own_pack() -> None:
    packs = packing.one_per_row(3)
    assert packs.bounds.tolist() == [0, 1, 2, 3]


@pytest.mark.skipif("ALPACA_DEMO" not in os.environ, reason="set ALPACA_DEMO to the path of alpaca_en_demo.json")
def test_alpaca_rows_are_packed_at_least_99_percent_full() -> None:
    path = Path(os.environ["ALPACA_DEMO"])
    rows = json.loads(path.read_text(encoding="utf-8"))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<eos>"])
    inner.train_from_iterator([text for row in rows for text in row.values()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    loaded = load(str(path), tokenizer, max_length=2048)
    packs = packing.pack(loaded.lengths, 2048)
    assert len(loaded) == 999
    assert packing.fill(loaded.lengths, packs, 2048) >= 0.99
