"""Build the optimizer, its schedule and DeepSpeed's engine."""

import copy
import importlib
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime import compiler
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError

from superoffload import distributed
from superoffload.config import Config
from superoffload.ds_config import DsConfig, has_bf16_state
from superoffload.errors import UserError, first_line
from superoffload.log import logger
from superoffload.model.parameter_groups import parameter_groups
from superoffload.offload.install import installed
from superoffload.offload.operators import compiled
from superoffload.offload.settings import OffloadSettings
from superoffload.offload.zero3.optimizer import SharedMemorySuperOffload
from superoffload.protocols import Engine, Model
from superoffload.training import schedule

MUON = "deepspeed.runtime.zero.muon.original_muon"
# What DeepSpeed raises for values of its configuration, besides pydantic's error.
REJECTIONS = (
    DeepSpeedConfigError, ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError
)  # fmt: skip


def check(ds_config: DsConfig, name: str) -> None:
    """Raise `UserError` if DeepSpeed or the device does not accept the ds_config made from the file `name`.

    `superoffload.ds_schema` has checked what this program reads; DeepSpeed's own keys are checked here, before it
    rejects them while it loads the model.
    """
    try:
        DeepSpeedConfig(copy.deepcopy(ds_config))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"--deepspeed_config {name}: {key} is {first['input']!r}: {first['msg']} ({error.title})"
        ) from error
    except REJECTIONS as error:
        raise UserError(f"--deepspeed_config {name}: DeepSpeed does not accept it: {first_line(error)}") from error
    device = get_accelerator()
    for precision, supported in (("bf16", device.is_bf16_supported), ("fp16", device.is_fp16_supported)):
        if ds_config.get(precision, {}).get("enabled") and not supported():
            raise UserError(
                f"--deepspeed_config {name}: enables {precision}, which this device ({distributed.device_name()}) does "
                "not support; enable another precision there"
            )


def create(model: Model, ds_config: DsConfig, config: Config, total_steps: int, *, stock: bool = False) -> Engine:
    """Wrap the partitioned model in DeepSpeed's engine, with AdamW on the host and the schedule (collective).

    `stock`: with DeepSpeed's own SuperOffload, for comparison.
    """
    training = config.training
    groups = parameter_groups(model, training.weight_decay)
    with compiled("cpu_adam"):
        optimizer = DeepSpeedCPUAdam(
            groups,
            lr=training.lr,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
            fp32_optimizer_states=not has_bf16_state(ds_config),
        )
    course = schedule.of(training, total_steps)

    def lr_scheduler(base: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        # DeepSpeed steps sub-groups without calling base.step; torch would warn that the schedule runs ahead of it.
        base._opt_called = True  # type: ignore[attr-defined]
        return torch.optim.lr_scheduler.LambdaLR(base, lambda step: course.factor(step))

    _import_muon()
    with nullcontext() if stock else installed(offload_settings(config)):
        engine: Engine
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=ds_config)
    logger.info("Optimizer: %s", _name(engine.optimizer))
    _follow_schedule_on_device(engine.optimizer, optimizer)
    engine.train()
    return engine


def _import_muon() -> None:
    """Import DeepSpeed's Muon without compiling it.

    DeepSpeed imports it with every engine, to compare the type of the optimizer, which is Adam here. Its functions are
    decorated with torch.compile, which loads the whole of torch's compiler; that takes more than a second.
    """
    compile_ = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module(MUON)
    except ImportError:  # of a DeepSpeed that has no Muon there
        pass
    finally:
        compiler.compile = compile_


def offload_settings(config: Config) -> OffloadSettings:
    """Return the settings of the offload engine, whose check of the first steps reports to the output folder."""
    steps = config.offload.verify_steps
    return OffloadSettings(
        verify_steps=None if steps == -1 else steps,
        report_folder=config.output.output_dir,
        verify_error=UserError,
    )


def _name(zero_optimizer: Any) -> str:
    """Name the optimizer that is in use, which may not be the one that the ds_config asks for."""
    if isinstance(zero_optimizer, SharedMemorySuperOffload):
        return "SuperOffload, with its state in memory shared with the optimizer process"
    return "DeepSpeed's SuperOffload" if hasattr(zero_optimizer, "superoffload_cpu_optimizer") else "ZeRO-Offload"


def replay_adam_beta_powers(engine: Engine) -> None:
    """Bring the running powers of Adam's betas, after a load, to their values in an uninterrupted run.

    DeepSpeed's C++ Adam (csrc/includes/cpu_adam.h, IncrementStep) multiplies beta^t step by step, but recomputes the
    power when the step jumps, as it does after a load; the two round differently. Updates of empty tensors, a few
    microseconds each, repeat the multiplications.
    """
    optimizer = getattr(engine.optimizer, "optimizer", None)
    if not isinstance(optimizer, DeepSpeedCPUAdam) or isinstance(engine.optimizer, SharedMemorySuperOffload):
        return  # SharedMemorySuperOffload does this itself
    last = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    empty = torch.empty(0)
    group = optimizer.param_groups[0]
    for step in range(1, last + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, True, empty, empty, empty, empty
        )


def _follow_schedule_on_device(zero_optimizer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Make the device share of ZeRO-Offload's optimizer (ratio below 1) follow the schedule.

    DeepSpeed builds that second optimizer from the first group's initial values and never updates them. The optimizer
    of `superoffload.offload` updates its own.
    """
    device_share = getattr(zero_optimizer, "backup_optimizer", None)
    if device_share is None or isinstance(zero_optimizer, SharedMemorySuperOffload):
        return

    def copy_lr(*_: Any) -> None:
        for group, source in zip(device_share.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = source["lr"]

    device_share.register_step_pre_hook(copy_lr)
