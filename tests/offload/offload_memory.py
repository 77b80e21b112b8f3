"""Measure the host memory of one engine, per parameter; test_memory.py runs it and looks at the numbers."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from superoffload.offload.install import installed

WIDTH, LAYERS = 1024, 24
PARAMETERS = LAYERS * WIDTH * WIDTH


def status(pid: int, key: str) -> int:
    """Return a line of /proc/PID/status in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def private_bytes() -> int:
    """Return what this process holds of its own, without what the allocator keeps although nobody uses it."""
    ctypes.CDLL(None).malloc_trim(0)
    return status(os.getpid(), "RssAnon")


def shared_bytes(pid: int) -> int:
    """Return how much of the arena is resident in this process's mapping of it."""
    found, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = "memfd:superoffload" in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def measure(super_offload: bool, steps: int = 3) -> dict[str, Any]:
    """Return bytes per parameter: the arena's, and the growth of private memory on both sides."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 4 * WIDTH * WIDTH,
            "reduce_bucket_size": 2 * WIDTH * WIDTH,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu", "super_offload": super_offload},
        },
    }
    before = private_bytes()
    with installed():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=DeepSpeedCPUAdam(model.parameters(), lr=1e-5), config=config
        )
    worker = engine.optimizer._process.pid if super_offload else 0
    private = []
    for _ in range(steps):
        engine.backward(engine(torch.randn(1, WIDTH, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
        private.append(private_bytes() - before)
    result = {
        "trainer_private": max(private) / PARAMETERS,
        "peak": status(os.getpid(), "VmHWM") / PARAMETERS,
    }
    if super_offload:
        engine.optimizer.flush()
        result |= {
            "arena": shared_bytes(worker) / PARAMETERS,
            "planned": engine.optimizer._arena.layout.nbytes / PARAMETERS,
            "worker_private": status(worker, "RssAnon") / PARAMETERS,
            "worker_private_bytes": status(worker, "RssAnon"),
        }
    engine.destroy()
    return result


def train_a_little(_: str = "") -> str:
    """Train three steps; used where /dev/shm is small."""
    measure(True)
    return os.popen("df -k --output=size /dev/shm | tail -1").read().strip()
