"""What is recorded: the tasks that the coordinator has sent, and how long start-up took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from logging import getLogger

from ..shared.messages import AdamHyper

_log = getLogger(__name__)


@contextmanager
def startup_phase(name: str) -> Iterator[None]:
    """Log at DEBUG how long the block took."""
    started = time.perf_counter()
    yield
    _log.debug("start-up: %s took %.2f s", name, time.perf_counter() - started)


class Stage(Enum):
    """How far one sub-group has come in this round."""

    SPECULATING = "speculating"
    SPECULATED = "speculated"
    STEPPING = "stepping"
    STEPPED = "stepped"


@dataclass(slots=True, kw_only=True)
class Work:
    """What was requested for one sub-group in this round; `version` 0 marks a step without speculation."""

    version: int
    hyper: AdamHyper
    anchor_step: int
    factor: float
    stage: Stage


@dataclass(slots=True)
class Statistics:
    """Counts since the start, and times in seconds.

    speculated, accepted, refused, cancelled: speculations. stepped_in_turn: speculations that became steps because
    the norm was known before their turn. stepped_on_request: steps without an accepted speculation.
    steps, clipped_steps, discarded_rounds: rounds by their end.
    stepping_rounds: steps in rounds in which the trials had chosen not to speculate (trials.py).
    wait_s: the trainer's exposed wait for new weights in step(). commit_wait_s: its wait, during backward or
    before a read, for the commits of the last step. upload_s: copies of new weights to the device for which the
    trainer waited in step(); 0 on an accelerator with streams. busy_s: work in the optimizer process, by kind of reply.
    """

    speculated: int = 0
    accepted: int = 0
    refused: int = 0
    stepped_in_turn: int = 0
    stepped_on_request: int = 0
    cancelled: int = 0
    steps: int = 0
    clipped_steps: int = 0
    discarded_rounds: int = 0
    stepping_rounds: int = 0
    wait_s: float = 0.0
    commit_wait_s: float = 0.0
    upload_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)
