"""The private names of DeepSpeed that this package leans on, and a check that they are there.

The check reads DeepSpeed's source with `ast`: decorators hide the signatures of the live functions. It says
what does not hold; `install` then keeps DeepSpeed's own class. A new DeepSpeed release is supported when the
check is empty and the test suite passes on it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

FIRST_SUPPORTED = (0, 19, 8)
"""Before it, `step` does not call `_loss_scale_update_and_overflow_cleanup`; before 0.19.3 more is missing."""

TESTED_VERSIONS = ("0.19.8",)

BASE_MODULE = "deepspeed.runtime.zero.stage3"
BASE_CLASS = "DeepSpeedZeroOptimizer_Stage3"
SEAM_MODULE = "deepspeed.runtime.superoffload.superoffload_stage3"
SEAM_NAME = "SuperOffloadOptimizer_Stage3"
ENGINE_MODULE = "deepspeed.runtime.engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Name a method of the base class: its first arguments, and why it matters."""

    arguments: tuple[str, ...]
    why: str


METHODS: Mapping[str, Method] = {
    "_create_fp32_partitions": Method(arguments=("self",), why="replaced: parameters go into the arena"),
    "initialize_optimizer_states": Method(arguments=("self",), why="replaced: gradients are the arena's"),
    "partition_grads": Method(
        arguments=("self", "params_to_release", "grad_partitions"), why="extended: counts arrivals"
    ),
    "_offload_grad_partition_at_boundary": Method(
        arguments=("self", "param", "grad_buffer"), why="extended: the only writer of host gradients"
    ),
    "zero_grad": Method(arguments=("self", "set_to_none"), why="extended: a dropped batch"),
    "step": Method(arguments=("self", "closure"), why="extended: its calls are listed below"),
    "_overflow_clean_up": Method(arguments=("self", "prev_scale"), why="extended: the step is skipped"),
    "unscale_and_clip_grads": Method(
        arguments=("self", "sub_group_id", "total_norm"), why="extended: the norm is known; same arithmetic"
    ),
    "_optimizer_step": Method(arguments=("self", "sub_group_id"), why="extended: collects the new weights"),
    "_reassign_or_swap_out_partitioned_parameters": Method(
        arguments=("self", "sub_group_id"), why="extended: weights are already uploaded"
    ),
    "_unflatten_partitioned_parameters": Method(arguments=("self", "sub_group_id"), why="called"),
    "_post_step": Method(arguments=("self", "timer_names"), why="extended: the step has ended"),
    "get_param_id": Method(arguments=("self", "param"), why="called"),
    "set_fp32_grad_for_param": Method(arguments=("self", "value", "param"), why="extended: outside write"),
    "set_local_grad_for_param": Method(arguments=("self", "value", "param"), why="extended: outside write"),
    "update_fp32_grad_for_param_vectorized": Method(
        arguments=("self", "update_func", "param_list"), why="extended: outside write"
    ),
    "set_full_hp_param": Method(arguments=("self", "value", "param", "optim_state_key"), why="extended: outside write"),
    "set_local_hp_param": Method(
        arguments=("self", "value", "param", "optim_state_key"), why="extended: outside write"
    ),
    "refresh_fp32_params": Method(arguments=("self",), why="extended: outside write"),
    "checkpoint_event_prologue": Method(arguments=("self",), why="extended: commits before a save"),
    "_rigid_state_dict": Method(arguments=("self",), why="extended: complete state"),
    "_rigid_load_state_dict": Method(
        arguments=("self", "state_dict", "load_optimizer_states"), why="extended: state into the arena"
    ),
    "load_hp_checkpoint_state_from_checkpoint_dir_stage3": Method(
        arguments=("self", "checkpoint_dir"), why="extended: state into the arena"
    ),
    "load_module_checkpoint_state_from_checkpoint_dir_stage3": Method(
        arguments=("self", "checkpoint_dir", "load_from_fp32_weights"), why="extended: outside write"
    ),
    "destroy": Method(arguments=("self",), why="extended: ends the optimizer process"),
}

