"""Cores: how many, hyperthreads, NUMA nodes, and how the planned ranks share them."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from superoffload.offload.shared.affinity import Cores, Seat, Siblings, parse_list, share_of_rank
from superoffload.planning import cgroup, nvidia
from superoffload.planning.checks.finding import Finding, Surroundings
from superoffload.planning.machine import Node, numa_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Which cores this process may use, the hyperthreads of each, the NUMA nodes, and the quota of the cgroup."""

    cores: Cores
    siblings: Siblings
    nodes: Sequence[Node]
    quota: float | None

    @property
    def physical(self) -> list[Cores]:
        """Return the usable physical cores, each as its usable logical ones."""
        units = {tuple(c for c in self.siblings.get(core, (core,)) if c in self.cores) for core in self.cores}
        return sorted(units)

    def nodes_of(self, cores: Cores) -> set[int]:
        """Return the numbers of the NUMA nodes that some of the cores belong to."""
        return {node.number for node in self.nodes if set(node.cores) & set(cores)}

    def cores_of_ranks(self, ranks: int) -> list[Cores]:
        """Return the cores of each rank, as SuperOffload divides them."""
        seats = [Seat(host="", cores=self.cores)] * ranks
        return [share_of_rank(seats, rank, self.siblings) for rank in range(ranks)]


def read_topology(root: Path) -> Topology:
    """Read the topology from the kernel."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    siblings = {}
    for core in cores:
        path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        if path.is_file():
            siblings[core] = parse_list(path.read_text(encoding="utf-8"))
    return Topology(cores=cores, siblings=siblings, nodes=numa_nodes(root), quota=cgroup.core_quota(root))


def cores(around: Surroundings) -> Iterator[Finding]:
    """Check cores, hyperthreads, NUMA nodes and the place of each device against the ranks that are planned."""
    topology = read_topology(around.root)
    online = os.cpu_count() or 1
    yield cores_finding(topology, around.ranks, online)
    yield load_finding(float((around.root / "proc/loadavg").read_text(encoding="utf-8").split()[0]), online)
    # Only the recipes of several devices let the launcher bind ranks, which needs numactl.
    yield hyperthreads_finding(topology, around.ranks if around.has_devices else 1)
    has_numactl = not around.has_devices or shutil.which("numactl") is not None
    yield numa_finding(topology, around.ranks, has_numactl, around.environment if around.has_devices else {})
    yield threads_finding(topology, around.ranks, around.environment.get("OMP_NUM_THREADS"))
    if around.has_devices:
        yield locality_finding(topology, around.ranks, device_nodes(nvidia.bus_ids(), around.root))


def cores_finding(topology: Topology, ranks: int, online: int) -> Finding:
    """Judge the number of cores: slow with fewer than two for each rank, or with a quota below what is visible."""
    count, quota = len(topology.cores), topology.quota
    found = f"{count} of {online}" if count < online else str(count)
    each = count / ranks
    found += f" for {ranks} rank{'s' * (ranks > 1)}"
    line = partial(Finding, name="cores", looked_at="affinity, cgroup quota")
    if quota is not None and quota < count:
        return line(
            found=f"{found}, but a quota of {quota:g} cores' time: programs start {count} threads and are halted",
            verdict="slow",
            fix="Give a container cores instead of time: --cpuset-cpus 0-15 instead of --cpus 16. Otherwise:\n"
            f"$ export OMP_NUM_THREADS={max(1, int(quota / ranks))}",
        )
    if count < ranks:
        return line(
            found=f"{found}: several ranks share a core",
            verdict="slow",
            fix="Start fewer ranks, or allow more cores (taskset, --cpuset-cpus, --cpus-per-task of Slurm).",
        )
    if len(topology.physical) / ranks < 2:
        return line(
            found=f"{found}: training and optimizer share a core",
            verdict="slow",
            fix="Allow more cores (taskset, --cpuset-cpus, --cpus-per-task of Slurm).",
        )
    return line(found=f"{found}, {each:g} each", verdict="good")


def load_finding(load: float, online: int) -> Finding:
    """Judge what other processes do: slow if they keep more than half of the machine's cores busy."""
    busy = load > online / 2
    return Finding(
        name="load",
        looked_at="/proc/loadavg",
        found=f"{load:.1f} processes on {online} cores in the last minute",
        verdict="slow" if busy else "good",
        fix="See which processes use the cores; measurements below suffer from them, too:\n$ ps aux --sort=-%cpu | head"
        if busy
        else "",
    )


def hyperthreads_finding(topology: Topology, ranks: int) -> Finding:
    """Judge hyperthreads: DeepSpeed's launcher binds ranks to the lowest core numbers, one per physical core.

    That leaves physical cores idle where the hyperthreads of a core have neighbouring numbers
    (deepspeed/utils/numa.py, get_numactl_cmd).
    """
    line = partial(Finding, name="hyperthreads", looked_at="/sys/devices/system/cpu/*/topology")
    physical, logical = len(topology.physical), len(topology.cores)
    if physical == logical:
        return line(found="none in use", verdict="good")
    found = f"{logical} logical cores on {physical} physical ones"
    lowest = set(topology.cores[:physical])
    covered = sum(bool(lowest & set(unit)) for unit in topology.physical)
    if ranks > 1 and covered < physical:
        return line(
            found=f"{found}; --bind_cores_to_rank would leave {physical - covered} physical cores idle",
            verdict="slow",
            fix="SuperOffload divides cores itself, hyperthreads together: set BIND_CORES=false in the recipe.",
        )
    return line(found=f"{found}; those of one core stay together", verdict="good")


