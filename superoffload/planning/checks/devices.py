"""Devices: what there is, the link to host memory, what each mode gains on it, and what only superchips have."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from superoffload.planning import nvidia
from superoffload.planning.checks import child
from superoffload.planning.checks.finding import Finding, Surroundings, gb_per_s, size, skipped
from superoffload.planning.machine import Machine, Node, numa_nodes
from superoffload.planning.speed import LINKS

SUPERCHIPS = ("GH200", "GB200", "GB300", "GB10")
# Bytes per second and direction that copies reach of 16 lanes, about 80 % of the raw rate, by generation of PCIe.
PCIE_BYTES_PER_S = {3: 12e9, 4: 25e9, 5: 50e9, 6: 100e9}
COHERENT_BYTES_PER_S = LINKS["c2c"].rate
FAIR_SHARE = 0.6
BUSY_SHARE = 0.9
PARAMS = "proc/driver/nvidia/params"


def devices(around: Surroundings) -> Iterator[Finding]:
    """Check which devices there are, and whether they are free."""
    hidden = around.environment.get("CUDA_VISIBLE_DEVICES")
    try:
        rows = nvidia.query()
    except OSError as error:
        yield Finding(
            name="devices",
            looked_at="nvidia-smi",
            found=str(error),
            verdict="broken",
            fix="The driver does not work. Look at the kernel's messages, and install the driver again or reboot:\n"
            "$ sudo dmesg | grep -i -E 'nvrm|nvidia'",
        )
        return
    if not rows and hidden is None and (present := undriven(around.root)):
        yield Finding(
            name="devices",
            looked_at="/sys/bus/pci/devices, nvidia-smi",
            found=f"{present} from NVIDIA, but no driver: runs would use the CPU",
            verdict="broken",
            fix="Install the driver. In a container, start it with --gpus all.",
        )
        return
    yield devices_finding(around.machine, around.ranks, hidden, rows[0].driver if rows else "")


def undriven(root: Path) -> int:
    """Return the number of NVIDIA's display and 3D controllers on the PCI bus."""
    count = 0
    for folder in (root / "sys/bus/pci/devices").glob("*"):
        with suppress(OSError):
            vendor, kind = ((folder / name).read_text(encoding="utf-8") for name in ("vendor", "class"))
            count += vendor.strip() == "0x10de" and kind.startswith("0x03")
    return count


def devices_finding(machine: Machine, ranks: int, visible: str | None, driver: str) -> Finding:
    """Judge the devices: broken with fewer than ranks, slow if other processes occupy more than a tenth."""
    line = partial(Finding, name="devices", looked_at="nvidia-smi, CUDA_VISIBLE_DEVICES")
    hidden = f"; CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else ""
    if not machine.devices:
        return line(found=f"none: runs use the CPU{hidden}", verdict="good")
    kinds = [f"{machine.devices[0].name}, {size(machine.devices[0].total_bytes)}"]
    if len({device.name for device in machine.devices}) > 1:
        kinds = [f"{device.name}, {size(device.total_bytes)}" for device in machine.devices]
    found = f"{len(machine.devices)} x {' + '.join(kinds)}, driver {driver}{hidden}"
    if len(machine.devices) < ranks:
        return line(
            found=f"{found}; {ranks} ranks need one each",
            verdict="broken",
            fix="Start fewer ranks, or let CUDA_VISIBLE_DEVICES name more devices.",
        )
    busy = [i for i, device in enumerate(machine.devices) if device.free_bytes < BUSY_SHARE * device.total_bytes]
    if busy:
        free = ", ".join(f"{size(machine.devices[i].free_bytes)} free on {i}" for i in busy)
        return line(
            found=f"{found}; other processes use some memory: {free}",
            verdict="slow",
            fix="See which, and end those that are not needed:\n"
            "$ nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv",
        )
    return line(found=found, verdict="good")


def link(around: Surroundings) -> Iterator[Finding]:
    """Measure the link between host and device, and say what each mode gains on it."""
    looked_at = "timed copies, page-locked and pageable, in both directions"
    if not around.has_devices:
        yield Finding(name="device link", looked_at=looked_at, found="no device", verdict="skipped")
    elif around.quick:
        yield skipped("device link", looked_at)
    else:
        outcome = child.run("link")
        if outcome.failure:
            raise RuntimeError(outcome.failure)
        result = outcome.merged()
        arena = result["rates"]["arena, page-locked in place"]
        around.measured["to_device_bytes_per_s"] = arena["to device"]
        around.measured["from_device_bytes_per_s"] = arena["to host"]
        around.measured["device_bf16_flops_per_s"] = result["device_bf16_flops_per_s"]
        yield link_finding(result, nvidia.pcie(), is_superchip(around.machine), looked_at)
    if not around.quick:
        yield modes_finding(around.measured)


