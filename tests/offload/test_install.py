"""When the optimizer is used and when not; nothing stays patched."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.superoffload import superoffload_stage3

from superoffload.offload import install
from superoffload.offload.install import installed
from superoffload.offload.zero3 import contract

ARGUMENTS: dict[str, Any] = {"offload_optimizer_config": SimpleNamespace(device="cpu"), "ds_config": {}}


@pytest.fixture
def adam() -> DeepSpeedCPUAdam:
    return DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record which class is built, instead of building it."""
    from superoffload.offload.zero3 import optimizer

    names: list[str] = []
    monkeypatch.setattr(optimizer, "SharedMemorySuperOffload", lambda *a, **k: names.append("ours"))
    monkeypatch.setattr(install, "DeepSpeedZeroOptimizer_Stage3", lambda *a, **k: names.append("ZeRO-Offload"))
    return names


def build(optimizer: Any, **arguments: Any) -> None:
    """Do what DeepSpeed's engine does."""
    with installed():
        superoffload_stage3.SuperOffloadOptimizer_Stage3(None, optimizer, {}, **{**ARGUMENTS, **arguments})


def test_it_is_used_if_nothing_stands_against_it(built: list[str], adam: DeepSpeedCPUAdam, tmp_path: Path) -> None:
    build(adam)
    build(adam, ds_config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "compile": {"deepcompile": False}})
    assert built == ["ours"] * 2


@pytest.mark.parametrize("written", ["{}", '{"compile": {"deepcompile": true,},}  # as DeepSpeed reads it: Hjson'])
def test_a_configuration_that_is_not_a_dict_is_read(
    written: str, built: list[str], adam: DeepSpeedCPUAdam, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(written)
    build(adam, ds_config=str(tmp_path / "ds.json"))
    build(adam, ds_config=base64.urlsafe_b64encode(written.encode()).decode())
    assert built == ["ours" if written == "{}" else "ZeRO-Offload"] * 2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("offload_optimizer_config", SimpleNamespace(device="nvme"), "optimizer offload to nvme"),
        ("offload_param_config", SimpleNamespace(device="nvme"), "NVMe"),
        ("zenflow_config", {}, "ZenFlow"),
        ("elastic_checkpoint", True, "elastic"),
        ("ds_config", {"compile": {"deepcompile": True}}, "DeepCompile"),
        ("ds_config", {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "GradScaler"),
        ("ds_config", {"torch_autocast": {"enabled": True, "dtype": "torch.half"}}, "GradScaler"),
    ],
)
def test_what_is_unsupported_is_named_and_not_used(
    name: str, value: Any, words: str, built: list[str], adam: DeepSpeedCPUAdam, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        build(adam, **{name: value})
    assert built == ["ZeRO-Offload"]
    (line,) = caplog.messages
    assert words in line and "Adam moments" in line and "plain ZeRO-Offload is used" in line and "\n" not in line


@pytest.mark.unit
def test_another_optimizer_is_not_used(built: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    assert built == ["ZeRO-Offload"] and "SGD" in caplog.text


def test_another_deepspeed_is_not_used(
    monkeypatch: pytest.MonkeyPatch, built: list[str], adam: DeepSpeedCPUAdam, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.19.5")
    build(adam)
    monkeypatch.setattr(deepspeed, "__version__", "0.20.1+abc")
    build(adam)
    monkeypatch.setattr(contract, "INHERITED", ("no_such_name",))
    build(adam)
    assert built == ["ZeRO-Offload", "ours", "ZeRO-Offload"]
    assert "older than 0.19.8" in caplog.text and "no_such_name is missing" in caplog.text


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
