"""The private names of DeepSpeed that this package depends on, and a check that they exist.

The check reads DeepSpeed's source with `ast`, because decorators hide the signatures of the live functions. It
returns what does not hold; `install` then falls back. A new DeepSpeed release is supported if the check finds nothing
and the test suite passes on it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from deepspeed.accelerator import get_accelerator

FIRST_SUPPORTED = (0, 19, 8)
"""Older versions do not call `_loss_scale_update_and_overflow_cleanup` in `step`; versions before 0.19.3 lack more."""

TESTED_VERSIONS = ("0.19.8",)

BASE_MODULE = "deepspeed.runtime.zero.stage3"
BASE_CLASS = "DeepSpeedZeroOptimizer_Stage3"
CPU_ADAM_MODULE = "deepspeed.ops.adam.cpu_adam"
CPU_ADAM_CLASS = "DeepSpeedCPUAdam"
PARAMETER_MODULE = "deepspeed.runtime.zero.partition_parameters"
SEAM_MODULE = "deepspeed.runtime.superoffload.superoffload_stage3"
SEAM_NAME = "SuperOffloadOptimizer_Stage3"
ENGINE_MODULE = "deepspeed.runtime.engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method of the base class: its first arguments, and what it is used for."""

    arguments: tuple[str, ...]
    why: str


METHODS: Mapping[str, Method] = {
    "__init__": Method(
        arguments=("self", "module", "init_optimizer", "param_names", "timers", "ds_config"), why="extended"
    ),
    "_setup_for_real_optimizer": Method(
        arguments=("self",), why="replaced: the accumulation buffer is allocated when it is needed"
    ),
    "_create_fp32_partitions": Method(arguments=("self",), why="replaced: parameters go into the arena"),
    "_create_next_swappable_fp32_groups": Method(arguments=("self",), why="called"),
    "initialize_optimizer_states": Method(arguments=("self",), why="replaced: gradients are the arena's"),
    "partition_grads": Method(
        arguments=("self", "params_to_release", "grad_partitions"), why="extended: counts arrivals"
    ),
    "_offload_grad_partition_at_boundary": Method(
        arguments=("self", "param", "grad_buffer"), why="extended: the only writer of host gradients"
    ),
    "_finalize_offload_gradient_accumulation": Method(
        arguments=("self",), why="extended: its copies run on the copy stream"
    ),
    "zero_grad": Method(arguments=("self", "set_to_none"), why="extended: a dropped batch"),
    "step": Method(arguments=("self", "closure"), why="extended: its calls are listed below"),
    "_overflow_clean_up": Method(arguments=("self", "prev_scale"), why="extended: the step is skipped"),
    "unscale_and_clip_grads": Method(
        arguments=("self", "sub_group_id", "total_norm"),
        why="extended: the norm is known; gradients.py repeats its arithmetic",
    ),
    "_optimizer_step": Method(arguments=("self", "sub_group_id"), why="extended: collects the new weights"),
    "_reassign_or_swap_out_partitioned_parameters": Method(
        arguments=("self", "sub_group_id"), why="extended: weights are already uploaded"
    ),
    "_unflatten_partitioned_parameters": Method(arguments=("self", "sub_group_id"), why="called"),
    "_post_step": Method(arguments=("self", "timer_names"), why="extended: the step has ended"),
    "get_param_id": Method(arguments=("self", "param"), why="called"),
    "set_fp32_grad_for_param": Method(arguments=("self", "value", "param"), why="extended: write from outside"),
    "set_local_grad_for_param": Method(arguments=("self", "value", "param"), why="extended: write from outside"),
    "update_fp32_grad_for_param_vectorized": Method(
        arguments=("self", "update_func", "param_list"), why="extended: write from outside"
    ),
    "set_full_hp_param": Method(
        arguments=("self", "value", "param", "optim_state_key"), why="extended: write from outside"
    ),
    "set_local_hp_param": Method(
        arguments=("self", "value", "param", "optim_state_key"), why="extended: write from outside"
    ),
    "refresh_fp32_params": Method(arguments=("self",), why="extended: write from outside"),
    "offload_states": Method(arguments=("self", "include"), why="extended: copies end first"),
    "checkpoint_event_prologue": Method(arguments=("self",), why="extended: commits before a save"),
    "_rigid_state_dict": Method(arguments=("self",), why="extended: complete state"),
    "_rigid_load_state_dict": Method(
        arguments=("self", "state_dict", "load_optimizer_states"), why="extended: state into the arena"
    ),
    "load_hp_checkpoint_state_from_checkpoint_dir_stage3": Method(
        arguments=("self", "checkpoint_dir"), why="extended: state into the arena"
    ),
    "load_module_checkpoint_state_from_checkpoint_dir_stage3": Method(
        arguments=("self", "checkpoint_dir", "load_from_fp32_weights"), why="extended: write from outside"
    ),
    "destroy": Method(arguments=("self",), why="extended: ends the optimizer process"),
}

