"""Host memory per parameter, measured; and no need for /dev/shm."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.helpers import offload_memory
from tests.helpers.ranks import REPOSITORY, free_port, rank_environment, run_ranks

MIB = 2**20


@pytest.fixture(scope="module")
def zero() -> dict[str, float]:
    """Measure ZeRO-Offload with its state in fp32."""
    (measured,) = run_ranks(1, offload_memory.measure, False)
    return dict(measured)


def test_bytes_per_parameter(zero: dict[str, float]) -> None:
    (ours,) = run_ranks(1, offload_memory.measure, True, nursery=False)
    assert ours["planned"] == pytest.approx(18.0, rel=0.01)
    assert ours["arena"] == pytest.approx(18.0, rel=0.01)
    # The trainer's private memory is DeepSpeed's: weights and buckets. For ZeRO-Offload it also holds the sixteen
    # bytes of parameters, gradients and moments, and two of the buffer for gradient accumulation.
    assert ours["trainer_private"] <= zero["trainer_private"] - 18.0 + 1.0
    # Scratch memory and libraries, of which a CUDA build of torch has more; a copy of the fp32 state would be at least
    # 100 MiB.
    assert ours["worker_private_bytes"] < (200 if torch.version.cuda is None else 320) * MIB


def test_bf16_state_takes_ten_bytes_a_parameter(zero: dict[str, float]) -> None:
    (ours,) = run_ranks(1, measure_with_bf16_state, True, nursery=False)
    (low,) = run_ranks(1, measure_with_bf16_state, False)
    assert ours["planned"] == pytest.approx(10.0, rel=0.01)
    assert ours["arena"] == pytest.approx(10.0, rel=0.01)
    assert ours["trainer_private"] <= low["trainer_private"] - 8.0 + 1.0  # parameters, gradients and moments
    assert low["trainer_private"] <= zero["trainer_private"] - 8.0 + 1.0


def measure_with_bf16_state(super_offload: bool) -> dict[str, Any]:
    return offload_memory.measure(super_offload, bf16_state=True)


def mount_works() -> bool:
    unshare = shutil.which("unshare")
    command = [unshare or "false", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not mount_works(), reason="mounting a small /dev/shm is not allowed here")
def test_one_mebibyte_of_dev_shm_is_enough() -> None:
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && exec {sys.executable} -m tests.helpers.offload_memory"],
        env=rank_environment(0, 1, free_port()),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "/dev/shm holds 1024 KiB" in done.stdout
