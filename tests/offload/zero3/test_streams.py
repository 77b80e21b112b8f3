"""Order between streams and the host, on an accelerator whose calls are recorded."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from superoffload.offload.settings import OffloadSettings
from superoffload.offload.shared.affinity import CoreSplit
from superoffload.offload.shared.messages import Task, TaskKind
from superoffload.offload.zero3 import service, transfers
from superoffload.offload.zero3.transfers import Transfers
from tests.helpers.fake_cuda import Accelerator

pytestmark = pytest.mark.unit


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    made = Accelerator()
    for module in (service, transfers):
        monkeypatch.setattr(module, "get_accelerator", lambda: made)
    return made


def test_events_block_instead_of_spinning(accelerator: Accelerator) -> None:
    copies = Transfers()
    assert copies.record().blocking
    accelerator.events_can_block = False
    assert not copies.record().blocking
    assert [what for what, _ in accelerator.calls] == ["record"] * 2


def test_a_rank_on_its_third_device_uses_that_device_alone(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    process: Any = SimpleNamespace(
        belongs_to_this_process=True, close=lambda: None, send=lambda *_, **__: None, receive=lambda *_: None
    )
    locked: list[Any] = []
    started: list[str] = []

    def start(setup: Any, arena_fd: int) -> Any:
        started.append("process")
        return process

    monkeypatch.setattr(service, "OptimizerProcess", start)
    monkeypatch.setattr(service, "_split_cores_of_this_rank", lambda _: CoreSplit(trainer=(0,), optimizer=(1,)))
    monkeypatch.setattr(service.OptimizerService, "_worker_setup", lambda *_, **__: None)

    def page_lock(*arguments: Any) -> list[int]:
        started.append("page-locking")
        locked.append(arguments)
        return [4096]

    monkeypatch.setattr(service, "page_lock", page_lock)
    monkeypatch.setattr(service, "page_unlock", lambda addresses, synchronize: synchronize())
    zero: Any = SimpleNamespace(
        offload_optimizer_pin_memory=True,
        fp16_groups=[["a parameter"]],
        sub_group_to_group_id={0: 0},
        optimizer=SimpleNamespace(defaults={"betas": (0.9, 0.99)}, param_groups=[]),
    )
    arena = SimpleNamespace(transferred=lambda: ["G", "S"])
    parts: Any = SimpleNamespace(arena=arena, hand_over=nullcontext, host={0: None})
    accelerator.set_device(2)
    made = service.OptimizerService(OffloadSettings(bind_trainer=False), 0.5)
    made.start(zero, parts)
    assert made.coordinator.trials is not None  # both processes use the same cores
    assert started == ["process", "page-locking"]  # the process loads while pages are being locked
    assert locked == [(["G", "S"], "cuda")]
    made.coordinator.settle()
    assert [what for what, _ in accelerator.calls] == ["record", "synchronize"]
    made.coordinator.send_speculation(Task(kind=TaskKind.SPECULATE))
    made.close()
    assert accelerator.calls[-1] == ("synchronize device", 2)
    assert accelerator.contexts == {2}


def test_an_engine_whose_device_has_failed_is_closed(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(service, "_split_cores_of_this_rank", lambda _: CoreSplit(trainer=(0,), optimizer=(1,)))
    made = service.OptimizerService(OffloadSettings(), 0.5)
    coordinator: Any = SimpleNamespace(statistics=None, has_uncommitted=False)
    made._coordinator, made._finalizer = coordinator, lambda: ended.append("process")  # type: ignore[assignment]

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(made.transfers, "synchronize", fail)
    made.close()
    assert ended == ["process"] and not made.is_running and "illegal memory access" in caplog.text


def test_pages_are_unlocked_after_the_optimizer_process_and_the_dispatcher_have_ended() -> None:
    ended: list[str] = []
    process: Any = SimpleNamespace(belongs_to_this_process=True, close=lambda: ended.append("process"))
    dispatcher: Any = SimpleNamespace(close=lambda: ended.append("dispatcher"))
    service._shut_down(process, dispatcher, lambda: ended.append("pages"), False)
    assert ended == ["dispatcher", "process", "pages"]
