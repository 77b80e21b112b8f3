"""Follow the host memory of a run under its launcher, and predict it."""

import os
import re
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from superoffload import cli, ds_config
from superoffload.model import architecture, load
from superoffload.planning.budget import host, job, shape
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.shape import Shape
from tests.helpers.ranks import REPOSITORY, environment, free_port

POLL_S = 0.1
MARKS = {"loaded": r"INFO Model ", "stepped": r"INFO Step (\d+) ", "trained": r"INFO Finished after"}


@dataclass
class Trace:
    """The output of a run and its memory, by the time in seconds since the start.

    memory: private and shared pages of all its processes, shared ones counted once (PSS), in bytes. Pages of files are
    left out. shared: of these, the shared ones.
    """

    returncode: int = 0
    lines: list[tuple[float, str]] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)

    def times(self, mark: str) -> list[float]:
        """Return when a line with this mark was printed."""
        return [at for at, line in self.lines if re.search(MARKS[mark], line)]

    def between(self, start: float, end: float) -> list[int]:
        """Return the memory from `start` to `end`."""
        return [size for at, size in self.memory if start <= at <= end]

    def phases(self) -> dict[str, int]:
        """Return the memory of each phase: the peak, but in `steady` the median."""
        (loaded,), stepped, (end,) = self.times("loaded"), self.times("stepped"), self.times("trained")
        found = {
            "loading": max(self.between(0, loaded)),
            "first step": max(self.between(loaded, stepped[-1])),
            "steady": int(statistics.median(self.between(stepped[0], end))),
        }
        saving = self.between(stepped[-1], end)
        return found | ({"saving": max(saving)} if saving else {})


def follow(ranks: int, *flags: str, timeout_s: float = 600, **env: str) -> Trace:
    """Run finetune_zero3.py on `ranks` ranks under the launcher, and follow its memory."""
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    command += [str(REPOSITORY / "finetune_zero3.py"), *flags]
    trace, start = Trace(), time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**env),
        start_new_session=True,
    )
    reader = threading.Thread(target=_read, args=(process, trace, start))
    reader.start()
    try:
        while process.poll() is None and time.monotonic() - start < timeout_s:
            private, shared = _memory(process.pid)
            trace.memory.append((time.monotonic() - start, private + shared))
            trace.shared.append(shared)
            time.sleep(POLL_S)
    finally:
        for pid in _session(process.pid):
            os.kill(pid, 9)
        trace.returncode = process.wait()
        reader.join()
    return trace


def _read(process: "subprocess.Popen[str]", trace: Trace, start: float) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        trace.lines.append((time.monotonic() - start, line.rstrip()))


def _session(leader: int) -> list[int]:
    """List the processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def _memory(leader: int) -> tuple[int, int]:
    """Return the private and the shared pages of a session."""
    total = {"Anon": 0, "Shmem": 0}
    for pid in _session(leader):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        for kind, size in re.findall(r"^Pss_(Anon|Shmem):\s+(\d+)", text, re.MULTILINE):
            total[kind] += int(size) * 1024
    return total["Anon"], total["Shmem"]


def described(ranks: int, *flags: str) -> tuple[Shape, Job]:
    """Return what the planning reads from the flags of a run on the CPU."""
    config = cli.parse(list(flags))
    merged = ds_config.merge_flags(ds_config.read_ds_config(config), config, ranks)
    skeleton = architecture.empty_model(load.load_config(config.model.model_name))
    read = job.of(merged.config, merged.ds_config, ranks, ranks)
    return shape.of_model(config.model.model_name, skeleton), replace(read, on_cpu=True)


def predicted(ranks: int, *flags: str) -> dict[str, int]:
    """Return the planned bytes of each phase, without the pages of libraries."""
    peaks = host.host_peaks(*described(ranks, *flags))
    return {phase: size - host.LIBRARIES_BYTES for phase, size in peaks.items()}
