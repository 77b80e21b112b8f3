"""What nvidia-smi says about the devices. It creates no context on them, which torch would do."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

TIMEOUT_S = 30.0
FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "mig.mode.current", "driver_version")
_BY_TORCH = (
    "import torch\n"
    "for i in range(torch.cuda.device_count()):\n"
    "    free, total = torch.cuda.mem_get_info(i)\n"
    "    print(i, '', torch.cuda.get_device_name(i), total / 2**20, free / 2**20, 'Disabled', '', sep=', ')\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One device, as nvidia-smi lists it; bytes are None where it reports none: memory shared with the host."""

    index: str
    uuid: str
    name: str
    total_bytes: int | None
    free_bytes: int | None
    mig: bool
    driver: str


def parse(text: str) -> list[Row]:
    """Read the output of nvidia-smi for FIELDS, as CSV without header and units (MiB)."""
    rows = []
    for values in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(values) == len(FIELDS):
            index, uuid, name, total, free, mig, driver = values
            rows.append(
                Row(
                    index=index,
                    uuid=uuid,
                    name=name,
                    total_bytes=_mib(total),
                    free_bytes=_mib(free),
                    mig=mig == "Enabled",
                    driver=driver,
                )
            )
    return rows


def _mib(text: str) -> int | None:
    try:
        return int(float(text) * 2**20)
    except ValueError:  # [N/A]
        return None


def visible(rows: Sequence[Row], variable: str | None) -> list[Row]:
    """Return the devices that a program may use, in its order; `variable` is CUDA_VISIBLE_DEVICES, None if unset.

    As CUDA does, take indices or prefixes of UUIDs, and ignore all that follows an unknown one.
    """
    if variable is None:
        return list(rows)
    chosen: list[Row] = []
    for name in (part.strip() for part in variable.split(",")):
        by_index = [row for row in rows if row.index == name]
        by_uuid = [row for row in rows if name.startswith("GPU-") and row.uuid.startswith(name)]
        if len(by_index + by_uuid) != 1:
            break
        chosen += by_index + by_uuid
    return chosen


def is_installed() -> bool:
    """Return whether there is nvidia-smi; devices without it are those that torch sees by itself."""
    return shutil.which("nvidia-smi") is not None


def query() -> list[Row]:
    """Return the devices that this process may use; empty without a device. Raises OSError if the driver fails."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is not None and not variable.strip():
        return []
    try:
        everything = parse(run("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"))
    except FileNotFoundError:
        return _by_torch() if _has_device_files() else []
    # A slice of a device has a memory of its own, which this query does not list.
    if any(row.mig for row in everything) or (variable or "").startswith("MIG-"):
        return _by_torch()
    return visible(everything, variable)


def run(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """Return what a program prints. Raises OSError with the first line of its message if it fails or hangs."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} did not answer within {timeout_s:.0f} s") from error
    if result.returncode:
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        raise OSError(f"{command[0]} failed: {lines[0].strip() if lines else f'status {result.returncode}'}")
    return result.stdout


def _has_device_files() -> bool:
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd")


def _by_torch() -> list[Row]:
    """Ask torch, in a process of its own, whose contexts on the devices end with it."""
    return parse(run(sys.executable, "-P", "-c", _BY_TORCH, timeout_s=120.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pcie:
    """A device's link: the generation that device and slot share, the lanes in use, and those that the device has."""

    generation: int
    width: int
    widest: int


def pcie() -> Pcie | None:
    """Return the link of the first device; None if it is not on PCIe. Raises OSError if the driver fails."""
    rows = query()
    if not is_installed() or not rows:
        return None
    fields = "pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max"
    return parse_pcie(
        run("nvidia-smi", f"--id={rows[0].index}", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    )


def parse_pcie(text: str) -> Pcie | None:
    """Read the three numbers that `pcie` asks for."""
    numbers = text.strip().split(",")
    if len(numbers) != 3 or not all(number.strip().isdecimal() for number in numbers):
        return None
    generation, width, widest = map(int, numbers)
    return Pcie(generation=generation, width=width, widest=widest)


def bus_ids() -> list[str]:
    """Return the PCI address of each device that this process may use; empty if nvidia-smi does not list them."""
    if not is_installed():
        return []
    rows = run("nvidia-smi", "--query-gpu=uuid,pci.bus_id", "--format=csv,noheader").splitlines()
    addresses = dict(row.replace(" ", "").split(",", 1) for row in rows if row.strip())
    return [addresses[row.uuid] for row in query() if row.uuid in addresses]
