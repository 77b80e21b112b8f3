"""Warn while the host's memory fills up, before the kernel ends the run."""

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


class HostWatch:
    """Looks at the host's memory, on the first rank of each machine, and warns once for each level."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Start with no level reached; `root` holds proc/ and sys/."""
        self._root = root
        self._warned = len(LEVELS) if distributed.local_rank() else 0

    def check(self) -> None:
        """Warn if a level has been reached since the last call; takes less than a millisecond."""
        if self._warned == len(LEVELS):
            return
        try:
            seen = machine.look(root=self._root, devices=())
        except (OSError, ValueError, LookupError) as error:
            logger.debug("Host memory is not watched: %s", error)
            self._warned = len(LEVELS)
            return
        used_bytes = seen.host_bytes - seen.host_available_bytes
        reached = level(used_bytes / seen.host_bytes)
        if reached > self._warned:
            self._warned = reached
            logger.log(
                logging.WARNING if distributed.is_rank_0() else logging.ERROR,  # the other ranks log only errors
                "Host memory: %.1f of %.1f GiB are in use; a run that needs more is killed by the kernel "
                "(docs/memory.md says what needs less)",
                used_bytes / GIB,
                seen.host_bytes / GIB,
            )
