"""Tokenising with several processes gives what one process gives."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from superoffload.data.encode import Encoder
from superoffload.protocols import Tokenizer
from tests.helpers.rows import BAD_ROWS, RawRow, WriteJsonLines, check_bad_row_is_named_or_skipped, load, pairs


def test_workers_give_the_same_rows(jsonl: WriteJsonLines, tokenizer: Tokenizer, own_cache: Path) -> None:
    name = jsonl(pairs(30))
    alone = [ids.tolist() for ids, _ in load(name, tokenizer).read(range(30))]
    keys = {path.name for path in (own_cache / "superoffload").iterdir()}
    (own_cache / "superoffload").rename(own_cache / "old")
    assert [ids.tolist() for ids, _ in load(name, tokenizer, num_proc=2).read(range(30))] == alone
    assert {path.name for path in (own_cache / "superoffload").iterdir()} == keys


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_malformed_row_is_named_or_skipped(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, bad: RawRow, reason: str
) -> None:
    check_bad_row_is_named_or_skipped(jsonl, tokenizer, bad, reason, num_proc=2)


def test_ctrl_c_is_left_to_the_process_that_started_them(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, encode = os.getpid(), Encoder.encode

    def interrupted(self: Encoder, rows: Sequence[Any]) -> Any:
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(self, rows)

    monkeypatch.setattr(Encoder, "encode", interrupted)
    assert len(load(jsonl(pairs(30)), tokenizer, num_proc=2)) == 30
