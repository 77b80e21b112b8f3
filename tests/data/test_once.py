"""Two ranks, one slow tokenizer, and collectives that time out sooner: nobody waits in one."""

import multiprocessing
import os
import socket
import time
from datetime import timedelta

import pytest

COLLECTIVE_TIMEOUT_S = 2
TOKENISING_S = 4


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def one_rank(name, env, results):
    os.environ.update(env)
    import datasets
    import torch

    from superoffload import distributed
    from superoffload.config import DataSettings
    from superoffload.data import cache
    from superoffload.errors import UserError
    from tests.data.conftest import make_tokenizer

    datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE.__class__(env["HF_DATASETS_CACHE"])
    tokenised_here = []
    encode = cache.Encoder.__call__

    def slowly(self, conversation):
        tokenised_here.append(1)
        time.sleep(float(env["DELAY"]))
        return encode(self, conversation)

    cache.Encoder.__call__ = slowly
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    try:
        with distributed.each_for_itself("tokenising"):
            request = cache.Request(name=env.get("NAME", name), split="train")
            rows = cache.tokenised(request, make_tokenizer(), DataSettings())
    except UserError as error:
        results.put((env["RANK"], str(error)))
        return
    total = torch.tensor([len(rows)])
    torch.distributed.all_reduce(total)
    results.put((env["RANK"], int(total), bool(tokenised_here)))
    torch.distributed.destroy_process_group()


def run(name, envs):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        context.Process(target=one_rank, args=(name, {**shared, "RANK": str(rank), **env}, results))
        for rank, env in enumerate(envs)
    ]
    for process in processes:
        process.start()
    try:
        return sorted(results.get(timeout=90) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


@pytest.mark.parametrize("nodes", [1, 2])
def test_no_collective_waits_on_tokenising(jsonl, tmp_path, nodes):
    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(10)]
    delay = str(TOKENISING_S / len(rows))
    if nodes == 1:  # rank 0 tokenises for both
        envs = [{"LOCAL_RANK": str(rank), "HF_DATASETS_CACHE": str(tmp_path), "DELAY": delay} for rank in (0, 1)]
    else:  # each machine has its cache, and one of them is slow
        envs = [
            {"LOCAL_RANK": "0", "HF_DATASETS_CACHE": str(tmp_path / str(rank)), "DELAY": delay if rank else "0"}
            for rank in (0, 1)
        ]
    assert run(jsonl(rows), envs) == [("0", 20, True), ("1", 20, nodes == 2)]


def test_a_machine_that_fails_does_not_leave_the_others_waiting(jsonl, tmp_path):
    envs = [
        {
            "LOCAL_RANK": "0",
            "HF_DATASETS_CACHE": str(tmp_path / str(rank)),
            "DELAY": "0",
            **({"NAME": "./missing.json"} if rank == 0 else {}),
        }
        for rank in (0, 1)
    ]
    answers = dict(run(jsonl([{"prompt": "q", "completion": "a"}]), envs))
    assert "no such file" in answers["0"]
    assert answers["1"].startswith("tokenising: rank 0 ")  # which holds the store, and may be gone by now
