"""Run a measurement in a process of its own: what crashes, hangs or holds a device there does not harm the caller."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULE = "superoffload.planning.checks.measure"
PREFIX = "RESULT "
TIMEOUT_S = 900.0
"""Compiling all operators takes two minutes on slow cores, and waiting for the lock of a killed build three."""
GRACE_S = 5.0
"""Time in which a process that is told to end cleans up."""
KILL_ROUNDS = 3

_COMMAND = (sys.executable, "-P", "-m", MODULE)
_IMPORT_ROOT = str(Path(__file__).resolve().parents[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the process reported before it ended, and how it failed; None if it did not."""

    results: list[dict[str, Any]]
    failure: str | None

    def merged(self) -> dict[str, Any]:
        """Return all results as one; later ones replace earlier ones."""
        return {key: value for result in self.results for key, value in result.items()}


def run(part: str, environment: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Run one part of `measure.py`; `environment` is added to that of this process."""
    paths = [_IMPORT_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
    # A session of its own: Ctrl-C reaches this process only, which then ends the other in order.
    process = subprocess.Popen(
        [*_COMMAND, part],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=variables, start_new_session=True,
    )  # fmt: skip
    failure = None
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        failure = f"not finished after {timeout_s:.0f} s"
    finally:
        if process.poll() is None:
            end(process)
            output, errors = process.communicate()
    if failure is None and process.returncode:
        failure = _failure(process.returncode, errors)
    lines = [line.removeprefix(PREFIX) for line in output.splitlines() if line.startswith(PREFIX)]
    return Outcome(results=[json.loads(line) for line in lines], failure=failure)


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started; a build removes its lock if it can.

    ninja starts each compiler in a process group of its own, but all are in the session of `process`. One that stayed
    would keep the pipes open, on whose end the caller waits.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)  # measure.py cleans up, and ninja ends its compilers
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    process.kill()
    for _ in range(KILL_ROUNDS):  # one that is being started escapes the first
        for pid in _session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _session(leader: int) -> list[int]:
    """Return the processes of a session."""
    import psutil  # here, so that a missing package is a finding of `versions`

    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == leader:
                found.append(pid)
    return found


def _failure(status: int, errors: str) -> str:
    """Say how a process ended: by which signal, or with which last line."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {status}"
