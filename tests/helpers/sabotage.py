"""Waits that the offload engine needs, each taken away: what the tests of the simulated device must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from deepspeed.accelerator import get_accelerator

from superoffload.offload.trainer import pinning
from superoffload.offload.trainer.bookkeeping import Stage
from superoffload.offload.trainer.coordinator import Coordinator
from superoffload.offload.trainer.dispatch import EventDispatcher
from superoffload.offload.zero3 import service, stepping
from superoffload.offload.zero3.stepping import HostStep

Patches = Iterator[tuple[Any, str, Any]]


def _speculations_wait_for_gradients() -> Patches:
    yield EventDispatcher, "send", lambda self, task: self._process.send(task)


def _decide_waits_for_gradients() -> Patches:
    yield EventDispatcher, "settle", lambda self, relieve: relieve()


def _gradients_wait_for_the_last_commit() -> Patches:
    yield Coordinator, "pump", lambda self: None  # the confirmation may have arrived by luck
    yield Coordinator, "gradient_changes", Coordinator.cancel


def _readers_wait_for_commits() -> Patches:
    yield Coordinator, "flush", lambda self: None


def _uploads_wait_for_the_optimizer_process() -> Patches:
    collect = Coordinator.collect

    def hasty(self: Coordinator, upload: Callable[[int], None]) -> None:
        for work in self._work.values():
            work.stage = Stage.SPECULATED if work.stage is Stage.SPECULATING else work.stage
        collect(self, upload)

    yield Coordinator, "pump", lambda self: None
    yield Coordinator, "collect", hasty


def _staging_is_rewritten_after_its_upload() -> Patches:
    upload = HostStep._upload

    def beside(self: HostStep, zero: Any, sub_group: int) -> None:
        with get_accelerator().stream(get_accelerator().Stream()):
            upload(self, zero, sub_group)

    yield HostStep, "_upload", beside


def _all_gather_waits_for_uploads() -> Patches:
    yield stepping, "_let_all_gather_wait", lambda zero: None


def _pages_are_unlocked_after_the_device_has_finished() -> Patches:
    yield service, "page_unlock", lambda addresses, synchronize: pinning.page_unlock(addresses, lambda: None)


WAITS: Mapping[str, Callable[[], Patches]] = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        _speculations_wait_for_gradients,
        _decide_waits_for_gradients,
        _gradients_wait_for_the_last_commit,
        _readers_wait_for_commits,
        _uploads_wait_for_the_optimizer_process,
        _staging_is_rewritten_after_its_upload,
        _all_gather_waits_for_uploads,
        _pages_are_unlocked_after_the_device_has_finished,
    )
}


@contextmanager
def without(wait: str) -> Iterator[None]:
    """Take one wait away during the block."""
    with ExitStack() as stack:
        for target, name, replacement in WAITS[wait]():
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield
