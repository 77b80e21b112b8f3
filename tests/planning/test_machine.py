import os
import socket
from pathlib import Path

import pytest

from superoffload.planning import cgroup, machine
from superoffload.planning.checks.finding import GIB
from superoffload.planning.machine import Rates
from tests.helpers import machines

pytestmark = pytest.mark.unit

RATES = Rates(
    adam_parameters_per_s=1e9,
    host_copy_bytes_per_s=2e10,
    to_device_bytes_per_s=None,
    from_device_bytes_per_s=None,
    device_bf16_flops_per_s=None,
    disk_write_bytes_per_s=1e9,
)


def test_without_a_limit_host_memory_is_the_machines(tmp_path: Path) -> None:
    machines.with_cgroup_v2(tmp_path)
    machines.v2(tmp_path, "system.slice/job.scope", memory_max="max", memory_current=str(GIB))
    found = machine.look(root=tmp_path, devices=())
    assert (found.host_bytes, found.host_available_bytes) == (125 * GIB, 100 * GIB)
    assert cgroup.memory_limits(tmp_path) == []


def test_a_limit_of_version_2_counts_and_its_page_cache_does_not(tmp_path: Path) -> None:
    machines.with_cgroup_v2(tmp_path)
    statistics = f"anon 1\ninactive_file {GIB}\nactive_file {2 * GIB}\nshmem {GIB}"
    machines.v2(
        tmp_path, "system.slice/job.scope",
        memory_max=str(64 * GIB), memory_current=str(14 * GIB), memory_stat=statistics,
    )  # fmt: skip
    found = machine.look(root=tmp_path, devices=())
    assert (found.host_bytes, found.host_available_bytes) == (64 * GIB, 53 * GIB)


def test_the_limit_of_a_group_further_out_counts(tmp_path: Path) -> None:
    machines.with_cgroup_v2(tmp_path)
    machines.v2(tmp_path, "system.slice/job.scope", memory_max="max", memory_current="0")
    machines.v2(tmp_path, "system.slice", memory_max=str(32 * GIB), memory_current=str(31 * GIB), memory_stat="anon 1")
    found = machine.look(root=tmp_path, devices=())
    assert (found.host_bytes, found.host_available_bytes) == (32 * GIB, GIB)


def test_memory_high_is_a_limit_too(tmp_path: Path) -> None:
    machines.with_cgroup_v2(tmp_path)
    machines.v2(
        tmp_path, "system.slice/job.scope",
        memory_max=str(64 * GIB), memory_high=str(40 * GIB), memory_current="0", memory_stat="",
    )  # fmt: skip
    assert machine.look(root=tmp_path, devices=()).host_bytes == 40 * GIB


def test_a_limit_of_version_1_counts_beside_version_2(tmp_path: Path) -> None:
    machines.with_cgroup_v1(tmp_path)
    machines.v1_memory(tmp_path, "docker/abc", limit=50 * GIB, usage=30 * GIB, cache=8 * GIB)
    machines.v1_memory(tmp_path, "docker", limit=9223372036854771712, usage=30 * GIB)
    machines.v1_memory(tmp_path, "", limit=9223372036854771712, usage=90 * GIB)
    found = machine.look(root=tmp_path, devices=())
    assert (found.host_bytes, found.host_available_bytes) == (50 * GIB, 28 * GIB)


def test_in_a_container_the_mounted_group_is_its_own(tmp_path: Path) -> None:
    """The name of the group is that of the host, the files are at the mount point."""
    machines.with_cgroup_v1(tmp_path, mount_root="/docker/abc")
    machines.v1_memory(tmp_path, "", limit=16 * GIB, usage=GIB)
    assert machine.look(root=tmp_path, devices=()).host_bytes == 16 * GIB


def test_a_group_inside_a_container_counts_too(tmp_path: Path) -> None:
    machines.with_cgroup_v1(tmp_path, mount_root="/docker/abc", own="/docker/abc/job")
    machines.v1_memory(tmp_path, "job", limit=8 * GIB, usage=GIB)
    machines.v1_memory(tmp_path, "", limit=16 * GIB, usage=GIB)
    assert machine.look(root=tmp_path, devices=()).host_bytes == 8 * GIB


def test_a_limit_above_physical_memory_is_none(tmp_path: Path) -> None:
    machines.with_cgroup_v1(tmp_path)
    machines.v1_memory(tmp_path, "docker/abc", limit=500 * GIB, usage=GIB)
    assert machine.look(root=tmp_path, devices=()).host_bytes == 125 * GIB


