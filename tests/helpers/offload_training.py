"""Train a small model for some steps in either mode; the equality and checkpoint tests compare the results."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cpuinfo
import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.utils.checkpoint import checkpoint

from superoffload.offload.install import installed
from superoffload.offload.settings import OffloadSettings
from superoffload.offload.trainer.trials import SpeculationTrials

WIDTH, VOCABULARY, LENGTH = 32, 50, 12

# Building a DeepSpeedCPUAdam runs several programs to identify the processor, for more than a second. Once is enough.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of training; steps are numbered from 0.

    in_turns: speculate in every other step, in which the other ranks do not.
    """

    clip: float = 0.0
    accumulation: int = 1
    steps: int = 10
    dtype: str = "bf16"
    scheduler: dict[str, Any] | None = None
    groups: bool = False
    group_betas: bool = False
    adamw_mode: bool = True
    bias_correction: bool = True
    ratio: float = 1.0
    device_share: bool = False
    low_precision_state: bool = False
    loss_scale: float = 0.0
    loss_factor: float = 1.0
    nan_steps: tuple[int, ...] = ()
    dropped_steps: tuple[int, ...] = ()
    twice_steps: tuple[int, ...] = ()
    lr_moved_steps: tuple[int, ...] = ()
    unused_steps: tuple[int, ...] = ()
    gradient_set_steps: tuple[int, ...] = ()
    by_hand: int = 0
    unmanaged: int = 0
    checkpointing: bool = False
    speculate: bool | None = True
    in_turns: bool = False
    direct_gradients: bool = True
    fused: bool = True
    persistence_threshold: int = 40
    overlap_comm: bool = False
    verify_steps: int | None = None
    report_folder: str = "."
    reduce_bucket_size: int = 4000
    evaluated_steps: tuple[int, ...] = ()


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x + hidden


class Toy(torch.nn.Module):
    """int64 [batch, length] -> mean cross entropy of the next token."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(4))
        self.side = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor, use_side: bool = True) -> torch.Tensor:
        x = self.embedding(tokens[:, :-1]) * self.scale
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        if use_side:
            x = x + self.side(x)
        logits = self.head(x).float()
        loss: torch.Tensor = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss


def ds_config(case: Case, super_offload: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "timers": {"throughput": {"enabled": False}},  # from the third step on, it would wait for the whole device
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 3000,
            "reduce_bucket_size": case.reduce_bucket_size,
            "overlap_comm": case.overlap_comm,
            "stage3_param_persistence_threshold": case.persistence_threshold,
            "offload_optimizer": {
                "device": "cpu",
                "pin_memory": not get_accelerator().is_synchronized_device(),
                "ratio": case.ratio,
                "super_offload": super_offload,
            },
        },
    }
    if case.dtype == "fp16":
        allow_fp16_on_cpu()
        config["fp16"] = {
            "enabled": True,
            "loss_scale": case.loss_scale,
            "initial_scale_power": 18,
            "loss_scale_window": 3,
            "hysteresis": 1,
        }
    elif case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        if case.low_precision_state:
            config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    if case.scheduler:
        config["scheduler"] = case.scheduler
    if case.unmanaged:
        config["managed_gradient_accumulation"] = False
    return config


def make_engine(case: Case, super_offload: bool, *, bind_trainer: bool | None = None) -> Any:
    torch.manual_seed(7)
    model = Toy(case.checkpointing)
    parameters: Any = list(model.parameters())
    if case.groups or case.group_betas:
        plain = [p for p in parameters if p.ndim < 2]
        decayed = [p for p in parameters if p.ndim >= 2]
        parameters = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        if case.group_betas:
            parameters[1]["betas"] = (0.8, 0.95)
    adam = DeepSpeedCPUAdam(
        parameters,
        lr=3e-3,
        betas=(0.9, 0.99),
        weight_decay=0.05,
        adamw_mode=case.adamw_mode,
        bias_correction=case.bias_correction,
        fp32_optimizer_states=not case.low_precision_state,
    )
    settings = OffloadSettings(
        speculate=case.speculate,
        direct_gradients=case.direct_gradients,
        fused=case.fused,
        bind_trainer=bind_trainer,
        verify_steps=case.verify_steps,
        report_folder=case.report_folder,
    )
    with device_share(case.device_share), installed(settings):
        engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=ds_config(case, super_offload))
    return engine


@contextlib.contextmanager
def device_share(wanted: bool) -> Iterator[None]:
    """Rename the CPU accelerator's device to "cpu:0", so that `ratio` below 1 has a device share."""
    accelerator = get_accelerator()
    before = accelerator._name
    accelerator._name = "cpu:0" if wanted and on_cpu() else before
    try:
        yield
    finally:
        accelerator._name = before


