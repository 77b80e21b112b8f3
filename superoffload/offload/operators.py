"""Compiled operators, DeepSpeed's and our own: where they are kept, who compiles them, locks of killed builds.

ninja compiles an operator again if another version of ninja, or an environment in another folder, compiled it before.
So this environment's ninja must be on PATH, even if the environment is not activated, and each environment keeps its
operators in a folder of its own, beside what DeepSpeed asks about the processor. torch guards a build with a file named
`lock`. If the building process is killed, nothing removes that file, and every later process that needs the operator
waits forever, silently.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from typing import Any

import cpuinfo
import psutil
from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

_log = getLogger(__name__)

FUSED = "superoffload_fused"
NAMES = ("cpu_adam", "deepspeed_shm_comm", "async_io", FUSED)
# A build takes about a minute. A builder on another node that shares the home folder is invisible here, so a lock
# counts as abandoned only after this time.
PATIENCE_S = 180.0
# A rank that only loads a finished operator holds the lock too, for less than this.
LOADING_S = 5.0


def prepare() -> None:
    """Put this environment's ninja on PATH, choose the folder of its operators, and remove abandoned locks there.

    TORCH_EXTENSIONS_DIR, if it is set, is that folder.
    """
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = programs + os.pathsep + os.environ["PATH"]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder()))
    cpuinfo.get_cpu_info = processor
    clear_abandoned_locks(folder())


@functools.cache
def processor(ask: Callable[[], dict[str, Any]] = cpuinfo.get_cpu_info) -> dict[str, Any]:
    """Return what py-cpuinfo says about the processor, from a file if it has been asked on such a processor before.

    An answer of py-cpuinfo takes a second, and DeepSpeed asks three times while it loads its Adam.
    """
    path = folder() / f"processor_{processor_key()}.json"
    with suppress(OSError, ValueError):  # none yet, or damaged
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    answer = ask()
    with suppress(OSError):  # the folder may not be writable; then it is asked again
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(answer), encoding="utf-8")
        unfinished.replace(path)
    return answer


@functools.cache
def processor_key() -> str:
    """Return a name that differs between kinds of processors, by what Linux says of their instructions."""
    told = ("vendor_id", "model name", "flags", "CPU ", "Features")  # the latter two on ARM
    lines = {line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith(told)}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def folder() -> Path:
    """Return the folder of this environment's operators."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(get_default_build_root()) / environment_key()))


def environment_key() -> str:
    """Return a name that differs between environments, and between versions of what the operators are compiled for.

    Also between processors: an operator may use instructions that another node, with the same home folder, lacks.
    """
    parts = (sys.prefix, platform.python_version(), processor_key(), *map(version, ("torch", "deepspeed", "ninja")))
    return "superoffload_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@contextmanager
def compiled(name: str) -> Iterator[None]:
    """Prepare for a block that loads an operator and compiles it if necessary; log that, and how long it takes."""
    prepare()
    library = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / name / f"{name}.so"
    before = _changed_ns(library)
    if not before:
        _log.info("Compiling the operator %s, which takes about a minute, once per environment", name)
    started = time.perf_counter()
    yield
    if _changed_ns(library) != before:
        _log.info("Compiled the operator %s in %.0f s", name, time.perf_counter() - started)


def _changed_ns(path: Path) -> int:
    """Return when a file was last written; 0 if there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def clear_abandoned_locks(root: Path, patience_s: float = PATIENCE_S) -> None:
    """Wait for running builds to finish, and remove the locks of builds whose process is gone.

    `root` is the folder of the operators. Returns immediately if there is no lock.
    """
    locks = [lock for name in NAMES for lock in root.glob(f"{name}/lock")]
    for lock in locks:
        announced = False
        while lock.exists():
            if not announced and _age_s(lock) > LOADING_S:
                announced = True
                _log.warning(
                    "Waiting for another process that compiles the operator %s; its lock %s is removed once no process "
                    "compiles here and it is %.0f s old",
                    lock.parent.name,
                    lock,
                    patience_s,
                )
            # The system releases a FileLock when its owner dies. It keeps a rank from removing another rank's new lock.
            with FileLock(lock.parent / "abandoned.lock"):
                if _age_s(lock) > patience_s and not _is_building(lock.parent):
                    _log.warning("Removing %s: the process that created it is gone", lock)
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
            if Path(process.cwd()) == folder.resolve():  # the system reports it without links
                return True
        except (psutil.Error, OSError):
            continue  # it has ended, or belongs to another user
    return False
