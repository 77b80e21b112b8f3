"""Ranks that share a row: the loss and the gradients of one rank that has all of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from superoffload import config, distributed
from superoffload.data.collate import Batch, Layout, collate
from superoffload.ds_config import DsConfig, merge_flags
from superoffload.errors import UserError
from superoffload.model import attention, isolation, load, loss_kernel, sequence_parallel
from superoffload.training import engine
from tests.helpers.models import write_model
from tests.helpers.packs import PACKS, document
from tests.helpers.ranks import run_ranks
from tests.helpers.training import FP32

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with one head of key and value": {"num_key_value_heads": 1},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},  # shorter than a document
}
MORE_KINDS: dict[str, dict[str, Any]] = {
    # Neither 6 nor 4 ranks is a multiple of the other: key and value are repeated twice.
    "llama with six heads of key and value": {
        "num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96,
    },
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
}  # fmt: skip
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


def batches(parts: int) -> list[Batch]:
    """Make batches that are packed, not packed, with targets in the last part alone, and without any."""
    unpacked = [[document] for pack in PACKS for document in pack]
    return [
        collate(PACKS, 2, layout(parts)),
        collate(unpacked, 4, layout(parts, packs=False)),
        collate([[document(45, 7, prompt=40)]], 1, layout(parts)),
        collate([], 1, layout(parts)),
    ]


def compare(folders: dict[str, str], ds_config: DsConfig, parts: int) -> dict[str, list[tuple[Numbers, Numbers]]]:
    """Compute batches on every rank alone and then shared, for each model (collective).

    The first model computes all batches with both loss kernels, the others two of them with one kernel.
    """
    sequence_parallel.form_groups(parts)
    world, index = distributed.world_size(), distributed.rank() % parts
    results: dict[str, list[tuple[Numbers, Numbers]]] = {}
    for kind, folder in folders.items():
        model_engine = make_engine(folder, ds_config, parts)
        for packs in (True, False):
            isolation.check(model_engine, layout(parts, packs))
            sequence_parallel.check(model_engine, layout(parts, packs))
        first = kind == next(iter(folders))
        for kernel in ("plain", "chunked") if first else ("chunked",):
            loss = loss_kernel.choose(kernel, model_engine, layout(parts))
            for batch in batches(parts) if first else batches(parts)[:2]:
                targets = max(1, batch.target_tokens)
                alone = numbers(model_engine, loss, batch, targets, world)
                shared = numbers(model_engine, loss, batch.part(index, parts), targets, world // parts)
                results.setdefault(kind, []).append((alone, shared))
    return results


def assert_equal(results: dict[str, list[tuple[Numbers, Numbers]]], rel: float) -> None:
    for kind, pairs in results.items():
        assert len(pairs) == (8 if kind == next(iter(results)) else 2)
        for (alone, expected), (shared, gradients) in pairs:
            assert shared == pytest.approx(alone, rel=rel), kind
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                assert (gradient - expected[name]).norm() <= rel * expected[name].norm() + 1e-8, (kind, name)


def write_models(folder: Path, kinds: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Write models; the first part of a name is the type."""
    return {
        kind: str(write_model(folder / kind, kind.split(" ")[0], "float32", **changes))
        for kind, changes in kinds.items()
    }


def test_loss_and_gradients_equal_those_of_whole_rows(tmp_path: Path) -> None:
    folders = write_models(tmp_path, KINDS)
    for results in run_ranks(2, compare, folders, FP32, 2):
        assert list(results) == list(KINDS)
        assert_equal(results, 1e-5)


@pytest.mark.slow
def test_loss_and_gradients_of_four_ranks_equal_those_of_whole_rows(tmp_path: Path) -> None:
    folders = write_models(tmp_path, MORE_KINDS)
    for parts in (2, 4):
        for results in run_ranks(4, compare, folders, FP32, parts):
            assert list(results) == list(MORE_KINDS)
            assert_equal(results, 1e-5)


@pytest.mark.slow
def test_in_half_precision_they_differ_by_rounding(tmp_path: Path) -> None:
    folders = write_models(tmp_path, {"llama": {}})
    for results in run_ranks(2, compare, folders, BF16, 2):
        assert_equal(results, 2e-2)


def refusals(folder: str, mixing: str) -> list[str]:
    """Return why models are refused that mix positions outside of attention, or see their number (collective)."""
    sequence_parallel.form_groups(2)
    found = []
    model_engine = make_engine(folder, FP32, 2)
    for mix in (running_mean, short_window, only_whole_rows):
        hook = model_engine.module.model.layers[0].mlp.register_forward_hook(mix)
        found.append(refusal(model_engine))
        hook.remove()
    return [*found, refusal(make_engine(mixing, FP32, 2))]


def refusal(model_engine: Any) -> str:
    with pytest.raises(UserError) as refused:
        sequence_parallel.check(model_engine, layout(2))
    assert model_engine.training
    return str(refused.value)


def running_mean(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    counts = torch.arange(1, output.shape[1] + 1)[:, None]
    return output.cumsum(dim=1) / counts


def short_window(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output + torch.nn.functional.pad(output[:, :-1], (0, 0, 1, 0))


def only_whole_rows(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    if output.shape[1] < 48:
        raise ValueError("too few positions")
    return output


def test_models_that_mix_positions_outside_of_attention_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "llama", "llama", "float32", initializer_range=0.2)
    mixing = write_model(tmp_path / "lfm2", "lfm2", "float32", layer_types=["conv", "full_attention"])
    for found in run_ranks(2, refusals, str(folder), str(mixing)):
        words = ["mixes positions outside of its attention (logits of a part differ by"] * 2
        words += ["does not accept a part of a row (too few positions); use 1", "conv.conv is a convolution); use 1"]
        assert len(found) == 4
        for line, expected in zip(found, words, strict=True):
            assert line.startswith("--sequence_parallel_size 2: ") and expected in line


@pytest.mark.unit
@pytest.mark.parametrize("by_type", [False, True])
def test_a_rotary_embedding_that_depends_on_the_length_is_refused(by_type: bool) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    default = {"rope_type": "default", "rope_theta": 1e4}
    of_types = {"full_attention": dynamic, "sliding_attention": default}
    kind = "gemma3_text" if by_type else "llama"
    changed = transformers.AutoConfig.for_model(kind, rope_parameters=of_types if by_type else dynamic)
    with pytest.raises(UserError, match=rf"the rotary embedding of {kind} \(dynamic\) depends on the length of a row"):
        sequence_parallel.check_config(changed, 2)
    sequence_parallel.check_config(transformers.AutoConfig.for_model(kind), 2)
