"""Train a small model of a family for a step, and compare with plain transformers: loss, gradient norm and export."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from superoffload.data.collate import Layout, Row, collate
from superoffload.errors import UserError
from superoffload.protocols import Engine
from tests.helpers.families import FAMILIES
from tests.helpers.models import write_model
from tests.helpers.packs import document
from tests.helpers.training import FP32

NO_STEP = 1e-30  # a learning rate that changes no weight
LR = 1e-2
Numbers = tuple[float, float]
"""The mean loss of the target tokens, and the norm of its gradient."""


def documents() -> list[Row]:
    """Make the documents of a step, of different lengths."""
    return [document(length, seed) for seed, length in enumerate((21, 9, 30, 14))]


def plain_numbers(folder: Path) -> Numbers:
    """Compute loss and gradient norm with transformers alone, one document at a time."""
    from superoffload.model.architecture import without_zero3
    from superoffload.model.head import summed_loss

    with without_zero3():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    total, targets = 0.0, 0
    for ids, labels in documents():
        loss = summed_loss(model(input_ids=torch.tensor(ids)[None]).logits, torch.tensor(labels)[None])
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss)
        targets += int((labels[1:] >= 0).sum())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    return total / targets, norm / targets


def step_numbers(model_engine: Engine, packs: Sequence[Sequence[Row]], layout: Layout) -> Numbers:
    """Run one step of the program on packs; return its loss and gradient norm (collective)."""
    from superoffload.model import loss_kernel

    loss = loss_kernel.choose("auto", model_engine, layout)
    batch = collate(packs, len(packs), layout)
    loss_sum = loss(model_engine, batch)
    model_engine.backward(loss_sum / batch.target_tokens)
    model_engine.step()
    return float(loss_sum) / batch.target_tokens, float(model_engine.get_global_grad_norm())


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """Compare a family with plain transformers, in float32 and on one rank (collective).

    Returns `plain`, `unpacked` and `packed`, each loss and gradient norm, `packed` possibly the reason why the program
    refuses it; `export`, the largest difference of an exported weight from the trained one; and `frozen`, the number of
    parameters that are not trained.
    """
    from superoffload import config, distributed
    from superoffload.ds_config import merge_flags
    from superoffload.model import architecture, attention, isolation, load
    from superoffload.model.flops import count_parameters
    from superoffload.training import engine

    with architecture.without_zero3():  # of an earlier call in this process
        write_model(folder, kind, "float32", **FAMILIES[kind])
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(_without_dropout(described)))
    chosen = config.build({"model_name": str(folder), "output_dir": str(folder / "out"), "lr": NO_STEP,
                           "lr_scheduler": "constant", "warmup": 0.0, "max_grad_norm": 0.0})  # fmt: skip
    merged = merge_flags(FP32, chosen, distributed.world_size())
    described = load.load_architecture(merged.config.model)
    kernel = attention.choose(merged.config.model, described.config, merged.ds_config, True)
    model = load.load_model(merged.config.model, described, merged.ds_config, kernel)
    result: dict[str, Any] = {
        "parameters": count_parameters(model),
        "frozen": count_parameters(model) - count_parameters(model, trained_only=True),
        "plain": plain_numbers(folder),
    }
    model_engine = engine.create(model, merged.ds_config, merged.config, 10)
    varlen = attention.takes_documents(kernel)
    packed = Layout(packs=True, full_length=False, max_length=64, pad_token_id=0, varlen=varlen)
    rows = documents()
    try:
        isolation.check(model_engine, packed)
        result["packed"] = step_numbers(model_engine, [rows[:2], rows[2:]], packed)
    except UserError as error:
        result["packed"] = str(error)
    with attention.without_packs(model):
        unpacked = Layout(packs=False, full_length=False, max_length=64, pad_token_id=0)
        result["unpacked"] = step_numbers(model_engine, [[row] for row in rows], unpacked)
        for group in model_engine.optimizer.param_groups:
            group["lr"] = LR
        step_numbers(model_engine, [[row] for row in rows], unpacked)
    result["export"] = _export(model_engine, merged.config)
    return result


def _without_dropout(value: Any) -> Any:
    """Set every probability of dropout in a configuration to zero: it makes each loss a different one."""
    if not isinstance(value, dict):
        return value
    return {
        key: 0.0 if "drop" in key and isinstance(item, float) else _without_dropout(item)
        for key, item in value.items()
    }  # fmt: skip


def _export(model_engine: Engine, config: Any) -> float:
    """Save and export the model; return the largest difference of an exported weight (collective)."""
    from deepspeed.utils import safe_get_full_fp32_param

    from superoffload.checkpoint import save
    from superoffload.export import weights
    from superoffload.model.architecture import without_zero3
    from superoffload.model.tokenizer import load_tokenizer

    target = Path(config.output.output_dir)
    saved = save.save(model_engine, load_tokenizer(config.model.model_name), config, {"step": 3}, {})
    assert saved is not None
    weights.export(saved, target / "model", "float32")
    with without_zero3():
        exported: Any = transformers.AutoModelForCausalLM.from_pretrained(target / "model", dtype=torch.float32)
        before: Any = transformers.AutoModelForCausalLM.from_pretrained(config.model.model_name, dtype=torch.float32)
    written, original = dict(exported.named_parameters()), dict(before.named_parameters())
    largest, changed = 0.0, False
    for name, parameter in model_engine.module.named_parameters():
        trained = safe_get_full_fp32_param(parameter) if parameter.requires_grad else original[name]
        largest = max(largest, float((written[name] - trained).abs().max()))
        changed |= not torch.equal(written[name], original[name])
    assert changed, "training changed no weight"
    return largest


def differences(result: dict[str, Any]) -> list[str]:
    """List what differs between the program and plain transformers by more than rounding in float32."""
    found = []
    for way in ("unpacked", "packed"):
        if isinstance(result[way], str):
            continue
        for name, ours, theirs in zip(("loss", "gradient norm"), result[way], result["plain"], strict=True):
            if not math.isclose(ours, theirs, rel_tol=2e-4):
                found.append(f"{way} {name} {ours:.6f}, not {theirs:.6f}")
    if result["export"] != 0:
        found.append(f"an exported weight differs by {result['export']:.2g}")
    return found
