"""The optimizer, its schedule and DeepSpeed's engine, made once, here."""

from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from superoffload import schedule
from superoffload.config import TrainingSettings
from superoffload.ds_config import BETAS, Document
from superoffload.log import logger
from superoffload.model import parameter_groups
from superoffload.offload.install import installed
from superoffload.offload.optimizer import SharedMemorySuperOffload


def create(model: Any, document: Document, training: TrainingSettings, total_steps: int) -> Any:
    """Wrap the sharded model in DeepSpeed's engine with AdamW on the host and the schedule (collective)."""
    logger.info("Preparing DeepSpeed (its CPU Adam is compiled at the first start, about a minute)")
    groups = parameter_groups(model, training.weight_decay)
    optimizer = DeepSpeedCPUAdam(groups, lr=training.lr, betas=BETAS, weight_decay=training.weight_decay)
    warmup = schedule.warmup_steps(total_steps, training.warmup)

    def lr_scheduler(base: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(
            base, lambda step: schedule.factor(training.lr_scheduler, step, warmup, total_steps)
        )

    with installed():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=document)
    logger.info("Optimizer: %s", _name(engine.optimizer))
    _follow_schedule_on_device(engine.optimizer, optimizer)
    engine.train()
    return engine


def _name(zero_optimizer: Any) -> str:
    """Say which optimizer trains: what was asked for is not always what can run."""
    if isinstance(zero_optimizer, SharedMemorySuperOffload):
        return "SuperOffload, its state in memory shared with a process of its own"
    return "DeepSpeed's SuperOffload" if hasattr(zero_optimizer, "superoffload_cpu_optimizer") else "ZeRO-Offload"


def catch_up(engine: Any) -> None:
    """Bring the running powers of Adam's betas, after a load, to where an uninterrupted run has them.

    DeepSpeed's C++ Adam (csrc/includes/cpu_adam.h, IncrementStep) multiplies beta^t up step by step and takes a
    power afresh when the step jumps, as it does after a load; the two round differently. Updates of nothing,
    microseconds each, multiply it up again.
    """
    optimizer = getattr(engine.optimizer, "optimizer", None)
    if not isinstance(optimizer, DeepSpeedCPUAdam) or isinstance(engine.optimizer, SharedMemorySuperOffload):
        return  # the latter does so itself
    last = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    nothing = torch.empty(0)
    group = optimizer.param_groups[0]
    for step in range(1, last + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, True, nothing, nothing, nothing, nothing
        )


def _follow_schedule_on_device(zero_optimizer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Let the device's share of ZeRO-Offload's optimizer (ratio below 1) take the learning rate of each step.

    DeepSpeed makes that second optimizer from the first group's values at the start and never updates them; the
    optimizer of `superoffload.offload` keeps its own up to date.
    """
    device_share = getattr(zero_optimizer, "backup_optimizer", None)
    if device_share is None or isinstance(zero_optimizer, SharedMemorySuperOffload):
        return

    def copy_lr(*_: Any) -> None:
        for group, source in zip(device_share.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = source["lr"]

    device_share.register_step_pre_hook(copy_lr)
