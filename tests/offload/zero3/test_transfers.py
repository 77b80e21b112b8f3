"""The copy stream: order between the copies of gradients and the work that produces, measures and replaces them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from superoffload.offload.settings import OffloadSettings
from superoffload.offload.zero3 import gradients, transfers
from superoffload.offload.zero3.gradients import HostGradients
from superoffload.offload.zero3.transfers import Transfers, download
from tests.helpers.fake_cuda import Accelerator, Stream

pytestmark = pytest.mark.unit


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    made = Accelerator()
    for module in (gradients, transfers):
        monkeypatch.setattr(module, "get_accelerator", lambda: made)
    return made


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Stream]]:
    """Note the memory whose reuse waits for a stream."""
    found: list[tuple[int, Stream]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: found.append((t.data_ptr(), stream)))
    return found


def test_copies_follow_the_gradients_on_a_stream_of_their_own(
    accelerator: Accelerator, recorded: list[tuple[int, Stream]]
) -> None:
    copies, source = Transfers(), torch.ones(3)
    with copies.downloading([source]):
        copy_stream = accelerator.current_stream()
    assert copy_stream is not accelerator.default is accelerator.current_stream()
    assert copy_stream.calls == [("wait_stream", accelerator.default)]
    assert recorded == [(source.data_ptr(), copy_stream)]
    copies.synchronize()
    events = [event for what, event in accelerator.calls if what == "record"]
    assert [event.recorded_on for event in events] == [copy_stream] * 2
    assert accelerator.calls[-1] == ("synchronize", events[-1])


def test_few_buckets_wait_for_their_copies_at_once(
    accelerator: Accelerator, recorded: list[tuple[int, Stream]]
) -> None:
    copies = Transfers()
    for _ in range(4):
        with copies.downloading(()):
            pass
    queued = [event for what, event in accelerator.calls if what == "record"]
    waited = [event for what, event in accelerator.calls if what == "synchronize"]
    assert waited == queued[: 4 - transfers._BUCKETS_IN_FLIGHT]


def test_an_accelerator_without_streams_copies_at_once(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "is_synchronized_device", lambda: True)
    copies = Transfers()
    assert not copies.asynchronous
    with copies.downloading([torch.ones(3)]):
        assert accelerator.current_stream() is accelerator.default
    copies.synchronize()
    assert accelerator.calls == []


def test_a_gradient_is_converted_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_PIECE_NUMEL", 4)
    gradient, target = torch.randn(11, dtype=torch.bfloat16), torch.zeros(11)
    download(gradient, target)
    assert torch.equal(target, gradient.float())


class Backward:
    """One parameter on the host, one on the device, in a bucket of DeepSpeed's; notes the stream of each operation."""

    def __init__(self, accelerator: Accelerator, *, partition: torch.Tensor, bucket: torch.Tensor) -> None:
        self.norm_streams: list[Stream] = []
        self.flats = [torch.zeros(4), torch.zeros(4)]
        for flat in self.flats:
            flat.grad = torch.zeros(4)

        def norm(tensor: torch.Tensor) -> torch.Tensor:
            self.norm_streams.append(accelerator.current_stream())
            result: torch.Tensor = tensor.float().norm()
            return result

        self.zero: Any = SimpleNamespace(
            ipg_buckets={torch.bfloat16: SimpleNamespace(buffer=bucket)},
            micro_step_id=0,
            is_gradient_accumulation_boundary=lambda: True,
            dtype=torch.bfloat16,
            gradient_accumulation_dtype=torch.bfloat16,
            master_weights_and_grads_dtype=torch.float32,
            grad_position={0: (0, 0, 4), 1: (1, 0, 4)},
            norm_for_param_grads={},
            loss_scale=1.0,
            clip_grad=0.0,
            get_param_id=lambda p: p.ds_id,
            _get_param_partition_rank=lambda p: 0,
            _constant_buffered_norm2=norm,
            _offload_boundary_param_ids=set(),
        )
        self.changed: list[int] = []
        coordinator = SimpleNamespace(
            pump=lambda: None, worth_speculating=False, arrived=lambda *_: None, gradient_changes=self.changed.append
        )
        own_access = accelerator.stream(accelerator.default)
        parts: Any = SimpleNamespace(
            host={0: None},
            own_access=lambda: own_access,
            gradient=lambda i, offset, numel: self.flats[i].grad,
        )
        self.copies = Transfers()
        verification = SimpleNamespace(gradient=lambda *_: None)
        service: Any = SimpleNamespace(coordinator=coordinator, transfers=self.copies, verification=verification)
        params: Any = [
            SimpleNamespace(ds_id=i, ds_numel=4, partition_numel=lambda: 4, grad=torch.ones(4)) for i in (0, 1)
        ]
        self.params = params
        HostGradients(OffloadSettings(), parts, service).partition(
            self.zero, params, [partition, torch.full((4,), 2.0, dtype=torch.bfloat16)], lambda *_: pytest.fail("base")
        )


def test_gradients_are_measured_by_the_stream_that_made_them_and_copied_by_the_other(
    accelerator: Accelerator, recorded: list[tuple[int, Stream]]
) -> None:
    partition = torch.full((4,), 3.0, dtype=torch.bfloat16)
    run = Backward(accelerator, partition=partition, bucket=torch.zeros(8, dtype=torch.bfloat16))
    (copy_stream,) = {stream for _, stream in recorded if stream is not accelerator.default}
    assert run.norm_streams == [accelerator.default] * 2
    assert recorded.count((partition.data_ptr(), copy_stream)) == 1
    assert [flat.grad.tolist() for flat in run.flats if flat.grad is not None] == [[3.0] * 4, [2.0] * 4]
    assert run.changed == [0] and all(param.grad is None for param in run.params)


def test_a_gradient_that_lies_in_a_bucket_is_copied_before_the_bucket_is_filled_again(
    accelerator: Accelerator, recorded: list[tuple[int, Stream]]
) -> None:
    bucket = torch.full((8,), 3.0, dtype=torch.bfloat16)
    run = Backward(accelerator, partition=bucket[:4], bucket=bucket)
    read = {address for address, stream in recorded if stream is not accelerator.default}
    assert bucket.data_ptr() not in read and len(read) == 1
    assert run.zero.norm_for_param_grads[0] == 6.0
