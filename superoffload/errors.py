"""Errors meant for the user, and how a library's error becomes one."""

import subprocess


class UserError(Exception):
    """One line that says what is wrong, with which value, and what to do.

    `main()` prints it as `Error: ...` and exits with its status, without a traceback.
    """

    status = 2


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
