"""Versions of packages, CUDA, and the attention kernels."""

import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from superoffload.planning import nvidia
from superoffload.planning.checks import child
from superoffload.planning.checks.finding import Finding, Surroundings, pip

DRIVER, TOOLKIT = r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", r"release (\d+\.\d+)"  # nvidia-smi, nvcc
SHOWN = ("torch", "deepspeed", "transformers")
_CHECKOUT = Path(__file__).resolve().parents[3]
_PYPROJECT, _CONSTRAINTS = _CHECKOUT / "pyproject.toml", _CHECKOUT / "scripts/constraints.txt"


def versions(_: Surroundings) -> Iterator[Finding]:
    """Check the installed packages against what this one requires, and DeepSpeed against the tested versions."""
    yield versions_finding(requirements(), installed_version, tested_versions())
    yield deepspeed_finding()


def requirements(pyproject: Path = _PYPROJECT) -> list[Requirement]:
    """Return what the package requires: from pyproject.toml in a checkout, else from the installed package."""
    if pyproject.is_file():
        lines = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = metadata.requires("superoffload") or []
    found = [Requirement(line) for line in lines]
    return [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tested_versions(constraints: Path = _CONSTRAINTS) -> dict[str, str]:
    """Return the versions that a checkout is tested with, by package; empty outside a checkout."""
    lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.is_file() else []
    return {name: version for name, equal, version in (line.partition("==") for line in lines) if equal}


def versions_finding(
    needs: Sequence[Requirement], version_of: Callable[[str], str | None], tested: Mapping[str, str]
) -> Finding:
    """Judge installed versions: broken if a package is missing or outside its range."""
    wrong = []
    for need in needs:
        version = version_of(need.name)
        if version is None:
            wrong.append((f"{need.name} is missing", need))
        elif not need.specifier.contains(version, prereleases=True):
            wrong.append((f"{need.name} is {version}, needs {need.specifier}", need))
    python = ".".join(map(str, sys.version_info[:3]))
    good = ", ".join([f"Python {python}", *(_with_tested(name, version_of(name), tested.get(name)) for name in SHOWN)])
    packages = " ".join(f"'{need.name}{need.specifier}'" for _, need in wrong)
    return Finding(
        name="versions",
        looked_at="installed packages, pyproject.toml",
        found="; ".join(what for what, _ in wrong) or good,
        verdict="broken" if wrong else "good",
        fix=pip(f"install {packages}") if wrong else "",
    )


def _with_tested(name: str, version: str | None, tested: str | None) -> str:
    """Return a package's version, and the tested one if it is another; builds of torch (+cpu) do not differ."""
    same = tested is None or (version or "").partition("+")[0] == tested.partition("+")[0]
    return f"{name} {version}" if same else f"{name} {version} (tested: {tested})"


def deepspeed_finding() -> Finding:
    """Judge DeepSpeed by the private names that SuperOffload depends on: slow if a run would fall back."""
    from superoffload.offload import install
    from superoffload.offload.zero3.contract import TESTED_VERSIONS

    version, tested = metadata.version("deepspeed"), ", ".join(TESTED_VERSIONS)
    problem = install.environment_problem()
    known = version.split("+")[0] in TESTED_VERSIONS
    note = "tested" if known else f"not tested (tested: {tested}), but all that SuperOffload uses is there"
    return Finding(
        name="DeepSpeed",
        looked_at="its source, for the private names in use",
        found=f"the mode superoffload falls back to zerooffload: {problem}" if problem else f"{version}, {note}",
        verdict="slow" if problem else "good",
        fix=pip(f"install deepspeed=={TESTED_VERSIONS[-1]}") if problem else "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuda:
    """Versions of CUDA: what torch was built for, the newest that the driver takes, and the compiler's (nvcc).

    None: torch without CUDA, no driver, no nvcc. usable: torch sees a device.
    """

    torch: str | None
    driver: str | None
    toolkit: str | None
    devices: int
    usable: bool


def cuda(around: Surroundings) -> Iterator[Finding]:
    """Check that the driver, torch's CUDA and the toolkit that compiles operators match."""
    import torch

    if torch.version.hip:
        found = f"torch for ROCm {torch.version.hip}, which has not been tested"
        yield Finding(name="CUDA", looked_at="torch", found=found, verdict="unknown")
        return
    driver = toolkit = None
    if around.has_devices and nvidia.is_installed():
        driver = release(nvidia.run("nvidia-smi"), DRIVER)
    if shutil.which("nvcc"):
        toolkit = release(nvidia.run("nvcc", "--version"), TOOLKIT)
    versions = Cuda(
        torch=torch.version.cuda,
        driver=driver,
        toolkit=toolkit,
        devices=len(around.machine.devices),
        usable=around.has_devices and torch.cuda.is_available(),
    )
    yield cuda_finding(versions)


def release(text: str, pattern: str) -> str | None:
    """Return the version in the output of a program."""
    found = re.search(pattern, text)
    return found[1] if found else None


def cuda_finding(versions: Cuda) -> Finding:
    """Judge the versions. DeepSpeed compiles with a toolkit of torch's major version only (op_builder/builder.py)."""
    line = partial(Finding, name="CUDA", looked_at="torch, nvidia-smi, nvcc")
    built = f"torch for CUDA {versions.torch}" if versions.torch else "torch without CUDA"
    if not versions.devices:
        return line(found=f"{built}; no device to use it on", verdict="good")
    found = f"{built}, driver up to {versions.driver or '?'}, nvcc {versions.toolkit or 'missing'}"
    verdict_and_fix = _cuda_problem(versions)
    if verdict_and_fix is None:
        return line(found=found, verdict="good")
    return line(found=found, verdict="broken", fix=verdict_and_fix)


def _cuda_problem(versions: Cuda) -> str | None:
    """Return the fix for what does not match; None if all does. A missing nvcc shows when operators are compiled."""
    if versions.torch is None:
        return "Install a torch that is built for CUDA; see `Get started` on pytorch.org."
    if versions.driver and _major(versions.driver) < _major(versions.torch):
        return f"Update the driver, or install a torch that is built for CUDA {_major(versions.driver)}."
    if not versions.usable:
        return "torch sees no device, nvidia-smi does. Look at the error of:\n" + (
            f'$ {sys.executable} -c "import torch; torch.cuda.init()"'
        )
    if versions.toolkit and _major(versions.toolkit) != _major(versions.torch):
        return (
            f"Install the CUDA toolkit {versions.torch} and let CUDA_HOME point to it, or, if operators compile all "
            "the same:\n$ export DS_SKIP_CUDA_CHECK=1"
        )
    return None


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def attention(around: Surroundings) -> Iterator[Finding]:
    """Check which attention kernel a run on a device would use."""
    if not around.has_devices:
        yield Finding(
            name="attention",
            looked_at="flash_attn, torch",
            found="sdpa, document by document: without a GPU there is no other",
            verdict="good",
        )
        return
    outcome = child.run("attention")
    trial = outcome.merged()
    if outcome.failure or "varlen" not in trial:
        raise RuntimeError(outcome.failure or "no result")
    yield attention_finding(find_spec("flash_attn") is not None, trial.get("flash"), trial["varlen"])


def attention_finding(has_flash: bool, flash_problem: str | None, varlen_problem: str | None) -> Finding:
    """Judge attention kernels: broken if flash-attn is installed and fails, slow without any kernel for packs."""
    line = partial(Finding, name="attention", looked_at="flash_attn, torch's varlen_attn")
    if has_flash and flash_problem:
        return line(
            found=f"flash-attn is installed, but cannot be loaded: {flash_problem}",
            verdict="broken",
            fix="Build it for the installed torch, or remove it; torch has a kernel of its own:\n"
            + pip("uninstall flash-attn"),
        )
    if has_flash:
        return line(found="flash-attn", verdict="good")
    if varlen_problem is None:
        return line(found="torch's varlen_attn, for bf16 packs", verdict="good")
    return line(
        found=f"sdpa, one document at a time: {varlen_problem}",
        verdict="slow",
        fix="Install torch 2.10 or newer, or flash-attn:\n" + pip("install flash-attn"),
    )
