from collections.abc import Sequence
from pathlib import Path

import pytest

from superoffload.planning.checks import cores
from superoffload.planning.checks.cores import Topology
from superoffload.planning.machine import Node
from tests.helpers import machines

pytestmark = pytest.mark.unit


def topology(
    count: int = 16, *, nodes: int = 1, threads: int = 1, adjacent: bool = False, quota: float | None = None
) -> Topology:
    """Return `count` logical cores: siblings are neighbours, or half of all cores apart; nodes take turns in runs."""
    physical = count // threads
    siblings = {}
    for core in range(count):
        first = core - core % threads if adjacent else core % physical
        siblings[core] = tuple(range(first, first + threads)) if adjacent else tuple(range(first, count, physical))
    each = physical // nodes
    members: list[set[int]] = [
        {
            sibling
            for core in range(count)
            for sibling in siblings[core]
            if _unit(core, threads, adjacent, physical) // each == n
        }
        for n in range(nodes)
    ]
    return Topology(
        cores=tuple(range(count)),
        siblings=siblings,
        nodes=[Node(number=n, cores=tuple(sorted(own)), total_bytes=1) for n, own in enumerate(members)],
        quota=quota,
    )


def _unit(core: int, threads: int, adjacent: bool, physical: int) -> int:
    return core // threads if adjacent else core % physical


@pytest.mark.parametrize(
    ("seen", "ranks", "verdict", "text"),
    [
        (topology(16), 4, "good", "16 for 4 ranks, 4 each"),
        (topology(2), 4, "slow", "several ranks share a core"),
        (topology(4), 4, "slow", "training and optimizer share a core"),
        (topology(4, threads=2), 2, "slow", "training and optimizer share a core"),
        (topology(16, quota=4.0), 1, "slow", "a quota of 4 cores' time"),
        (topology(16, quota=64.0), 1, "good", "16 for 1 rank, 16 each"),
    ],
)
def test_cores(seen: Topology, ranks: int, verdict: str, text: str) -> None:
    found = cores.cores_finding(seen, ranks, len(seen.cores))
    assert (found.verdict, bool(found.fix)) == (verdict, verdict != "good")
    assert text in found.found


def test_an_affinity_mask_is_shown() -> None:
    assert "16 of 64" in cores.cores_finding(topology(16), 1, 64).found


@pytest.mark.parametrize(("load", "verdict"), [(0.3, "good"), (8.0, "good"), (8.1, "slow")])
def test_load(load: float, verdict: str) -> None:
    found = cores.load_finding(load, 16)
    assert (found.verdict, "$ ps" in found.fix) == (verdict, verdict == "slow")


@pytest.mark.parametrize(
    ("seen", "ranks", "verdict", "text"),
    [
        (topology(16), 2, "good", "none in use"),
        (topology(16, threads=2), 2, "good", "16 logical cores on 8 physical ones"),
        (topology(16, threads=2, adjacent=True), 2, "slow", "would leave 4 physical cores idle"),
        (topology(16, threads=2, adjacent=True), 1, "good", "stay together"),  # a single rank is not bound
    ],
)
def test_hyperthreads(seen: Topology, ranks: int, verdict: str, text: str) -> None:
    found = cores.hyperthreads_finding(seen, ranks)
    assert (found.verdict, "BIND_CORES=false" in found.fix) == (verdict, verdict == "slow")
    assert text in found.found


@pytest.mark.parametrize(
    ("seen", "ranks", "numactl", "environment", "verdict", "text"),
    [
        (topology(16), 1, False, {}, "good", "1 with cores, 1 rank"),
        (topology(16, nodes=2), 1, False, {}, "good", "2 with cores"),
        (topology(16, nodes=2), 2, True, {}, "good", "each on one node"),
        (topology(16, nodes=2), 4, True, {}, "good", "each on one node"),
        (topology(16, nodes=2, threads=2), 2, True, {}, "good", "each on one node"),
        (topology(16, nodes=2), 3, True, {}, "slow", "the cores of rank 1 are on several nodes"),
        (topology(16, nodes=4), 2, True, {}, "slow", "the cores of rank 0, 1 are on several nodes"),
        (topology(16, nodes=2), 2, False, {}, "broken", "numactl is missing"),
        (topology(16), 2, True, {"KMP_AFFINITY": "compact"}, "broken", "KMP_AFFINITY is set"),
    ],
)
def test_numa(seen: Topology, ranks: int, numactl: bool, environment: dict[str, str], verdict: str, text: str) -> None:
    found = cores.numa_finding(seen, ranks, numactl, environment)
    assert (found.verdict, bool(found.fix)) == (verdict, verdict != "good")
    assert text in found.found


