"""What a bug report needs: versions, the machine, and the variables that matter, without secrets."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from superoffload.planning import nvidia
from superoffload.planning.checks.finding import public, size
from superoffload.planning.checks.software import installed_version, requirements
from superoffload.planning.machine import look

Report = dict[str, dict[str, str]]

OPTIONAL = ("flash-attn", "triton", "kernels", "trl")
PREFIXES = (
    "ACCELERATE_", "CUBLAS_", "CUDA_", "DEEPSPEED_", "DS_", "GOMP_", "HF_", "KMP_", "MASTER_", "MKL_", "NCCL_",
    "NVIDIA_", "OMP_", "PYTORCH_", "SLURM_JOB_", "TOKENIZERS_", "TORCH_", "TRANSFORMERS_", "WANDB_",
)  # fmt: skip
NAMES = ("CC", "CXX", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE")
SECRET = re.compile(r"TOKEN(?!IZERS_)|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|HEADER|USER|EMAIL|ACCOUNT", re.I)
_CHECKOUT = Path(__file__).resolve().parents[2]


def collect() -> Report:
    """Return the report by section. What cannot be found out says why; nothing raises for it."""
    return {
        "superoffload": {"version": installed_version("superoffload") or "not installed", "commit": commit(_CHECKOUT)},
        "packages": packages(),
        "torch": torch_build(),
        "machine": machine(),
        "variables": variables(os.environ),
    }


def of_run() -> Report:
    """Return the part of the report that `run.json` keeps: nothing of it is a variable or a path of this machine."""
    found = {name: version for name, version in packages().items() if version != "not installed"}
    return {
        "superoffload": {"version": installed_version("superoffload") or "not installed", "commit": commit(_CHECKOUT)},
        "machine": machine(),
        "packages": {**found, "Python": platform.python_version()},
    }


def commit(folder: Path) -> str:
    """Return the commit that is checked out, and whether files differ from it; says so if there is none."""
    if not (folder / ".git").exists():  # an installed package may be inside a checkout of something else
        return "not a checkout"
    try:
        text = nvidia.run("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except OSError as error:
        return str(error)
    return text.strip()


def packages() -> dict[str, str]:
    """Return the version of Python and of every package that this one requires or can use."""
    names = [*(need.name for need in requirements()), *OPTIONAL]
    found = {name: installed_version(name) or "not installed" for name in names}
    return {"Python": f"{platform.python_version()} ({public(sys.executable)})", **found}


def torch_build() -> dict[str, str]:
    """Return what torch was built for, and the tools that compile operators."""
    import torch

    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {
        "CUDA": torch.version.cuda or "none",
        "cuDNN": str(cudnn or "none"),
        "sees a device": str(torch.cuda.is_available()),
        "threads": str(torch.get_num_threads()),
        "compiler": _first_line(*shlex.split(os.environ.get("CXX", "")) or ["c++"], "--version"),
        "nvcc": _last_line("nvcc", "--version"),
    }


def machine() -> dict[str, str]:
    """Return the system, the processor, memory and devices."""
    found = look()
    try:
        rows = nvidia.query()
        devices = ", ".join(f"{row.name} ({size(row.total_bytes or 0)})" for row in rows) or "none"
        driver = rows[0].driver if rows else "none"
    except OSError as error:
        devices, driver = "unknown", str(error)
    return {
        "system": f"{_system()}, {platform.platform()}",
        "processor": processor(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        "cores": f"{found.cores} usable of {os.cpu_count()}, {found.numa_nodes} NUMA nodes",
        "host memory": f"{size(found.host_bytes)}, {size(found.host_available_bytes)} available",
        "/dev/shm": f"{size(found.shm_bytes)}, {size(found.shm_free_bytes)} free",
        "devices": devices,
        "driver": driver,
    }


def processor(cpuinfo: str) -> str:
    """Return the name of the processor and its vector instructions, from /proc/cpuinfo."""
    values = dict(
        (key.strip(), value.strip())
        for key, separator, value in (line.partition(":") for line in cpuinfo.splitlines())
        if separator
    )
    flags = {*values.get("flags", "").split(), *values.get("Features", "").split()}
    vectors = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "sve2") if name in flags]
    name = values.get("model name") or values.get("CPU part") or platform.machine()
    return f"{name} ({', '.join(vectors) or 'no vector instructions known'})"


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that change a run, sorted; those that may be secret or name a person are not shown."""
    chosen = {name: value for name, value in environment.items() if name.startswith(PREFIXES) or name in NAMES}
    return {name: "set, not shown" if SECRET.search(name) else public(chosen[name]) for name in sorted(chosen)}


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def _first_line(*command: str) -> str:
    return _output(*command)[0]


def _last_line(*command: str) -> str:
    return _output(*command)[-1]


def _output(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return ["none"]
    try:
        return nvidia.run(*command).strip().splitlines() or ["no output"]
    except (OSError, subprocess.SubprocessError) as error:
        return [str(error)]


def lines(report: Report) -> list[str]:
    """Return the report as text, to paste into an issue."""
    shown = []
    for section, values in report.items():
        width = max(map(len, values), default=0)
        shown += ["", section, *(f"  {name:{width}}  {value}" for name, value in values.items())]
    return shown[1:]
