"""Machines for tests: files of /proc and /sys that the planning code reads, and what commands print."""

from collections.abc import Mapping
from pathlib import Path

from superoffload.planning.checks.finding import GIB, Surroundings
from superoffload.planning.machine import Device, Machine

MEMINFO = """MemTotal:       131072000 kB
MemFree:         1000000 kB
MemAvailable:   104857600 kB
Buffers:           13867 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""
SMI = """0, GPU-aaaa1111-0000, NVIDIA H100 80GB HBM3, 81559, 80994, Disabled, 550.54.15
1, GPU-bbbb2222-0000, NVIDIA H100 80GB HBM3, 81559, 20000, Disabled, 550.54.15
"""


def write(root: Path, **files: str) -> Path:
    """Write files below `root`; a name has `__` for `/`."""
    for name, text in files.items():
        put(root, name.replace("__", "/"), text)
    return root


def put(root: Path, name: str, text: str) -> None:
    """Write one file below `root`."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def with_cgroup_v1(root: Path, *, mount_root: str = "/", own: str = "/docker/abc") -> Path:
    """Write a machine whose memory and processor time are limited by cgroups of version 1."""
    put(root, "proc/meminfo", MEMINFO)
    put(root, "proc/self/cgroup", f"4:memory:{own}\n2:cpu,cpuacct:{own}\n1:name=systemd:{own}\n0::/\n")
    mounts = (
        f"32 31 0:29 {mount_root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
        f"35 31 0:32 {mount_root} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    )
    put(root, "proc/self/mountinfo", mounts)
    return root


def v1_memory(root: Path, folder: str, *, limit: int, usage: int, cache: int = 0) -> None:
    """Write the files of one memory cgroup of version 1; `cache` is page cache, half of it active."""
    base = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    put(root, f"{base}/memory.limit_in_bytes", f"{limit}\n")
    put(root, f"{base}/memory.usage_in_bytes", f"{usage}\n")
    statistics = f"cache {cache}\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache // 2}\ntotal_shmem 0\n"
    put(root, f"{base}/memory.stat", statistics)


def with_cgroup_v2(root: Path, *, own: str = "/system.slice/job.scope") -> Path:
    """Write a machine with cgroups of version 2."""
    put(root, "proc/meminfo", MEMINFO)
    put(root, "proc/self/cgroup", f"0::{own}\n")
    put(root, "proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n")
    return root


def v2(root: Path, folder: str, **files: str) -> None:
    """Write files of one cgroup of version 2; a name has `_` for `.`."""
    base = f"sys/fs/cgroup/{folder}".rstrip("/")
    for name, text in files.items():
        put(root, f"{base}/{name.replace('_', '.')}", f"{text}\n")


def with_nodes(root: Path, *nodes: tuple[str, int]) -> Path:
    """Write NUMA nodes: the list of cores and the memory in GiB of each."""
    for number, (cores, gib) in enumerate(nodes):
        base = f"sys/devices/system/node/node{number}"
        put(root, f"{base}/cpulist", f"{cores}\n")
        put(root, f"{base}/meminfo", f"Node {number} MemTotal:       {gib << 20} kB\nNode {number} MemFree: 1 kB\n")
    return root


def device(name: str = "NVIDIA H100 80GB HBM3", total_gib: int = 80, free_gib: int = 79) -> Device:
    """Return a device."""
    return Device(name=name, total_bytes=total_gib * GIB, free_bytes=free_gib * GIB)


def machine(
    devices: tuple[Device, ...] = (),
    *,
    host_gib: int = 100,
    available_gib: int = 90,
    shm_gib: int = 50,
    memlock_bytes: int | None = None,
) -> Machine:
    """Return a machine with 16 cores."""
    return Machine(
        devices=devices,
        host_bytes=host_gib * GIB,
        host_available_bytes=available_gib * GIB,
        cores=16,
        shm_bytes=shm_gib * GIB,
        shm_free_bytes=shm_gib * GIB,
        memlock_bytes=memlock_bytes,
        numa_nodes=1,
    )


def around(
    root: Path, *devices: Device, ranks: int = 1, quick: bool = False, environment: Mapping[str, str] | None = None
) -> Surroundings:
    """Return surroundings whose files are below `root`, which is the output folder too."""
    return Surroundings(
        machine=machine(devices),
        ranks=ranks,
        output_dir=root,
        quick=quick,
        root=root,
        environment=environment or {},
    )
