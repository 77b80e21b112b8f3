"""Ranks, collectives and seeds."""

import os
import random
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from superoffload import distributed
from superoffload.errors import UserError
from tests.helpers.ranks import REPOSITORY, rank_environment, run_ranks


def communicate() -> dict[str, object]:
    """Call every collective once and return its result on this rank."""
    rank = distributed.rank()
    return {
        "rank": rank,
        "world size": distributed.world_size(),
        "is rank 0": distributed.is_rank_0(),
        "all ok": distributed.all_ranks_ok(True),
        "one not ok": distributed.all_ranks_ok(rank != 1),
        "sum": distributed.all_reduce_sum(torch.tensor([rank, 10.0])).tolist(),
        "sum in float64": distributed.all_reduce_sum(torch.tensor([rank + 1, 10], dtype=torch.float64)).tolist(),
        "gathered": distributed.all_gather_objects({"rank": rank}),
        "broadcast": distributed.broadcast_from_rank_0(f"from {rank}"),
        "peak": distributed.peak_device_bytes(),
    }


def test_collectives_on_two_ranks() -> None:
    first, second = run_ranks(2, communicate)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert (first["is rank 0"], second["is rank 0"]) == (True, False)
    for results in (first, second):
        assert results["world size"] == 2
        assert results["all ok"] is True
        assert results["one not ok"] is False
        assert results["sum"] == [1.0, 20.0]
        assert results["sum in float64"] == [3.0, 20.0]
        assert results["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert results["broadcast"] == "from 0"
        assert results["peak"] == 0


def test_a_process_without_a_launcher_is_a_job_of_one(one_rank: None) -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert distributed.is_rank_0()


@pytest.mark.unit
@pytest.mark.parametrize(("name", "fits"), [("cuda", False), ("cpu", True)])
def test_a_rank_without_a_device_of_its_own_is_told_so(name: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(device_count=lambda: 1, device_name=lambda: name)
    monkeypatch.setattr(distributed, "get_accelerator", lambda: accelerator)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with nullcontext() if fits or rank == "0" else pytest.raises(
            UserError, match=r"LOCAL_RANK=1: this process sees 1 device\(s\) \(CUDA_VISIBLE_DEVICES is 3\)"
        ):  # fmt: skip
            distributed._require_device()


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds_reach_every_generator(one_rank: None) -> None:
    distributed.seed_everything(7, deterministic=False)
    first = draw()
    distributed.seed_everything(7, deterministic=False)
    assert draw() == first
    distributed.seed_everything(8, deterministic=False)
    assert draw() != first


def test_a_captured_rng_state_can_be_restored(one_rank: None) -> None:
    state = distributed.capture_rng_state()
    first = draw()
    assert draw() != first
    distributed.restore_rng_state(state)
    assert draw() == first


def deterministic_mode() -> bool:
    distributed.seed_everything(7, deterministic=True)
    return torch.are_deterministic_algorithms_enabled()


def test_deterministic_mode_is_full_determinism() -> None:
    assert run_ranks(1, deterministic_mode) == [True]


def shared_buffers() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")}


def sum_often() -> float:
    values = torch.ones(4096)
    for _ in range(5):
        distributed.all_reduce_sum(values)
    return float(values.sum())


def test_nothing_stays_in_shared_memory() -> None:
    before = shared_buffers()
    assert run_ranks(2, sum_often) == [4096.0 * 2**5] * 2
    assert shared_buffers() <= before


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-c", "from superoffload import distributed; distributed.init()"],
            env=rank_environment(0, 1, port), cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    *_, last = result.stderr.splitlines()
    assert last.startswith(f"superoffload.errors.UserError: MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: ")
    assert last.endswith("; set MASTER_PORT to a free port")
