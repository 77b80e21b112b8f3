"""Is it faster to speculate during backward, or to step after it? Measured, because it depends on idle cores.

A speculation computes every update twice, in S and later in P, M and V. That is free on idle cores. Where the trainer
computes on the same cores, as on the CPU accelerator, it takes their time from backward and forward, and a step on all
cores while the trainer waits is often cheaper. Both ways give the same numbers, so rounds are timed in both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from logging import getLogger

_log = getLogger(__name__)

WARM_UP_ROUNDS = 4
"""Rounds before the first trial: they allocate memory and compile."""

BLOCK_ROUNDS = 4
"""Rounds in a row of one way in a trial: the commits of a round that speculates run in the next one."""

TRIAL = (True, False, False, True)
"""Which blocks of a trial speculate; in this order, a machine that slowly becomes faster favours neither way."""

ROUNDS_BETWEEN_TRIALS = 240
MARGIN = 0.01
"""A choice is changed if the other way takes less time by this share."""


class SpeculationTrials:
    """Times rounds of both ways in short trials; between trials, uses the faster one."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin with speculation, and with a trial after the warm-up; `clock` returns seconds."""
        self._clock = clock
        self._chosen = True
        self._round = -WARM_UP_ROUNDS
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._started = clock()

    @property
    def speculate(self) -> bool:
        """Return whether to speculate in this round."""
        block = self._round // BLOCK_ROUNDS
        return TRIAL[block] if 0 <= block < len(TRIAL) else self._chosen

    def end_round(self, *, counts: bool) -> None:
        """Record how long this round took, if it `counts` as one of its way, and begin the next."""
        now = self._clock()
        in_trial = 0 <= self._round < BLOCK_ROUNDS * len(TRIAL)
        if counts and in_trial:
            self._times[self.speculate].append(now - self._started)
        self._started = now
        self._round += 1
        if self._round == BLOCK_ROUNDS * len(TRIAL):
            self._choose()
        elif self._round == BLOCK_ROUNDS * len(TRIAL) + ROUNDS_BETWEEN_TRIALS:
            self._round = 0

    def _choose(self) -> None:
        times, self._times = self._times, {True: [], False: []}
        if not all(times.values()):  # every step was clipped, so that none speculated
            return
        typical = {way: statistics.median_low(found) for way, found in times.items()}
        if typical[not self._chosen] < (1 - MARGIN) * typical[self._chosen]:
            self._chosen = not self._chosen
        _log.debug(
            "a round takes %.3f s with speculation and %.3f s without: it is %s",
            typical[True],
            typical[False],
            "on" if self._chosen else "off",
        )
