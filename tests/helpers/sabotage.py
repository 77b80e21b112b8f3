"""Waits that the offload engine needs, each taken away: what the tests of the simulated device must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator

from superoffload.offload.trainer import pinning
from superoffload.offload.trainer.bookkeeping import Stage
from superoffload.offload.trainer.coordinator import Coordinator
from superoffload.offload.trainer.dispatch import EventDispatcher
from superoffload.offload.zero3 import gradients, service
from superoffload.offload.zero3.gradients import HostGradients
from superoffload.offload.zero3.optimizer import SharedMemorySuperOffload
from superoffload.offload.zero3.transfers import Transfers

Patches = Iterator[tuple[Any, str, Any]]


def _speculations_wait_for_gradients() -> Patches:
    yield EventDispatcher, "send", lambda self, task: self._process.send(task)


def _decide_waits_for_gradients() -> Patches:
    yield Transfers, "synchronize", lambda self: None  # step() waits too, for the norms
    yield EventDispatcher, "settle", lambda self, relieve: relieve()
    yield from _steps_wait_for_copies()  # which waits for the same


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
    @contextmanager
    def beside(self: Transfers, sub_group: int) -> Iterator[None]:
        with get_accelerator().stream(get_accelerator().Stream()):
            yield

    yield Transfers, "uploading", beside


def _gathers_wait_for_uploads() -> Patches:
    yield Transfers, "wait_for_uploads", lambda self, sub_groups: None


def _gathers_wait_for_steps_on_the_device() -> Patches:
    wait = Transfers.wait_for_uploads

    def for_uploads_alone(self: Transfers, sub_groups: Iterable[int]) -> None:
        wait(self, self._uploads.keys() & sub_groups)

    yield Transfers, "wait_for_uploads", for_uploads_alone


def _uploads_wait_for_readers_of_the_old_weights() -> Patches:
    yield Transfers, "begin_uploads", lambda self: None


def _copies_wait_for_gradients() -> Patches:
    downloading = Transfers.downloading

    @contextmanager
    def early(self: Transfers, sources: Iterable[torch.Tensor]) -> Iterator[None]:
        with mock.patch.object(type(self._stream), "wait_stream", lambda self, other: None), downloading(self, sources):
            yield

    yield Transfers, "downloading", early


def _gradients_are_kept_until_they_are_copied() -> Patches:
    downloading = Transfers.downloading

    def forgetting(self: Transfers, sources: Iterable[torch.Tensor]) -> Any:
        return downloading(self, ())

    yield Transfers, "downloading", forgetting


def _buckets_are_filled_again_after_their_copies() -> Patches:
    yield gradients, "_outside_buckets", lambda zero, partition: partition


def _steps_wait_for_copies() -> Patches:
    yield SharedMemorySuperOffload, "step", _without_synchronizing(SharedMemorySuperOffload.step)


def _accumulation_is_finished_on_the_copy_stream() -> Patches:
    yield HostGradients, "finishing_accumulation", lambda self: nullcontext()


def _accumulation_waits_for_gradients() -> Patches:
    yield HostGradients, "fill_accumulation_buffers", _without_synchronizing(HostGradients.fill_accumulation_buffers)


def _readers_wait_for_gradients() -> Patches:
    yield service.OptimizerService, "flush", _without_synchronizing(service.OptimizerService.flush)


def _without_synchronizing(function: Callable[..., Any]) -> Callable[..., Any]:
    def hasty(*args: Any) -> Any:
        with mock.patch.object(Transfers, "synchronize", lambda self: None):
            return function(*args)

    return hasty


def _pages_are_unlocked_after_the_device_has_finished() -> Patches:
    yield Transfers, "synchronize", lambda self: None  # close() waits too; an optimizer that is collected does not
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
        _gathers_wait_for_uploads,
        _gathers_wait_for_steps_on_the_device,
        _uploads_wait_for_readers_of_the_old_weights,
        _copies_wait_for_gradients,
        _gradients_are_kept_until_they_are_copied,
        _buckets_are_filled_again_after_their_copies,
        _steps_wait_for_copies,
        _accumulation_is_finished_on_the_copy_stream,
        _accumulation_waits_for_gradients,
        _readers_wait_for_gradients,
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
