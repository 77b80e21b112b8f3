from pathlib import Path
from typing import Any

import pytest

from superoffload.planning import nvidia
from superoffload.planning.checks import devices
from superoffload.planning.checks.child import Outcome
from superoffload.planning.machine import Machine, numa_nodes
from tests.helpers import machines

pytestmark = pytest.mark.unit

PCIE5 = nvidia.Pcie(generation=5, width=16, widest=16)


@pytest.mark.parametrize(
    ("seen", "ranks", "visible", "verdict", "text"),
    [
        (machines.machine(), 1, None, "good", "none: runs use the CPU"),
        (machines.machine(), 1, "", "good", "CUDA_VISIBLE_DEVICES is ''"),
        (
            machines.machine((machines.device(),) * 2),
            2,
            None,
            "good",
            "2 x NVIDIA H100 80GB HBM3, 80.0 GiB, driver 550",
        ),
        (machines.machine((machines.device(),)), 2, "0", "broken", "2 ranks need one each"),
        (machines.machine((machines.device(), machines.device(free_gib=20))), 2, None, "slow", "20.0 GiB free on 1"),
        (machines.machine((machines.device(), machines.device("NVIDIA A100"))), 2, None, "good", "+ NVIDIA A100"),
    ],
)
def test_devices(seen: Machine, ranks: int, visible: str | None, verdict: str, text: str) -> None:
    found = devices.devices_finding(seen, ranks, visible, "550.54.15")
    assert (found.verdict, bool(found.fix)) == (verdict, verdict != "good")
    assert text in found.found


def test_a_driver_that_fails_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def query() -> list[nvidia.Row]:
        raise OSError("nvidia-smi failed: Driver/library version mismatch")

    monkeypatch.setattr(nvidia, "query", query)
    (found,) = devices.devices(machines.around(tmp_path))
    assert (found.verdict, found.found) == ("broken", "nvidia-smi failed: Driver/library version mismatch")
    assert "dmesg" in found.fix


@pytest.mark.parametrize(
    ("vendor", "kind", "visible", "verdict"),
    [
        ("0x10de", "0x030200", None, "broken"),
        ("0x10de", "0x030200", "", "good"),  # hidden on purpose
        ("0x10de", "0x020700", None, "good"),  # a network adapter
        ("0x1af4", "0x030000", None, "good"),
    ],
)
def test_a_device_without_a_driver_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, kind: str, visible: str | None, verdict: str
) -> None:
    monkeypatch.setattr(nvidia, "query", list)
    machines.put(tmp_path, "sys/bus/pci/devices/0000:3b:00.0/vendor", f"{vendor}\n")
    machines.put(tmp_path, "sys/bus/pci/devices/0000:3b:00.0/class", f"{kind}\n")
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    (found,) = devices.devices(machines.around(tmp_path, environment=environment))
    assert found.verdict == verdict


def measured(to_device: float, to_host: float, *, locked: bool = True) -> dict[str, Any]:
    rates = {"to device": to_device * 1e9, "to host": to_host * 1e9}
    pageable = {"to device": 8e9, "to host": 6e9}
    return {
        "rates": {"arena, page-locked in place": rates, "pageable": pageable},
        "locked": locked,
        "device_bf16_flops_per_s": 7e14,
    }


@pytest.mark.parametrize(
    ("result", "pcie", "coherent", "verdict", "text"),
    [
        (measured(55, 53), PCIE5, False, "good", "PCIe 5 x16: to the device 55.0 GB/s (pageable 8.0 GB/s), from it 53"),
        (measured(25, 53), PCIE5, False, "slow", "50.0 GB/s are usual"),
        (measured(53, 12), PCIE5, False, "slow", "50.0 GB/s are usual"),
        (measured(25, 24), nvidia.Pcie(generation=4, width=16, widest=16), False, "good", "PCIe 4 x16"),
        (measured(13, 13), nvidia.Pcie(generation=4, width=8, widest=16), False, "slow", "only 8 of 16 lanes in use"),
        (measured(55, 53, locked=False), PCIE5, False, "slow", "page-locking failed"),
        (measured(380, 290), PCIE5, True, "good", "coherent (NVLink-C2C)"),
        (measured(55, 53), PCIE5, True, "slow", "330.0 GB/s are usual"),
        (measured(5, 5), None, False, "good", "unknown kind"),
    ],
)
def test_link(result: dict[str, Any], pcie: nvidia.Pcie | None, coherent: bool, verdict: str, text: str) -> None:
    found = devices.link_finding(result, pcie, coherent, "timed copies")
    assert (found.verdict, bool(found.fix)) == (verdict, verdict != "good")
    assert text in found.found


