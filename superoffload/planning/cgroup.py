"""The limits of this process's cgroups, version 1 or 2: memory and processor time. Reads files and changes nothing.

A limit holds for a cgroup and everything below it, so each function walks from the process's own cgroup up to the one
that is mounted. Formats: the kernel's Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """The limit that leaves the least: what may be used, and what is left of it, in bytes."""

    limit_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """The files of the memory controller: limits, usage, and the page cache that the kernel can take back."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


# Above memory.high the kernel stops a process until it has reclaimed pages, which ends a run's progress too.
_MEMORY = {
    1: _Names(
        limits=("memory.limit_in_bytes",),
        usage="memory.usage_in_bytes",
        cache=("total_inactive_file", "total_active_file"),
    ),
    2: _Names(limits=("memory.max", "memory.high"), usage="memory.current", cache=("inactive_file", "active_file")),
}


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """Return the memory limits that apply to this process, the innermost first; empty if there are none.

    `root` holds proc/ and sys/. What is available does not count page cache as used.
    """
    found = []
    for version, folder in _folders("memory", root):
        names = _MEMORY[version]
        limits = [value for name in names.limits if (value := _number(folder / name)) is not None]
        if limits:
            statistics = dict(line.partition(" ")[::2] for line in _read(folder / "memory.stat").splitlines())
            cache = sum(int(statistics.get(name, 0)) for name in names.cache)
            used = max(0, (_number(folder / names.usage) or 0) - cache)
            limit = min(limits)
            found.append(MemoryLimit(limit_bytes=limit, available_bytes=max(0, limit - used)))
    return found


def core_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores' time this process may use; None without a quota."""
    quotas = []
    for version, folder in _folders("cpu", root):
        if version == 1:
            quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        else:
            values = _read(folder / "cpu.max").split() or ["max", "max"]
            quota, period = (int(value) if value.isdecimal() else None for value in values)
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _folders(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the version of cgroups and the folder of each cgroup that holds this process, from the inside out."""
    version, name = _membership(controller, _read(root / "proc/self/cgroup"))
    mounted = _mount(controller, version, _read(root / "proc/self/mountinfo"))
    if name is None or mounted is None:
        return
    mount_root, mount_point = mounted
    # In a container, the mounted cgroup is its own, and names above it are those of the host.
    inside = PurePosixPath(name)
    inner = inside.relative_to(mount_root) if inside.is_relative_to(mount_root) else PurePosixPath()
    for part in (inner, *inner.parents) if inner.parts else (inner,):
        folder = root / mount_point.lstrip("/") / part
        if folder.is_dir():
            yield version, folder


def _membership(controller: str, text: str) -> tuple[int, str | None]:
    """Return the version of the hierarchy that has a controller, and the name of this process's cgroup in it."""
    lines = [line.split(":", 2) for line in text.splitlines() if line.count(":") >= 2]
    for _, controllers, name in lines:
        if controller in controllers.split(","):
            return 1, name
    return 2, next((name for number, controllers, name in lines if number == "0" and not controllers), None)


def _mount(controller: str, version: int, text: str) -> tuple[str, str] | None:
    """Return which cgroup is mounted and where, from /proc/self/mountinfo."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if (version == 2 and kind[0] == "cgroup2") or (
            version == 1 and kind[0] == "cgroup" and controller in kind[2].split(",")
        ):
            return fields[3], fields[4]
    return None


def _number(path: Path) -> int | None:
    """Return the number in a file; None for `max`, -1 (no quota), a missing file and one that may not be read."""
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