CALLS: Mapping[str, tuple[str, ...]] = {
    "_setup_for_real_optimizer": ("_create_fp32_partitions", "initialize_optimizer_states"),
    "partition_grads": ("is_gradient_accumulation_boundary", "_offload_grad_partition_at_boundary"),
    "_finalize_offload_gradient_accumulation": ("_offload_grad_partition_at_boundary",),
    "step": (
        "_loss_scale_update_and_overflow_cleanup",
        "unscale_and_clip_grads",
        "_optimizer_step",
        "_reassign_or_swap_out_partitioned_parameters",
        "_post_step",
    ),
    "_loss_scale_update_and_overflow_cleanup": ("_overflow_clean_up",),
}
"""Base method -> methods of self that it must call."""

ATTRIBUTES_SET: Mapping[str, frozenset[str]] = {
    "_create_fp32_partitions": frozenset({"subgroup_to_device"}),
    "initialize_optimizer_states": frozenset({"optimizer"}),
}
"""Replaced base method -> attributes of self that it assigns. More would mean more to replace."""

ATTRIBUTES: tuple[str, ...] = (
    "optimizer",
    "backup_optimizer",
    "partial_offload",
    "master_weights_and_grads_dtype",
    "offload_optimizer_pin_memory",
    "fp16_groups",
    "fp16_partitioned_groups_flat",
    "fp16_partitioned_groups_flat_id",
    "fp32_partitioned_groups_flat",
    "sub_group_to_group_id",
    "grad_position",
    "clip_grad",
    "micro_step_id",
    "gradient_accumulation_dtype",
    "norm_for_param_grads",
    "_offload_boundary_param_ids",
    "subgroup_to_device",
)
"""Attributes of self that the base class must assign somewhere."""

INHERITED: tuple[str, ...] = (
    "is_gradient_accumulation_boundary",
    "_get_param_partition_rank",
    "_constant_buffered_norm2",
    "loss_scale",
)
"""Names that may come from anywhere in the base class's ancestry."""


def problems() -> list[str]:
    """Return what of the table does not hold for the installed DeepSpeed; empty means that all does."""
    base = importlib.import_module(BASE_MODULE)
    methods = _methods(base, BASE_CLASS)
    found = [*_method_problems(methods), *_call_problems(methods), *_attribute_problems(methods)]
    live_class = getattr(base, BASE_CLASS)
    found += [f"{name} is missing" for name in INHERITED if not hasattr(live_class, name)]
    return found + _seam_problems()


def _methods(module: ModuleType, class_name: str) -> dict[str, ast.FunctionDef]:
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    return {}


def _method_problems(methods: Mapping[str, ast.FunctionDef]) -> list[str]:
    found = []
    for name, wanted in METHODS.items():
        if name not in methods:
            found.append(f"{BASE_CLASS}.{name} is missing ({wanted.why})")
            continue
        arguments = tuple(a.arg for a in methods[name].args.args)
        if arguments[: len(wanted.arguments)] != wanted.arguments:
            found.append(f"{BASE_CLASS}.{name}{arguments} was expected to begin with {wanted.arguments}")
    return found


def _call_problems(methods: Mapping[str, ast.FunctionDef]) -> list[str]:
    found = []
    for caller, callees in CALLS.items():
        called = _called_on_self(methods[caller]) if caller in methods else set()
        found += [f"{BASE_CLASS}.{caller} does not call {c}" for c in callees if c not in called]
    return found


def _attribute_problems(methods: Mapping[str, ast.FunctionDef]) -> list[str]:
    found = []
    for name, wanted in ATTRIBUTES_SET.items():
        surplus = _assigned_on_self(methods[name]) - wanted if name in methods else set()
        found += [f"{BASE_CLASS}.{name} also sets {attribute}" for attribute in sorted(surplus)]
    everywhere: set[str] = set().union(*(_assigned_on_self(m) for m in methods.values()))
    return found + [f"{BASE_CLASS} no longer sets {a}" for a in ATTRIBUTES if a not in everywhere]


def _seam_problems() -> list[str]:
    """Check that the engine imports the class inside a function, which is what makes install() work."""
    if not hasattr(importlib.import_module(SEAM_MODULE), SEAM_NAME):
        return [f"{SEAM_MODULE} has no {SEAM_NAME}"]
    tree = ast.parse(inspect.getsource(importlib.import_module(ENGINE_MODULE)))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and node.module == SEAM_MODULE:
                    return []
    return [f"{ENGINE_MODULE} does not import {SEAM_NAME} inside a function"]


def _called_on_self(function: ast.FunctionDef) -> set[str]:
    return {
        node.func.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    }


def _assigned_on_self(function: ast.FunctionDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