def link_finding(result: Mapping[str, Any], pcie: nvidia.Pcie | None, coherent: bool, looked_at: str) -> Finding:
    """Judge the rates of page-locked memory against those of the kind of link."""
    arena, pageable = result["rates"]["arena, page-locked in place"], result["rates"]["pageable"]
    rates = (
        f"to the device {gb_per_s(arena['to device'])} (pageable {gb_per_s(pageable['to device'])}), "
        f"from it {gb_per_s(arena['to host'])} ({gb_per_s(pageable['to host'])})"
    )
    if coherent:
        kind, expected = "coherent (NVLink-C2C)", COHERENT_BYTES_PER_S
    elif pcie is not None and pcie.generation in PCIE_BYTES_PER_S:
        kind = f"PCIe {pcie.generation} x{pcie.width}"
        expected = PCIE_BYTES_PER_S[pcie.generation] * pcie.width / 16
    else:
        kind, expected = "unknown kind", 0.0
    found = f"{kind}: {rates}"
    if not result["locked"]:
        return Finding(
            name="device link",
            looked_at=looked_at,
            found=f"{found}; page-locking failed",
            verdict="slow",
            fix="Allow more locked memory. In a container: --ulimit memlock=-1. Otherwise:\n$ ulimit -l unlimited",
        )
    slow = min(arena.values()) < FAIR_SHARE * expected
    narrow = pcie is not None and not coherent and pcie.width < pcie.widest
    if slow or narrow:
        reason = f"only {pcie.width} of {pcie.widest} lanes in use" if pcie is not None and narrow else ""
        return Finding(
            name="device link",
            looked_at=looked_at,
            found=f"{found}; " + (reason or f"{gb_per_s(expected)} are usual"),
            verdict="slow",
            fix="See whether the device sits in a slot with all lanes, and whether its NUMA node is that of the cores "
            "(`device locality`):\n$ nvidia-smi topo -m",
        )
    return Finding(name="device link", looked_at=looked_at, found=found, verdict="good")


def modes_finding(measured: Mapping[str, float]) -> Finding:
    """Say what a step of each mode pays per billion parameters on the host, from the measured rates."""
    line = partial(Finding, name="modes", looked_at="the measured rates")
    if "adam_parameters_per_s" not in measured:
        return line(found="Adam was not measured", verdict="skipped")
    adam_s = 1e9 / measured["adam_parameters_per_s"]
    text = f"per billion parameters on the host, Adam takes {adam_s:.2f} s"
    if "to_device_bytes_per_s" in measured:
        # fp32 gradients come from the device, bf16 weights return to it.
        copies_s = 4e9 / measured["from_device_bytes_per_s"] + 2e9 / measured["to_device_bytes_per_s"]
        text += f" and copies {copies_s:.2f} s"
    text += ": added to each step by zerooffload; superoffload overlaps Adam with backward and the next forward"
    return line(found=text, verdict="good")


def is_superchip(machine: Machine, architecture: str | None = None) -> bool:
    """Return whether host and device share coherent memory: an ARM host with a device of such a chip."""
    names = [device.name for device in machine.devices]
    arm = (architecture or platform.machine()) == "aarch64"
    return arm and any(chip in name for name in names for chip in SUPERCHIPS)


def superchip(around: Surroundings) -> Iterator[Finding]:
    """Check the driver's memory mode and MPAM, on a superchip only."""
    if not is_superchip(around.machine):
        return
    params = around.root / PARAMS
    text = params.read_text(encoding="utf-8") if params.is_file() else ""
    yield memory_mode_finding(text, numa_nodes(around.root))
    yield mpam_finding(
        (around.root / "proc/filesystems").read_text(encoding="utf-8"),
        (around.root / "sys/fs/resctrl/schemata").is_file(),
    )


def memory_mode_finding(params: str, nodes: Sequence[Node]) -> Finding:
    """Judge who manages the memory of the device: the kernel may place pages of the host there, the driver does not.

    Up to driver R610 the kernel does by default. Its nodes of device memory have memory and no cores.
    """
    lines = [line.partition(":") for line in params.splitlines()]
    mode = next((value.strip().strip('"') for key, _, value in lines if key == "CoherentGPUMemoryMode"), "")
    of_devices = [node.number for node in nodes if not node.cores and node.total_bytes]
    managed = mode == "driver" or (not of_devices and mode != "numa")
    shown = f"CoherentGPUMemoryMode is {mode or 'not set'}"
    return Finding(
        name="memory mode",
        looked_at=f"/{PARAMS}, NUMA nodes",
        found=f"{shown}: the driver manages device memory"
        if managed
        else f"{shown}: pages of the host may be placed on the device (NUMA nodes {of_devices}) and take its memory",
        verdict="good" if managed else "slow",
        fix=""
        if managed
        else "Let the driver manage it, then reboot:\n$ echo options nvidia NVreg_CoherentGPUMemoryMode=driver | "
        "sudo tee /etc/modprobe.d/nvidia-memory.conf\nUntil then, keep the host's pages on its own nodes:\n"
        f"$ numactl --membind={','.join(str(node.number) for node in nodes if node.cores)} COMMAND",
    )


def mpam_finding(filesystems: str, mounted: bool) -> Finding:
    """Say whether memory traffic of processor and device can be partitioned; no effect has been measured here."""
    supported = "resctrl" in filesystems.split()
    if mounted:
        found = "resctrl is mounted"
    else:
        found = "resctrl is not mounted" if supported else "the kernel has no resctrl (MPAM is not enabled)"
    return Finding(
        name="MPAM",
        looked_at="/proc/filesystems, /sys/fs/resctrl",
        found=f"{found}; DeepSpeed recommends MPAM on Grace, the effect has not been measured",
        verdict="good" if mounted else "unknown",
        fix=""
        if mounted
        else "$ sudo mount -t resctrl resctrl /sys/fs/resctrl"
        if supported
        else "Needs a kernel with MPAM, such as NVIDIA's for Grace.",
    )
