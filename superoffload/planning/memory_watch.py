"""Read the memory in use at each log line, and warn while the host's fills up, before the kernel ends the run."""

import logging
from pathlib import Path

from superoffload import distributed
from superoffload.log import logger
from superoffload.planning import machine
from superoffload.planning.forecast import GIB

LEVELS = (0.90, 0.95)
"""Shares of the machine's memory, or of the limit of this process's cgroups; each is worth one warning."""


def level(used: float) -> int:
    """Return how many of the levels a share in use has reached."""
    return sum(used >= share for share in LEVELS)


class MemoryWatch:
    """Looks at the memory in use, on the first rank of each machine, and warns once for each level of the host's."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Start with no level reached; `root` holds proc/ and sys/."""
        self._root = root
        self._warned = 0
        self._works = distributed.local_rank() == 0

    def check(self) -> dict[str, int]:
        """Return the bytes in use by name, as in `metrics.jsonl`, and warn if a level has been reached since last time.

        Takes less than a millisecond and does not wait for the device. `host_bytes` is what the machine, or the limit
        of this process's cgroups, has in use; `device_bytes` is what torch has allocated on this rank's device.
        """
        if not self._works:
            return {}
        try:
            seen = machine.look(root=self._root, devices=())
        except (OSError, ValueError, LookupError) as error:
            logger.debug("Memory is not watched: %s", error)
            self._works = False
            return {}
        used_bytes = seen.host_bytes - seen.host_available_bytes
        reached = level(used_bytes / seen.host_bytes)
        if reached > self._warned:
            self._warned = reached
            logger.log(
                logging.WARNING if distributed.is_rank_0() else logging.ERROR,  # the other ranks show only errors
                "Host memory: %.1f of %.1f GiB are in use; a run that needs more is killed by the kernel "
                "(docs/memory.md says what needs less)",
                used_bytes / GIB,
                seen.host_bytes / GIB,
            )
        return {"host_bytes": used_bytes, "host_total_bytes": seen.host_bytes, **distributed.device_memory()}
