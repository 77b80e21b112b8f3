"""Ranks, the collectives that the program calls itself, and seeds."""

import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator

from superoffload import ops
from superoffload.errors import UserError

# A rank may write its share of a large checkpoint for long while the others wait in DeepSpeed's barrier;
# DeepSpeed's own ten minutes would end the run then. DEEPSPEED_TIMEOUT (minutes) still has the last word.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
POLL_S = 0.1


def rank() -> int:
    """Return this process's number among all ranks; 0 where no launcher started it."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of ranks of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def place() -> tuple[int, int]:
    """Return this rank and the number of ranks."""
    return rank(), world_size()


def speaks() -> bool:
    """Tell whether this rank reports for the whole job."""
    return rank() == 0


def init() -> None:
    """Join the other ranks (collective); a process without a launcher is a job of one rank."""
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    get_accelerator().set_device(local_rank())
    ops.prepare()  # on the CPU, joining compiles one
    chosen = {} if "DEEPSPEED_TIMEOUT" in os.environ else {"timeout": COLLECTIVE_TIMEOUT}
    deepspeed.init_distributed(verbose=False, **chosen)
    barrier()
    _forget_shared_buffer()


def _forget_shared_buffer() -> None:
    """Take the name of DeepSpeed's buffer between CPU ranks away, now that every rank has mapped it.

    DeepSpeed never does, and 69 MB a rank stay in /dev/shm, that is in memory, for each run there ever was.
    """
    place_and_port = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{rank()}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{place_and_port}").unlink(missing_ok=True)


def close() -> None:
    """Leave the group of ranks once all are ready to (collective): rank 0's end is the end of the store they share."""
    if comm.is_initialized():
        barrier()
        comm.destroy_process_group()


@contextmanager
def each_for_itself(work: str) -> Iterator[None]:
    """Let every rank do a long piece of work, then wait for all, without a collective: nothing times out.

    The ranks tell each other through the store that brought them together. Where one of them fails, the others
    raise `UserError` instead of waiting for it.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    prefix = f"superoffload/{work}"
    try:
        yield
    except BaseException:
        store.set(f"{prefix}/failed", str(rank()))
        raise
    try:
        store.set(f"{prefix}/{rank()}", "done")
        while not store.check([f"{prefix}/{other}" for other in range(world_size())]):
            if store.check([f"{prefix}/failed"]):
                raise UserError(f"{work}: rank {store.get(f'{prefix}/failed').decode()} failed, see its message")
            time.sleep(POLL_S)
    except torch.distributed.DistError as error:  # the store is gone with the rank that held it
        raise UserError(f"{work}: rank 0 has ended, see its message") from error


def device() -> torch.device:
    """Return the device this rank computes on."""
    return torch.device(get_accelerator().current_device_name())


def barrier() -> None:
    """Wait for all ranks (collective)."""
    comm.barrier()


def total(values: torch.Tensor) -> torch.Tensor:
    """Add a tensor up over all ranks, in place, on the device (collective); returns it."""
    comm.all_reduce(values)
    return values


def counts(*mine: float) -> torch.Tensor:
    """Add counts up over all ranks, left on the device: float64 `[number of counts]` (collective)."""
    return total(torch.tensor(mine, dtype=torch.float64, device=device()))


def agree(ok: bool) -> bool:
    """Tell every rank whether all of them said yes (collective)."""
    answer = torch.tensor([0.0 if ok else 1.0], device=device())
    return bool(total(answer).item() == 0)


def gather(mine: Any) -> list[Any]:
    """Give every rank a list of what each rank holds, any picklable object, in the order of ranks (collective)."""
    everyone: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def of_rank_0(value: Any) -> Any:
    """Give every rank the picklable object that rank 0 holds (collective)."""
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def peak_device_bytes() -> int:
    """Return the most device memory that torch held on any rank (collective); 0 where the device is the CPU."""
    accelerator = get_accelerator()
    mine = 0 if accelerator.device_name() == "cpu" else accelerator.max_memory_allocated()
    largest = torch.tensor([mine], dtype=torch.int64, device=device())
    comm.all_reduce(largest, op=comm.ReduceOp.MAX)
    return int(largest.item())


def random_state() -> dict[str, Any]:
    """Take down the state of every random number generator of this rank."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every random number generator of this rank where `random_state` found it."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_accelerator().set_rng_state(state["device"])


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch; with `deterministic` allow deterministic kernels only."""
    if deterministic:
        from transformers import enable_full_determinism

        enable_full_determinism(seed)
        torch.backends.cudnn.benchmark = False
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)
