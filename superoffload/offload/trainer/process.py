"""The trainer's handle on the optimizer process: start, send, receive, notice its death, close."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shared.affinity import Cores
from ..shared.messages import MAX_RECORD_BYTES, Reply, ReplyKind, Task, TaskKind, wait_for
from ..shared.state import ArenaLayout

_SEND_BUFFER_BYTES = 1 << 20
_EXIT_GRACE_S = 5.0
# A parallel loop of the trainer is as slow as its slowest thread, so none of its threads should wait for a core.
_NICENESS_ON_SHARED_CORES = 10
_WORKER_MODULE = f"{__package__.rpartition('.')[0]}.worker.worker"
_IMPORT_ROOT = str(Path(__file__).resolve().parents[__package__.count(".") + 1])


class OptimizerProcessError(RuntimeError):
    """The optimizer process has died or failed. The state in memory is lost; resume from the last checkpoint.

    out_of_memory: it was killed by a signal that usually means that the host had no memory left.
    """

    out_of_memory = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """What the optimizer process needs when it starts.

    op_name, op_path: the compiled cpu_adam module that the trainer has loaded.
    fused_path: the compiled kernel of worker/fused.py; None to run without it.
    chunk_numel: elements computed between two checks of the socket; a multiple of 1024.
    threads_beside_trainer: threads that compute while the trainer does; a step uses all cores.
    shares_cores: the trainer computes on the same cores. Then it takes precedence, threads that wait sleep, and the
        replies to several steps are sent together, because each would wake the trainer and stop the next step.
    """

    layout: ArenaLayout
    cores: Cores
    op_name: str
    op_path: str
    fused_path: str | None
    adamw_mode: bool
    chunk_numel: int
    threads_beside_trainer: int
    shares_cores: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the setup as JSON values, with the process id of the trainer, which is this process."""
        return {
            "layout": self.layout.to_json(),
            "cores": list(self.cores),
            "op_name": self.op_name,
            "op_path": self.op_path,
            "fused_path": self.fused_path,
            "adamw_mode": self.adamw_mode,
            "chunk_numel": self.chunk_numel,
            "threads_beside_trainer": self.threads_beside_trainer,
            "shares_cores": self.shares_cores,
            "niceness": _NICENESS_ON_SHARED_CORES if self.shares_cores else 0,
            "trainer_pid": os.getpid(),
        }


class OptimizerProcess:
    """Owns the child process and the trainer's end of the socket.

    `send` may be called from several threads, `receive` from one.
    """

    def __init__(self, setup: WorkerSetup, arena_fd: int) -> None:
        """Start the process; return before it is ready. The caller still owns `arena_fd`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        setup_fd = os.memfd_create("superoffload-setup", os.MFD_CLOEXEC)
        try:
            os.write(setup_fd, json.dumps(setup.to_json()).encode())
            os.lseek(setup_fd, 0, os.SEEK_SET)
            inherited = (theirs.fileno(), setup_fd, arena_fd)
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", _WORKER_MODULE, *map(str, inherited)],
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                env=_environment(len(setup.cores), setup.shares_cores),
            )
        finally:
            theirs.close()
            os.close(setup_fd)
        ours.setblocking(False)
        self._sock = ours
        self._send_lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._closed = False

    @property
    def pid(self) -> int:
        """Return the process id of the optimizer process."""
        return self._child.pid

    @property
    def belongs_to_this_process(self) -> bool:
        """Return whether the current process started it; False in a forked child, such as a data loader worker."""
        return os.getpid() == self._owner_pid

    def send(self, task: Task, relieve: Callable[[], None] | None = None) -> None:
        """Send a task; while the socket is full, call `relieve` (which may receive), or just wait.

        Raises OptimizerProcessError if the process has died.
        """
        record = task.pack()
        while True:
            try:
                with self._send_lock:
                    self._sock.send(record)
                return
            except BlockingIOError:
                if relieve is not None:
                    relieve()
                wait_for(self._sock, select.POLLOUT, 0.05)
            except OSError as error:
                raise self._death("sending a task") from error

    def receive(self, timeout_s: float, doing: str) -> Reply | None:
        """Return the next reply, or None if none arrives within `timeout_s`.

        Raises OptimizerProcessError as soon as the process has died or reports a failure; `doing` completes the
        message "while the trainer was ...".
        """
        if self._closed:
            raise OptimizerProcessError("the SuperOffload optimizer process has been closed")
        if not wait_for(self._sock, select.POLLIN, timeout_s):
            if self._child.poll() is not None:
                raise self._death(doing)
            return None
        try:
            record = self._sock.recv(MAX_RECORD_BYTES)
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise self._death(doing) from error
        if not record:
            raise self._death(doing)
        reply = Reply.unpack(record)
        if reply.kind is ReplyKind.ERROR:
            raise OptimizerProcessError(f"the SuperOffload optimizer process (pid {self.pid}) {reply.text}")
        return reply

    def close(self) -> None:
        """End the process and wait for it. Safe to call twice, from finalizers, and in forked children."""
        if self._closed or not self.belongs_to_this_process:
            return
        self._closed = True
        try:
            self._sock.send(Task(kind=TaskKind.EXIT).pack())
        except OSError:  # full or closed; closing the socket, below, has the same effect
            pass
        self._sock.close()
        try:
            self._child.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:  # stopped, or in a long chunk
            self._child.kill()
            self._child.wait()

    def _death(self, doing: str) -> OptimizerProcessError:
        deadline = time.monotonic() + 1.0
        status = self._child.poll()
        while status is None and time.monotonic() < deadline:
            time.sleep(0.01)
            status = self._child.poll()
        if status is None:
            how = "has closed its socket"
        elif status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        else:
            how = f"exited with status {status}"
        hint = ""
        if status == -signal.SIGKILL:
            hint = " SIGKILL usually means that the host ran out of memory (see dmesg)."
        if status == -signal.SIGBUS:
            hint = " SIGBUS usually means that the host had no memory left for the optimizer state."
        error = OptimizerProcessError(
            f"the SuperOffload optimizer process (pid {self.pid}) {how} while the trainer was {doing}.{hint} "
            "Resume from the last checkpoint."
        )
        error.out_of_memory = status in (-signal.SIGKILL, -signal.SIGBUS)
        return error


def _environment(threads: int, shares_cores: bool) -> dict[str, str]:
    """Return the child's environment: its threads, no accelerator, the trainer's import path."""
    paths = [_IMPORT_ROOT, *(p for p in sys.path if p)]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        **({"OMP_WAIT_POLICY": "passive"} if shares_cores else {}),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
    }