def test_the_link_is_measured_with_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome(results=[measured(55, 53)], failure=None)
    monkeypatch.setattr("superoffload.planning.checks.child.run", lambda part: outcome)
    monkeypatch.setattr(nvidia, "pcie", lambda: PCIE5)
    around = machines.around(tmp_path, machines.device())
    around.measured["adam_parameters_per_s"] = 2e9
    link, modes = devices.link(around)
    assert link.verdict == "good"
    assert around.measured == {
        "adam_parameters_per_s": 2e9,
        "to_device_bytes_per_s": 55e9,
        "from_device_bytes_per_s": 53e9,
        "device_bf16_flops_per_s": 7e14,
    }
    # 4 bytes of gradients at 53 GB/s, 2 bytes of weights at 55.
    assert "Adam takes 0.50 s and copies 0.11 s: added to each step by zerooffload" in modes.found


def test_a_measurement_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome(results=[], failure="torch.OutOfMemoryError: CUDA out of memory")
    monkeypatch.setattr("superoffload.planning.checks.child.run", lambda part: outcome)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        list(devices.link(machines.around(tmp_path, machines.device())))


def test_without_a_device_there_is_no_link(tmp_path: Path) -> None:
    link, modes = devices.link(machines.around(tmp_path))
    assert (link.verdict, modes.verdict) == ("skipped", "skipped")
    (quick,) = devices.link(machines.around(tmp_path, machines.device(), quick=True))
    assert (quick.verdict, quick.found) == ("skipped", "not measured with --quick")


@pytest.mark.parametrize(
    ("name", "architecture", "expected"),
    [
        ("NVIDIA GH200 480GB", "aarch64", True),
        ("NVIDIA GB200", "aarch64", True),
        ("NVIDIA H100 80GB HBM3", "aarch64", False),  # a card in an ARM server
        ("NVIDIA GH200 480GB", "x86_64", False),
    ],
)
def test_what_is_a_superchip(name: str, architecture: str, expected: bool) -> None:
    assert devices.is_superchip(machines.machine((machines.device(name),)), architecture) == expected


PARAMS = 'ResmanDebugLevel: 4294967295\nCoherentGPUMemoryMode: "{}"\nRegistryDwords: ""\n'


@pytest.mark.parametrize(
    ("params", "nodes", "verdict"),
    [
        (PARAMS.format("driver"), [("0-71", 480)], "good"),
        (PARAMS.format("numa"), [("0-71", 480), ("", 96)], "slow"),
        (PARAMS.format(""), [("0-71", 480), ("", 96)], "slow"),  # the default of older drivers
        (PARAMS.format(""), [("0-71", 480)], "good"),  # the default since R615
        ("", [("0-71", 480), ("", 96)], "slow"),
        ("", [("0-71", 480), ("", 0)], "good"),  # nodes that the firmware reserves
    ],
)
def test_memory_mode(tmp_path: Path, params: str, nodes: list[tuple[str, int]], verdict: str) -> None:
    found = devices.memory_mode_finding(params, numa_nodes(machines.with_nodes(tmp_path, *nodes)))
    assert found.verdict == verdict
    assert ("NVreg_CoherentGPUMemoryMode=driver" in found.fix) == (verdict == "slow")
    assert ("--membind=0 COMMAND" in found.fix) == (verdict == "slow")


@pytest.mark.parametrize(
    ("filesystems", "mounted", "verdict", "fix"),
    [
        ("nodev\tsysfs\nnodev\tresctrl\n", True, "good", ""),
        ("nodev\tsysfs\nnodev\tresctrl\n", False, "unknown", "$ sudo mount -t resctrl resctrl /sys/fs/resctrl"),
        ("nodev\tsysfs\n", False, "unknown", "Needs a kernel with MPAM"),
    ],
)
def test_mpam(filesystems: str, mounted: bool, verdict: str, fix: str) -> None:
    found = devices.mpam_finding(filesystems, mounted)
    assert (found.verdict, found.fix[: len(fix)]) == (verdict, fix)


def test_only_superchips_are_asked_for_their_memory_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(devices.superchip(machines.around(tmp_path, machines.device()))) == []
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    machines.put(tmp_path, "proc/filesystems", "nodev\tsysfs\n")
    machines.put(tmp_path, devices.PARAMS, PARAMS.format("driver"))
    found = devices.superchip(machines.around(tmp_path, machines.device("NVIDIA GH200 480GB")))
    assert [(line.name, line.verdict) for line in found] == [("memory mode", "good"), ("MPAM", "unknown")]
