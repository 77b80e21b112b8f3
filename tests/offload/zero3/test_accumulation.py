"""DeepSpeed's accumulation buffer appears when it is needed, and can be moved and freed like DeepSpeed's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

from superoffload.offload.zero3 import accumulation
from superoffload.offload.zero3.accumulation import AccumulationBuffer
from tests.helpers.offload_training import Case, Trainer, make_engine, snapshot
from tests.helpers.ranks import run_ranks

TWICE = Case(clip=100.0, twice_steps=(2,), steps=4)


def life_of_the_buffer() -> list[bool]:
    """Return whether it is allocated: after steps of one micro-batch, after a second backward, after destroy()."""
    engine = make_engine(TWICE, True)
    accumulation, found = engine.optimizer._accumulation, []
    trainer = Trainer(engine, TWICE)
    for first, last in ((0, 2), (2, 3)):
        trainer.run(first, last)
        found.append(accumulation.is_allocated)
    engine.destroy()
    return [*found, accumulation.is_allocated]


def unused_until_the_end() -> list[bool]:
    engine = make_engine(Case(), True)
    accumulation = engine.optimizer._accumulation
    Trainer(engine, Case()).run(0, 1)
    engine.destroy()
    return [accumulation.is_allocated, engine.optimizer.grad_partitions_flat_buffer is None]


def train_and_move(moved: bool) -> dict[str, Any]:
    """Train; on the way, let DeepSpeed move the buffer away and back."""
    engine = make_engine(TWICE, True)
    trainer = Trainer(engine, TWICE)
    trainer.run(0, 1)
    if moved:
        engine.offload_states(include=[OffloadStateTypeEnum.lp_grads], pin_memory=False)
        engine.reload_states()
    trainer.run(1, 4)
    result = {"losses": trainer.losses, **snapshot(engine)["tensors"]}
    engine.destroy()
    return result


def destroyed_on_a_device_that_fails() -> list[bool]:
    """Return what is left: the accumulation buffer, the arena, the optimizer process."""
    engine = make_engine(TWICE, True)
    Trainer(engine, TWICE).run(0, 3)
    optimizer = engine.optimizer
    with (
        mock.patch.object(type(get_accelerator()), "synchronize", side_effect=RuntimeError("CUDA error")),
        pytest.raises(RuntimeError, match="CUDA error"),
    ):
        optimizer.destroy()
    return [optimizer._accumulation.is_allocated, bool(optimizer._partitions.host), optimizer._service.is_running]


def run_all() -> tuple[list[bool], list[bool], list[bool], dict[str, Any], dict[str, Any]]:
    stayed, moved = train_and_move(False), train_and_move(True)
    return life_of_the_buffer(), unused_until_the_end(), destroyed_on_a_device_that_fails(), stayed, moved


def test_the_buffer_appears_when_needed_and_can_be_moved() -> None:
    ((life, unused, failed, stayed, moved),) = run_ranks(1, run_all)
    assert life == [False, True, False]
    assert unused == [False, True]
    assert failed == [False, False, False]
    assert stayed["losses"] == moved["losses"]
    assert all(torch.equal(t, moved[name]) for name, t in stayed.items() if name != "losses")


def test_a_page_locked_buffer_is_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning a tensor would hold a copy of it, as large as all gradients."""
    asked: list[int] = []

    def pin_empty(numel: int, *, dtype: torch.dtype) -> torch.Tensor:
        asked.append(numel)
        return torch.full((numel,), 7, dtype=dtype)

    params = [SimpleNamespace(ds_id=i, partition_numel=lambda: 3) for i in range(2)]
    zero: Any = SimpleNamespace(
        fp16_groups=[params], gradient_accumulation_dtype=torch.bfloat16, offload_optimizer_pin_memory=True
    )
    monkeypatch.setattr(accumulation, "get_accelerator", lambda: SimpleNamespace(pin_empty=pin_empty))
    views = AccumulationBuffer().views(zero)
    assert asked == [6]
    assert [view.tolist() for view in views.values()] == [[0, 0, 0]] * 2
