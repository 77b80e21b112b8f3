"""DeepSpeed's compiled operators, and our own: which ninja builds them, and locks that a killed build left behind.

An operator built by one version of ninja is built again by another, so the one of this environment must be found
first, also where nobody activated the environment. And torch guards a build with a file named `lock`, which nothing
removes when the process that made it is killed; whoever needs the operator then waits for ever, without a word.
"""

import os
import sys
import time
from pathlib import Path

import psutil
from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

from superoffload.log import logger

NAMES = ("cpu_adam", "deepspeed_shm_comm", "async_io", "superoffload_fused")
# A build takes about a minute. A builder on another node that shares the home folder cannot be seen, so a lock is
# given time before it counts as left behind.
PATIENCE_S = 180.0


def prepare() -> None:
    """Make the builds that DeepSpeed starts find this environment's ninja, and no abandoned lock."""
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = programs + os.pathsep + os.environ["PATH"]
    clear_abandoned_locks()


def clear_abandoned_locks(root: Path | None = None, patience_s: float = PATIENCE_S) -> None:
    """Wait for builds under way to end, and remove the locks of builds that nobody is at any more.

    `root` is the folder of torch's extensions (TORCH_EXTENSIONS_DIR). Returns at once where no lock lies.
    """
    root = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [lock for name in NAMES for lock in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock"))]
    for lock in locks:
        logger.info("An operator is being compiled already (%s); waiting for it", lock.parent.name)
        while lock.exists():
            # Under a lock of our own that the system releases: no rank removes the fresh lock of another.
            with FileLock(lock.parent / "abandoned.lock"):
                if _age_s(lock) > patience_s and not _is_building(lock.parent):
                    logger.warning("Removing %s: the process that compiled there is gone", lock)
                    lock.unlink(missing_ok=True)
            time.sleep(0.5)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_building(folder: Path) -> bool:
    """Tell whether a process of this machine works in the folder, as ninja does while it builds."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                return True
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or another user's
    return False
