"""The arithmetic on one sub-group: a speculation promises what the step delivers, chunks change nothing."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder

from superoffload.offload.adam import SubGroupAdam
from superoffload.offload.messages import AdamHyper, Task, TaskKind
from superoffload.offload.state import SubGroupState

HYPER = AdamHyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)


def state(numel: int, master: torch.dtype, weights: torch.dtype) -> SubGroupState:
    generator = torch.Generator().manual_seed(numel)
    parameters, gradients, exp_avg, exp_avg_sq = (torch.rand(numel, generator=generator) for _ in range(4))
    return SubGroupState(
        parameters=parameters.to(master),
        gradients=(gradients - 0.5).to(master),
        exp_avg=exp_avg - 0.5,
        exp_avg_sq=exp_avg_sq,
        staging=torch.zeros(numel, dtype=weights),
    )


def task(kind: TaskKind, factor: float) -> Task:
    return Task(kind=kind, step=4, hyper=HYPER, factor=factor)


@pytest.mark.parametrize("numel", [1, 15, 1024, 1025, 5000])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize(("master", "weights"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)])
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_speculation_promises_what_the_step_delivers(
    numel: int, factor: float, master: torch.dtype, weights: torch.dtype, adamw_mode: bool
) -> None:
    op = CPUAdamBuilder().load()
    chunked = SubGroupAdam(op, adamw_mode=adamw_mode, chunk_numel=1024)
    before, speculated, stepped, committed, whole = (state(numel, master, weights) for _ in range(5))
    assert chunked.speculate(task(TaskKind.SPECULATE, factor), speculated, lambda: False)
    for name in ("parameters", "gradients", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(speculated, name), getattr(before, name)), name
    chunked.step(task(TaskKind.STEP, factor), stepped, stage=True)
    chunked.step(task(TaskKind.COMMIT, factor), committed, stage=False)
    SubGroupAdam(op, adamw_mode=adamw_mode, chunk_numel=1 << 20).step(task(TaskKind.STEP, factor), whole, stage=True)
    assert torch.equal(speculated.staging, stepped.staging)
    assert torch.equal(stepped.staging, stepped.parameters.to(weights))
    assert committed.staging.eq(0).all()
    for field in fields(SubGroupState):
        assert torch.equal(getattr(stepped, field.name), getattr(whole, field.name)), field.name
        if field.name != "staging":
            assert torch.equal(getattr(stepped, field.name), getattr(committed, field.name)), field.name


def test_an_abandoned_speculation_says_so() -> None:
    adam = SubGroupAdam(CPUAdamBuilder().load(), adamw_mode=True, chunk_numel=1024)
    where = state(5000, torch.float32, torch.bfloat16)
    looks: list[int] = []
    assert not adam.speculate(task(TaskKind.SPECULATE, 1.0), where, lambda: looks.append(1) is None and len(looks) == 3)
    assert len(looks) == 3
