"""The lock of an output folder: one run at a time writes there. Imports no torch.

It is a lock of `run.log`, because NFS locks only files that are open for writing, which a folder cannot be.
"""

import fcntl
import os
import time
from pathlib import Path

from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.run_log import FILE

LOOK_S = 0.1
"""Longer than `is_locked` holds the lock that it looks at."""


def lock(folder: str) -> int | None:
    """Lock the output folder against other runs; the lock ends with this process, however it ends.

    Returns the handle that holds the lock, None if the file system has no locks. Raises `UserError` if another run
    holds it.
    """
    handle = None
    try:
        handle = os.open(Path(folder) / FILE, os.O_RDWR | os.O_CREAT, 0o666)
        if not _take(handle, fcntl.LOCK_EX):
            time.sleep(LOOK_S)
            if not _take(handle, fcntl.LOCK_EX):
                os.close(handle)
                raise UserError(
                    f"--output_dir {folder}: another run is writing there; wait for it, or choose another folder"
                )
    except OSError as error:
        logger.warning("%s cannot be locked (%s): make sure that no other run writes there", folder, error.strerror)
        unlock(handle)
        return None
    return handle


def unlock(handle: int | None) -> None:
    """Unlock the output folder at the end of a run."""
    if handle is not None:
        os.close(handle)


def is_locked(folder: Path) -> bool:
    """Return whether a run holds the lock of an output folder; False if the file system has no locks."""
    try:
        handle = os.open(folder / FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _take(handle, fcntl.LOCK_SH)
    except OSError:
        return False
    finally:
        os.close(handle)


def _take(handle: int, kind: int) -> bool:
    """Return whether the lock could be taken, without waiting for it. Raises OSError without locks."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
