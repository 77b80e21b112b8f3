"""Host memory and limits: cgroup, /dev/shm and what dead runs left there, locked memory, open files, huge pages."""

import fcntl
import os
import re
import resource
import shlex
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from superoffload.planning import cgroup
from superoffload.planning.checks.finding import Finding, Surroundings, size
from superoffload.planning.machine import Machine, meminfo

# DeepSpeed's ranks on CPUs share a buffer of 69 MB each (see superoffload/distributed.py); NCCL's segments are smaller.
SHM_BYTES_PER_RANK = 128 * 2**20
OPEN_FILES = 1024
LEFT_BEHIND = ("deepspeed_*", "torch_*", "nccl-*")
SHMEM_ENABLED = "sys/kernel/mm/transparent_hugepage/shmem_enabled"


def host_memory(around: Surroundings) -> Iterator[Finding]:
    """Check what host memory there is, and how much of it other processes use."""
    total = meminfo((around.root / "proc/meminfo").read_text(encoding="utf-8"))["MemTotal"]
    yield host_memory_finding(around.machine, total, bool(cgroup.memory_limits(around.root)))


def host_memory_finding(machine: Machine, total_bytes: int, has_cgroup: bool) -> Finding:
    """Judge host memory: slow if other processes use more than half of it."""
    found = f"{size(machine.host_bytes)}, {size(machine.host_available_bytes)} of it available"
    if machine.host_bytes < total_bytes:
        found += f"; a cgroup's limit, the machine has {size(total_bytes)}"
    looked_at = "/proc/meminfo" + (" and the cgroup's limit" if has_cgroup else "")
    line = partial(Finding, name="host memory", looked_at=looked_at, found=found)
    if machine.host_available_bytes >= machine.host_bytes / 2:
        return line(verdict="good")
    return line(
        verdict="slow",
        fix="See which processes use the memory, and end those that are not needed:\n$ ps aux --sort=-rss | head",
    )


def shared_memory(around: Surroundings) -> Iterator[Finding]:
    """Check the size of /dev/shm, for the ranks that are planned."""
    yield shared_memory_finding(around.machine, around.ranks)


def shared_memory_finding(machine: Machine, ranks: int) -> Finding:
    """Judge /dev/shm: ranks that communicate through it need some; the optimizer state does not pass through it."""
    needed = SHM_BYTES_PER_RANK * ranks if ranks > 1 or not machine.devices else 0
    line = partial(Finding, name="shared memory", looked_at="/dev/shm")
    found = f"{size(machine.shm_bytes)}, {size(machine.shm_free_bytes)} of it free"
    if machine.shm_free_bytes >= needed:
        return line(found=found if machine.shm_bytes else "there is none", verdict="good")
    return line(
        found=f"{found}; ranks: {ranks}, which may need {size(needed)} (bus error, exit status -7)",
        verdict="broken",
        fix="In a container, start it with --ipc=host or --shm-size=8g. Otherwise:\n"
        "$ sudo mount -o remount,size=8G /dev/shm",
    )


def locked_memory(around: Surroundings) -> Iterator[Finding]:
    """Check the limit of locked memory. Whether locking works is measured with the link."""
    yield locked_memory_finding(around.machine.memlock_bytes, around.has_devices)


def locked_memory_finding(limit: int | None, has_devices: bool) -> Finding:
    """Judge the limit of locked memory: unknown with a device, whose driver may lock more than the limit says."""
    line = partial(Finding, name="locked memory", looked_at="ulimit -l")
    if limit is None:
        return line(found="unlimited", verdict="good")
    if not has_devices:
        return line(found=f"{size(limit)} at most, not used without a GPU", verdict="good")
    return line(
        found=f"{size(limit)} at most; `device link` says whether page-locking works",
        verdict="unknown",
        fix="If it fails, allow more. In a container: --ulimit memlock=-1. Otherwise:\n$ ulimit -l unlimited",
    )