def test_usage_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    machines.with_cgroup_v1(tmp_path)
    machines.v1_memory(tmp_path, "docker/abc", limit=GIB, usage=2 * GIB)
    assert machine.look(root=tmp_path, devices=()).host_available_bytes == 0


def test_a_machine_without_cgroups_has_no_limits(tmp_path: Path) -> None:
    machines.write(tmp_path, proc__meminfo=machines.MEMINFO)
    assert (cgroup.memory_limits(tmp_path), cgroup.core_quota(tmp_path)) == ([], None)
    found = machine.look(root=tmp_path, devices=())
    assert (found.host_bytes, found.shm_bytes, found.numa_nodes) == (125 * GIB, 0, 1)


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [("max 100000", "max 100000", None), ("250000 100000", "max 100000", 2.5), ("max 100000", "400000 100000", 4.0)],
)
def test_a_quota_of_version_2_is_found(tmp_path: Path, inner: str, outer: str, expected: float | None) -> None:
    machines.with_cgroup_v2(tmp_path)
    machines.v2(tmp_path, "system.slice/job.scope", cpu_max=inner)
    machines.v2(tmp_path, "system.slice", cpu_max=outer)
    assert cgroup.core_quota(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("150000", 1.5)])
def test_a_quota_of_version_1_is_found(tmp_path: Path, quota: str, expected: float | None) -> None:
    machines.with_cgroup_v1(tmp_path)
    base = "sys/fs/cgroup/cpu,cpuacct/docker/abc"
    machines.put(tmp_path, f"{base}/cpu.cfs_quota_us", f"{quota}\n")
    machines.put(tmp_path, f"{base}/cpu.cfs_period_us", "100000\n")
    assert cgroup.core_quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"), [(8, None, 8), (8, 2.5, 2), (8, 0.5, 1), (8, 64.0, 8), (1, 4.0, 1)]
)
def test_usable_cores_are_whole_and_at_least_one(affinity: int, quota: float | None, expected: int) -> None:
    assert machine.usable_cores(affinity, quota) == expected


def test_nodes_without_cores_do_not_count(tmp_path: Path) -> None:
    """A coherent device's memory is a node of its own."""
    machines.write(tmp_path, proc__meminfo=machines.MEMINFO)
    machines.with_nodes(tmp_path, ("0-3", 64), ("4-7,12", 64), ("", 96))
    assert [(node.number, node.cores, node.total_bytes) for node in machine.numa_nodes(tmp_path)] == [
        (0, (0, 1, 2, 3), 64 * GIB),
        (1, (4, 5, 6, 7, 12), 64 * GIB),
        (2, (), 96 * GIB),
    ]
    assert machine.look(root=tmp_path, devices=()).numa_nodes == 2


def test_this_machine_can_be_looked_at() -> None:
    found = machine.look(devices=())
    assert 0 < found.host_available_bytes <= found.host_bytes
    assert 1 <= found.cores <= len(os.sched_getaffinity(0))
    assert found.shm_free_bytes <= found.shm_bytes


def test_rates_are_read_back_on_the_same_hardware_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = machine.look(devices=())
    assert machine.measured_rates(seen) is None
    path = machine.write_rates(RATES, seen)
    assert path == machine.rates_file() == tmp_path / "superoffload" / f"rates_{socket.gethostname()}.json"
    assert list(path.parent.iterdir()) == [path]
    assert machine.measured_rates(seen) == RATES
    assert machine.measured_rates(machine.look(devices=[machines.device()])) is None
    monkeypatch.setattr(os, "cpu_count", lambda: 12345)
    assert machine.measured_rates(seen) is None


def test_a_rank_reads_the_rates_that_all_devices_were_measured_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine.write_rates(RATES, machine.look(devices=[machines.device(), machines.device(free_gib=3)]))
    assert machine.measured_rates(machine.look(devices=[machines.device()])) == RATES


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hardware": 1}', "{"])
def test_a_damaged_file_of_rates_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = machine.look(devices=())
    path = machine.write_rates(RATES, seen)
    path.write_text(text, encoding="utf-8")
    assert machine.measured_rates(seen) is None


def test_free_space_is_that_of_the_folder_above(tmp_path: Path) -> None:
    assert machine.existing(tmp_path / "a" / "b") == tmp_path
    assert machine.disk_free_bytes(tmp_path / "a" / "b") > 0