@pytest.mark.parametrize(
    ("variable", "ranks", "verdict", "fix"),
    [
        (None, 2, "good", ""),
        ("8", 2, "good", ""),
        ("4", 2, "good", ""),  # one per physical core
        ("1", 2, "slow", "$ export OMP_NUM_THREADS=8"),
        ("16", 2, "slow", "$ export OMP_NUM_THREADS=8"),
        ("8,2", 2, "good", ""),
        ("many", 2, "slow", "$ unset OMP_NUM_THREADS"),
    ],
)
def test_threads(variable: str | None, ranks: int, verdict: str, fix: str) -> None:
    found = cores.threads_finding(topology(16, threads=2), ranks, variable)
    assert (found.verdict, found.fix) == (verdict, fix)


@pytest.mark.parametrize(
    ("seen", "ranks", "nodes", "verdict", "fix"),
    [
        (topology(16), 2, [None, None], "good", ""),
        (topology(16, nodes=2), 2, [0, 1], "good", ""),
        (topology(16, nodes=2), 4, [0, 0, 1, 1], "good", ""),
        (topology(16, nodes=2), 2, [1, 0], "slow", "$ export CUDA_VISIBLE_DEVICES=1,0"),
        (topology(16, nodes=2), 2, [1, 1], "slow", "--bind_core_list"),
        (topology(16, nodes=2), 2, [None, 1], "unknown", ""),
        (topology(16, nodes=2), 2, [], "unknown", ""),
    ],
)
def test_device_locality(seen: Topology, ranks: int, nodes: Sequence[int | None], verdict: str, fix: str) -> None:
    found = cores.locality_finding(seen, ranks, nodes)
    assert found.verdict == verdict
    assert fix in found.fix
    assert bool(fix) == bool(found.fix)


def test_the_node_of_a_device_is_read_from_its_address(tmp_path: Path) -> None:
    base = "sys/bus/pci/devices"
    machines.put(tmp_path, f"{base}/0000:3b:00.0/numa_node", "1\n")
    machines.put(tmp_path, f"{base}/0009:01:00.0/numa_node", "-1\n")
    addresses = ["00000000:3B:00.0", "00000009:01:00.0", "00000000:FF:00.0"]
    assert cores.device_nodes(addresses, tmp_path) == [1, None, None]


def test_core_numbers_are_written_as_ranges() -> None:
    assert cores._ranges((0, 1, 2, 3, 8, 10, 11)) == "0-3,8,10-11"


def test_the_topology_of_this_machine_is_read() -> None:
    seen = cores.read_topology(Path("/"))
    assert sorted(core for unit in seen.physical for core in unit) == list(seen.cores)
    assert seen.nodes_of(seen.cores)


def test_ranks_on_cpus_are_not_bound_by_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the recipes of several devices let the launcher bind ranks."""
    machines.put(tmp_path, "proc/loadavg", "0.10 0.20 0.30 1/234 5678\n")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(cores, "read_topology", lambda root: topology(16, threads=2, adjacent=True))
    monkeypatch.setattr("superoffload.planning.nvidia.bus_ids", list)
    found = {}
    for devices in ([], [machines.device()] * 2):
        around = machines.around(tmp_path, *devices, ranks=2, environment={"KMP_AFFINITY": "compact"})
        found[len(devices)] = {line.name: line for line in cores.cores(around)}
    for name, verdict in (("NUMA nodes", "broken"), ("hyperthreads", "slow")):
        assert (found[0][name].verdict, found[2][name].verdict) == ("good", verdict)
        assert "BIND_CORES=false" in found[2][name].fix


def test_every_kind_is_checked(tmp_path: Path) -> None:
    machines.put(tmp_path, "proc/loadavg", "0.10 0.20 0.30 1/234 5678\n")
    names = [found.name for found in cores.cores(machines.around(tmp_path))]
    assert names == ["cores", "load", "hyperthreads", "NUMA nodes", "threads"]
