"""A text that names a file or folder -> its path."""

import os
import stat
from pathlib import Path

from superoffload.errors import UserError

LONGEST_SHOWN = 120
"""Characters of a text in a message."""


def path_of(text: str, flag: str = "") -> Path:
    """Return the path that a user's text names, with `~` expanded; there need not be anything.

    Raises `UserError` for a text that names no path, and for what this user may not read. `flag` is what the message
    begins with.
    """
    shown = f"{flag} {text if text.isprintable() else repr(text)}".strip()
    shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."
    if not text:
        raise UserError(f"{flag or 'a path'}: is empty; give a name")
    try:
        path = Path(text).expanduser()
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError as error:
        raise UserError(f"{shown}: cannot be used ({error.strerror}); choose another path") from error
    except RuntimeError as error:
        raise UserError(f"{shown}: there is no user of that name; write the path in full, or ./~ for a name") from error
    except ValueError as error:  # a NUL byte, or a text that is not of the file system's encoding
        raise UserError(f"{shown}: is not a path ({error}); choose another one") from error
    if not os.access(path, os.R_OK | (os.X_OK if is_folder else 0)):
        raise UserError(f"{shown}: cannot be used (Permission denied); choose another path")
    return path