def on_cpu() -> bool:
    return bool(get_accelerator().device_name() == "cpu")


def allow_fp16_on_cpu() -> None:
    """Disable DeepSpeed's check: torch supports fp16 on the CPU, slowly, which is fast enough here."""
    if not on_cpu():
        return
    get_accelerator().is_fp16_supported = lambda: True


@dataclass
class Trainer:
    """Drive an engine through the events of a case."""

    engine: Any
    case: Case
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            self._step(step)
            self.norms.append(float(self.engine.get_global_grad_norm() or 0.0))

    def _batch(self, step: int, micro: int) -> torch.Tensor:
        seed = 1000 * step + 10 * micro + torch.distributed.get_rank()
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
        return tokens.to(self.engine.device)

    def _backward(self, step: int, micro: int) -> None:
        use_side = step not in self.case.unused_steps
        loss = self.engine(self._batch(step, micro), use_side=use_side) * self.case.loss_factor
        if step in self.case.nan_steps:
            loss = loss * float("nan")
        self.losses.append(loss.item())
        self.engine.backward(loss)

    def _step(self, step: int) -> None:
        case, engine = self.case, self.engine
        if step in case.dropped_steps:
            self._backward(step, 7)
            engine.optimizer.zero_grad()
        if step in case.twice_steps:
            self._backward(step, 8)
            if step in case.gradient_set_steps:
                self._set_a_gradient()
        for micro in range(case.by_hand or case.unmanaged or case.accumulation):
            if case.by_hand:
                engine.set_gradient_accumulation_boundary(micro == case.by_hand - 1)
            self._backward(step, micro)
            if step in case.lr_moved_steps:
                for group in engine.optimizer.param_groups:
                    group["lr"] *= 0.5
            if step in case.gradient_set_steps:
                self._set_a_gradient()
            self._evaluate(step)
            if not case.unmanaged or micro == case.unmanaged - 1:
                engine.step()

    def _evaluate(self, step: int) -> None:
        if step in self.case.evaluated_steps:
            with torch.no_grad():
                self.engine(self._batch(step, 9))

    def _set_a_gradient(self) -> None:
        param = self.engine.module.head.weight
        value = deepspeed.utils.safe_get_full_grad(param)
        deepspeed.utils.safe_set_full_grad(param, value * 0.25)


def snapshot(engine: Any) -> dict[str, Any]:
    """Return every tensor of the optimizer without padding, in float64, so that dtypes do not matter."""
    optimizer = engine.optimizer
    flats = optimizer.fp32_partitioned_groups_flat
    result: dict[str, Any] = {"tensors": {}, "steps": {}}
    for i, flat in enumerate(flats):
        state = optimizer.optimizer.state.get(flat) or optimizer.backup_optimizer.state[flat]
        parts = {
            "parameters": flat,
            "gradients": flat.grad,
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
            "weights": optimizer.fp16_partitioned_groups_flat[i],
        }
        result["steps"][i] = int(state["step"])
        for name, tensor in parts.items():
            result["tensors"][f"{name} {i}"] = real_elements(optimizer, i, tensor.detach()).cpu().double().clone()
    return result


def real_elements(optimizer: Any, sub_group: int, flat: torch.Tensor) -> torch.Tensor:
    offset, pieces = 0, []
    for param in optimizer.fp16_groups[sub_group]:
        size = param.partition_numel()
        rank = optimizer._get_param_partition_rank(param)
        pieces.append(flat[offset : offset + min(size, max(0, param.ds_numel - size * rank))])
        offset += size
    return torch.cat(pieces)


class Turns(SpeculationTrials):
    """Choose the other way in each round."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.way = first

    @property
    def speculate(self) -> bool:
        return self.way

    def end_round(self, *, counts: bool) -> None:
        self.way = not self.way


def train(case: Case, super_offload: bool) -> dict[str, Any]:
    """Train a fresh model; return losses, norms, all tensors, and the engine's statistics."""
    engine = make_engine(case, super_offload)
    if case.in_turns and super_offload:
        engine.optimizer._service.coordinator.trials = Turns(torch.distributed.get_rank() % 2 == 0)
    trainer = Trainer(engine, case)
    trainer.run(0, case.steps)
    result = snapshot(engine)
    result |= {
        "losses": trainer.losses,
        "norms": trainer.norms,
        "skipped": engine.skipped_steps,
        "kind": type(engine.optimizer).__name__,
    }
    if super_offload:
        result["statistics"] = engine.optimizer.statistics
        result["has_accumulated"] = engine.optimizer._accumulation.is_allocated
    engine.destroy()
    return result
