"""What the machines of a job have for it, as its ranks see them."""

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from superoffload import distributed
from superoffload.checkpoint import manifest
from superoffload.planning import machine
from superoffload.planning.budget import job
from superoffload.planning.budget.device import CONTEXT_BYTES, NCCL_BYTES
from superoffload.planning.remedies import Capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What one rank sees, in bytes.

    held_bytes: host memory of its own, such as its libraries'. disk_bytes: free where the output folder is, or taken
    by checkpoints in it, which make room for new ones. checkpoints: the number of those. pinned_rounding: torch rounds
    pinned memory up in this rank's environment, which may be another on each machine.
    """

    host_name: str
    machine: machine.Machine
    held_bytes: int
    disk_bytes: int
    checkpoints: int
    pinned_rounding: bool


def see(output_dir: str) -> Sight:
    """Look at what this rank can use.

    Raises what reading the system's files and asking the driver raises: OSError, ValueError, LookupError, RuntimeError.
    """
    on_gpu = distributed.device().type == "cuda"
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    own = machine.meminfo("\n".join(line for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))))
    folder = Path(output_dir)
    saved = manifest.complete_checkpoints(folder)
    taken = sum(path.stat().st_size for tag in saved for path in tag.iterdir())
    return Sight(
        host_name=socket.gethostname(),
        machine=machine.look(devices=(machine.current_device(),) if on_gpu else ()),
        held_bytes=sum(own.values()),
        disk_bytes=machine.disk_free_bytes(folder) + taken,
        checkpoints=len(saved),
        pinned_rounding=job.rounds_pinned_memory(),
    )


def capacity(sights: Sequence[Sight]) -> Capacity:
    """Return what a job may use: the least of all devices, machines and views of the output folder; pure.

    Includes what its ranks hold already, as the budget does. There is no device without a GPU.
    """
    devices = [_usable(device, len(sights)) for sight in sights for device in sight.machine.devices]
    hosts = []
    for name in {sight.host_name for sight in sights}:
        own = [sight for sight in sights if sight.host_name == name]
        available = min(sight.machine.host_available_bytes for sight in own) + sum(sight.held_bytes for sight in own)
        hosts.append(min(available, *(sight.machine.host_bytes for sight in own)))
    return Capacity(
        device=min(devices) if devices else None,
        host=min(hosts),
        disk=min(sight.disk_bytes for sight in sights),
    )


def ranks_per_node(sights: Sequence[Sight]) -> int:
    """Return the most ranks on one machine."""
    return max(Counter(sight.host_name for sight in sights).values())


def _usable(device: machine.Device, ranks: int) -> int:
    """Return what a rank may use of its device: all but what other processes hold.

    By the time a rank looks, it has a context and buffers of its own there, which the budget counts.
    """
    own = CONTEXT_BYTES + (NCCL_BYTES if ranks > 1 else 0)
    return min(device.total_bytes, device.free_bytes + own)
