"""The processes of one configuration, as the parent sees them: started, asked, and ended whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from superoffload.bench import channel
from superoffload.ds_config import REPOSITORY
from superoffload.errors import UserError
from superoffload.planning.checks import child

ANSWER_S = 3600.0
"""The longest that a command may take. Reading a model of 70 billion parameters takes minutes."""
CLOSE_S, OTHERS_S = 30.0, 2.0
"""Time in which a process ends in order, and in which the other ranks say why they failed too."""


class Failed(UserError):
    """Why a configuration cannot continue, in one line."""


class Player:
    """One process for each rank. Used as a context manager, which ends them."""

    def __init__(self, module: str, order: Any, ranks: int, log: Path) -> None:
        """Start `python -m superoffload.bench.MODULE` for every rank; output goes to the file `log`."""
        self._log = log
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._ended: list[int] = []
        port = _free_port()
        for rank in range(ranks):
            self._start(module, _environment(rank, ranks, port))
        self._send(order)

    def _start(self, module: str, environment: Mapping[str, str]) -> None:
        ours, theirs = channel.pair()
        self._connections.append(ours)
        try:
            with self._log.open("ab") as log:
                # A session of its own: Ctrl-C reaches the parent only, which then ends its processes in order.
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", f"superoffload.bench.{module}", str(theirs)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs],
                    env={**environment}, start_new_session=True,
                )  # fmt: skip
        finally:
            os.close(theirs)
        self._processes.append(process)
        self._ended.append(os.pidfd_open(process.pid))

    def _send(self, message: Any) -> None:
        for connection in self._connections:
            with suppress(OSError):  # it has ended, which `receive` reports
                connection.send(message)

    def ask(self, *command: Any) -> Any:
        """Send a command to every rank; return the answer of rank 0, once all have answered. Raises `Failed`."""
        self._send(command)
        return self.receive()

    def receive(self) -> Any:
        """Wait until every rank has answered, and return rank 0's result.

        Raises `Failed` if a rank fails, or as soon as a process has ended.
        """
        answers: dict[int, channel.Answer] = {}
        until = time.monotonic() + ANSWER_S
        while len(answers) < len(self._processes):
            self._collect(answers, until - time.monotonic())
            if any(answer.failure for answer in answers.values()) or self._dead():
                self._collect_rest(answers)
                if any(answer.failure for answer in answers.values()) or len(answers) < len(self._processes):
                    raise Failed(self._reason(answers))
            if time.monotonic() > until:
                raise Failed(f"no answer after {ANSWER_S:.0f} s")
        return answers[0].result

    def _collect(self, answers: dict[int, channel.Answer], timeout_s: float) -> None:
        """Wait for an answer or the end of a process, and add the answers that have come."""
        open_ones = {c: rank for rank, c in enumerate(self._connections) if rank not in answers}
        for ready in wait([*open_ones, *self._ended], max(0.0, timeout_s)):
            if isinstance(ready, Connection):
                with suppress(EOFError, OSError):  # the process has ended
                    answers[open_ones[ready]] = ready.recv()

    def _collect_rest(self, answers: dict[int, channel.Answer]) -> None:
        """Give the other ranks a moment: the reason may be theirs."""
        until = time.monotonic() + OTHERS_S
        while len(answers) < len(self._processes) and time.monotonic() < until:
            before, ended = len(answers), len(self._dead()) == len(self._processes)
            self._collect(answers, 0.0)
            if len(answers) == before:  # what is ready, if anything, is the end of a channel
                if ended:
                    return
                time.sleep(0.05)

    def _dead(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes if process.poll() is not None]

    def _reason(self, answers: Mapping[int, channel.Answer]) -> str:
        """Say why a configuration failed: the first failure that is not that of another rank."""
        failures = [answer for answer in answers.values() if answer.failure]
        own = [answer.failure for answer in failures if not answer.secondary]
        killed = [process.returncode for process in self._dead() if process.returncode < 0]
        if own and own[0]:
            return own[0]
        if killed:
            name = signal.Signals(-killed[0]).name
            memory = ", usually for lack of host memory" if name == "SIGKILL" else ""
            return f"a process was killed by {name}{memory}"
        if failures and failures[0].failure:
            return failures[0].failure
        return self._last_line() or "a process ended without an answer"

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def finish(self) -> None:
        """Let every process end in order; those that do not are ended."""
        self._send(None)
        until = time.monotonic() + CLOSE_S
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self.end()

    def end(self) -> None:
        """End every process and all that it started."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            if process.poll() is None:
                child.end(process)
            process.wait()
        for descriptor in self._ended:
            os.close(descriptor)
        self._processes, self._connections, self._ended = [], [], []

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment of a rank, as the launcher makes it; the program itself is found in the repository."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),  # without it, DeepSpeed's ranks on the CPU do not communicate by shared memory
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
