"""When memory runs out all the same: say what failed, what was planned, what was in use, and what to change."""

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from superoffload import distributed
from superoffload.checkpoint import manifest
from superoffload.cli import SILENT_RANK_PATIENCE_S
from superoffload.errors import UserError, first_line
from superoffload.log import logger
from superoffload.offload.trainer.process import OptimizerProcessError
from superoffload.planning import machine
from superoffload.planning.forecast import GIB, Forecast

# How torch's allocators, CUDA and the optimizer process say it where they have no type for it.
ON_HOST = re.compile(r"can't allocate memory|Cannot allocate memory|unable to mmap|std::bad_alloc|\bMemoryError\b")
ON_EITHER = re.compile(r"CUDA error: out of memory|cudaErrorMemoryAllocation|ALLOC_FAILED|Cuda failure.*out of memory")
AMOUNT = re.compile(r"[Tt]ried to allocate [0-9.]+ \w+")
DEVICE, HOST = "device memory", "host memory"
EITHER, PROBABLY_HOST = "device memory, or pinned host memory,", "host memory, it seems,"


class MemoryRanOut(UserError):
    """Memory ran out during the run."""

    status = 4


def kind(error: BaseException) -> str | None:
    """Return which memory has run out, as far as an error says it; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return DEVICE
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return HOST
    if isinstance(error, OptimizerProcessError) and error.out_of_memory:
        return PROBABLY_HOST
    if isinstance(error, RuntimeError):
        text = str(error)
        return HOST if ON_HOST.search(text) else EITHER if ON_EITHER.search(text) else None
    return None


@contextmanager
def explained(forecast: Forecast | None, output_dir: str) -> Iterator[None]:
    """Turn an error that says that memory has run out into a table in the log and one line.

    Raises `MemoryRanOut`. Another rank, whose communication breaks then, gives the launcher time to end it, because
    its own error would say nothing of the cause; it raises `UserError` if that does not happen.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError, UserError) as error:
        # A library's error may have become the user's already, e.g. that of a file of weights that cannot be mapped.
        cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
        what = kind(cause)
        if what is not None:
            logger.debug("Memory ran out here", exc_info=True)
            planned = ["The plan was:", *forecast.lines()] if forecast else ["Memory was not known beforehand."]
            happened = f"{what.capitalize()} ran out: {first_line(cause)}"
            logger.error("%s", "\n".join([happened, *planned, "", *measured()]))
            raise MemoryRanOut(_line(what, cause, forecast, output_dir)) from error
        if not distributed.lost_another_rank(error):
            raise
        logger.debug("Another rank has ended", exc_info=True)
        time.sleep(SILENT_RANK_PATIENCE_S)
        raise UserError(f"another rank has ended; see its error ({first_line(error)})") from error


def _line(what: str, error: BaseException, forecast: Forecast | None, output_dir: str) -> str:
    amount = AMOUNT.search(str(error))
    cause = f"t{amount[0][1:]}" if amount else first_line(error).split(". ")[0].rstrip(".")
    place = "host" if what in (HOST, PROBABLY_HOST) else "device"
    change = forecast.advice(place) if forecast else "see docs/memory.md for what needs less"
    return f"{what} ran out ({cause}); {change}; {last_checkpoint(output_dir)}"


def last_checkpoint(output_dir: str) -> str:
    """Say which complete checkpoint the output folder has, and its step."""
    for path in manifest.complete_checkpoints(Path(output_dir)):
        if described := manifest.read(path):
            return (
                f"the last complete checkpoint is {path} (step {described['progress']['step']}), which --resume takes"
            )
    return "there is no checkpoint to resume from"


def measured() -> list[str]:
    """Say what is in use now: on this rank's device, by each process of the run on this machine, and on the machine."""
    lines = ["In use at that moment:"]
    with suppress(RuntimeError):  # the driver may answer nothing any more
        lines += _device() if distributed.device().type == "cuda" else []
    lines += [f"  {name}: {size / GIB:.2f} GiB" for name, size in _processes()]
    with suppress(OSError):
        seen = machine.look(devices=())
        lines.append(f"  host: available {seen.host_available_bytes / GIB:.2f} of {seen.host_bytes / GIB:.2f} GiB")
    return lines


def _device() -> list[str]:
    free, total = torch.cuda.mem_get_info()
    sizes = {
        "allocated": torch.cuda.memory_allocated(),
        "allocated at the most": torch.cuda.max_memory_allocated(),
        "reserved by torch": torch.cuda.memory_reserved(),
        "free": free,
        "in all": total,
    }
    return ["  device: " + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in sizes.items())]


def _processes() -> list[tuple[str, int]]:
    """Return every process of this run on this machine, in words, and its resident memory, shared parts included."""
    port, found = os.environ.get("MASTER_PORT"), []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = os.environ if process.pid == os.getpid() else process.environ()
            if port and environment.get("MASTER_PORT") == port and "RANK" in environment:
                role = "rank" if any(word.startswith("--local_rank") for word in process.cmdline()) else "child of rank"
                found.append((f"{role} {environment['RANK']}, process {process.pid}", process.memory_info().rss))
    return found
