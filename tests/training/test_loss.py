"""The loss kernels under ZeRO-3: the same losses and gradients, the same collectives on all ranks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import config, distributed
from superoffload.data.collate import Batch, Layout, collate
from superoffload.data.encode import IGNORED
from superoffload.ds_config import merge_flags
from superoffload.model import head, load, loss_kernel
from superoffload.model.head import ChunkedLoss, Loss, PlainLoss
from superoffload.protocols import Engine
from superoffload.training import engine
from tests.helpers.forked import launch
from tests.helpers.models import write_model
from tests.helpers.packs import document
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import logged
from tests.helpers.training import FP32

PADDED = Layout(packs=False, full_length=False, max_length=64, pad_token_id=0)
COLLECTIVES = ("all_gather_into_tensor", "all_gather", "all_reduce", "reduce_scatter_tensor", "reduce", "broadcast",
               "inference_all_reduce", "all_gather_object", "barrier")  # fmt: skip


def make_engine(folder: str) -> Engine:
    """Build an engine around the model of a folder, in float32, all parameters sharded (collective)."""
    ds_config = {**FP32, "zero_optimization": {**FP32["zero_optimization"], "stage3_param_persistence_threshold": 0}}
    values = {"model_name": folder, "output_dir": "unused", "gradient_accumulation_steps": 3}
    merged = merge_flags(ds_config, config.build(values), distributed.world_size())
    model = load.load_model(merged.config.model, load.load_architecture(merged.config.model), merged.ds_config, None)
    return engine.create(model, merged.ds_config, merged.config, 10)


def micro_batches(rank: int) -> list[Batch]:
    """Make three micro-batches: many targets on rank 0 and few on rank 1, none on rank 1, none on rank 0."""
    many, few = [document(40, 1), document(30, 2)], [document(5, 3)]
    none = [(ids, ids * 0 + IGNORED) for ids, _ in many]
    rows = ([many, few, none], [few, none, many])[rank]
    return [collate([[row] for row in batch], 2, PADDED) for batch in rows]


def count_collectives() -> Counter[str]:
    """Count DeepSpeed's collectives from now on by name and size of their first tensor."""
    from deepspeed.comm import comm

    counts: Counter[str] = Counter()
    for name in COLLECTIVES:
        original = getattr(comm.cdb, name, None)
        if original is None:
            continue

        def counted(*arguments: Any, _name: str = name, _original: Any = original, **options: Any) -> Any:
            tensors = [value for value in (*arguments, *options.values()) if torch.is_tensor(value)]
            counts[f"{_name} of {tensors[0].numel() if tensors else 0}"] += 1
            return _original(*arguments, **options)

        setattr(comm.cdb, name, counted)
    return counts


Found = tuple[list[float], dict[str, torch.Tensor], list[dict[str, int]], str]


def step(folder: str, kernel: str) -> Found:
    """Run the micro-batches of a step with a kernel; return losses, gradients and collectives by micro-batch."""
    from deepspeed.utils import safe_get_full_grad

    head.TILE = 3000  # many targets make more tiles than few
    model_engine = make_engine(folder)
    loss: Loss = loss_kernel.choose(kernel, model_engine, PADDED)
    for batch in micro_batches(distributed.rank()):  # DeepSpeed's first pass records the order of the modules
        with torch.no_grad():
            loss(model_engine, batch)
    counts = count_collectives()
    losses, collectives = [], []
    for batch in micro_batches(distributed.rank()):
        counts.clear()
        loss_sum = loss(model_engine, batch)
        model_engine.backward(loss_sum * 0.01)
        losses.append(loss_sum.item())
        collectives.append(dict(counts))
        if len(losses) < 3:
            model_engine.step()
    named = model_engine.module.named_parameters()
    gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in named}
    return losses, gradients, collectives, type(loss).__name__ if isinstance(loss, ChunkedLoss) else "plain"


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 7.0},  # tied
    "phi": {},  # a head with a bias
}


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_ranks_run_the_same_collectives_and_get_the_plain_gradients(kind: str, tmp_path: Path) -> None:
    folder = str(write_model(tmp_path, kind, "float32", **KINDS[kind]))
    plain: list[Found] = run_ranks(2, step, folder, "plain")
    chunked: list[Found] = run_ranks(2, step, folder, "chunked")
    assert [found[3] for found in plain + chunked] == ["plain"] * 2 + ["ChunkedLoss"] * 2
    assert [losses[1] == 0 for losses, *_ in chunked] == [False, True]
    assert [losses[2] == 0 for losses, *_ in chunked] == [True, False]
    for rank in range(2):
        losses, gradients, collectives, _ = chunked[rank]
        assert losses == pytest.approx(plain[rank][0], rel=1e-6)
        assert gradients.keys() == plain[rank][1].keys()
        for name, gradient in gradients.items():
            expected = plain[rank][1][name]
            assert (gradient - expected).norm() <= 3e-6 * expected.norm() + 1e-8, name
        assert collectives == chunked[0][2] == plain[0][2]
        gathers = [sum(n for name, n in counts.items() if name.startswith("all_gather")) for counts in collectives]
        assert min(gathers) > 10


