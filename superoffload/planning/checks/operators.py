"""Compiled operators: the compiler, whether each operator builds and loads now, and how fast Adam is."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from superoffload.errors import first_line
from superoffload.planning import nvidia
from superoffload.planning.checks import child
from superoffload.planning.checks.child import Outcome
from superoffload.planning.checks.finding import Finding, Surroundings, gb_per_s, pip, skipped

ADAM_BYTES = 28
"""Memory traffic of a step for each parameter in fp32: parameter, gradient and moments are read, all but the gradient
are written (deepspeed/csrc/adam/cpu_adam_impl.cpp)."""
FAIR_SHARE = 0.5
"""Of the bandwidth of a copy; Adam also computes, so it does not reach all of it."""
NEEDED = {
    "cpu_adam": "so runs cannot start",
    "deepspeed_shm_comm": "so ranks on CPUs cannot communicate",
    "superoffload_fused": "so Adam takes longer",
}
_ERROR = re.compile(r"error[: ]|undefined (reference|symbol)|cannot find|not found|No such file|No space left", re.I)


def compiler(around: Surroundings) -> Iterator[Finding]:
    """Check that there are a C++ compiler and ninja."""
    name = around.environment.get("CXX", "c++")
    command = shlex.split(name) or [""]  # such as "ccache g++"
    version = None
    if shutil.which(command[0]):
        try:
            version = nvidia.run(*command, "--version").splitlines()[0]
        except (OSError, IndexError) as error:
            yield Finding(
                name="compiler",
                looked_at="CXX, PATH",
                found=f"{name} does not say its version: {first_line(error)}",
                verdict="broken",
                fix="Let CXX name a compiler that works, or remove the variable:\n$ unset CXX",
            )
            return
    # torch looks on PATH, where operators.prepare() puts this environment's programs.
    beside = Path(sys.executable).parent / "ninja"
    yield compiler_finding(name, version, str(beside) if beside.exists() else shutil.which("ninja"))


def compiler_finding(name: str, version: str | None, ninja: str | None) -> Finding:
    """Judge the tools that compile operators: broken if one is missing."""
    missing = [tool for tool, found in ((f"the C++ compiler {name}", version), ("ninja", ninja)) if not found]
    fixes = []
    if not version:
        fixes += ["Install a compiler, or let CXX name one:", "$ sudo apt-get install g++"]
    if not ninja:
        fixes += [pip("install ninja")]
    return Finding(
        name="compiler",
        looked_at="CXX, PATH",
        found=f"{' and '.join(missing)} not found" if missing else f"{version}",
        verdict="broken" if missing else "good",
        fix="\n".join(fixes),
    )


def operators(around: Surroundings) -> Iterator[Finding]:
    """Compile and load every operator, in a process of its own; time a step of Adam if that one works."""
    looked_at = "compiled and loaded now"
    if around.quick:
        yield skipped("operators", looked_at)
        yield skipped("Adam", "one timed step")
        return
    found = list(operator_findings(child.run("operators"), looked_at))
    yield from found
    if any(finding.verdict == "broken" and finding.found.startswith("cpu_adam") for finding in found):
        yield Finding(
            name="Adam", looked_at="one timed step", found="cannot be measured without cpu_adam", verdict="skipped"
        )
        return
    outcome = child.run("adam", {"OMP_NUM_THREADS": str(around.machine.cores)})
    if outcome.failure:
        yield Finding(
            name="Adam",
            looked_at="one timed step",
            found=f"fails: {outcome.failure}",
            verdict="broken",
            fix=_fix(outcome.failure, "cpu_adam"),
        )
        return
    around.measured.update(outcome.merged())
    yield adam_finding(around.measured, around.machine.cores)


def operator_findings(outcome: Outcome, looked_at: str) -> Iterator[Finding]:
    """Judge each operator; one that was started and never reported has ended the process."""
    started = [result["started"] for result in outcome.results if "started" in result]
    ended: dict[str, Any] = {result["operator"]: result["error"] for result in outcome.results if "operator" in result}
    if outcome.failure and not set(started) - set(ended):
        raise RuntimeError(outcome.failure)
    for name in started:
        error = ended[name] if name in ended else f"its process ended: {outcome.failure}"
        if error is None:
            yield Finding(name="operator", looked_at=looked_at, found=f"{name} builds and loads", verdict="good")
            continue
        yield Finding(
            name="operator",
            looked_at=looked_at,
            found=f"{name} fails, {NEEDED[name]}: {compiler_error(error)}",
            verdict="slow" if name == "superoffload_fused" else "broken",
            fix=_fix(error, name),
        )


def compiler_error(text: str) -> str:
    """Return the first line of a failed build in which a compiler, linker or loader says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # The first line is torch's and names the extension; lines of ninja repeat the command.
    telling = [line for line in lines[1:] if _ERROR.search(line) and not line.startswith(("FAILED", "[", "/bin/sh -c"))]
    return (telling or lines or ["no message"])[0]


def _fix(error: str, name: str) -> str:
    if "No space left" in error:
        return "Free some space, or let TORCH_EXTENSIONS_DIR name a folder with more."
    if error.startswith("[Errno"):  # Python's own: the folder cannot be created or written to
        return "Let TORCH_EXTENSIONS_DIR name a folder that can be written to."
    if "Python.h" in error:
        return "Install the headers of Python:\n$ sudo apt-get install python3-dev"
    if "SIGILL" in error:
        from superoffload.offload import operators as compiled

        folder = shlex.quote(str(compiled.folder() / name))
        return f"It was compiled for another processor; remove it, and it is compiled again:\n$ rm -r {folder}"
    return "The compiler's whole output:\n" + f"$ {sys.executable} -m {child.MODULE} operators"


def adam_finding(measured: Mapping[str, float], cores: int) -> Finding:
    """Judge Adam's bandwidth: slow below half of that of a copy on the same cores."""
    rate = measured["adam_parameters_per_s"]
    reached, copied = rate * ADAM_BYTES, 2 * measured["host_copy_bytes_per_s"]
    share = reached / copied
    found = (
        f"{rate / 1e9:.2f} billion parameters/s on {cores} cores: {gb_per_s(reached)}, a copy reaches "
        f"{gb_per_s(copied)}"
    )
    return Finding(
        name="Adam",
        looked_at="one timed step",
        found=found,
        verdict="good" if share >= FAIR_SHARE else "slow",
        fix=""
        if share >= FAIR_SHARE
        else f"Adam reaches {share:.0%} of a copy's bandwidth. See whether other processes use the cores, and whether "
        "the processor has AVX2, AVX-512 or SVE:\n$ lscpu; uptime",
    )
