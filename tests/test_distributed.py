import os
import random
from pathlib import Path

import numpy as np
import torch

from superoffload import distributed
from tests.ranks import run_ranks


def ask() -> dict[str, object]:
    rank, ranks = distributed.place()
    return {
        "rank": rank,
        "ranks": ranks,
        "agree": distributed.agree(True),
        "one says no": distributed.agree(rank != 1),
        "total": distributed.total(torch.tensor([rank, 10.0])).tolist(),
        "counts": distributed.counts(rank + 1, 10).tolist(),
        "gather": distributed.gather({"rank": rank}),
        "of rank 0": distributed.of_rank_0(f"said by {rank}"),
        "peak": distributed.peak_device_bytes(),
    }


def test_collectives_on_two_ranks() -> None:
    first, second = run_ranks(2, ask)
    assert (first["rank"], second["rank"]) == (0, 1)
    for answer in (first, second):
        assert answer["ranks"] == 2
        assert answer["agree"] is True
        assert answer["one says no"] is False
        assert answer["total"] == [1.0, 20.0]
        assert answer["counts"] == [3.0, 20.0]
        assert answer["gather"] == [{"rank": 0}, {"rank": 1}]
        assert answer["of rank 0"] == "said by 0"
        assert answer["peak"] == 0


def test_a_process_without_a_launcher_is_a_job_of_one(one_rank: None) -> None:
    assert distributed.place() == (0, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert distributed.speaks()


def test_seeds_reach_every_generator(one_rank: None) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    distributed.seed_everything(7, deterministic=False)
    first = draw()
    distributed.seed_everything(7, deterministic=False)
    assert draw() == first
    distributed.seed_everything(8, deterministic=False)
    assert draw() != first


def deterministic_mode() -> bool:
    distributed.seed_everything(7, deterministic=True)
    return torch.are_deterministic_algorithms_enabled()


def test_deterministic_mode_is_full_determinism() -> None:
    assert run_ranks(1, deterministic_mode) == [True]


def buffers() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")}


def add_up_often() -> float:
    values = torch.ones(4096)
    for _ in range(5):
        distributed.total(values)
    return float(values.sum())


def test_nothing_stays_in_shared_memory() -> None:
    before = buffers()
    assert run_ranks(2, add_up_often) == [4096.0 * 2**5] * 2
    assert buffers() <= before
