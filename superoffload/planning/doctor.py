"""Check the machine for what would break or slow a run, and say what to do.

Each check stands alone: one that fails unexpectedly is a finding of its own and ends no other.
"""

import contextlib
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from superoffload.errors import FAILURES, first_line
from superoffload.planning import machine
from superoffload.planning.checks import cores, devices, memory, network, operators, software, storage
from superoffload.planning.checks.finding import Check, Finding, Surroundings, Verdict
from superoffload.planning.machine import Machine, Rates

CHECKS: Mapping[str, Check] = {
    "versions": software.versions,
    "devices": devices.devices,
    "CUDA": software.cuda,
    "superchip": devices.superchip,
    "host memory": memory.host_memory,
    "cores": cores.cores,
    "shared memory": memory.shared_memory,
    "leftovers": memory.leftovers,
    "huge pages": memory.huge_pages,
    "locked memory": memory.locked_memory,
    "open files": memory.open_files,
    "compiler": operators.compiler,
    "operators": operators.operators,
    "device link": devices.link,
    "attention": software.attention,
    "disk": storage.disk,
    "hub": network.hub,
    "W&B": network.wandb,
}
COLOURS: Mapping[Verdict, int] = {"good": 32, "slow": 33, "broken": 31, "unknown": 36, "skipped": 90}
_NAME_WIDTH, _VERDICT_WIDTH = 16, 8


def surroundings(ranks: int | None, output_dir: Path, *, quick: bool) -> Surroundings:
    """Look at this machine; `ranks` is by default the number of devices, or 1 without any."""
    seen = machine.look()
    return Surroundings(
        machine=seen,
        ranks=ranks or len(seen.devices) or 1,
        output_dir=output_dir,
        quick=quick,
        root=Path("/"),
        environment=os.environ,
    )


def examine(
    around: Surroundings, checks: Mapping[str, Check] = CHECKS, starting: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Run the checks and return what they found; `starting` is called with the name of each.

    What libraries print meanwhile goes to standard error, so that the report stands alone.
    """
    found: list[Finding] = []
    with contextlib.redirect_stdout(sys.stderr):
        for name, check in checks.items():
            starting(name)
            try:
                found += check(around)
            except FAILURES as error:
                found.append(Finding(name=name, looked_at="", found=first_line(error), verdict="broken"))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the checks found and measured, and the file in which the rates were saved; None if they were not."""

    findings: list[Finding]
    measured: Mapping[str, float]
    rates_file: Path | None

    @property
    def is_broken(self) -> bool:
        """Return whether a run would not work."""
        return any(finding.verdict == "broken" for finding in self.findings)


def diagnose(
    around: Surroundings, checks: Mapping[str, Check] = CHECKS, starting: Callable[[str], None] = lambda name: None
) -> Report:
    """Run the checks and save what they measured."""
    findings = examine(around, checks, starting)
    rates_file = None
    try:
        rates_file = save_rates(around.measured, around.machine)
    except OSError as error:
        findings.append(
            Finding(
                name="rates",
                looked_at=str(machine.rates_file()),
                found=f"cannot be saved: {error.strerror}",
                verdict="slow",
                fix="Let XDG_CACHE_HOME name a folder that can be written to.",
            )
        )
    return Report(findings=findings, measured=dict(around.measured), rates_file=rates_file)


def save_rates(measured: Mapping[str, float], seen: Machine) -> Path | None:
    """Write the measured rates for `plan` and runs; return the file, or None if Adam or the disk was not measured."""
    needed = ("adam_parameters_per_s", "host_copy_bytes_per_s", "disk_write_bytes_per_s")
    if any(name not in measured for name in needed):
        return None
    rates = Rates(
        **{name: measured[name] for name in needed},
        to_device_bytes_per_s=measured.get("to_device_bytes_per_s"),
        from_device_bytes_per_s=measured.get("from_device_bytes_per_s"),
        device_bf16_flops_per_s=measured.get("device_bf16_flops_per_s"),
    )
    return machine.write_rates(rates, seen)


def lines(findings: Sequence[Finding], width: int, *, colours: bool) -> list[str]:
    """Return the report: for each finding its verdict, name and text, then its fix, indented.

    Text is wrapped at `width`; commands are not, so that they can be copied.
    """
    shown = []
    indent = " " * (_VERDICT_WIDTH + _NAME_WIDTH)
    for finding in findings:
        verdict = f"{finding.verdict:{_VERDICT_WIDTH}}"
        source = f" ({finding.looked_at})" if finding.looked_at else ""
        name = f"{finding.name:{_NAME_WIDTH - 1}} "
        first, *rest = _wrap(f"{name}{finding.found}{source}", width - _VERDICT_WIDTH, indent[_VERDICT_WIDTH:])
        if colours:
            verdict = f"\x1b[{COLOURS[finding.verdict]}m{verdict}\x1b[0m"
        shown += [verdict + first, *(" " * _VERDICT_WIDTH + line for line in rest)]
        for line in finding.fix.splitlines():
            if line.startswith("$ "):
                shown.append(f"{indent}  {line}")
            else:
                shown += _wrap(f"{indent}> {line}", width, f"{indent}  ")
    return shown


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def summary(report: Report, *, quick: bool) -> list[str]:
    """Return the last lines: how many findings there are of each kind, and what has been written."""
    counts = {verdict: sum(finding.verdict == verdict for finding in report.findings) for verdict in COLOURS}
    texts = [", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)]
    if quick:
        texts.append("Changed nothing.")
    elif report.rates_file:
        texts.append(f"Changed nothing but compiled operators and the measured rates in {report.rates_file}.")
    else:
        texts.append("Changed nothing but compiled operators; rates were not saved, as not all could be measured.")
    return texts


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON values."""
    return {
        "broken": report.is_broken,
        "findings": [asdict(finding) for finding in report.findings],
        "measured": dict(report.measured),
        "rates_file": str(report.rates_file) if report.rates_file else None,
    }
