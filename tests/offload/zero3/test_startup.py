"""What takes time when an engine starts is logged at DEBUG."""

from __future__ import annotations

import logging

from tests.helpers.offload_training import Case, make_engine
from tests.helpers.ranks import run_ranks


class Phases(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("start-up: "):
            self.names.append(record.getMessage().removeprefix("start-up: ").partition(" took ")[0])


def phases() -> list[str]:
    handler, logger = Phases(), logging.getLogger("superoffload.offload")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    engine = make_engine(Case(), True)
    engine.optimizer._service.coordinator.wait_until_ready()
    engine.destroy()
    return handler.names


def test_each_phase_is_logged_once() -> None:
    assert run_ranks(1, phases) == [
        [
            "allocating the arena",
            "copying the weights to the arena",
            "starting the optimizer process",
            "page-locking",
            "loading the optimizer process",
        ]
    ]
