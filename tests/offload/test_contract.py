"""The table of private names holds for the installed DeepSpeed, and the check notices when it does not."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from superoffload.offload import contract
from superoffload.offload.optimizer import SharedMemorySuperOffload


def test_the_installed_deepspeed_keeps_the_contract() -> None:
    assert contract.problems() == []


@pytest.mark.skipif("OFFLOAD_OTHER_DEEPSPEED" in os.environ, reason="another version is being tried")
def test_the_installed_deepspeed_is_a_tested_one() -> None:
    assert deepspeed.__version__.split("+")[0] in contract.TESTED_VERSIONS


@pytest.mark.parametrize("name", contract.METHODS)
def test_a_missing_or_changed_method_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    entry = contract.METHODS[name]
    changed = {f"{name}_gone": entry, name: dataclasses.replace(entry, arguments=("self", "other"))}
    monkeypatch.setattr(contract, "METHODS", changed)
    found = contract.problems()
    assert len(found) == 2 and "is missing" in found[0] and "was expected to begin with" in found[1]


def test_changed_calls_attributes_and_names_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "CALLS", {"step": ("_no_such_call",)})
    monkeypatch.setattr(contract, "ATTRIBUTES", ("no_such_attribute",))
    monkeypatch.setattr(contract, "ATTRIBUTES_SET", {"_create_fp32_partitions": frozenset()})
    monkeypatch.setattr(contract, "INHERITED", ("no_such_name",))
    monkeypatch.setattr(contract, "SEAM_NAME", "NoSuchClass")
    assert len(contract.problems()) == 5


def test_every_extended_method_is_in_the_table() -> None:
    own = {
        name
        for cls in SharedMemorySuperOffload.__mro__
        if cls.__module__.startswith("superoffload.offload")
        for name in vars(cls)
    }
    extended = {n for n in own if hasattr(DeepSpeedZeroOptimizer_Stage3, n) and not n.startswith("__")}
    assert extended <= set(contract.METHODS)


@pytest.mark.parametrize("clip_grad", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("norm", [0.1, 1.0, 37.5])
@pytest.mark.parametrize("loss_scale", [1.0, 96.0, 65536.0])
def test_the_factor_is_that_of_deepspeed(clip_grad: float, norm: float, loss_scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(1000, generator=generator)
    ours, flat = gradient.clone(), torch.zeros(1000)
    flat.grad = gradient.clone()
    total_norm = torch.tensor(norm * loss_scale)
    optimizer = SimpleNamespace(loss_scale=loss_scale, clip_grad=clip_grad, fp32_partitioned_groups_flat=[flat])
    DeepSpeedZeroOptimizer_Stage3.unscale_and_clip_grads(optimizer, 0, total_norm)
    ours.mul_(SharedMemorySuperOffload._factor(optimizer, total_norm))
    assert torch.equal(ours, flat.grad)
