"""Errors meant for the user, and how a library's error becomes one."""

import difflib
import subprocess
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """One line that says what is wrong, with which value, and what to do.

    `main()` prints it as `Error: ...` and exits with its status, without a traceback.
    """

    status = 2


class Interrupted(UserError):
    """Ctrl-C outside training, which answers it by saving."""

    status = 130


class BadRow(Exception):
    """What is wrong with one row, without its number, which the caller adds."""


# What libraries and the files of an unusual system make code raise; for checks that must not end what they are part of.
FAILURES = (
    UserError, subprocess.SubprocessError, ArithmeticError, AssertionError, AttributeError, EOFError, ImportError,
    LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error that is not empty, or else the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(word: Any, known: Iterable[str]) -> str:
    """Return `; did you mean NAME?` with the known name that is nearest to a word, empty if none is near."""
    found = difflib.get_close_matches(str(word).lower(), {name.lower(): name for name in known}, n=1)
    return f"; did you mean {next(name for name in known if name.lower() == found[0])}?" if found else ""
