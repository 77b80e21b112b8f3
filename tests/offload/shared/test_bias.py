"""The anchor reproduces the beta products of ZeRO-Offload's Adam in whatever order updates are made."""

from __future__ import annotations

import random

import pytest
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder

from superoffload.offload.shared.bias import ProductHistory
from superoffload.offload.shared.messages import AdamHyper, Task, TaskKind
from superoffload.offload.shared.state import SubGroupState
from superoffload.offload.worker.adam import SubGroupAdam

BETAS = (0.9, 0.99)
OTHER = (0.8, 0.95)


def state() -> SubGroupState:
    generator = torch.Generator().manual_seed(1)
    fill = [torch.rand(37, generator=generator) for _ in range(4)]
    return SubGroupState(
        parameters=fill[0],
        gradients=fill[1],
        exp_avg=fill[2],
        exp_avg_sq=fill[3],
        staging=torch.empty(37, dtype=torch.float32),
    )


def speculated(adam: SubGroupAdam, step: int, betas: tuple[float, float], anchor: int) -> torch.Tensor:
    hyper = AdamHyper(lr=1.0, beta1=betas[0], beta2=betas[1], eps=1e-8, weight_decay=0.0)
    task = Task(kind=TaskKind.SPECULATE, step=step, anchor_step=anchor, hyper=hyper)
    where = state()
    assert adam.speculate(task, where, lambda: False)
    return where.staging


SEQUENCES = {
    "constant": [(t, BETAS) for t in range(1, 60)],
    "changing": [(t, (0.9 - t * 1e-3, 0.99)) for t in range(1, 20)] + [(t, BETAS) for t in range(20, 60)],
    "two groups": [(t, b) for t in range(1, 30) for b in (BETAS, OTHER)],
    "a jump": [(t, BETAS) for t in [1, 2, 3, 10, 11, 12, 5, 6]],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_anchors_give_the_updates_of_one_object_in_order(name: str) -> None:
    sequence = SEQUENCES[name]
    op = CPUAdamBuilder().load()
    reference_id = 4711
    op.create_adam(reference_id, 1e-3, *BETAS, 1e-8, 0.0, True, False)
    expected = []
    for step, betas in sequence:
        s = state()
        op.adam_update(
            reference_id,
            step,
            1.0,
            *betas,
            1e-8,
            0.0,
            True,
            s.parameters,
            s.gradients,
            s.exp_avg,
            s.exp_avg_sq,
        )
        expected.append(s.parameters)
    op.destroy_adam(reference_id)
    anchors, _ = ProductHistory.fresh(*BETAS).plan([(t, *b) for t, b in sequence])
    adam = SubGroupAdam(op, adamw_mode=True, chunk_numel=1024)
    order = list(range(len(sequence)))
    random.Random(0).shuffle(order)
    for i in [*range(len(sequence)), *order]:
        step, betas = sequence[i]
        assert torch.equal(speculated(adam, step, betas, anchors[i]), expected[i]), (i, step)


def test_running_products_differ_from_powers() -> None:
    """Show why anchors are needed: without them the results would not be equal."""
    adam = SubGroupAdam(CPUAdamBuilder().load(), adamw_mode=True, chunk_numel=1024)
    different = [
        t for t in range(2, 200) if not torch.equal(speculated(adam, t, BETAS, 0), speculated(adam, t, BETAS, t))
    ]
    assert different
