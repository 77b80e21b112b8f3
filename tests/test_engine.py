import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import (
    config,
    distributed,
    ds_config,
    engine,
    evaluation,
    isolation,
    metrics,
    model,
    schedule,
    tracking,
)
from superoffload.data import collate, loader
from superoffload.requests import Requests
from superoffload.run import Run
from superoffload.tokenizer import load_tokenizer
from tests.models import write_rows
from tests.ranks import REPOSITORY, run_ranks

sys.path.insert(0, str(REPOSITORY))
import finetune_zero3

FP32 = {
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
}


class Recorder:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        pass


def train(values: dict[str, Any], document: dict[str, Any] | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """Run finetune_zero3.train on a small model, and return the engine and what was logged."""
    values = {"output_dir": "unused", "max_length": 128, "lr": 1e-3, **values}
    merged = ds_config.merge(copy.deepcopy(document or FP32), config.build(values), distributed.world_size())
    chosen = merged.config
    distributed.seed_everything(chosen.training.seed, deterministic=False)
    tokenizer = load_tokenizer(chosen.model.model_name)
    rows, _ = loader.load(tokenizer, chosen.data, chosen.training.seed)
    layout = collate.layout(chosen.data, tokenizer.pad_token_id, False)
    batches = loader.Batches(rows, layout, chosen.training, distributed.place())
    folder = chosen.model.model_name
    sharded = model.load_model(chosen.model, model.load_config(folder), merged.document, None)
    shape = model.shape_of(sharded)
    wrapped = engine.create(sharded, merged.document, chosen.training, batches.total_steps)
    isolation.check(wrapped, layout)
    recorder = Recorder()
    finetune_zero3.train(
        Run(
            config=chosen,
            engine=wrapped,
            tokenizer=tokenizer,
            batches=batches,
            progress=metrics.Progress(),
            meter=metrics.Meter(chosen, shape),
            trackers=tracking.Trackers([recorder]),
            evaluation=evaluation.Evaluation(None, [], 0),
            requests=Requests(chosen, True),
        )
    )
    return wrapped, recorder.logged


def gradients(values: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Take the gradient of one step from Adam's first moment, which is a tenth of it after that step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    wrapped, logged = train({**values, "max_steps": 1, "max_grad_norm": 0})
    moments = {
        name: safe_get_full_optimizer_state(parameter, "exp_avg").clone() * 10
        for name, parameter in wrapped.module.named_parameters()
    }
    return moments, logged[0]


def test_accumulation_and_ranks_do_not_change_the_gradient(model_folder: Path, rows_file: Path) -> None:
    data = {"model_name": str(model_folder), "dataset_name": str(rows_file)}
    whole, logged = run_ranks(1, gradients, {**data, "batch_size": 8})[0]
    split, logged_split = run_ranks(1, gradients, {**data, "batch_size": 2, "gradient_accumulation_steps": 4})[0]
    shared = run_ranks(2, gradients, {**data, "batch_size": 2, "gradient_accumulation_steps": 2})
    assert sum(float(gradient.abs().sum()) for gradient in whole.values()) > 1
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)
        for moments, _ in shared:
            torch.testing.assert_close(moments[name], gradient, rtol=1e-4, atol=1e-6)
    for other in (logged_split, shared[0][1], shared[1][1]):
        assert other["loss"] == pytest.approx(logged["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)


def learning_rates(values: dict[str, Any], document: dict[str, Any]) -> tuple[list[float], list[list[float]]]:
    """Train and return, per step, the logged learning rate and those that every optimizer really stepped with."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    used: list[list[float]] = []
    step = DeepSpeedCPUAdam.step

    def watched(self: Any, closure: Any = None) -> Any:
        used.append([float(group["lr"]) for group in self.param_groups])
        return step(self, closure)

    on_device: list[list[float]] = []
    device_step = torch.optim.AdamW.step

    def watched_on_device(self: Any, closure: Any = None) -> Any:
        result = device_step(self, closure)
        on_device.append([float(group["lr"]) for group in self.param_groups])
        return result

    DeepSpeedCPUAdam.step = watched
    torch.optim.AdamW.step = watched_on_device  # type: ignore[method-assign]
    _, logged = train(values, document)
    return [line["lr"] for line in logged], used + on_device


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("linear", "constant")]


@pytest.mark.parametrize("kind", ["cosine", *SLOW_KINDS])
def test_the_optimizer_steps_with_the_schedule(kind: str, model_folder: Path, rows_file: Path) -> None:
    values = {"model_name": str(model_folder), "dataset_name": str(rows_file), "batch_size": 4, "lr_scheduler": kind,
              "warmup": 0.3, "lr": 2e-3}  # fmt: skip
    ((logged, used),) = run_ranks(1, learning_rates, values, FP32)
    expected = [2e-3 * schedule.factor(kind, step, 3, 10) for step in range(10)]
    assert logged == pytest.approx(expected)
    per_step = len(used) // 10
    assert per_step >= 2  # one call per sub-group: decayed and not
    for step, lr in enumerate(expected):
        for groups in used[step * per_step : (step + 1) * per_step]:
            assert groups == pytest.approx([lr, lr])


def test_the_share_on_the_device_follows_the_schedule(model_folder: Path, rows_file: Path) -> None:
    document = copy.deepcopy(FP32)
    document["zero_optimization"]["offload_optimizer"]["ratio"] = 0.0
    values = {"model_name": str(model_folder), "dataset_name": str(rows_file), "batch_size": 4, "warmup": 0.3}
    ((logged, used),) = run_ranks(1, learning_rates, values, document)
    assert len(set(logged)) > 5
    per_step = len(used) // len(logged)
    for step, lr in enumerate(logged):
        for groups in used[step * per_step : (step + 1) * per_step]:
            assert groups == pytest.approx([lr, lr])


def names_of_optimizers(folder: str, document: dict[str, Any]) -> tuple[str, bool]:
    wrapped, _ = train({"model_name": folder, "dataset_name": folder + "/rows.json", "max_steps": 2}, document)
    return type(wrapped.optimizer).__name__, bool(wrapped.optimizer.statistics.steps)


def test_super_offload_is_this_projects_own_on_the_cpu_too(model_folder: Path) -> None:
    write_rows(model_folder / "rows.json")
    document = copy.deepcopy(FP32)
    document["zero_optimization"]["offload_optimizer"]["super_offload"] = True
    assert run_ranks(1, names_of_optimizers, str(model_folder), document) == [("SharedMemorySuperOffload", True)]
