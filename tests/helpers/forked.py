"""Run programs in processes forked from one that has imported the libraries: the same code, without the imports.

The imports of a program under the launcher take longer than what most tests let it do. What a test says of the
launcher, of the imports or of the interpreter's own start needs `tests.helpers.ranks.run` or `launch_with_deepspeed`.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from superoffload import cli
from tests.helpers.nursery import open_nursery
from tests.helpers.ranks import ACCELERATOR, REPOSITORY, environment, free_port, rank_context, rank_environment

SCRIPT = str(REPOSITORY / "finetune_zero3.py")


def _play(argv: list[str], env: dict[str, str], cwd: str | None, streams: tuple[str, str], nursery: bool) -> None:
    """Become the program: `argv` is a path or `-m` and a module, then its arguments."""
    os.setsid()
    for target, path in zip((1, 2), streams, strict=True):
        stream = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    if nursery:
        open_nursery()
    status = 1
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    cli.leave(status)


class Output:
    """What programs have written to stdout and stderr, which may be several ranks, as under the launcher."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="superoffload-output-")
        self.paths = (f"{self._folder.name}/stdout", f"{self._folder.name}/stderr")
        for path in self.paths:
            Path(path).touch()

    def read(self) -> tuple[str, str]:
        """Return stdout and stderr so far."""
        out, err = (Path(path).read_text(errors="replace") for path in self.paths)
        return out, err


class Program:
    """A Python program in a forked process and a session of its own."""

    def __init__(
        self, argv: list[str], env: dict[str, str], output: Output, cwd: Path | None = None, nursery: bool = False
    ) -> None:
        """Start it. `env` is all of its environment, but what libraries read on import has been read before.

        With `nursery`, its optimizer process is forked too, on the CPU.
        """
        where = None if cwd is None else str(cwd)
        forks = nursery and ACCELERATOR == "cpu"
        self._process = rank_context().Process(target=_play, args=(argv, env, where, output.paths, forks))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return its exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """Wait for its end and return its exit status. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout_s)
        return self._process.exitcode

    def terminate(self) -> None:
        """Ask it to end and wait; kill it after the 30 seconds that the launcher waits."""
        self._process.terminate()
        self._process.join(30)
        self.kill()

    def kill(self) -> None:
        """Kill it, if it still runs, and everything of its session."""
        self._process.kill()
        self._process.join()
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def run_forked(
    argv: list[str], timeout_s: float = 240, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end, as `tests.helpers.ranks.run` does; `argv` is what follows the interpreter."""
    output = Output()
    program = Program(argv, environment(**env), output, cwd)
    try:
        status = program.wait(timeout_s)
    finally:
        program.kill()
    return subprocess.CompletedProcess(argv, status, *output.read())


class Launched:
    """finetune_zero3.py on some ranks, as the launcher runs it: the first that fails ends the others."""

    def __init__(self, n: int, *flags: str, **env: str) -> None:
        """Start the ranks."""
        assert not any(name.startswith(("HF_", "DS_")) for name in env), "read on import: use the real launcher"
        self.output, self._flags, port = Output(), flags, free_port()
        self.ranks = [
            Program(
                [SCRIPT, f"--local_rank={rank}", *flags],
                rank_environment(rank, n, port) | env,
                self.output,
                nursery=True,
            )
            for rank in range(n)
        ]

    def wait(self, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for the end and return status and output. Raises subprocess.TimeoutExpired. Leaves nothing behind."""
        deadline = time.monotonic() + timeout_s
        try:
            while (status := self._status()) is None:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(SCRIPT, timeout_s, *self.output.read())
                time.sleep(0.02)
            for rank in self.ranks:
                rank.terminate()
        finally:
            self.kill()
        return subprocess.CompletedProcess([SCRIPT, *self._flags], status, *self.output.read())

    def _status(self) -> int | None:
        """Return the status of the first rank that failed, 0 if all have ended well, or None."""
        ended = [rank.poll() for rank in self.ranks]
        return 0 if not any(ended) and None not in ended else next((status for status in ended if status), None)

    def kill(self) -> None:
        """End every process of the run."""
        for rank in self.ranks:
            rank.kill()


def launch(n: int, *flags: str, timeout_s: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run finetune_zero3.py on `n` ranks to its end."""
    return Launched(n, *flags, **env).wait(timeout_s)
