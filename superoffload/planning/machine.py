"""What this machine has: devices, host memory, cores, shared memory. Looks, and changes nothing.

Figures that `superoffload doctor` has measured here before are read back by `measured_rates`.
"""

import hashlib
import json
import os
import resource
import shutil
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from superoffload.offload.shared.affinity import parse_list
from superoffload.planning import cgroup, nvidia


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator. `free_bytes` is what the driver says is free now; other processes' memory is in use."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is and what of it is free, in bytes.

    devices: empty without a GPU; those of CUDA_VISIBLE_DEVICES, if it is set.
    host_bytes: physical memory, or the limit of this process's cgroups if that is less.
    host_available_bytes: what can be allocated now; page cache that the kernel can take back counts as available.
    cores: logical cores that this process may use, by its affinity and the quota of its cgroups.
    shm_bytes, shm_free_bytes: size of /dev/shm and what is free there; 0 if it does not exist.
    memlock_bytes: how much memory a process may lock (`ulimit -l`); None: unlimited.
    numa_nodes: nodes with cores; the memory of a coherent device may be a node without any.
    """

    devices: tuple[Device, ...]
    host_bytes: int
    host_available_bytes: int
    cores: int
    shm_bytes: int
    shm_free_bytes: int
    memlock_bytes: int | None
    numa_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What `superoffload doctor` measured on this machine; None: not measured, e.g. without a device.

    adam_parameters_per_s: parameters that the compiled Adam updates, on all cores that were usable.
    host_copy_bytes_per_s: bytes copied within host memory, by as many threads; each is read and written once.
    to_device_bytes_per_s, from_device_bytes_per_s: copies from and to pinned memory.
    device_bf16_flops_per_s: a large bf16 matrix product.
    disk_write_bytes_per_s: a file written to the output folder and flushed to the disk.
    """

    adam_parameters_per_s: float
    host_copy_bytes_per_s: float
    to_device_bytes_per_s: float | None
    from_device_bytes_per_s: float | None
    device_bf16_flops_per_s: float | None
    disk_write_bytes_per_s: float


def look(*, root: Path = Path("/"), devices: Sequence[Device] | None = None) -> Machine:
    """Look at the machine, in milliseconds, plus the time that nvidia-smi takes.

    `devices` are those that the caller knows already, e.g. `(current_device(),)` on a rank. Without a working driver
    there are none. `root` holds proc/ and sys/.
    """
    memory = meminfo((root / "proc/meminfo").read_text(encoding="utf-8"))
    limits = cgroup.memory_limits(root)
    shm_bytes, shm_free_bytes = _shm(root)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if devices is None:
        devices = _devices(memory)
    return Machine(
        devices=tuple(devices),
        host_bytes=min([memory["MemTotal"], *(limit.limit_bytes for limit in limits)]),
        host_available_bytes=min([memory["MemAvailable"], *(limit.available_bytes for limit in limits)]),
        cores=usable_cores(len(os.sched_getaffinity(0)), cgroup.core_quota(root)),
        shm_bytes=shm_bytes,
        shm_free_bytes=shm_free_bytes,
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        numa_nodes=max(1, sum(bool(node.cores) for node in numa_nodes(root))),
    )


def meminfo(text: str) -> dict[str, int]:
    """Read /proc/meminfo: names and bytes."""
    values = (line.split() for line in text.splitlines())
    return {name.rstrip(":"): int(rest[0]) * (1024 if rest[1:] == ["kB"] else 1) for name, *rest in values if rest}


def usable_cores(affinity: int, quota: float | None) -> int:
    """Return how many cores are of use: those of the affinity mask, at most the whole cores of the quota."""
    return affinity if quota is None else max(1, min(affinity, int(quota)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One NUMA node: the numbers of its logical cores, and its memory."""

    number: int
    cores: tuple[int, ...]
    total_bytes: int


def numa_nodes(root: Path = Path("/")) -> list[Node]:
    """Return the NUMA nodes that the kernel lists; empty where it lists none."""
    found = []
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda f: int(f.name[4:])):
        try:
            cores = parse_list((folder / "cpulist").read_text(encoding="utf-8"))
            lines = (folder / "meminfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        memory = meminfo("\n".join(line.split(maxsplit=2)[2] for line in lines if line.startswith("Node")))
        found.append(Node(number=int(folder.name[4:]), cores=cores, total_bytes=memory.get("MemTotal", 0)))
    return found


def disk_free_bytes(folder: Path) -> int:
    """Return the free space where a folder is, or would be created."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """Return the folder, or the innermost folder above it that exists."""
    folder = folder.absolute()
    return next(
        path for path in (folder, *folder.parents) if os.path.isdir(path)
    )  # of Path, it raises without permission


def current_device() -> Device:
    """Return the device of this process, from torch; creates a context on it, so only for a process that has one."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return Device(name=torch.cuda.get_device_name(), total_bytes=total, free_bytes=free)


def _devices(memory: dict[str, int]) -> list[Device]:
    """Return the devices that nvidia-smi lists; a device that reports no memory of its own shares the host's."""
    try:
        rows = nvidia.query()
    except OSError:  # `superoffload doctor` shows why
        return []
    return [
        Device(
            name=row.name,
            total_bytes=memory["MemTotal"] if row.total_bytes is None else row.total_bytes,
            free_bytes=memory["MemAvailable"] if row.free_bytes is None else row.free_bytes,
        )
        for row in rows
    ]


def _shm(root: Path) -> tuple[int, int]:
    try:
        usage = shutil.disk_usage(root / "dev/shm")
    except OSError:
        return 0, 0
    return usage.total, usage.free


def rates_file() -> Path:
    """Return the file of the measured rates; hosts that share a home folder have one each."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "superoffload" / f"rates_{socket.gethostname()}.json"


def hardware_key(machine: Machine, root: Path = Path("/")) -> str:
    """Return a name that differs between machines: processor, number of cores, memory and kinds of devices.

    The same on every rank, whatever cores and devices the rank may use.
    """
    model = [line for line in _lines(root / "proc/cpuinfo") if line.startswith(("model name", "CPU part"))][:1]
    total_gib = meminfo("\n".join(_lines(root / "proc/meminfo")))["MemTotal"] >> 30
    parts = (*model, os.cpu_count(), total_gib, *sorted({device.name for device in machine.devices}))
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def write_rates(rates: Rates, machine: Machine) -> Path:
    """Write the rates for this machine; return the file."""
    path = rates_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(json.dumps({"hardware": hardware_key(machine), **asdict(rates)}, indent=1), encoding="utf-8")
    return written.replace(path)


def measured_rates(machine: Machine | None = None) -> Rates | None:
    """Return what `superoffload doctor` measured on this machine; None if it has not, or on other hardware.

    `machine` is what look() returned, if it has been called already.
    """
    try:
        found = json.loads(rates_file().read_text(encoding="utf-8"))
        if found.pop("hardware") != hardware_key(machine or look()):
            return None
        return Rates(**{field.name: found[field.name] for field in fields(Rates)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is no file, or one of another version
        return None
