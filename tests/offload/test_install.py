"""When the optimizer is used and when not; nothing stays patched."""

from __future__ import annotations

import copy
import logging
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.superoffload import superoffload_stage3

from superoffload.offload.install import installed, reason_unsupported
from superoffload.offload.zero3 import contract

CONFIG: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split(".")
    section = config
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    return config


def test_a_fitting_configuration_has_no_reason() -> None:
    assert reason_unsupported(CONFIG) is None
    adam = DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))])
    assert reason_unsupported(CONFIG, adam) is None


@pytest.mark.unit
@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("zero_optimization.stage", 2, "ZeRO stage 2"),
        ("zero_optimization.offload_optimizer.super_offload", False, "super_offload is not set"),
        ("zero_optimization.offload_optimizer.device", "nvme", "offload to nvme"),
        ("zero_optimization.offload_param.device", "nvme", "NVMe"),
        ("zero_optimization.zenflow", {}, "ZenFlow"),
        ("zero_optimization.elastic_checkpoint", True, "elastic"),
        ("compile.deepcompile", True, "DeepCompile"),
        ("torch_autocast", {"enabled": True, "dtype": "float16"}, "GradScaler"),
        ("optimizer.type", "Lion", "Lion"),
        ("optimizer.params.torch_adam", True, "torch_adam"),
    ],
)
def test_the_reason_names_what_is_unsupported(path: str, value: Any, words: str) -> None:
    reason = reason_unsupported(changed(path, value))
    assert reason is not None and words in reason and "Adam moments" in reason and "\n" not in reason


@pytest.mark.unit
def test_another_optimizer_is_a_reason() -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    assert "SGD" in (reason_unsupported(CONFIG, sgd) or "")


def test_another_deepspeed_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.19.5")
    assert "older than 0.19.8" in (reason_unsupported(CONFIG) or "")
    monkeypatch.setattr(deepspeed, "__version__", "0.20.1+abc")
    assert reason_unsupported(CONFIG) is None
    monkeypatch.setattr(contract, "INHERITED", ("no_such_name",))
    assert "no_such_name is missing" in (reason_unsupported(CONFIG) or "")


@pytest.mark.unit
def test_nothing_stays_patched() -> None:
    stock = superoffload_stage3.SuperOffloadOptimizer_Stage3
    with installed():
        assert superoffload_stage3.SuperOffloadOptimizer_Stage3 is not stock
        with installed():
            pass
    assert superoffload_stage3.SuperOffloadOptimizer_Stage3 is stock
    with pytest.raises(ValueError, match="inside"), installed():
        raise ValueError("inside")
    assert superoffload_stage3.SuperOffloadOptimizer_Stage3 is stock


@pytest.mark.unit
def test_an_unsuitable_optimizer_falls_back_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from superoffload.offload import install

    built: list[Any] = []
    monkeypatch.setattr(install, "DeepSpeedZeroOptimizer_Stage3", lambda *a, **k: built.append(a))
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with installed(), caplog.at_level(logging.WARNING):
        superoffload_stage3.SuperOffloadOptimizer_Stage3(None, sgd, {}, None, {})
    (record,) = caplog.records
    assert "SGD" in record.getMessage() and "plain ZeRO-Offload" in record.getMessage()
    assert len(built) == 1
