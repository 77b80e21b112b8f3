"""Ranks that share a row: the loss and the gradients of one rank that has all of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import config, distributed
from superoffload.data.collate import Batch, Layout, collate
from superoffload.ds_config import DsConfig, merge_flags
from superoffload.model import attention, isolation, load, loss_kernel, sequence_parallel
from superoffload.training import engine
from tests.helpers.models import write_model
from tests.helpers.packs import PACKS
from tests.helpers.ranks import run_ranks
from tests.helpers.training import FP32

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "llama_one_kv": {"num_key_value_heads": 1},  # fewer than ranks
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},  # shorter than a document
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
BF16: DsConfig = {**FP32, "bf16": {"enabled": True}}
NO_STEP = 1e-30  # a learning rate that changes no weight
Numbers = tuple[float, dict[str, torch.Tensor]]
"""The mean loss of the target tokens, and its gradients by name."""


def make_engine(folder: str, ds_config: DsConfig, parts: int) -> Any:
    """Build the engine of a run whose rows `parts` ranks share (collective)."""
    values = {"model_name": folder, "output_dir": "unused", "sequence_parallel_size": parts, "lr": NO_STEP}
    merged = merge_flags(ds_config, config.build(values), distributed.world_size())
    described = load.load_architecture(merged.config.model)
    kernel = attention.choose(merged.config.model, described.config, merged.ds_config, True, parts)
    model = load.load_model(merged.config.model, described, merged.ds_config, kernel)
    return engine.create(model, merged.ds_config, merged.config, 10)


def layout(parts: int, packs: bool = True) -> Layout:
    return Layout(packs=packs, full_length=False, max_length=48, pad_token_id=0, varlen=True, parts=parts)


def numbers(model_engine: Any, loss: Any, batch: Batch, targets: int, copies: int) -> Numbers:
    """Return loss and gradients of the target tokens of all ranks, `copies` of which have the same (collective)."""
    from deepspeed.utils import safe_get_full_grad

    losses = loss(model_engine, batch)
    model_engine.backward(losses.sum() * (distributed.world_size() / (targets * copies)))
    named = model_engine.module.named_parameters()
    found = {name: safe_get_full_grad(parameter) for name, parameter in named}
    gradients = {name: gradient.float().clone() for name, gradient in found.items() if gradient is not None}
    model_engine.step()
    total = distributed.all_reduce_sum(losses.detach().sum().double()[None])
    return float(total) / (targets * copies), gradients


def compare(folder: str, ds_config: DsConfig, parts: int) -> list[tuple[Numbers, Numbers]]:
    """Compute a micro-batch on every rank alone and then shared, with both kernels, packed and not (collective)."""
    sequence_parallel.form_groups(parts)
    model_engine = make_engine(folder, ds_config, parts)
    world, index = distributed.world_size(), distributed.rank() % parts
    results = []
    for packs in (True, False):
        isolation.check(model_engine, layout(parts, packs))
        sequence_parallel.check(model_engine, layout(parts, packs))
        documents = PACKS if packs else [[document] for pack in PACKS for document in pack]
        batch = collate(documents, len(documents), layout(parts, packs))
        for kernel in ("plain", "chunked"):
            loss = loss_kernel.choose(kernel, model_engine, layout(parts, packs))
            alone = numbers(model_engine, loss, batch, batch.target_tokens, world)
            shared = numbers(model_engine, loss, batch.part(index, parts), batch.target_tokens, world // parts)
            results.append((alone, shared))
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_those_of_whole_rows(kind: str, tmp_path: Path) -> None:
    folder = str(write_model(tmp_path, kind.removesuffix("_one_kv"), "float32", **KINDS[kind]))
    for results in run_ranks(2, compare, folder, FP32, 2):
        assert len(results) == 4
        for (alone, expected), (shared, gradients) in results:
            assert shared == pytest.approx(alone, rel=1e-5)
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-8, name
