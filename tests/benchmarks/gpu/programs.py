"""Run the programs of a part: each in a process group of its own, with a time limit, its output in the part's log."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.ranks import REPOSITORY, free_port

LINES = 12  # of a failed program's output, shown in the report
HIDES_FLASH_ATTN = 'import sys\n\nsys.modules["flash_attn"] = None\n'


class PartError(Exception):
    """A part failed; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run of finetune_zero3.py left behind."""

    out: Path
    text: str
    summary: dict[str, Any]

    def found(self, pattern: str) -> str:
        """Return the first group of a pattern in the run's output; raises `PartError` if there is no match."""
        match = re.search(pattern, self.text)
        if match is None:
            raise PartError(f"the run printed nothing like {pattern}")
        return match.group(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where and how one part runs. `deadline` is on the clock of `time.monotonic`."""

    part: str
    rehearse: bool
    work: Path
    machine: Mapping[str, Any]
    deadline: float

    @property
    def folder(self) -> Path:
        """Return the folder of the part's own files."""
        return self.work / "runs" / self.part

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """Run a program of this interpreter and return its output; raises `PartError` if it fails or takes too long."""
        log = self.work / "logs" / f"{self.part}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            stream.write(f"$ python {' '.join(command)}\n".encode())
            stream.flush()
            start = stream.tell()
            process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                cwd=REPOSITORY, env=self._environment() | dict(env or {}), start_new_session=True,
            )  # fmt: skip
            try:
                status: int | None = process.wait(timeout=max(1.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process)
        with log.open("rb") as written:
            written.seek(start)
            text = written.read().decode(errors="replace")
        if status != 0:
            how = "took too long" if status is None else f"ended with status {status}"
            last = "\n".join(line for line in text.splitlines() if line.strip()).splitlines()[-LINES:]
            name = command[1] if command[0] == "-m" else Path(command[0]).name
            raise PartError("\n".join([f"{name} {how}; see {log}", *last]))
        return text

    def benchmark(self, script: str, *flags: str, name: str) -> dict[str, Any]:
        """Run a program of tests/benchmarks and return its results, the file NAME.json."""
        self.run(f"tests/benchmarks/{script}", *flags, "--results", str(self.folder))
        return dict(json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8")))

    def finetune(self, label: str, *flags: str, ranks: int = 1, hide_flash_attn: bool = False) -> Outcome:
        """Run finetune_zero3.py under the launcher, with an output folder of its own."""
        out = self.folder / label
        shutil.rmtree(out, ignore_errors=True)
        env = self.without_flash_attn() if hide_flash_attn else {}
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
        script = str(REPOSITORY / "finetune_zero3.py")
        text = self.run(*launcher, script, "--output_dir", str(out), *flags, env=env)
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        return Outcome(out=out, text=text, summary=summary)

    def without_flash_attn(self) -> dict[str, str]:
        """Return the environment in which the package flash-attn is not found, also if it is installed."""
        hiding = self.work / "hides_flash_attn"
        hiding.mkdir(parents=True, exist_ok=True)
        (hiding / "sitecustomize.py").write_text(HIDES_FLASH_ATTN, encoding="utf-8")
        return {"PYTHONPATH": f"{hiding}{os.pathsep}{self._environment()['PYTHONPATH']}"}

    def _environment(self) -> dict[str, str]:
        device = "cpu" if self.rehearse else "cuda"
        path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "DS_ACCELERATOR": device,
            "OFFLOAD_ACCELERATOR": device,
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "HF_HOME": str(self.work / "hf"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"OMP_NUM_THREADS": "1"} if self.rehearse else {}),
        }


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what a program has left running: its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