def fallback(folder: str) -> tuple[bool, list[float], list[float]]:
    """Try the chunked kernel on a model that rejects it, then train; return the losses before and after a step."""
    model_engine = make_engine(folder)
    model: Any = model_engine.module
    forward = model.forward

    def checked(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        if output.logits.shape[1] == 0:
            raise ValueError("logits of no position")
        return output

    model.forward = checked
    loss = loss_kernel.choose("auto", model_engine, PADDED)
    before: list[float] = []
    after: list[float] = []
    for losses in (before, after):
        for batch in micro_batches(distributed.rank()):
            loss_sum = loss(model_engine, batch)
            model_engine.backward(loss_sum * 0.01)
            model_engine.step()
            losses.append(loss_sum.item())
    return isinstance(loss, PlainLoss), before, after


def test_training_goes_well_after_a_model_has_rejected_the_kernel(model_folder: Path) -> None:
    expected = run_ranks(2, step, str(model_folder), "plain")
    for (fell_back, before, after), (losses, *_) in zip(
        run_ranks(2, fallback, str(model_folder)), expected, strict=True
    ):
        assert fell_back
        assert before == losses
        assert sum(after) < sum(before)


@pytest.fixture
def float32_configs(tmp_path: Path) -> dict[str, str]:
    """Write ds_configs of both modes with weights in float32."""
    paths = {}
    for mode in ("superoffload", "zerooffload"):
        ds_config = json.loads((Path(__file__).parents[2] / "configs" / f"{mode}.json").read_text())
        ds_config["bf16"]["enabled"] = False
        (tmp_path / f"{mode}.json").write_text(json.dumps(ds_config))
        paths[mode] = str(tmp_path / f"{mode}.json")
    return paths


def test_a_run_logs_the_same_losses_with_either_kernel_and_the_same_bits_in_either_mode(
    float32_configs: dict[str, str], model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    lines = {}
    for kernel, mode in (("chunked", "superoffload"), ("chunked", "zerooffload"), ("plain", "superoffload")):
        out = tmp_path / f"{kernel}-{mode}"
        done = launch(
            1, "--model_name", str(model_folder), "--dataset_name", str(rows_file), "--output_dir", str(out),
            "--max_length", "128", "--batch_size", "2", "--lr", "3e-3", "--eval_percentage", "10", "--eval_steps", "4",
            "--deterministic", "--loss_kernel", kernel, "--deepspeed_config", float32_configs[mode],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("Loss kernel: chunked" in done.stderr) == (kernel == "chunked")
        lines[kernel, mode] = logged(out)
    chunked, plain = lines["chunked", "superoffload"], lines["plain", "superoffload"]
    assert lines["chunked", "zerooffload"] == chunked
    assert len(chunked) == len(plain) > 8
    for ours, theirs in zip(chunked, plain, strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "eval_loss", "grad_norm"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert chunked[-1]["eval_loss"] < chunked[0]["loss"]
