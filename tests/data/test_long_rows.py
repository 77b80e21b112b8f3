"""Rows longer than --max_length: no target is lost or counted twice, and the figures say what happened."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from superoffload import config
from superoffload.config import DataSettings, TrainingSettings
from superoffload.data import loader
from superoffload.data.collate import choose_layout
from superoffload.data.encode import IGNORED, Encoded
from superoffload.data.long_rows import fit, lost_tokens
from superoffload.data.preview import shown_rows
from superoffload.data.rows import TokenizedRows
from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.protocols import Tokenizer
from tests.helpers.rows import RawRow, WriteJsonLines, load

pytestmark = pytest.mark.unit

LENGTH = 24
TEXTS: list[RawRow] = [{"text": f"{n} the quick brown fox jumps " * n} for n in range(1, 12)]


def chat(number: int) -> RawRow:
    """Make a chat of three turns of the assistant, of which some are longer than a piece."""
    turns = []
    for turn in range(3):
        turns += [
            {"role": "user", "content": f"question {number} " * (turn + 1)},
            {"role": "assistant", "content": f"answer {number} {turn} " * (number * (turn + 1) % 5 + 1)},
        ]
    return {"messages": turns}


CHATS = [chat(number) for number in range(1, 12)]


def predictions(row: Encoded) -> Counter[tuple[int, int]]:
    """Count the pairs of a token and the target that is predicted from it."""
    pairs = zip(row.input_ids, row.labels[1:], strict=False)
    return Counter((token, label) for token, label in pairs if label != IGNORED)


def predicted_in_batches(rows: TokenizedRows, settings: DataSettings, takes_documents: bool) -> Iterator[Any]:
    """Yield those pairs in the batches of an epoch, as the model and its loss see them."""
    layout = choose_layout(settings, 1, takes_documents)
    for batches in loader.Batches(rows, layout, TrainingSettings(batch_size=3), rank=0, world_size=1).epoch(0):
        for batch in batches:
            ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
            is_target = labels[:, 1:] != IGNORED
            assert int(is_target.sum()) == batch.target_tokens
            if "position_ids" in batch.inputs:  # a target is predicted from the token before it in the same document
                positions = batch.inputs["position_ids"]
                assert (positions[:, 1:][is_target] == positions[:, :-1][is_target] + 1).all()
            assert max(batch.lengths) <= settings.max_length
            yield from zip(ids[:, :-1][is_target].tolist(), labels[:, 1:][is_target].tolist(), strict=True)


@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["text", "chat"])
@pytest.mark.parametrize("takes_documents", [False, True])
@pytest.mark.parametrize("layout", [{}, {"packing": False}, {"padding": "max_length"}], ids=["packs", "rows", "padded"])
def test_pieces_have_exactly_the_targets_of_the_rows(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, rows: list[RawRow], layout: dict[str, Any], takes_documents: bool
) -> None:
    name = jsonl(rows)
    whole = load(name, tokenizer, max_length=4096)
    expected = Counter[tuple[int, int]]()
    for ids, labels in whole.read(range(len(whole))):
        expected += predictions(Encoded(ids.tolist(), labels.tolist()))
    settings = DataSettings(max_length=LENGTH, long_rows="split", **layout)
    pieces = load(name, tokenizer, max_length=LENGTH, long_rows="split")
    assert pieces.counts.split and len(pieces) > len(whole)
    assert pieces.targets.sum() == whole.targets.sum() == expected.total()
    assert Counter(predicted_in_batches(pieces, settings, takes_documents)) == expected
    truncated = load(name, tokenizer, max_length=LENGTH)
    assert truncated.targets.sum() < whole.targets.sum() and not truncated.counts.split


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 14, 15, 16, 22, 23, 100])
def test_pieces_share_one_token_and_none_is_longer(length: int) -> None:
    ids = list(range(length))
    labels = [token if token % 5 else IGNORED for token in ids]
    pieces = Encoded(ids, labels, empty=2, untrained=3, unwritten=4).pieces(8)
    assert [token for n, piece in enumerate(pieces) for token in piece.input_ids[n > 0 :]] == ids
    assert [label for n, piece in enumerate(pieces) for label in piece.labels[n > 0 :]] == labels
    assert all(piece.labels[0] == IGNORED for piece in pieces[1:])
    assert all(len(piece.input_ids) == 8 for piece in pieces[:-1]) and len(pieces[-1].input_ids) >= min(length, 2)
    assert [(piece.empty, piece.untrained, piece.unwritten) for piece in pieces] == [(2, 3, 4)] + [(0, 0, 0)] * (
        len(pieces) - 1
    )


class Counting(list[int]):
    """A list that counts the elements that were taken from it."""

    taken = 0

    def __getitem__(self, index: Any) -> Any:
        """Count the elements of a slice."""
        found = super().__getitem__(index)
        self.taken += len(found) if isinstance(index, slice) else 1
        return found


def test_a_row_of_a_million_tokens_is_read_once() -> None:
    ids, labels = Counting(range(10**6)), Counting(range(10**6))
    pieces = Encoded(ids, labels).pieces(1024)
    assert sum(piece.target_tokens for piece in pieces) == 10**6 - 1
    assert max(ids.taken, labels.taken) < 1.01 * 10**6


def test_a_piece_without_a_target_is_dropped() -> None:
    row = Encoded(list(range(30)), [IGNORED] * 20 + list(range(20, 30)))
    pieces = fit(row, 8, "split")
    assert [len(piece.input_ids) for piece in pieces] == [0, 0, 8, 8, 2]
    assert lost_tokens(row, pieces) == 14
    without = Encoded(list(range(30)), [IGNORED] * 30)
    assert [piece.input_ids for piece in fit(without, 8, "split")] == [[]]
    assert [piece.input_ids for piece in fit(row, 8, "drop")] == [[]]
    assert fit(row, 30, "drop") == fit(row, 30, "split") == fit(row, 30, "truncate") == [row]


def test_the_figures_say_what_became_of_long_rows(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    rows = [{"prompt": "q", "completion": "a"}] * 3
    name = jsonl(
        [*rows, {"prompt": "long " * 40, "completion": "word " * 40}, {"prompt": "q", "completion": "w " * 90}]
    )
    split = load(name, tokenizer, max_length=64, long_rows="split")
    counts = split.counts
    assert (counts.given, counts.split, counts.truncated, counts.dropped, counts.too_long) == (5, 2, 0, 0, 0)
    assert counts.pieces == len(split) - 3 == (split.pieces > 0).sum() and counts.dropped_pieces >= 1
    assert split.numbers.tolist() == sorted(split.numbers) and set(split.numbers) == set(range(5))
    lines = [record.message for record in caplog.records if "--long_rows split" in record.message]
    assert len(lines) == 1 and "2 of the rows" in lines[0]
    heading = list(shown_rows(split, tokenizer, 5, colours=False))[2 * 3]
    assert heading.startswith(f"--- row 4, piece {split.pieces[3]} of a longer row: ")
    figures = statistics(split, max_length=64, long_rows="split")
    assert figures["rows"] == "5 of 5"
    assert figures["split"] == f"2 into {counts.pieces} pieces, {counts.dropped_pieces} without a target dropped"
    assert figures["tokens"] == f"{split.lengths.sum():,} ({counts.lost_tokens} left out)"

    dropped = load(name, tokenizer, max_length=64, long_rows="drop")
    assert (dropped.counts.too_long, dropped.counts.dropped, len(dropped)) == (2, 0, 3)
    whole = load(name, tokenizer, max_length=4096)
    assert dropped.counts.lost_tokens == whole.lengths[3:].sum() and not whole.counts.lost_tokens
    assert statistics(dropped, max_length=64)["too long"] == "2 (dropped)"
    truncated = load(name, tokenizer, max_length=64).counts
    assert truncated.truncated + truncated.dropped == 2
    assert truncated.lost_tokens == whole.lengths.sum() - load(name, tokenizer, max_length=64).lengths.sum()


def statistics(rows: TokenizedRows, **settings: Any) -> dict[str, str]:
    layout = choose_layout(DataSettings(**settings), 1, False)
    return loader.Batches(rows, layout, TrainingSettings(), rank=0, world_size=1).statistics().figures()


def test_texts_are_split_without_a_warning(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    assert load(jsonl(TEXTS), tokenizer, max_length=LENGTH, long_rows="split").counts.split
    assert not caplog.records


def test_drop_that_leaves_no_row_is_an_error(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"--long_rows drop: 11 of 11 rows of .* longer than --max_length 8, and none"):
        load(jsonl(TEXTS), tokenizer, max_length=8, long_rows="drop")


def test_several_sources_and_held_out_rows(jsonl: WriteJsonLines, tokenizer: Tokenizer, tmp_path: Path) -> None:
    names = (jsonl(TEXTS, "texts.jsonl"), jsonl(CHATS, "chats.jsonl"))
    options: dict[str, Any] = {"max_length": LENGTH, "long_rows": "split", "eval_percentage": 30.0}
    settings = DataSettings(dataset_name=names, dataset_weights=(3, 1), **options)
    train, held_out = loader.load(tokenizer, settings, seed=1)
    assert held_out is not None
    assert not set(train.numbers) & set(held_out.numbers)  # the pieces of a row stay together
    assert set(train.numbers) | set(held_out.numbers) == set(range(22))
    for label, part in held_out.by_source().items():
        assert len(np.unique(part.numbers)) == 3 and part.counts.given == 11
        assert part.counts.pieces == (train.by_source()[label].pieces > 0).sum() + (part.pieces > 0).sum()
    layout = choose_layout(settings, 1, False)
    found = loader.Batches(train, layout, TrainingSettings(), rank=0, world_size=1).statistics()
    assert [source.rows for source in found.sources] == [8, 8] and found.rows == 16
    assert sum(source.rows_per_epoch for source in found.sources) == len(train)
    assert "rows and pieces, " in found.sources[0].figures()["in an epoch"]
    assert abs(found.sources[0].rows_per_epoch - 0.75 * len(train)) <= 1


def test_another_choice_is_another_run() -> None:
    settings = {"model_name": "m", "output_dir": "o"}
    saved = config.flat(config.build(settings))
    assert config.differences(config.build({**settings, "long_rows": "split"}), saved) == [
        "--long_rows: checkpoint has truncate, this run has split"
    ]
