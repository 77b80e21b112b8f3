"""Run a function on N gloo ranks, each a process of its own, and return what it returned.

As a program it is one rank: `python offload_ranks.py MODULE:FUNCTION RESULT_FILE KEYWORDS_AS_JSON`. With
OFFLOAD_ACCELERATOR=cuda a rank trains on a CUDA device, one rank a device.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class RankFailed(AssertionError):
    """A rank ended with an error or ran out of time; the message holds the end of its output."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    path = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": os.environ.get("OFFLOAD_ACCELERATOR", "cpu"),
        "PYTHONPATH": os.pathsep.join(path),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONWARNINGS": "ignore",
    }


def start_rank(
    target: str, result: Path, keywords: dict[str, Any], environment: dict[str, str]
) -> subprocess.Popen[str]:
    """Start one rank in a process group of its own, output captured."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "offload_ranks.py"), target, str(result), json.dumps(keywords)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_ranks(
    target: str, scratch: Path, /, *, world_size: int = 1, timeout_s: float = 200.0, **keywords: Any
) -> list[Any]:
    """Return what `target(**keywords)` returned on every rank; kills what is left at the end."""
    port, deadline = free_port(), time.monotonic() + timeout_s
    results = [scratch / f"rank{r}-of-{world_size}.pt" for r in range(world_size)]
    ranks = [start_rank(target, results[r], keywords, rank_environment(r, world_size, port)) for r in range(world_size)]
    outputs = []
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=max(1.0, deadline - time.monotonic()))
            outputs.append(output)
    except subprocess.TimeoutExpired as error:
        raise RankFailed(f"{target} took longer than {timeout_s} s") from error
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()
    for rank, output in zip(ranks, outputs, strict=True):
        if rank.returncode != 0:
            raise RankFailed(f"{target}: status {rank.returncode}\n{output[-6000:]}")
    return [torch.load(path, weights_only=False) for path in results]


def main(target: str, result: str, keywords: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(os.environ["DS_ACCELERATOR"] == "cuda")
    module, name = target.split(":")
    value = getattr(importlib.import_module(module), name)(**json.loads(keywords))
    torch.save(value, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
