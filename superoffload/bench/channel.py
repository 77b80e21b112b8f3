"""What a process of a benchmark answers, and how: one command at a time, until there are no more.

The process is started as `python -m MODULE DESCRIPTOR`, a descriptor of a socket. It receives what it is to set up,
answers `Answer`, and then answers each command, the name of a function and its arguments.
"""

import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

from superoffload import cli
from superoffload.errors import FAILURES, first_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The result of a command, or why it failed; `secondary`: because another rank did."""

    result: Any = None
    failure: str | None = None
    secondary: bool = False


class Served(Protocol):
    """What commands are sent to: its methods answer them."""

    def close(self) -> None:
        """End in order, after the last command."""


def pair() -> tuple[Connection, int]:
    """Return the parent's end of a new channel, and the descriptor that the process inherits; the caller closes it."""
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), theirs.detach()


def serve(make: Callable[[Any], Served], is_secondary: Callable[[BaseException], bool] = lambda _: False) -> NoReturn:
    """Set up what the parent asks for, answer its commands, and end the process.

    If the parent has ended, so does this process, before the next command.
    """
    connection = Connection(int(sys.argv[1]))
    try:
        served = make(_receive(connection))
        _send(connection, Answer())
        while (command := _receive(connection)) is not None:
            name, *arguments = command
            _send(connection, Answer(result=getattr(served, name)(*arguments)))
        served.close()
    except FAILURES as error:
        traceback.print_exc()
        _send(connection, Answer(failure=_said(error), secondary=is_secondary(error)))
        cli.leave(1)
    cli.leave(0)


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, ConnectionError):  # the parent has ended
        cli.leave(1)


def _send(connection: Connection, answer: Answer) -> None:
    try:
        connection.send(answer)
    except ConnectionError:
        cli.leave(1)


def _said(error: BaseException) -> str:
    text = first_line(error)
    return text if text.startswith("--") or type(error).__name__ in text else f"{type(error).__name__}: {text}"
