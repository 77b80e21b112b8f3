import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from superoffload.offload import install
from superoffload.planning.checks import software
from superoffload.planning.checks.child import Outcome
from superoffload.planning.checks.software import Cuda
from tests.helpers import machines

pytestmark = pytest.mark.unit

NEEDS = [Requirement("torch>=2.8"), Requirement("deepspeed>=0.19.8,<0.20")]


@pytest.mark.parametrize(
    ("torch", "deepspeed", "text", "packages"),
    [
        ("2.13.0+cpu", "0.19.9", "torch 2.13.0+cpu, deepspeed 0.19.9", None),
        ("2.7.1", "0.19.8", "torch is 2.7.1, needs >=2.8", "'torch>=2.8'"),
        ("2.8.0", "0.20.1", "deepspeed is 0.20.1, needs <0.20,>=0.19.8", "'deepspeed<0.20,>=0.19.8'"),
        ("2.8.0", None, "deepspeed is missing", "'deepspeed<0.20,>=0.19.8'"),
        (None, None, "torch is missing; deepspeed is missing", "'torch>=2.8' 'deepspeed<0.20,>=0.19.8'"),
    ],
)
def test_versions(torch: str | None, deepspeed: str | None, text: str, packages: str | None) -> None:
    versions = {"torch": torch, "deepspeed": deepspeed}
    found = software.versions_finding(NEEDS, versions.get, {})
    assert found.verdict == ("broken" if packages else "good")
    assert text in found.found
    assert found.fix == (f"$ {sys.executable} -m pip install {packages}" if packages else "")


def test_the_requirements_are_those_of_the_project(tmp_path: Path) -> None:
    names = [need.name for need in software.requirements()]
    assert {"torch", "deepspeed", "transformers"} <= set(names)
    assert "pytest" not in names
    installed = {need.name for need in software.requirements(tmp_path / "pyproject.toml")}  # not a checkout
    assert {"torch", "deepspeed", "transformers"} <= installed
    assert "pytest" not in installed


def test_the_tested_versions_are_shown_beside_others() -> None:
    tested = software.tested_versions()
    assert set(software.SHOWN) <= set(tested)
    installed = {"torch": f"{tested['torch']}+cu130", "deepspeed": "0.19.9", "transformers": tested["transformers"]}
    found = software.versions_finding(NEEDS, installed.get, tested)
    assert f"torch {tested['torch']}+cu130, deepspeed 0.19.9 (tested: {tested['deepspeed']})," in found.found
    assert found.found.count("tested") == 1


def test_this_environment_is_good(tmp_path: Path) -> None:
    assert [found.verdict for found in software.versions(machines.around(tmp_path))] == ["good", "good"]


def test_a_deepspeed_that_runs_would_fall_back_on_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "environment_problem", lambda: "DeepSpeed 0.19.9 differs: step is missing")
    found = software.deepspeed_finding()
    assert found.verdict == "slow"
    assert "falls back to zerooffload: DeepSpeed 0.19.9 differs: step is missing" in found.found
    assert "pip install deepspeed==0.19.8" in found.fix


def test_a_deepspeed_that_is_not_tested_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("superoffload.offload.zero3.contract.TESTED_VERSIONS", ("0.19.7",))
    found = software.deepspeed_finding()
    assert (found.verdict, "not tested (tested: 0.19.7)" in found.found) == ("good", True)


def versions(
    torch: str | None, driver: str | None, toolkit: str | None, *, devices: int = 1, usable: bool = True
) -> Cuda:
    return Cuda(torch=torch, driver=driver, toolkit=toolkit, devices=devices, usable=usable)


@pytest.mark.parametrize(
    ("seen", "verdict", "fix"),
    [
        (versions(None, None, None, devices=0), "good", ""),
        (versions("12.8", None, None, devices=0), "good", ""),
        (versions("12.8", "12.8", "12.8"), "good", ""),
        (versions("12.8", "12.4", "12.6"), "good", ""),  # minor versions are compatible
        (versions("12.8", "13.0", None), "good", ""),
        (versions(None, "12.8", "12.8", usable=False), "broken", "Install a torch that is built for CUDA"),
        (versions("13.0", "12.8", "13.0", usable=False), "broken", "Update the driver, or install a torch that is"),
        (versions("12.8", "12.8", "12.8", usable=False), "broken", "torch sees no device"),
        (versions("12.8", "13.0", "13.0"), "broken", "Install the CUDA toolkit 12.8"),
    ],
)
def test_cuda(seen: Cuda, verdict: str, fix: str) -> None:
    found = software.cuda_finding(seen)
    assert (found.verdict, found.fix[: len(fix)], bool(found.fix)) == (verdict, fix, bool(fix))


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |", software.DRIVER, "12.4"),
        ("| NVIDIA-SMI 595.1  KMD Version: 595.1  CUDA UMD Version: 13.2 |", software.DRIVER, "13.2"),
        ("No devices were found", software.DRIVER, None),
        ("Cuda compilation tools, release 13.0, V13.0.88", software.TOOLKIT, "13.0"),
    ],
)
def test_versions_are_found_in_what_programs_print(text: str, pattern: str, expected: str | None) -> None:
    assert software.release(text, pattern) == expected


@pytest.mark.parametrize(
    ("flash", "flash_problem", "varlen_problem", "verdict", "text"),
    [
        (True, None, "torch 2.8 has no varlen_attn", "good", "flash-attn"),
        (True, "undefined symbol: _ZN3c10", None, "broken", "cannot be loaded: undefined symbol: _ZN3c10"),
        (False, "No module named 'flash_attn'", None, "good", "torch's varlen_attn"),
        (False, None, "torch 2.8 has no varlen_attn", "slow", "one document at a time: torch 2.8 has no varlen_attn"),
    ],
)
def test_attention(flash: bool, flash_problem: str | None, varlen_problem: str | None, verdict: str, text: str) -> None:
    found = software.attention_finding(flash, flash_problem, varlen_problem)
    assert (found.verdict, bool(found.fix)) == (verdict, verdict != "good")
    assert text in found.found


def test_attention_is_tried_on_a_device_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = software.attention(machines.around(tmp_path))
    assert "without a GPU" in found.found
    outcome = Outcome(results=[{"flash": "No module named 'flash_attn'"}, {"varlen": "no"}], failure=None)
    monkeypatch.setattr("superoffload.planning.checks.child.run", lambda part: outcome)
    (found,) = software.attention(machines.around(tmp_path, machines.device()))
    assert found.verdict == "slow"
    dead = Outcome(results=[], failure="killed by SIGSEGV")
    monkeypatch.setattr("superoffload.planning.checks.child.run", lambda part: dead)
    with pytest.raises(RuntimeError, match="SIGSEGV"):
        list(software.attention(machines.around(tmp_path, machines.device())))
