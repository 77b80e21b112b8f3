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
        served = make(connection.recv())
        connection.send(Answer())
        while (command := connection.recv()) is not None:
            name, *arguments = command
            connection.send(Answer(result=getattr(served, name)(*arguments)))
        served.close()
    except (EOFError, ConnectionError):  # of the channel: the parent has ended
        cli.leave(1)
    except FAILURES as error:
        traceback.print_exc()
        connection.send(Answer(failure=_said(error), secondary=is_secondary(error)))
        cli.leave(1)
    cli.leave(0)


def _said(error: BaseException) -> str:
    text = first_line(error)
    return text if text.startswith("--") or type(error).__name__ in text else f"{type(error).__name__}: {text}"
