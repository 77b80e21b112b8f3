"""Run a function as N ranks in processes of their own, and the whole program under the real launcher."""

import multiprocessing
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """Find a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Ranks are forked from a process that has imported what takes longer than most of what they do.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.imported"])


def _one_rank(function: Callable[..., Any], arguments: tuple[Any, ...], env: dict[str, str], results: Any) -> None:
    os.environ.update(env)
    from superoffload import distributed, log

    try:
        log.setup("INFO")
        distributed.init()
        # Pickled here: a tensor on the queue would live only as long as this process.
        results.put((distributed.rank(), pickle.dumps(function(*arguments)), None))
        distributed.close()
    except BaseException:
        results.put((int(env["RANK"]), None, traceback.format_exc()))


def run_ranks(n: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 180) -> list[Any]:
    """Call `function(*arguments)` on each of `n` ranks joined over gloo, and return what each returned.

    The function must be importable. Raises where a rank raised, died or did not end in time.
    """
    results = FORKS.Queue()
    shared = {
        **os.environ,
        "WORLD_SIZE": str(n),
        "LOCAL_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        FORKS.Process(
            target=_one_rank, args=(function, arguments, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, results)
        )
        for r in range(n)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(answers) < n:
            try:
                rank, answer, error = results.get(timeout=1)
            except queue.Empty:
                dead = [r for r, p in enumerate(processes) if p.exitcode is not None and r not in answers]
                if time.monotonic() > deadline or any(processes[r].exitcode for r in dead):
                    raise AssertionError(f"ranks {sorted(set(range(n)) - set(answers))} gave no answer") from None
                continue
            assert error is None, f"rank {rank}:\n{error}"
            answers[rank] = pickle.loads(answer)
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            process.kill()
    return [answers[rank] for rank in range(n)]


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a launched run: this interpreter's programs first, one thread, the CPU."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **extra}


def run(
    command: list[str], timeout_s: float = 240, cwd: Path | None = None, **env: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end and return its status and what it wrote; all it started dies with it."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(**env),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def launch(n: int, *flags: str, timeout_s: float = 240, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run finetune_zero3.py on `n` ranks under the launcher."""
    script = str(REPOSITORY / "finetune_zero3.py")
    command = ["deepspeed", "--num_gpus", str(n), "--master_port", str(free_port()), script, *flags]
    return run(command, timeout_s, **env)
