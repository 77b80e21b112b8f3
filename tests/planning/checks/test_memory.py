import fcntl
import mmap
import os
import resource
import shlex
from pathlib import Path

import pytest

from superoffload.planning.checks import memory
from superoffload.planning.checks.finding import GIB, Finding
from superoffload.planning.machine import Machine
from tests.helpers import machines

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("available_gib", "total_gib", "verdict", "text"),
    [
        (90, 100, "good", "100.0 GiB, 90.0 GiB of it available"),
        (40, 100, "slow", "40.0 GiB of it available"),
        (90, 500, "good", "a cgroup's limit, the machine has 500.0 GiB"),
    ],
)
def test_host_memory(available_gib: int, total_gib: int, verdict: str, text: str) -> None:
    found = memory.host_memory_finding(machines.machine(available_gib=available_gib), total_gib * GIB, False)
    assert found.verdict == verdict
    assert text in found.found
    assert ("$ ps" in found.fix) == (verdict == "slow")


def test_host_memory_is_read_below_the_root(tmp_path: Path) -> None:
    machines.with_cgroup_v1(tmp_path)
    machines.v1_memory(tmp_path, "docker/abc", limit=GIB, usage=0)
    (found,) = memory.host_memory(machines.around(tmp_path))
    assert found.looked_at == "/proc/meminfo and the cgroup's limit"


@pytest.mark.parametrize(
    ("seen", "ranks", "verdict"),
    [
        (machines.machine(), 4, "good"),
        (machines.machine(shm_gib=0), 1, "broken"),  # ranks on CPUs always use it
        (machines.machine((machines.device(),), shm_gib=0), 1, "good"),
        (machines.machine((machines.device(),) * 2, shm_gib=0), 2, "broken"),
        (machines.machine(shm_gib=1), 9, "broken"),
    ],
)
def test_shared_memory(seen: Machine, ranks: int, verdict: str) -> None:
    found = memory.shared_memory_finding(seen, ranks)
    assert found.verdict == verdict
    assert ("--shm-size" in found.fix) == (verdict == "broken")


@pytest.mark.parametrize(
    ("limit", "has_devices", "verdict"),
    [(None, True, "good"), (8 << 20, False, "good"), (8 << 20, True, "unknown")],
)
def test_locked_memory(limit: int | None, has_devices: bool, verdict: str) -> None:
    found = memory.locked_memory_finding(limit, has_devices)
    assert found.verdict == verdict
    assert ("ulimit -l unlimited" in found.fix) == (verdict == "unknown")
    assert limit is None or "8.0 MiB" in found.found


@pytest.mark.parametrize(
    ("limit", "verdict"), [(256, "broken"), (1023, "broken"), (1024, "good"), (resource.RLIM_INFINITY, "good")]
)
def test_open_files(limit: int, verdict: str) -> None:
    found = memory.open_files_finding(limit)
    assert (found.verdict, "ulimit" in found.fix) == (verdict, verdict == "broken")


def huge_pages(root: Path, **files: str) -> Finding:
    for name, text in files.items():
        machines.put(root, f"{Path(memory.SHMEM_ENABLED).parent}/{name.replace('__', '/')}", text)
    (found,) = memory.huge_pages(machines.around(root))
    return found


@pytest.mark.parametrize(
    ("setting", "verdict"),
    [
        ("always within_size advise [never] deny force", "unknown"),
        ("always within_size advise never [deny] force", "unknown"),
        ("always within_size [advise] never deny force", "good"),
        ("[always] within_size advise never deny force", "good"),
    ],
)
def test_huge_pages(tmp_path: Path, setting: str, verdict: str) -> None:
    found = huge_pages(tmp_path, shmem_enabled=setting)
    assert (found.verdict, "tee /sys/kernel/mm" in found.fix) == (verdict, verdict == "unknown")


@pytest.mark.parametrize(
    ("own", "verdict"), [("always [inherit] within_size advise never", "good"), ("always inherit [never]", "unknown")]
)
def test_the_setting_of_the_page_size_takes_precedence(tmp_path: Path, own: str, verdict: str) -> None:
    name = "hugepages-2048kB/shmem_enabled"
    machines.put(tmp_path, f"{Path(memory.SHMEM_ENABLED).parent}/{name}", own)
    assert huge_pages(tmp_path, shmem_enabled="always [advise] never").verdict == verdict


def test_a_kernel_without_the_setting_is_unknown(tmp_path: Path) -> None:
    assert huge_pages(tmp_path).verdict == "unknown"


def shm(root: Path, *names: str) -> None:
    for name in names:
        machines.put(root, f"dev/shm/{name}", "x" * 10_000)


def test_a_file_that_no_process_uses_is_left_over(tmp_path: Path) -> None:
    shm(tmp_path, "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0", "torch_1_2_3", "nccl-AbC", "deepspeed_used", "mine")
    with (tmp_path / "dev/shm/deepspeed_used").open():
        (found,) = memory.leftovers(machines.around(tmp_path))
    assert found.verdict == "slow"
    assert found.found.startswith("3 of dead runs, ")
    command = shlex.split(found.fix.splitlines()[-1])
    names = ["deepspeed_allreduce_buffer_0_127.0.0.1_29500_0", "torch_1_2_3", "nccl-AbC"]
    assert command == ["$", "rm", *(f"/dev/shm/{name}" for name in names)]


def test_a_file_that_may_not_be_asked_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of other users are, and all files where the system knows no leases."""
    shm(tmp_path, "deepspeed_theirs")

    def refused(*arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(fcntl, "fcntl", refused)
    assert memory.find_leftovers(tmp_path) == []


def test_a_link_is_left_alone(tmp_path: Path) -> None:
    shm(tmp_path, "mine")
    (tmp_path / "dev/shm/torch_link").symlink_to(tmp_path / "dev/shm/mine")
    assert memory.find_leftovers(tmp_path) == []


def test_without_leftovers_all_is_good(tmp_path: Path) -> None:
    (found,) = memory.leftovers(machines.around(tmp_path))
    assert (found.verdict, found.found, found.fix) == ("good", "none", "")


def test_a_mapped_file_is_in_use_whoever_has_mapped_it(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(f"/dev/shm/deepspeed_test_{os.getpid()}")
    monkeypatch.setattr(Path, "read_text", lambda *arguments, **options: pytest.fail("not all of /proc can be read"))
    try:
        path.write_bytes(bytes(mmap.PAGESIZE))
        assert path in [leftover.path for leftover in memory.find_leftovers()]
        with path.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE):
            file.close()  # only the mapping remains, as in DeepSpeed's ranks
            assert path not in [leftover.path for leftover in memory.find_leftovers()]
        assert path in [leftover.path for leftover in memory.find_leftovers()]
    finally:
        path.unlink()
