"""Run a function as N ranks in processes of their own, and programs under the real launcher."""

from __future__ import annotations

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
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
ACCELERATOR = os.environ.get("OFFLOAD_ACCELERATOR", "cpu")
"""What ranks compute on: cpu, or cuda with one device for each rank."""

Answer = tuple[int, bytes | None, str | None]
"""Rank, pickled result, traceback."""


def free_port() -> int:
    """Find a port of the loopback interface that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_context() -> ForkServerContext | SpawnContext:
    """Return how ranks are started.

    On the CPU they are forked from a process that has imported the libraries, because the imports take longer than
    most tests. A process that has initialised CUDA cannot be forked, so there they are spawned.
    """
    if ACCELERATOR == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.imported"])
    return context


def _one_rank(call: bytes, env: dict[str, str], results: Queue[Answer], nursery: bool) -> None:
    """Run as one rank. `call` is unpickled late, because that may import DeepSpeed, which reads the environment."""
    os.environ.update(env)
    if nursery:
        from tests.helpers.nursery import open_nursery

        open_nursery()
    import torch

    from superoffload import distributed, log

    try:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(ACCELERATOR == "cuda")
        log.setup("INFO")
        distributed.init()
        function, arguments = pickle.loads(call)
        # Pickled here: a tensor on the queue would live only as long as this process.
        results.put((distributed.rank(), pickle.dumps(function(*arguments)), None))
        distributed.close()
    except BaseException:
        results.put((int(env["RANK"]), None, traceback.format_exc()))


def run_ranks(
    n: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 180, nursery: bool = True
) -> list[Any]:
    """Call `function(*arguments)` on each of `n` ranks, joined in a process group, and return all results by rank.

    The function must be importable. On the CPU, optimizer processes are forked too, unless `nursery` is False; see
    tests/helpers/nursery.py. Raises AssertionError if a rank raised, died or did not end in time.
    """
    context, port = rank_context(), free_port()
    results: Queue[Answer] = context.Queue()
    call, forks = pickle.dumps((function, arguments)), nursery and ACCELERATOR == "cpu"
    processes = [
        context.Process(target=_one_rank, args=(call, rank_environment(rank, n, port), results, forks))
        for rank in range(n)
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
            assert error is None and answer is not None, f"rank {rank}:\n{error}"
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


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment of one rank of a job on this machine."""
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR=ACCELERATOR,
        PYTHONPATH=os.pathsep.join(path),
        PYTHONWARNINGS="ignore",
    )


def run(
    command: list[str], timeout_s: float = 240, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its status and output; kill everything that it started."""
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


def launch(n: int, *flags: str, timeout_s: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run finetune_zero3.py on `n` ranks under the launcher."""
    script = str(REPOSITORY / "finetune_zero3.py")
    command = ["deepspeed", "--num_gpus", str(n), "--master_port", str(free_port()), script, *flags]
    return run(command, timeout_s, None, **env)
