"""The tables of private names hold for the installed DeepSpeed, and the check notices when they do not."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import os
import re
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from superoffload.offload.zero3 import contract, surface
from superoffload.offload.zero3.gradients import gradient_factor
from superoffload.offload.zero3.optimizer import SharedMemorySuperOffload

pytestmark = pytest.mark.unit

parsed = functools.cache(contract._tree)
NAMES = {
    contract.BASE_MODULE: (*contract.METHODS, *contract.ATTRIBUTES, *contract.INIT_KEYWORDS),
    contract.CPU_ADAM_MODULE: (*contract.CPU_ADAM_ATTRIBUTES, *contract.CPU_ADAM_KEYS, *contract.CPU_ADAM_CALLS),
    contract.PARAMETER_MODULE: contract.PARAMETER_ATTRIBUTES,
}


def test_the_installed_deepspeed_keeps_the_contract() -> None:
    assert contract.problems() == []


@pytest.mark.skipif("OFFLOAD_OTHER_DEEPSPEED" in os.environ, reason="another version is being tested")
def test_the_installed_deepspeed_is_a_tested_one() -> None:
    assert deepspeed.__version__.split("+")[0] in contract.TESTED_VERSIONS


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_a_renamed_name_is_noticed(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    source = inspect.getsource(importlib.import_module(module))
    changed = ast.parse(re.sub(rf"\b{name}\b", "renamed", source))
    monkeypatch.setattr(contract, "_tree", lambda wanted: changed if wanted == module else parsed(wanted))
    assert any(re.search(rf"\b{name}\b", problem) for problem in contract.problems())


@pytest.mark.parametrize("name", contract.INHERITED)
def test_a_missing_inherited_name_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for owner in DeepSpeedZeroOptimizer_Stage3.__mro__:
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    assert contract.problems() == [f"{contract.BASE_CLASS}.{name} is missing"]


@pytest.mark.parametrize("name", contract.ACCELERATOR_ATTRIBUTES)
def test_a_missing_attribute_of_the_accelerator_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(get_accelerator(), name)
    assert contract.problems() == [f"accelerator.{name} is missing"]


def test_changed_arguments_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {n: dataclasses.replace(m, arguments=("self", "other")) for n, m in contract.METHODS.items()}
    monkeypatch.setattr(contract, "METHODS", changed)
    found = contract.problems()
    assert len(found) == len(changed) and all("was expected to begin with" in problem for problem in found)


def test_changed_calls_attributes_and_names_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "CALLS", {"step": ("_no_such_call",)})
    monkeypatch.setattr(contract, "CALLS_EXACTLY", {"_post_step": frozenset({"reset_cpu_buffers"})})
    monkeypatch.setattr(contract, "ATTRIBUTES_SET", {"_create_fp32_partitions": frozenset()})
    monkeypatch.setattr(contract, "CPU_ADAM_CALLS", {"adam_update": 11})
    monkeypatch.setattr(contract, "SEAM_NAME", "NoSuchClass")
    assert len(contract.problems()) == 5


def test_every_extended_name_is_in_the_tables() -> None:
    own = {n for n in vars(SharedMemorySuperOffload) if not n.startswith("__") or n == "__init__"}
    extended = {n for n in own if hasattr(DeepSpeedZeroOptimizer_Stage3, n)}
    assert extended <= set(contract.METHODS)
    attributes = {n.replace(f"_{contract.BASE_CLASS}__", "__") for n in own - extended}
    assert attributes - set(contract.ATTRIBUTES) == {"statistics", "flush", "close"}


def members(protocol: type) -> set[str]:
    return {*protocol.__annotations__, *(n for n, v in vars(protocol).items() if inspect.isfunction(v))} - {
        "__init__",
        "__subclasshook__",
    }


def test_the_types_list_what_the_tables_list() -> None:
    mangled = f"_{contract.BASE_CLASS}__"
    names = {n.replace(mangled, "__") for n in members(surface.ZeroOptimizer) if not n.startswith("_no_init")}
    assert names <= {*contract.METHODS, *contract.ATTRIBUTES, *contract.INHERITED}
    assert members(surface.DsParameter) - {"grad", "requires_grad"} == set(contract.PARAMETER_ATTRIBUTES)
    assert members(surface.CpuAdam) - {"defaults", "param_groups", "state"} == set(contract.CPU_ADAM_ATTRIBUTES)


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
    ours.mul_(gradient_factor(loss_scale, clip_grad, total_norm))
    assert torch.equal(ours, flat.grad)
