"""Inputs of layers on the host: the same gradients bit for bit, no race on a device with streams, memory reused."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from superoffload.data.collate import collate
from superoffload.errors import UserError
from superoffload.model import recomputation
from superoffload.model.head import summed_loss
from superoffload.model.recomputation import HostStates, buffer_bytes
from tests.helpers.async_device import AsyncDevice, Stream
from tests.helpers.packs import PACKED, PACKS, document, tiny

pytestmark = pytest.mark.unit

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "gemma2": {"head_dim": 8},
}
MICRO_BATCHES = [PACKS, PACKS[:1], PACKS]  # of two lengths
LAYERS = 4


def model_with(where: str, kind: str = "llama", **changes: Any) -> Any:
    model = tiny(kind, "eager", num_hidden_layers=LAYERS, **{**KINDS[kind], **changes})
    recomputation.enable(model, where)
    return model.train()


def host_states(model: Any) -> HostStates:
    """Return what keeps the inputs of a model's layers."""
    states: HostStates = model.model.layers[0]._gradient_checkpointing_func.__self__
    return states


def loss_of(model: Any, packs: Any = PACKS) -> torch.Tensor:
    inputs = collate(packs, len(packs), PACKED).inputs
    labels = inputs.pop("labels")
    return summed_loss(model(**inputs).logits, labels)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Accumulate over micro-batches, with an evaluation after the first."""
    for number, packs in enumerate(MICRO_BATCHES):
        loss_of(model, packs).backward()  # type: ignore[no-untyped-call]
        if number == 0:
            model.eval()
            with torch.no_grad():
                loss_of(model)
            model.train()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_equal_bit_for_bit(kind: str) -> None:
    plain = gradients(model_with("none", kind))
    assert_same(gradients(model_with("full", kind)), plain)
    model = model_with("offload", kind)
    assert_same(gradients(model), plain)
    assert len(host_states(model)._free) == LAYERS  # so it ran, and every buffer is free again


def test_nothing_is_kept_without_gradients_and_without_training() -> None:
    model = model_with("offload")
    with torch.no_grad():
        loss_of(model)
    loss_of(model.eval())
    assert host_states(model)._free == []


def test_buffers_are_reused_and_rounded_up() -> None:
    model = model_with("offload")
    states = host_states(model)
    with mock.patch.object(HostStates, "allocate", autospec=True, side_effect=HostStates.allocate) as allocate:
        for length in (136, 144, 40):  # 136 tokens need 17 KiB
            loss_of(model, [[document(length, 1)]]).backward()  # type: ignore[no-untyped-call]
    assert allocate.call_count == LAYERS
    assert [buffer.numel() for buffer in states._free] == [18 * 1024] * LAYERS
    loss_of(model, [[document(136, 1)]] * 2)  # larger buffers replace them, and a graph that is dropped gives them back
    assert [buffer.numel() for buffer in states._free] == [36 * 1024] * LAYERS
    assert all(size <= buffer_bytes(size) <= size * 9 / 8 for size in (1, 7, 8, 9, 1000, 2**20, 2**20 + 1))


def test_backward_may_run_twice() -> None:
    model = model_with("offload")
    loss = loss_of(model)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()  # type: ignore[no-untyped-call]
    assert_same({name: p.grad for name, p in model.named_parameters()}, {name: 2 * g for name, g in once.items()})


def test_frozen_embeddings_do_not_keep_inputs_from_the_host() -> None:
    model = model_with("offload")
    model.get_input_embeddings().weight.requires_grad_(False)
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    assert len(host_states(model)._free) == LAYERS


def test_what_has_no_gradient_stays_where_it_is() -> None:
    states = HostStates()
    mask, hidden = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True) * 2
    out = states.checkpoint(lambda x, m: x * m * x, hidden, mask)
    assert len(states._free) == 0
    out.sum().backward()
    assert len(states._free) == 1


def test_a_model_whose_inputs_stay_on_the_device_is_named_once(caplog: Any) -> None:
    states, hidden = HostStates(), torch.ones(2, 3, requires_grad=True) * 2
    for _ in range(2):
        states.checkpoint(partial(lambda hidden: hidden * hidden, hidden=hidden))
    states.checkpoint(lambda x: x * x, hidden)
    assert [record.getMessage() for record in caplog.records if "stay on the device" in record.getMessage()] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("layers", [1, 2])
def test_a_layer_that_changes_its_input_is_noticed(layers: int) -> None:
    states, hidden = HostStates(), torch.ones(2, 3, requires_grad=True) * 2

    def run(hidden: torch.Tensor) -> None:
        for _ in range(layers):
            hidden = states.checkpoint(lambda x: x.mul_(2) * x, hidden)
        hidden.sum().backward()  # type: ignore[no-untyped-call]

    with pytest.raises(RuntimeError, match="a layer has changed its input in place"):
        run(hidden)


@pytest.mark.parametrize("seed", range(3))
def test_no_race_on_a_device_with_streams(seed: int) -> None:
    expected = gradients(model_with("full"))
    model = model_with("none")
    with AsyncDevice(seed, delay_s=0.0) as device:
        recomputation.enable(model, "offload")
        found = gradients(model)
    assert device.hazards == []
    assert_same(found, expected)
    steps = len(MICRO_BATCHES)
    assert device.counts["to host"] == LAYERS * steps
    assert device.counts["from host"] == (LAYERS - 1) * steps  # the last input has not left the device


@contextmanager
def no_wait_before(copies: str) -> Iterator[None]:
    """Take away the wait of the copies to one place for what was queued before; the other place's keep theirs."""
    copy = recomputation._Kept._copy

    def hasty(self: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        waits = Stream.wait_stream if (target is self._on_host) != (copies == "to the host") else lambda *_: None
        with mock.patch.object(Stream, "wait_stream", waits):
            copy(self, target, source)

    with mock.patch.object(recomputation._Kept, "_copy", hasty):
        yield


@contextmanager
def no_wait_in(method: str) -> Iterator[None]:
    """Take away the wait of the current stream for a copy, in one of the methods."""
    original: Callable[..., Any] = getattr(recomputation._Kept, method)

    def hasty(self: Any) -> Any:
        with mock.patch.object(recomputation._Kept, "_wait", lambda _: None):
            return original(self)

    with mock.patch.object(recomputation._Kept, method, hasty):
        yield


SABOTAGES: dict[str, tuple[Callable[[], AbstractContextManager[None]], str]] = {
    "a copy to the host waits for the input": (lambda: no_wait_before("to the host"), "(copy), which reads"),
    "a copy to the device waits for users of its memory": (
        lambda: no_wait_before("to the device"), "(copy), which writes"
    ),
    "memory is reused after its copy to the host": (lambda: no_wait_in("leave_device"), "freed for reuse"),
    "a layer waits for its input": (lambda: no_wait_in("fetch"), "without waiting for stream 1 (copy), which writes"),
}  # fmt: skip


@pytest.mark.parametrize("wait", SABOTAGES)
def test_a_missing_wait_is_noticed(wait: str) -> None:
    sabotage, piece = SABOTAGES[wait]
    model = model_with("none")
    with sabotage(), AsyncDevice(0, delay_s=0.0) as device:
        recomputation.enable(model, "offload")
        gradients(model)
    assert any(piece in hazard for hazard in device.hazards), device.hazards


def test_no_warning_of_transformers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model_with("full")


class Unable:
    """A model whose layers cannot be recomputed, or that does it by itself."""

    def __init__(self, supported: bool) -> None:
        self._supported = supported

    def activation_checkpointing_enable(self, _: Any) -> None:
        if not self._supported:
            raise ValueError("does not support activation checkpointing.")

    def modules(self) -> list[Any]:
        return []


def test_models_that_cannot() -> None:
    recomputation.enable(Unable(False), "none")
    with pytest.raises(UserError, match="full: Unable cannot recompute its layers; use none"):
        recomputation.enable(Unable(False), "full")
    with pytest.raises(UserError, match="offload: Unable recomputes its layers by itself; use full"):
        recomputation.enable(Unable(True), "offload")
