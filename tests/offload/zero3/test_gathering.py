"""Gathers wait for the uploads of the sub-groups that they read, and for no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from superoffload.offload.zero3 import transfers
from superoffload.offload.zero3.gathering import GatherGate
from superoffload.offload.zero3.optimizer import SharedMemorySuperOffload
from superoffload.offload.zero3.transfers import Transfers
from tests.helpers.fake_cuda import Accelerator, Event

pytestmark = pytest.mark.unit


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    made = Accelerator()
    monkeypatch.setattr(transfers, "get_accelerator", lambda: made)
    return made


class Model:
    """Parameters 0 and 1 in sub-group 0, parameter 2 in sub-group 1, parameter 3 frozen; notes what is gathered."""

    def __init__(self) -> None:
        self.gathered: list[tuple[str, Any, dict[str, Any]]] = []
        self.params: list[Any] = [SimpleNamespace(ds_id=i) for i in range(4)]
        for param in self.params:
            param.all_gather = lambda params=None, **options: self.gathered.append(("all", params, options))
            param.all_gather_coalesced = lambda params, **options: self.gathered.append(("coalesced", params, options))
        self.zero: Any = SimpleNamespace(
            module=SimpleNamespace(parameters=lambda: self.params),
            fp16_groups=[self.params[:2], self.params[2:3]],
            persistent_parameters=self.params[:1],
        )


def upload(copies: Transfers, accelerator: Accelerator) -> dict[int, Event]:
    """Upload two sub-groups; return the event of each."""
    copies.begin_uploads()
    for sub_group in (0, 1):
        with copies.uploading(sub_group):
            assert accelerator.current_stream() is not accelerator.default
    _, first, second = (event for what, event in accelerator.calls if what == "record")
    return {0: first, 1: second}


def waited(accelerator: Accelerator) -> list[Any]:
    events = [event for what, event in accelerator.default.calls if what == "wait_event"]
    accelerator.default.calls.clear()
    return events


def test_uploads_follow_the_readers_of_the_old_weights(accelerator: Accelerator) -> None:
    copies = Transfers()
    events = upload(copies, accelerator)
    copy_stream = events[0].recorded_on
    assert copy_stream is not None and copy_stream is not accelerator.default
    assert copy_stream.calls == [("wait_stream", accelerator.default)]


def test_a_gather_waits_for_its_own_sub_groups(accelerator: Accelerator) -> None:
    model, copies = Model(), Transfers()
    GatherGate(copies).install(model.zero)
    events = upload(copies, accelerator)
    frozen, first = model.params[3], model.params[0]
    first.all_gather()
    assert waited(accelerator) == [events[0]]
    first.all_gather(param_list=model.params[2:3], async_op=True)
    assert waited(accelerator) == [events[1]]
    frozen.all_gather_coalesced(iter([frozen, first]), quantize=False)
    assert waited(accelerator) == [events[0]]
    frozen.all_gather_coalesced([frozen])
    assert waited(accelerator) == []
    assert model.gathered == [
        ("all", None, {}),
        ("all", [model.params[2]], {"async_op": True}),
        ("coalesced", [frozen, first], {"quantize": False}),
        ("coalesced", [frozen], {}),
    ]


def test_a_sub_group_of_the_device_share_waits_for_the_work_before_the_uploads(accelerator: Accelerator) -> None:
    copies = Transfers()
    copies.begin_uploads()
    with copies.uploading(1):
        pass
    before, _ = (event for what, event in accelerator.calls if what == "record")
    copies.wait_for_uploads([0])
    assert waited(accelerator) == [before]


def test_nothing_waits_for_uploads_that_the_host_has_waited_for(accelerator: Accelerator) -> None:
    copies = Transfers()
    upload(copies, accelerator)
    copies.synchronize()
    copies.wait_for_uploads([0, 1, 2])
    assert waited(accelerator) == []


def test_small_parameters_are_not_gathered_before_all_uploads_have_ended(accelerator: Accelerator) -> None:
    model, gate = Model(), GatherGate(Transfers())
    with gate.holding_persistent_parameters_back(model.zero):
        assert model.zero.persistent_parameters == []
    assert model.zero.persistent_parameters == model.params[:1]


def test_the_functions_of_parameters_are_restored(accelerator: Accelerator) -> None:
    model, gate = Model(), GatherGate(Transfers())
    before = [(p.all_gather, p.all_gather_coalesced) for p in model.params]
    gate.install(model.zero)
    assert all(p.all_gather is not plain for p, (plain, _) in zip(model.params, before, strict=True))
    gate.remove()
    assert [(p.all_gather, p.all_gather_coalesced) for p in model.params] == before


def test_an_accelerator_without_streams_needs_no_gate(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "is_synchronized_device", lambda: True)
    model, copies = Model(), Transfers()
    gate = GatherGate(copies)
    plain = model.params[0].all_gather
    gate.install(model.zero)
    copies.begin_uploads()
    with copies.uploading(0), gate.holding_persistent_parameters_back(model.zero):
        assert model.zero.persistent_parameters == model.params[:1]
    assert model.params[0].all_gather is plain and accelerator.calls == []


@pytest.mark.parametrize("own", [True, False])
def test_a_reader_from_outside_waits_for_uploads(own: bool) -> None:
    calls: list[str] = []
    optimizer: Any = object.__new__(SharedMemorySuperOffload)
    optimizer._partitions = SimpleNamespace(in_own_access=own, weights=["weights"])
    optimizer._service = SimpleNamespace(transfers=SimpleNamespace(synchronize=lambda: calls.append("synchronize")))
    assert optimizer.fp16_partitioned_groups_flat == ["weights"]
    assert calls == ([] if own else ["synchronize"])


def test_states_are_moved_after_every_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    optimizer: Any = object.__new__(SharedMemorySuperOffload)
    optimizer._service = SimpleNamespace(flush=lambda: calls.append("flush"))
    monkeypatch.setattr(DeepSpeedZeroOptimizer_Stage3, "offload_states", lambda _, *a, **k: calls.append((a, k)))
    optimizer.offload_states(["lp_params"], pin_memory=False)
    assert calls == ["flush", ((["lp_params"],), {"pin_memory": False})]
