"""Two ranks, and tokenising that takes longer than a collective may: no rank waits in a collective."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.rows import WriteJsonLines, pairs

COLLECTIVE_TIMEOUT_S = 2
OUTWAITED_S = 1.5 * COLLECTIVE_TIMEOUT_S  # no rank can wait this long in a collective


@dataclass(frozen=True)
class Rank:
    """What one rank does: it is slow, or it reports when it has waited for the slow one, or neither."""

    name: str
    cache: Path
    local_rank: int = 0
    is_slow: bool = False
    waits: bool = False


def tokenize(ranks: list[Rank]) -> tuple[int, bool] | str:
    """Return the rows of all ranks and whether this rank tokenised, or the error's text (collective).

    A slow rank tokenises its rows only once the other has waited for `OUTWAITED_S`.
    """
    import datasets
    import torch

    from superoffload import distributed
    from superoffload.data.encode import Encoded, Encoder
    from superoffload.data.formats import Conversation
    from superoffload.errors import BadRow, UserError
    from tests.helpers.rows import load
    from tests.helpers.tokenizers import make_chat_tokenizer

    this = ranks[distributed.rank()]
    os.environ["LOCAL_RANK"] = str(this.local_rank)
    datasets.config.HF_DATASETS_CACHE = this.cache
    encode, tokenised_here = Encoder.encode, False
    store = torch.distributed.distributed_c10d._get_default_store()
    timer = threading.Timer(OUTWAITED_S, store.set, ("outwaited", ""))

    def slowly(self: Encoder, conversations: Sequence[Conversation]) -> list[Encoded | BadRow]:
        nonlocal tokenised_here
        tokenised_here = True
        if this.is_slow:
            store.wait(["outwaited"], timedelta(seconds=60))
        return encode(self, conversations)

    set_timeout = torch.distributed.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    try:
        with mock.patch.object(Encoder, "encode", slowly), distributed.wait_without_collective("tokenising"):
            if this.waits and this.local_rank:
                timer.start()  # from here on this rank waits for the folder
            rows = load(this.name, make_chat_tokenizer())
            if this.waits and not this.local_rank:
                timer.start()  # from here on this rank waits for the other machine
        total = torch.tensor([len(rows)])
        torch.distributed.all_reduce(total)
    except UserError as error:
        return str(error)
    finally:
        set_timeout(distributed.COLLECTIVE_TIMEOUT)
    return int(total), tokenised_here


def run(ranks: list[Rank]) -> list[tuple[int, bool] | str]:
    return run_ranks(2, tokenize, ranks, timeout_s=90)


def test_first_rank_of_a_machine_tokenises_while_the_other_waits(jsonl: WriteJsonLines, tmp_path: Path) -> None:
    name = jsonl(pairs(10))
    ranks = [Rank(name, tmp_path, is_slow=True), Rank(name, tmp_path, local_rank=1, waits=True)]
    assert run(ranks) == [(20, True), (20, False)]


def test_each_machine_tokenises_and_waits_for_the_slower_one(jsonl: WriteJsonLines, tmp_path: Path) -> None:
    name = jsonl(pairs(10))
    ranks = [Rank(name, tmp_path / "0", waits=True), Rank(name, tmp_path / "1", is_slow=True)]
    assert run(ranks) == [(20, True), (20, True)]


@pytest.mark.parametrize("failed", [0, 1])
def test_a_machine_that_fails_does_not_leave_the_others_waiting(
    jsonl: WriteJsonLines, tmp_path: Path, failed: int
) -> None:
    names = [jsonl(pairs(1)), jsonl(pairs(1))]
    names[failed] = "./missing.json"
    answers = run([Rank(name, tmp_path / str(index)) for index, name in enumerate(names)])
    assert "no such file" in str(answers[failed])
    assert str(answers[1 - failed]).startswith(f"tokenising: rank {failed} failed")


def test_end_of_rank_0_does_not_leave_the_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 holds the store through which the ranks report."""
    from torch.distributed import TCPStore, distributed_c10d  # type: ignore[attr-defined]

    from superoffload import distributed
    from superoffload.errors import UserError

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: client)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="tokenising: rank 0 has ended"):
        with distributed.wait_without_collective("tokenising"):
            del server
