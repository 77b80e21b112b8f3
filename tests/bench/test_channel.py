"""Answers of a process, and its end."""

import sys
from multiprocessing.connection import Connection
from typing import Any

import pytest

from superoffload import cli
from superoffload.bench import channel
from superoffload.bench.channel import Answer

pytestmark = pytest.mark.unit


class Served:
    def __init__(self, order: Any) -> None:
        assert order == "order"

    def double(self, number: int) -> int:
        return 2 * number

    def lose(self) -> None:
        raise EOFError("the optimizer process has ended")

    def close(self) -> None:
        """Do nothing."""


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Connection:
    """Return the parent's end; a process that ends raises SystemExit."""
    ours, theirs = channel.pair()
    monkeypatch.setattr(sys, "argv", ["served", str(theirs)])
    monkeypatch.setattr(cli, "leave", sys.exit)
    return ours


def test_a_connection_that_the_work_loses_is_a_failure_and_not_the_end_of_the_parent(parent: Connection) -> None:
    for message in ("order", ("double", 4), ("lose",)):
        parent.send(message)
    with pytest.raises(SystemExit, match="1"):
        channel.serve(Served)
    answers = [parent.recv() for _ in range(3)]
    assert answers == [Answer(), Answer(result=8), Answer(failure="EOFError: the optimizer process has ended")]


def test_a_process_ends_without_a_word_once_the_parent_has_ended(
    parent: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    parent.send("order")
    parent.send(("double", 4))
    parent.close()
    with pytest.raises(SystemExit, match="1"):
        channel.serve(Served)
    assert capsys.readouterr().err == ""
