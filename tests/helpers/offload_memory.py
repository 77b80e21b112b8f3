"""Measure the host memory of one engine, per parameter. As a program: train, then print the size of /dev/shm."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from superoffload.ds_config import BF16_STATE_KEYS
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
    """Return the private memory of this process, after the allocator has returned its unused pages."""
    ctypes.CDLL(None).malloc_trim(0)
    return status(os.getpid(), "RssAnon")


def shared_bytes(pid: int) -> int:
    """Return how many bytes of the arena are resident in the mapping of process `pid`."""
    found, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = "memfd:superoffload" in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def measure(
    super_offload: bool, steps: int = 3, *, bf16_state: bool = False, offload_params: bool = False
) -> dict[str, Any]:
    """Return bytes per parameter: the arena's, and the growth of private memory on both sides.

    `bf16_state` and `offload_params` are what --optimizer_state bf16 and --offload_params ask DeepSpeed for.
    """
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True, **dict.fromkeys(BF16_STATE_KEYS, bf16_state)},
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 4 * WIDTH * WIDTH,
            "reduce_bucket_size": 2 * WIDTH * WIDTH,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu", "super_offload": super_offload},
            "offload_param": {"device": "cpu" if offload_params else "none"},
        },
    }
    before = private_bytes()
    with installed():
        adam = DeepSpeedCPUAdam(model.parameters(), lr=1e-5, fp32_optimizer_states=not bf16_state)
        engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    worker = engine.optimizer._service.process.pid if super_offload else 0
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
            "planned": engine.optimizer._partitions.arena.layout.nbytes / PARAMETERS,
            "worker_private": status(worker, "RssAnon") / PARAMETERS,
            "worker_private_bytes": status(worker, "RssAnon"),
        }
    engine.destroy()
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(True)
    size = os.statvfs("/dev/shm")
    print(f"/dev/shm holds {size.f_frsize * size.f_blocks // 1024} KiB")
