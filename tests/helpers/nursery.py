"""Fork a rank's optimizer process from one that has imported its module, instead of starting an interpreter for it.

The import of torch takes the optimizer process longer than most tests let it compute. It is the same program with the
same descriptors and environment; how it is really started is tested by tests/offload/test_life.py and by whole runs
under the launcher.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace
from typing import Any, NoReturn

from superoffload.offload.trainer import process
from superoffload.offload.worker import adam, fused, worker  # noqa: F401  what the process imports

_PR_SET_CHILD_SUBREAPER = 36
_N_DESCRIPTORS = 3


class Child:
    """What the trainer uses of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        started = time.monotonic()
        while (status := self.poll()) is None:
            if timeout_s is not None and time.monotonic() - started > timeout_s:
                raise subprocess.TimeoutExpired(str(self.pid), timeout_s)
            time.sleep(0.002)
        return status

    def kill(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)


def open_nursery() -> None:
    """Fork the nursery of this process, which must not have started a thread, and let it start optimizer processes.

    The nursery forks twice and the process between ends at once, so that this process inherits the optimizer process as
    its child: it can wait for it, and is the parent that the optimizer process watches.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    rank_pid = os.getpid()
    if os.fork() == 0:
        _serve(os.dup2(theirs.fileno(), 3), rank_pid)
    theirs.close()

    def start(command: list[str], *, pass_fds: tuple[int, ...], env: dict[str, str], stdin: int) -> Child:
        assert (command[3], len(pass_fds), stdin) == (worker.__name__, _N_DESCRIPTORS, subprocess.DEVNULL)
        socket.send_fds(ours, [json.dumps(env).encode()], list(pass_fds))
        return Child(int(ours.recv(64)))

    replaced: Any = SimpleNamespace(
        Popen=start, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )  # fmt: skip
    process.subprocess = replaced  # type: ignore[attr-defined]


def _serve(fd: int, rank_pid: int) -> NoReturn:
    """Start an optimizer process for each request, until the rank ends."""
    os.closerange(fd + 1, 1 << 16)
    requests = socket.socket(fileno=fd)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, _N_DESCRIPTORS)
        if not message:
            os._exit(0)
        between = os.fork()
        if between == 0:
            if os.fork() == 0:
                _become_worker(requests, rank_pid, json.loads(message), descriptors)
            os._exit(0)
        os.waitpid(between, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def _become_worker(requests: socket.socket, rank_pid: int, env: dict[str, str], descriptors: list[int]) -> NoReturn:
    while os.getppid() != rank_pid:
        time.sleep(0.001)
    requests.send(str(os.getpid()).encode())
    requests.close()
    os.environ.clear()
    os.environ.update(env)
    status = 1
    try:
        status = worker.main([str(descriptor) for descriptor in descriptors])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
