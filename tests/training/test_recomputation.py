"""Recomputation under ZeRO-3: the same bits with the inputs of layers kept, on the device and on the host."""

from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import distributed
from superoffload.data.collate import collate
from superoffload.model import loss_kernel, recomputation
from superoffload.model.head import ChunkedLoss
from tests.helpers.packs import PACKED, document
from tests.helpers.ranks import run_ranks

RUNS = (("superoffload", "none"), ("superoffload", "full"), ("superoffload", "offload"), ("zerooffload", "offload"))
STEPS, MICRO_BATCHES = 2, 2


def train(folder: str, mode: str, where: str) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Take two steps of two micro-batches on packs, with an evaluation between them (collective).

    Returns losses and norms, the weights after them, and how many inputs were copied to the host.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    from tests.helpers.runs import make_engine

    copies = 0
    keep = recomputation.HostStates.take_buffer

    def counted(states: Any, size: int) -> torch.Tensor:
        nonlocal copies
        copies += 1
        return keep(states, size)

    values = {"gradient_accumulation_steps": MICRO_BATCHES, "lr": 1e-2, "max_grad_norm": 0.5, "warmup": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recomputation.HostStates, "take_buffer", counted)
        config = {"deepspeed_config": f"configs/{mode}.json", "activation_checkpointing": where}
        engine: Any = make_engine(folder, "unused", **config, **values)[0]
        loss = loss_kernel.choose("auto", engine, PACKED)
        assert isinstance(loss, ChunkedLoss)
        numbers = []
        for step in range(STEPS):
            for number in range(MICRO_BATCHES):
                seed = 10 * step + 2 * number + distributed.rank()
                batch = collate([[document(9 + seed % 7, seed), document(20, seed + 50)]], 1, PACKED)
                sums = loss(engine, batch)
                engine.backward(sums / batch.target_tokens)
                engine.step()
                numbers.append(sums.item())
            numbers.append(float(engine.get_global_grad_norm()))
            with torch.no_grad():
                engine.eval()
                numbers.append(loss(engine, batch).item())
                engine.train()
    weights = {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return numbers, weights, copies


def train_all(folder: str) -> dict[tuple[str, str], Any]:
    return {run: train(folder, *run) for run in RUNS}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_losses_norms_and_weights_are_equal_bit_for_bit(ranks: int, model_folder: Path) -> None:
    for found in run_ranks(ranks, train_all, str(model_folder)):
        numbers, weights, _ = found[RUNS[0]]
        layers = len({name.split(".")[2] for name in weights if name.startswith("model.layers.")})
        assert len(set(numbers)) == len(numbers)
        for (_, where), (others, other_weights, copies) in found.items():
            assert others == numbers
            assert all(torch.equal(other_weights[name], weight) for name, weight in weights.items())
            assert copies == (STEPS * MICRO_BATCHES * layers if where == "offload" else 0)
