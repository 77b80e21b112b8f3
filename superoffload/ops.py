"""Compiled operators, DeepSpeed's and our own: put the right ninja on PATH, remove locks of killed builds.

ninja compiles an operator again if another version of ninja compiled it before, so this environment's ninja must be on
PATH, even if the environment is not activated. torch guards a build with a file named `lock`. If the building
process is killed, nothing removes that file, and every later process that needs the operator waits forever, silently.
"""

import os
import sys
import time
from pathlib import Path

import psutil
from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

from superoffload.log import logger
from superoffload.offload.worker import fused

NAMES = ("cpu_adam", "deepspeed_shm_comm", "async_io", fused.NAME)
# A build takes about a minute. A builder on another node that shares the home folder is invisible here, so a lock
# counts as abandoned only after this time.
PATIENCE_S = 180.0


def prepare() -> None:
    """Put this environment's ninja on PATH for DeepSpeed's builds, and remove abandoned locks."""
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = programs + os.pathsep + os.environ["PATH"]
    clear_abandoned_locks()


def clear_abandoned_locks(root: Path | None = None, patience_s: float = PATIENCE_S) -> None:
    """Wait for running builds to finish, and remove the locks of builds whose process is gone.

    `root` is the folder of torch's extensions (default TORCH_EXTENSIONS_DIR). Returns immediately if there is no lock.
    """
    root = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [lock for name in NAMES for lock in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock"))]
    for lock in locks:
        logger.info("Another process is compiling the operator %s; waiting for it", lock.parent.name)
        while lock.exists():
            # The system releases a FileLock when its owner dies. It keeps a rank from removing another rank's new lock.
            with FileLock(lock.parent / "abandoned.lock"):
                if _age_s(lock) > patience_s and not _is_building(lock.parent):
                    logger.warning("Removing %s: the process that created it is gone", lock)
                    lock.unlink(missing_ok=True)
            time.sleep(0.5)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_building(folder: Path) -> bool:
    """Return whether a process of this machine has the folder as its working directory, as ninja has during a build."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                return True
        except (psutil.Error, OSError):
            continue  # it has ended, or belongs to another user
    return False
