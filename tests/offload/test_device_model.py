"""The simulated device itself: what is late, what is a race, and what is not."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from tests.helpers.async_device import AsyncDevice

pytestmark = pytest.mark.unit


@pytest.fixture
def device() -> Iterator[AsyncDevice]:
    with AsyncDevice(seed=0, delay_s=0.0) as made:  # with this seed no copy ends before something waits for it
        yield made


def pinned(values: list[float]) -> torch.Tensor:
    tensor: torch.Tensor = get_accelerator().pin_memory(torch.tensor(values))
    return tensor


def accelerator() -> Any:
    return get_accelerator()


def test_a_copy_to_the_host_lands_when_it_is_waited_for(device: AsyncDevice) -> None:
    target, source = pinned([7.0, 7.0]), torch.ones(2)
    target.copy_(source, non_blocking=True)
    source.add_(1)  # in stream order, so after the copy
    event = accelerator().Event()
    assert target.isnan().all()
    device.hazards.clear()  # that was a look without waiting
    event.record()
    event.synchronize()
    assert target.tolist() == [1.0, 1.0] and not device.hazards


def test_reading_what_has_not_been_waited_for_is_a_race(device: AsyncDevice) -> None:
    target = pinned([7.0])
    target.copy_(torch.ones(1), non_blocking=True)
    target.add(1)
    (hazard,) = device.hazards
    assert "thread MainThread (aten.add.Tensor), which reads a pinned tensor" in hazard
    assert "without waiting for the default stream (copy)" in hazard


@pytest.mark.parametrize("waits", [True, False])
def test_a_second_stream_must_wait_for_what_it_reads(device: AsyncDevice, waits: bool) -> None:
    stream, source = accelerator().Stream(), torch.ones(3)
    if waits:
        stream.wait_stream(accelerator().current_stream())
    with accelerator().stream(stream):
        source + 1
    assert bool(device.hazards) == (not waits)


@pytest.mark.parametrize("waits", [True, False])
def test_a_tensor_must_not_be_overwritten_while_a_second_stream_reads_it(device: AsyncDevice, waits: bool) -> None:
    stream, source = accelerator().Stream(), torch.ones(3)
    stream.wait_stream(accelerator().current_stream())
    with accelerator().stream(stream):
        source + 1
    if waits:
        accelerator().current_stream().wait_event(stream.record_event())
    source[1:].zero_()
    assert bool(device.hazards) == (not waits)


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_must_not_be_reused_while_a_second_stream_reads_it(device: AsyncDevice, recorded: bool) -> None:
    stream, source = accelerator().Stream(), torch.ones(3)
    stream.wait_stream(accelerator().current_stream())
    with accelerator().stream(stream):
        source + 1
    if recorded:
        source.record_stream(stream)
    del source
    gc.collect()
    assert [h for h in device.hazards if "without record_stream" in h] == device.hazards
    assert bool(device.hazards) == (not recorded)


def test_a_recorded_stream_brings_along_what_it_has_waited_for(device: AsyncDevice) -> None:
    first, second, source = accelerator().Stream(), accelerator().Stream(), torch.ones(3)
    first.wait_stream(accelerator().current_stream())
    with accelerator().stream(first):
        source + 1
    second.wait_stream(first)
    source.record_stream(second)
    del source
    gc.collect()
    assert not device.hazards


def test_different_parts_of_a_tensor_do_not_race(device: AsyncDevice) -> None:
    stream, both = accelerator().Stream(), torch.ones(4)
    stream.wait_stream(accelerator().current_stream())
    with accelerator().stream(stream):
        both[:2].zero_()
    both[2:].zero_()
    assert not device.hazards


def test_the_source_of_an_upload_must_stay_until_it_ends(device: AsyncDevice) -> None:
    source, target = pinned([1.0]), torch.zeros(1)
    target.copy_(source, non_blocking=True)
    source.fill_(2)
    accelerator().synchronize()
    assert any("which writes a pinned tensor" in hazard for hazard in device.hazards)
    assert "the source of a copy to the device has changed before the copy ended" in device.hazards


def test_a_kernel_does_not_touch_memory_of_the_host(device: AsyncDevice) -> None:
    pinned([1.0]).add_(torch.ones(1))
    assert device.hazards == ["aten.add_.Tensor mixes memory of the host and of the device"]


def test_reading_a_scalar_waits_for_nothing(device: AsyncDevice) -> None:
    target = pinned([7.0])
    target.copy_(torch.ones(1), non_blocking=True)
    assert float(torch.ones(())) == 1.0
    target.add(1)
    assert device.hazards


def test_a_blocking_copy_and_one_to_the_device_by_name(device: AsyncDevice) -> None:
    target = pinned([7.0])
    target.copy_(torch.ones(1))
    assert target.tolist() == [1.0]
    there = target.to("cpu", non_blocking=True)
    assert there.data_ptr() != target.data_ptr() and accelerator().on_accelerator(there)
    assert torch.ones(1).cpu().add(1).tolist() == [2.0] and not device.hazards


def test_everything_is_as_before_afterwards() -> None:
    before = get_accelerator(), torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.record_stream
    with AsyncDevice():
        assert not get_accelerator().is_synchronized_device()
    assert (get_accelerator(), torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.record_stream) == before