def open_files(around: Surroundings) -> Iterator[Finding]:
    """Check the limit of open files."""
    yield open_files_finding(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def open_files_finding(limit: int) -> Finding:
    """Judge the limit of open files: a run opens the files of weights and data, and sockets between ranks."""
    line = partial(Finding, name="open files", looked_at="ulimit -n")
    if limit == resource.RLIM_INFINITY:
        return line(found="unlimited", verdict="good")
    if limit >= OPEN_FILES:
        return line(found=f"{limit} at most", verdict="good")
    return line(found=f"{limit} at most, too few for large data sets", verdict="broken", fix="$ ulimit -n 65536")


def huge_pages(around: Surroundings) -> Iterator[Finding]:
    """Check whether shared memory may use huge pages: the optimizer state is shared memory."""
    settings = around.root / SHMEM_ENABLED
    chosen = _chosen(settings)
    own = _chosen(settings.parent / "hugepages-2048kB/shmem_enabled")  # newer kernels: one setting per size
    yield huge_pages_finding(chosen if own in (None, "inherit") else own)


def huge_pages_finding(setting: str | None) -> Finding:
    """Judge the kernel's setting; the memory of the optimizer state asks for huge pages with madvise."""
    line = partial(Finding, name="huge pages", looked_at=f"/{SHMEM_ENABLED}")
    if setting is None:
        return line(found="this kernel has no such setting", verdict="unknown")
    if setting in ("advise", "within_size", "always", "force"):
        return line(found=f"{setting}: the optimizer state can use huge pages", verdict="good")
    return line(
        found=f"{setting}: the optimizer state uses small pages; what that costs has not been measured",
        verdict="unknown",
        fix=f"To allow huge ones until the next boot:\n$ echo advise | sudo tee /{SHMEM_ENABLED}",
    )


def _chosen(path: Path) -> str | None:
    """Return the value in brackets of a kernel's setting; None if there is no such file."""
    try:
        found = re.search(r"\[(\w+)\]", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A file in /dev/shm that no process has mapped or open, and the memory that it occupies."""

    path: Path
    nbytes: int


def leftovers(around: Surroundings) -> Iterator[Finding]:
    """Check for files of dead runs in /dev/shm, which occupy memory until they are removed."""
    yield leftovers_finding(find_leftovers(around.root))


def leftovers_finding(found: list[Leftover]) -> Finding:
    """Judge what was left behind, and name the command that removes it."""
    line = partial(Finding, name="leftovers", looked_at="files of DeepSpeed, torch and NCCL in /dev/shm")
    if not found:
        return line(found="none", verdict="good")
    names = " ".join(shlex.quote(str(leftover.path)) for leftover in found)
    return line(
        found=f"{len(found)} of dead runs, {size(sum(leftover.nbytes for leftover in found))} of memory",
        verdict="slow",
        fix=f"No process has them open or mapped, in no container either:\n$ rm {names}",
    )


def find_leftovers(root: Path = Path("/")) -> list[Leftover]:
    """Return the files in /dev/shm that no process has mapped or open, leaving out those that cannot be examined.

    The superuser is told about the files of all users, others about their own.
    """
    files = [path for pattern in LEFT_BEHIND for path in sorted((root / "dev/shm").glob(pattern)) if path.is_file()]
    return [
        Leftover(path=Path("/dev/shm") / path.name, nbytes=path.stat().st_blocks * 512)
        for path in files
        if _is_unused(path)
    ]


def _is_unused(path: Path) -> bool:
    """Return whether the kernel grants a write lease: it does if no process, of any user or container, uses the file.

    The lists of open files in /proc would not show the processes of other users and containers. See fcntl(2),
    F_SETLEASE: only for the owner of the file or with CAP_LEASE.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # of another user, or gone by now
        return False
    try:
        # Who opens the file meanwhile waits until it is closed here. The usual signal for that would end this process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
