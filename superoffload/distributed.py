"""Ranks, the collectives that the program calls itself, and seeds."""

import os
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator

from superoffload.errors import UserError, first_line
from superoffload.offload import operators

# How gloo and NCCL say that a rank they communicate with has ended.
LOST_RANK = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|Application timeout caused"
)
# Writing a rank's part of a large checkpoint can take longer than DeepSpeed's default timeout of ten minutes, while the
# other ranks wait in a barrier. DEEPSPEED_TIMEOUT (minutes) overrides this.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
POLL_S = 0.1


def rank() -> int:
    """Return the rank of this process; 0 if no launcher started it."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the rank of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of ranks of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_0() -> bool:
    """Return whether this is rank 0, which reports for the whole job."""
    return rank() == 0


def init() -> None:
    """Join the process group (collective); a process that no launcher started is a job of one rank.

    Raises `UserError` if the ranks cannot meet, for instance because another program uses the port, and on a rank that
    sees no device of its own.
    """
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
    _require_device()
    get_accelerator().set_device(local_rank())
    chosen = {} if "DEEPSPEED_TIMEOUT" in os.environ else {"timeout": COLLECTIVE_TIMEOUT}
    on_cpu = get_accelerator().device_name() == "cpu"  # there DeepSpeed communicates by an operator
    try:
        with operators.compiled("deepspeed_shm_comm") if on_cpu else nullcontext():
            deepspeed.init_distributed(verbose=False, **chosen)
    except torch.distributed.DistNetworkError as error:  # a port in use, an unknown host, no answer
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        remedy = "set MASTER_PORT to a free port" if "EADDRINUSE" in str(error) else "is that the node of rank 0?"
        raise UserError(f"MASTER_ADDR={address} MASTER_PORT={port}: {first_line(error)}; {remedy}") from error
    barrier()
    _forget_shared_buffer()


def _require_device() -> None:
    """Raise `UserError` unless this rank sees the device of its number, as all ranks of a node see the same devices."""
    seen = get_accelerator().device_count()
    if get_accelerator().device_name() == "cuda" and local_rank() >= seen:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise UserError(
            f"LOCAL_RANK={local_rank()}: this process sees {seen} device(s) (CUDA_VISIBLE_DEVICES is {visible}); start "
            "fewer ranks, or let each see all devices of its node: srun needs --gpu-bind=none with --gpus-per-task"
        )


def _forget_shared_buffer() -> None:
    """Unlink the shared buffer of DeepSpeed's CPU ranks, now that every rank has mapped it.

    DeepSpeed never unlinks it, so every run would leave 69 MB per rank in /dev/shm, that is, in memory.
    """
    address = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{rank()}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}").unlink(missing_ok=True)


def close() -> None:
    """Leave the process group together (collective): the store that all ranks share ends with rank 0."""
    if comm.is_initialized():
        barrier()
        comm.destroy_process_group()


@contextmanager
def wait_without_collective(work: str) -> Iterator[None]:
    """Run a long piece of work on every rank, then wait for all of them without a collective, so nothing times out.

    The ranks report through the store of the process group. If one of them fails, the others raise `UserError`
    instead of waiting for it.
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
                raise UserError(f"{work}: rank {store.get(f'{prefix}/failed').decode()} failed; see its error")
            time.sleep(POLL_S)
    except torch.distributed.DistError as error:  # the store ended with rank 0
        raise UserError(f"{work}: rank 0 has ended; see its error") from error


def lost_another_rank(error: BaseException) -> bool:
    """Return whether an error says that another rank, with which this one communicates, has ended."""
    return isinstance(error, RuntimeError) and world_size() > 1 and bool(LOST_RANK.search(str(error)))


def device() -> torch.device:
    """Return the device this rank computes on."""
    return torch.device(get_accelerator().current_device_name())


class HostCopy:
    """A tensor on its way from the device to the host; it arrives once the device has done what was queued before."""

    def __init__(self, values: torch.Tensor) -> None:
        """Queue the copy."""
        self._values = values
        self._arrival: Any = None
        if not get_accelerator().is_synchronized_device():
            self._values = torch.empty(values.shape, dtype=values.dtype).pin_memory()
            self._values.copy_(values, non_blocking=True)
            self._arrival = get_accelerator().Event()
            self._arrival.record()

    def tolist(self) -> Any:
        """Return the values, once they have arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values.tolist()


class Mark:
    """A moment: on the CPU now; on another device, when it has done everything that was queued before."""

    def __init__(self) -> None:
        """Queue the mark, without waiting for it."""
        self._event: Any = None
        if get_accelerator().is_synchronized_device():
            self._at_s = time.perf_counter()
        else:
            self._event = get_accelerator().Event(enable_timing=True)
            self._event.record()

    def seconds_until(self, later: "Mark") -> float:
        """Return the time between two marks in seconds, once the device has reached the later one."""
        if self._event is None:
            return later._at_s - self._at_s
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1000


def barrier() -> None:
    """Wait for all ranks (collective)."""
    comm.barrier()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place, on its device (collective); return it."""
    comm.all_reduce(values)
    return values


def all_ranks_ok(ok: bool) -> bool:
    """Return on every rank whether `ok` is true on all of them (collective)."""
    failures = torch.tensor([0.0 if ok else 1.0], device=device())
    return bool(all_reduce_sum(failures).item() == 0)


def all_gather_objects(value: Any) -> list[Any]:
    """Return on every rank the picklable objects of all ranks, in rank order (collective)."""
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def broadcast_from_rank_0(value: Any) -> Any:
    """Return on every rank the picklable object of rank 0 (collective)."""
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def device_name() -> str:
    """Return the name of the device this rank computes on, e.g. `NVIDIA H200` or `CPU`."""
    accelerator = get_accelerator()
    name = accelerator.device_name()
    return torch.cuda.get_device_name(local_rank()) if name == "cuda" else str(name).upper()


def device_memory() -> dict[str, int]:
    """Return what torch has allocated on this rank's device, now and at most, and all it has; empty on the CPU.

    Reads counters of the host's, so the device is not waited for.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return {}
    return {
        "device_bytes": accelerator.memory_allocated(),
        "device_peak_bytes": accelerator.max_memory_allocated(),
        "device_total_bytes": accelerator.total_memory(),
    }


def peak_device_bytes() -> int:
    """Return the largest peak of device memory that torch allocated on any rank (collective); 0 on the CPU."""
    accelerator = get_accelerator()
    peak = 0 if accelerator.device_name() == "cpu" else accelerator.max_memory_allocated()
    largest = torch.tensor([peak], dtype=torch.int64, device=device())
    comm.all_reduce(largest, op=comm.ReduceOp.MAX)
    return int(largest.item())


def capture_rng_state() -> dict[str, Any]:
    """Capture every RNG state of this rank."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state(),
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Restore every RNG state of this rank from what `capture_rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_accelerator().set_rng_state(state["device"])


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch; with `deterministic`, allow only deterministic kernels."""
    if deterministic:
        from transformers import enable_full_determinism

        enable_full_determinism(seed)
        torch.backends.cudnn.benchmark = False
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)


def seed_rank(seed: int) -> None:
    """Seed torch's random numbers with another seed on each rank, for what must not be the same on all of them."""
    torch.manual_seed(seed + rank())
    get_accelerator().manual_seed_all(seed + rank())