INIT_KEYWORDS: tuple[str, ...] = (
    "offload_optimizer_config",
    "offload_param_config",
    "zenflow_config",
    "elastic_checkpoint",
    "cpuadam_cores_perc",
)
"""Keyword arguments of the base class's constructor that this package reads."""

CALLS: Mapping[str, tuple[str, ...]] = {
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
"""Base method -> methods of self that it calls."""

CALLS_EXACTLY: Mapping[str, frozenset[str]] = {
    "_setup_for_real_optimizer": frozenset(
        {"_create_fp32_partitions", "_create_next_swappable_fp32_groups", "initialize_optimizer_states"}
    ),
}
"""Replaced base method -> all methods of self that it calls. If it called more, so would the replacement."""

ATTRIBUTES_SET: Mapping[str, frozenset[str]] = {
    "_setup_for_real_optimizer": frozenset({"grad_partitions_flat_buffer", "__param_id_to_grad_partition"}),
    "_create_fp32_partitions": frozenset({"subgroup_to_device"}),
    "initialize_optimizer_states": frozenset({"optimizer"}),
}
"""Replaced base method -> all attributes of self that it assigns. If it assigned more, so would the replacement."""

ATTRIBUTES: tuple[str, ...] = (
    "optimizer",
    "module",
    "persistent_parameters",
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
    "dtype",
    "ipg_buckets",
    "contiguous_gradients",
    "reduce_bucket_size",
    "device",
    "grad_partitions_flat_buffer",
    "__param_id_to_grad_partition",
)
"""Attributes that the base class assigns on self. Python mangles the last with the name of the class."""

CPU_ADAM_ATTRIBUTES: tuple[str, ...] = ("ds_opt_adam", "fp32_optimizer_states", "adam_w_mode")
"""Attributes that DeepSpeedCPUAdam assigns on self."""

CPU_ADAM_KEYS: tuple[str, ...] = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "bias_correction",
    "step",
    "exp_avg",
    "exp_avg_sq",
)
"""Keys of its param groups and of its state."""

CPU_ADAM_CALLS: Mapping[str, int] = {"create_adam": 8, "adam_update": 12}
"""Function of the compiled op -> number of arguments with which DeepSpeedCPUAdam calls it."""

PARAMETER_ATTRIBUTES: tuple[str, ...] = ("ds_id", "ds_numel", "partition_numel", "all_gather", "all_gather_coalesced")
"""Attributes that ZeRO-3 assigns on a parameter."""

ACCELERATOR_ATTRIBUTES: tuple[str, ...] = ("_name",)
"""Private attributes of the accelerator object."""

INHERITED: tuple[str, ...] = (
    "is_gradient_accumulation_boundary",
    "_get_param_partition_rank",
    "_constant_buffered_norm2",
    "loss_scale",
)
"""Names that the base class defines or inherits."""


