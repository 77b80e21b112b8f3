"""Page-locking, against a CUDA runtime that refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from superoffload.offload.trainer import pinning
from tests.helpers.fake_cuda import Runtime

pytestmark = pytest.mark.unit

TENSORS = [torch.zeros(1000) for _ in range(3)]


def install(monkeypatch: pytest.MonkeyPatch, runtime: Runtime, *, static: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinning, "_loaded_runtimes", lambda: [] if static else [runtime])
    monkeypatch.setattr(torch, "ones", runtime.launch_kernel)


def test_regions_are_locked_and_unlocked_after_the_device_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(capacity=3)
    install(monkeypatch, runtime)
    locked = pinning.page_lock(TENSORS, "cuda")
    assert runtime.registered == {t.data_ptr(): t.nbytes for t in TENSORS}
    locked_while_waiting: list[int] = []
    pinning.page_unlock(locked, lambda: locked_while_waiting.extend(runtime.registered))
    assert locked_while_waiting == locked
    assert runtime.registered == {}


@pytest.mark.parametrize("static", [False, True], ids=["shared library", "linked statically"])
def test_a_region_that_cannot_be_locked_stays_pageable_and_leaves_no_error_behind(
    static: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(capacity=2)
    install(monkeypatch, runtime, static=static)
    locked = pinning.page_lock(TENSORS, "cuda")
    assert locked == [t.data_ptr() for t in TENSORS[:2]]
    runtime.launch_kernel()  # would raise the error of the third region
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "out of memory (2)" in record.message
    assert static or "cudaErrorMemoryAllocation" in record.message


def test_nothing_is_locked_for_another_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DS_ACCELERATOR=cpu on a machine with GPUs, CUDA is available, but no context may be opened."""
    runtime = Runtime(capacity=3)
    install(monkeypatch, runtime)
    assert pinning.page_lock(TENSORS, "cpu") == []
    pinning.page_unlock([], lambda: pytest.fail("nothing was locked, so there is nothing to wait for"))
    assert runtime.registered == {}


def test_pages_of_a_device_that_has_failed_are_unlocked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(capacity=3)
    install(monkeypatch, runtime)
    locked = pinning.page_lock(TENSORS, "cuda")

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runtime.registered.pop(locked[0])
    pinning.page_unlock(locked, fail)
    assert runtime.registered == {}
    assert "illegal memory access" in caplog.text and "unlocking pages failed" in caplog.text
    runtime.launch_kernel()


def test_no_runtime_library_is_found_where_none_is_loaded() -> None:
    expected = "libcudart" in Path("/proc/self/maps").read_text()
    assert bool(pinning._loaded_runtimes()) == expected


def test_a_runtime_whose_file_was_replaced_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = "7f00-7f01 r-xp 00000000 08:01 42   /no/such/libcudart.so.12 (deleted)\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: maps)
    assert pinning._loaded_runtimes() == []
