import os
from pathlib import Path

import pytest

from superoffload.planning import machine, nvidia
from superoffload.planning.checks.finding import GIB
from superoffload.planning.machine import Device
from tests.helpers import machines


def test_devices_are_read_with_what_other_processes_use() -> None:
    rows = nvidia.parse(machines.SMI)
    assert [(row.name, row.total_bytes, row.free_bytes) for row in rows] == [
        ("NVIDIA H100 80GB HBM3", 81559 << 20, 80994 << 20),
        ("NVIDIA H100 80GB HBM3", 81559 << 20, 20000 << 20),
    ]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, ["0", "1"]),
        ("1,0", ["1", "0"]),
        ("1", ["1"]),
        ("GPU-bbbb", ["1"]),
        ("-1", []),
        ("0,7,1", ["0"]),  # as CUDA: what follows an unknown device is ignored
        (" 1 ", ["1"]),
        ("", []),
    ],
)
def test_the_visible_devices_are_those_of_the_variable(variable: str | None, expected: list[str]) -> None:
    assert [row.index for row in nvidia.visible(nvidia.parse(machines.SMI), variable)] == expected


def smi(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Let `nvidia-smi` be a program of the test."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_devices_come_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi(monkeypatch, tmp_path, f"cat <<'E'\n{machines.SMI}E")
    assert [device.free_bytes >> 20 for device in machine.look().devices] == [80994, 20000]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [device.free_bytes >> 20 for device in machine.look().devices] == [20000]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.look().devices == ()


def test_a_device_without_memory_of_its_own_shares_the_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi(monkeypatch, tmp_path, "echo '0, GPU-1, NVIDIA GB10, [N/A], [N/A], [N/A], 580.95'")
    machines.write(tmp_path, proc__meminfo=machines.MEMINFO)
    assert machine.look(root=tmp_path).devices == (
        Device(name="NVIDIA GB10", total_bytes=125 * GIB, free_bytes=100 * GIB),
    )


def test_a_broken_driver_means_no_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi(monkeypatch, tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert machine.look().devices == ()
    with pytest.raises(OSError, match="nvidia-smi failed: Failed to initialize NVML"):
        nvidia.query()


def test_a_driver_that_hangs_is_not_waited_for() -> None:
    with pytest.raises(OSError, match="sleep did not answer within 0 s"):
        nvidia.run("sleep", "60", timeout_s=0.1)


def test_a_slice_of_a_device_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nvidia-smi reports the memory of the whole device."""
    smi(monkeypatch, tmp_path, "echo '0, GPU-1, NVIDIA H100, 81559, 80994, Enabled, 550.54'")
    monkeypatch.setattr(nvidia, "_by_torch", lambda: nvidia.parse("0, , NVIDIA H100 MIG 1g.10gb, 9856, 9800, , "))
    assert [device.total_bytes >> 20 for device in machine.look().devices] == [9856]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5, 16, 16\n", nvidia.Pcie(generation=5, width=16, widest=16)), ("[N/A], [N/A], [N/A]\n", None), ("", None)],
)
def test_the_link_is_read(text: str, expected: nvidia.Pcie | None) -> None:
    assert nvidia.parse_pcie(text) == expected