def problems() -> list[str]:
    """Return the entries of the tables that do not hold for the installed DeepSpeed; empty if all hold."""
    methods = _methods(BASE_MODULE, BASE_CLASS)
    found = [*_method_problems(methods), *_call_problems(methods), *_attribute_problems(methods)]
    base = getattr(importlib.import_module(BASE_MODULE), BASE_CLASS)
    found += [f"{BASE_CLASS}.{name} is missing" for name in INHERITED if not hasattr(base, name)]
    accelerator = get_accelerator()
    found += [f"accelerator.{name} is missing" for name in ACCELERATOR_ATTRIBUTES if not hasattr(accelerator, name)]
    return [*found, *_cpu_adam_problems(), *_parameter_problems(), *_seam_problems()]


def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(importlib.import_module(module)))


def _methods(module: str, class_name: str) -> dict[str, ast.FunctionDef]:
    for node in _tree(module).body:
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
    accepted = {a.arg for a in methods["__init__"].args.args} if "__init__" in methods else set()
    return found + [f"{BASE_CLASS}.__init__ does not accept {k}" for k in INIT_KEYWORDS if k not in accepted]


def _call_problems(methods: Mapping[str, ast.FunctionDef]) -> list[str]:
    found = []
    for caller, callees in CALLS.items():
        called = _called_on_self(methods[caller]) if caller in methods else set()
        found += [f"{BASE_CLASS}.{caller} does not call {c}" for c in callees if c not in called]
    for caller, wanted in CALLS_EXACTLY.items():
        surplus = _called_on_self(methods[caller]) ^ wanted if caller in methods else set()
        found += [f"{BASE_CLASS}.{caller} was expected to call {sorted(wanted)} and nothing else"] * bool(surplus)
    return found


def _attribute_problems(methods: Mapping[str, ast.FunctionDef]) -> list[str]:
    found = []
    for name, wanted in ATTRIBUTES_SET.items():
        surplus = _assigned_on("self", methods[name]) - wanted if name in methods else set()
        found += [f"{BASE_CLASS}.{name} also sets {attribute}" for attribute in sorted(surplus)]
    assigned = _assigned_in_class(methods)
    return found + [f"{BASE_CLASS} no longer sets {a}" for a in ATTRIBUTES if a not in assigned]


def _cpu_adam_problems() -> list[str]:
    methods = _methods(CPU_ADAM_MODULE, CPU_ADAM_CLASS)
    assigned = _assigned_in_class(methods)
    found = [f"{CPU_ADAM_CLASS} no longer sets {a}" for a in CPU_ADAM_ATTRIBUTES if a not in assigned]
    nodes = [node for method in methods.values() for node in ast.walk(method)]
    keys = {n.slice.value for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Constant)}
    found += [f"{CPU_ADAM_CLASS} no longer uses the key {k}" for k in CPU_ADAM_KEYS if k not in keys]
    calls = {(n.func.attr, len(n.args)) for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    wanted = CPU_ADAM_CALLS.items()
    return found + [f"{CPU_ADAM_CLASS} does not call {f} with {n} arguments" for f, n in wanted if (f, n) not in calls]


def _parameter_problems() -> list[str]:
    attributes = [node for node in ast.walk(_tree(PARAMETER_MODULE)) if isinstance(node, ast.Attribute)]
    assigned = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    return [f"{PARAMETER_MODULE} no longer sets {a} on parameters" for a in PARAMETER_ATTRIBUTES if a not in assigned]


def _seam_problems() -> list[str]:
    """Check that the engine imports the class inside a function, which is what makes install() work."""
    if not hasattr(importlib.import_module(SEAM_MODULE), SEAM_NAME):
        return [f"{SEAM_MODULE} has no {SEAM_NAME}"]
    for function in ast.walk(_tree(ENGINE_MODULE)):
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


def _assigned_in_class(methods: Mapping[str, ast.FunctionDef]) -> set[str]:
    return set().union(*(_assigned_on("self", method) for method in methods.values()))


def _assigned_on(name: str, tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
    }
