"""What the machine has, and what it lacks for the measurements.

Run as a program, prints the description as JSON: a process that asks CUDA keeps a context, about 0.5 GiB of device
memory, for as long as it lives.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GIB = 2**30
PACKAGES = ("deepspeed", "transformers", "pytest", "pytest-timeout")
DEVICE_GIB = 40
DISK_GIB = 25  # random weights of 1 and 3 billion parameters in bf16, and what the runs write


def describe() -> dict[str, Any]:
    """Return the devices, cores, memory and versions; the device's name is empty without CUDA."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    return {
        "device": torch.cuda.get_device_name() if cuda else "",
        "devices": torch.cuda.device_count() if cuda else 0,
        "capability": list(torch.cuda.get_device_capability()) if cuda else [],
        "device_gib": total / GIB,
        "device_free_gib": free / GIB,
        "cores": os.cpu_count(),
        "host_gib": psutil.virtual_memory().available / GIB,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in PACKAGES},
        "liger": importlib.util.find_spec("liger_kernel") is not None,
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def problems(machine: Mapping[str, Any], work: Path, rehearse: bool) -> list[str]:
    """List what prevents every measurement, one line each."""
    compiler = os.environ.get("CXX", "c++")
    found = []
    if not rehearse and not machine["device"]:
        found.append(
            "no CUDA device: torch.cuda.is_available() is false (--rehearse runs everything small, on the CPU)"
        )
    elif not rehearse and machine["capability"] < [8, 0]:
        found.append(f"{machine['device']} has no bf16: compute capability {machine['capability']} is below 8.0")
    if shutil.which(compiler) is None:
        found.append(
            f"no C++ compiler: {compiler} is not on PATH, and the operators are compiled; install one, or set CXX"
        )
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        found.append("no ninja: `pip install ninja`")
    found += [f"no {name}: `pip install {name}`" for name in PACKAGES if not machine[name]]
    free = shutil.disk_usage(work).free / GIB
    if not rehearse and free < DISK_GIB:
        found.append(f"{free:.0f} GiB free in {work}, {DISK_GIB} are needed: choose another folder with --work")
    return found


if __name__ == "__main__":
    print(json.dumps(describe()))