def numa_finding(topology: Topology, ranks: int, has_numactl: bool, environment: Mapping[str, str]) -> Finding:
    """Judge the NUMA nodes: each of several ranks should stay on one; binding by the launcher needs numactl."""
    nodes = [node for node in topology.nodes if node.cores]
    count = max(1, len(nodes))
    line = partial(Finding, name="NUMA nodes", looked_at="/sys/devices/system/node, numactl")
    found = f"{count} with cores, {ranks} rank{'s' * (ranks > 1)}"
    if ranks == 1:
        return line(found=found, verdict="good")
    if not has_numactl:
        return line(
            found=f"{found}; numactl is missing, without which recipes with BIND_CORES=true do not start",
            verdict="broken",
            fix="Install it, or set BIND_CORES=false in the recipe; SuperOffload divides cores itself:\n"
            "$ sudo apt-get install numactl",
        )
    if "KMP_AFFINITY" in environment:
        return line(
            found=f"{found}; KMP_AFFINITY is set, with which DeepSpeed's launcher refuses to bind ranks",
            verdict="broken",
            fix="$ unset KMP_AFFINITY",
        )
    spread = [rank for rank, own in enumerate(topology.cores_of_ranks(ranks)) if len(topology.nodes_of(own)) > 1]
    if spread:
        return line(
            found=f"{found}; the cores of rank {', '.join(map(str, spread))} are on several nodes",
            verdict="slow",
            fix=f"Use a number of ranks that is a multiple of {count}, or give each rank cores of one node: "
            "--bind_core_list of the deepspeed launcher.",
        )
    return line(found=f"{found}, each on one node", verdict="good")


def threads_finding(topology: Topology, ranks: int, variable: str | None) -> Finding:
    """Judge OMP_NUM_THREADS, which ZeRO-Offload's Adam uses; SuperOffload's optimizer process sets its own."""
    line = partial(Finding, name="threads", looked_at="OMP_NUM_THREADS")
    share = max(1, len(topology.cores) // ranks)
    physical = max(1, len(topology.physical) // ranks)
    if not variable:
        return line(found="not set, so one per core", verdict="good")
    first = variable.split(",")[0].strip()
    if not first.isdecimal() or int(first) == 0:
        return line(
            found=f"{variable!r} is no number",
            verdict="slow",
            fix="$ unset OMP_NUM_THREADS",
        )
    if physical <= int(first) <= share:
        return line(found=f"{first} for each rank", verdict="good")
    few = int(first) < physical
    return line(
        found=f"{first} for each rank, which has {share} cores: "
        + ("the others do not compute Adam in the mode zerooffload" if few else "threads wait for each other"),
        verdict="slow",
        fix=f"$ export OMP_NUM_THREADS={share}",
    )


def device_nodes(bus_ids: Sequence[str], root: Path = Path("/")) -> list[int | None]:
    """Return the NUMA node that each device is attached to, by its PCI address; None where the kernel names none."""
    nodes: list[int | None] = []
    for bus_id in bus_ids:
        domain, _, rest = bus_id.lower().partition(":")  # nvidia-smi writes eight digits of the domain, Linux four
        path = root / f"sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node"
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        nodes.append(int(text) if text.isdecimal() else None)  # -1: unknown
    return nodes


def locality_finding(topology: Topology, ranks: int, nodes: Sequence[int | None]) -> Finding:
    """Judge the place of each rank's device: it should be attached to the node of the rank's cores."""
    line = partial(Finding, name="device locality", looked_at="/sys/bus/pci/devices/*/numa_node")
    if len([node for node in topology.nodes if node.cores]) < 2:
        return line(found="one NUMA node", verdict="good")
    if None in nodes or not nodes:
        return line(found="the kernel does not name the nodes", verdict="unknown")
    places = [topology.nodes_of(own) for own in topology.cores_of_ranks(ranks)]
    remote = [rank for rank, node in enumerate(nodes[:ranks]) if node not in places[rank]]
    if not remote:
        return line(found="each device is on a node of its rank", verdict="good")
    order = sorted(range(len(nodes)), key=lambda index: (nodes[index] or 0, index))
    fix = "Give each rank cores of its device's node: --bind_core_list of the deepspeed launcher."
    if len(nodes) == ranks and order != list(range(len(nodes))):
        fix = f"Order the devices as the nodes:\n$ export CUDA_VISIBLE_DEVICES={','.join(map(str, order))}"
    elif ranks == 1:
        device_node = next(node for node in topology.nodes if node.number == nodes[0])
        fix = "Use the cores of the device's node:\n" + f"$ taskset -c {_ranges(device_node.cores)} COMMAND"
    return line(
        found=f"the device of rank {', '.join(map(str, remote))} is attached to another node than the rank's cores",
        verdict="slow",
        fix=fix,
    )


def _ranges(numbers: Cores) -> str:
    """Write core numbers as ranges, such as "0-3,8"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in parts)
