"""What a check of the machine returns, and what it is given."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from superoffload.planning.machine import Machine

Verdict = Literal["good", "slow", "broken", "unknown", "skipped"]

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report.

    looked_at: the file, variable or program that was asked. verdict: `unknown` if it could not be found out, `skipped`
    if it was not looked at. fix: what to do, one thing per line; a line that starts with "$ " is a command. A good
    finding may have one too, for a case that it does not know.
    """

    name: str
    looked_at: str
    found: str
    verdict: Verdict
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every check is given.

    ranks: processes of the run that is planned on this machine. root: holds proc/, sys/ and dev/. environment: the
    variables of this process. measured: figures by the names of `machine.Rates`, which checks add to.
    """

    machine: Machine
    ranks: int
    output_dir: Path
    quick: bool
    root: Path
    environment: Mapping[str, str]
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def has_devices(self) -> bool:
        """Return whether there is an accelerator."""
        return bool(self.machine.devices)


Check = Callable[[Surroundings], Iterable[Finding]]


def skipped(name: str, looked_at: str) -> Finding:
    """Return the finding of a check that measures, with --quick."""
    return Finding(name=name, looked_at=looked_at, found="not measured with --quick", verdict="skipped")


def size(nbytes: float) -> str:
    """Return a number of bytes in GiB, or in MiB below a tenth of one, to show."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB / 10 or not nbytes else f"{nbytes / 2**20:.1f} MiB"


def pip(arguments: str) -> str:
    """Return the command that changes this environment's packages; environments made by uv have no pip."""
    if find_spec("pip") is None:
        return f"$ uv pip {arguments} --python {shlex.quote(sys.executable)}"
    return f"$ {shlex.quote(sys.executable)} -m pip {arguments}"


def public(text: str) -> str:
    """Return a text without the user names and passwords of addresses, tokens, and the path of the home folder."""
    text = re.sub(r"(\w+://)[^/\s]*@", r"\1...@", text)
    text = re.sub(r"([?&][^=&\s]*)=[^&\s]+", r"\1=...", text)
    text = re.sub(r"\bhf_\w{16,}|\b[0-9a-f]{40,}\b|\bwandb_v\d_\w+", "...", text)
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text) if home.startswith("/") else text


def gb_per_s(rate: float) -> str:
    """Return a rate in bytes per second, to show."""
    return f"{rate / 1e9:.1f} GB/s"
