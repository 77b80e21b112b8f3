"""Host memory per parameter, measured; and no need for /dev/shm."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from offload_ranks import HERE, free_port, rank_environment, run_ranks

MIB = 2**20


def test_bytes_per_parameter(tmp_path: Path) -> None:
    ours = run_ranks("offload_memory:measure", tmp_path, super_offload=True)[0]
    zero = run_ranks("offload_memory:measure", tmp_path, super_offload=False)[0]
    assert ours["planned"] == pytest.approx(18.0, rel=0.01)
    assert ours["arena"] == pytest.approx(18.0, rel=0.01)
    # What stays private on the trainer's side is DeepSpeed's own: weights, gradient accumulation, buckets.
    # ZeRO-Offload has the sixteen bytes of parameters, gradients and moments in there as well.
    assert ours["trainer_private"] <= zero["trainer_private"] - 16.0 + 1.0
    # Scratch and libraries; a copy of the fp32 state would be 100 MiB and more.
    assert ours["worker_private_bytes"] < 200 * MIB


def mount_works() -> bool:
    unshare = shutil.which("unshare")
    command = [unshare or "false", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not mount_works(), reason="mounting a small /dev/shm is not allowed here")
def test_one_mebibyte_of_dev_shm_is_enough(tmp_path: Path) -> None:
    program = f"{sys.executable} {HERE / 'offload_ranks.py'}"
    rank = f"{program} offload_memory:train_a_little {tmp_path / 'out.pt'} '{{}}'"
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && exec {rank}"],
        env=rank_environment(0, 1, free_port()),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert torch.load(tmp_path / "out.pt") == "1024"
