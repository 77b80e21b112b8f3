"""The subclass of DeepSpeed's ZeRO-3 optimizer: which of its hooks mean what to the coordinator.

DeepSpeed calls, in the boundary backward, `partition_grads` with a bucket of gradients, and from there
`_offload_grad_partition_at_boundary` for each; in `step()`, `_overflow_clean_up` or else, for every
sub-group, `unscale_and_clip_grads`, `_optimizer_step` and `_reassign_or_swap_out_partitioned_parameters`, and
`_post_step` at the end. contract.py lists these names and is tested against the installed version.

The base class is ZeRO-Offload's, not DeepSpeed's own SuperOffload: nothing of the latter is used.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable
from logging import getLogger
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from . import fused
from .affinity import Cores, Seat, share_of_rank, split_cores
from .bias import ProductHistory
from .binding import TRAINER_BINDING
from .bookkeeping import Statistics
from .checkpointing import AdamStateBook
from .coordinator import Coordinator
from .dispatch import EventDispatcher
from .gradients import GradientFlow
from .messages import AdamHyper
from .outside import OutsideAccess
from .partitions import ArenaPartitions
from .pinning import page_lock, page_unlock
from .process import OptimizerProcess, OptimizerProcessError, WorkerSetup
from .settings import OffloadSettings

_log = getLogger(__name__)

# A parallel loop of the trainer is as slow as its slowest thread, which must not be one that waits for its core.
_NICENESS_ON_SHARED_CORES = 10


class SharedMemorySuperOffload(  # DeepSpeed is untyped
    GradientFlow,
    OutsideAccess,
    ArenaPartitions,
    DeepSpeedZeroOptimizer_Stage3,  # type: ignore[misc]
):
    """Step ZeRO-3's host sub-groups in another process, over shared memory, speculating during backward."""

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
        self,
        module: torch.nn.Module,
        init_optimizer: torch.optim.Optimizer,
        param_names: dict[torch.nn.Parameter, str],
        timers: Any,
        ds_config: Any,
        *,
        offload_settings: OffloadSettings | None = None,
        **kwargs: Any,
    ) -> None:
        """Build DeepSpeed's optimizer over the arena and start the optimizer process. Communicates."""
        self._settings = offload_settings or OffloadSettings()
        self._flats: list[torch.Tensor] = []
        self._own_access = 0
        self._bypassed: set[int] = set()
        self._coordinator: Coordinator | None = None
        self._last_statistics = Statistics()
        super().__init__(module, init_optimizer, param_names, timers, ds_config, **kwargs)
        self._state_book = AdamStateBook(
            flats=self._flats,
            host=self._arena.sub_groups,
            main=self.optimizer,
            backup=getattr(self, "backup_optimizer", None),
        )
        self._separate_backup_groups()
        self._start(kwargs.get("cpuadam_cores_perc", 0.8))

    # ------------------------------------------------------------------------------- construction

    def _separate_backup_groups(self) -> None:
        """Give the device share's Adam param groups of its own, which step() keeps equal to the main ones.

        DeepSpeed shares the dicts of all groups but the first, and never updates the first.
        """
        backup = self._state_book.backup
        if backup is not None:
            template = {**backup.param_groups[0], "params": []}
            backup.param_groups[:] = [dict(template) for _ in self.optimizer.param_groups]

    def _start(self, optimizer_fraction: float) -> None:
        """Start the optimizer process on its share of the cores. Communicates."""
        cores = split_cores(_cores_of_this_rank(), optimizer_fraction)
        on_cpu = get_accelerator().device_name() == "cpu"
        bind = self._settings.bind_trainer if self._settings.bind_trainer is not None else not on_cpu
        setup = WorkerSetup(
            layout=self._arena.layout,
            cores=cores.optimizer,
            op_name=self.optimizer.ds_opt_adam.__name__,
            op_path=self.optimizer.ds_opt_adam.__file__,
            fused_path=fused.build() if self._settings.fused and self.dtype == torch.bfloat16 else None,
            adamw_mode=bool(self.optimizer.adam_w_mode),
            chunk_numel=self._settings.chunk_numel_per_thread * len(cores.optimizer),
            niceness=0 if bind else _NICENESS_ON_SHARED_CORES,
        )
        pinned = page_lock(self._arena.transferred()) if self.offload_optimizer_pin_memory else []
        self._process = OptimizerProcess(setup, self._arena_fd)
        os.close(self._arena_fd)
        if bind:
            TRAINER_BINDING.take(cores.trainer)
        dispatcher = None if get_accelerator().is_synchronized_device() else self._dispatcher()
        self._finalizer = weakref.finalize(self, _shut_down, self._process, dispatcher, pinned, bind)
        self._coordinator = Coordinator(
            self._process,
            {i: len(self.fp16_groups[i]) for i in self._arena.sub_groups},
            _hyper_reader(weakref.ref(self)),
            ProductHistory.fresh(*self.optimizer.defaults["betas"]),
            self._settings.notice_interval_s,
        )
        if dispatcher is not None:
            pump = self._coordinator.pump
            self._coordinator.send_speculation = dispatcher.send
            self._coordinator.settle = lambda: dispatcher.settle(pump)
        self._state_book.publish(self._coordinator.steps)

    def _device_name(self) -> str:
        """Return what DeepSpeed calls the device of the sub-groups that are not offloaded."""
        return str(get_accelerator()._name)

    def _dispatcher(self) -> EventDispatcher:
        def record() -> Any:
            event = get_accelerator().Event()
            event.record()
            return event

        return EventDispatcher(self._process, record)

    # ---------------------------------------------------------------------------------------- step

    def step(self, closure: None = None) -> None:
        """Make one optimizer step, or skip it on overflow. Communicates."""
        self._running()
        with self._own_reads():
            super().step(closure)

    def _overflow_clean_up(self, prev_scale: float) -> None:
        self._running().discard()
        self._bypassed.clear()
        super()._overflow_clean_up(prev_scale)

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: torch.Tensor) -> None:
        """Decide the factor at the first call; scale device gradients here, host ones when stepped."""
        if self._arena.sub_groups:
            self._running().decide(self._factor(total_norm), self._factor(None))
        if sub_group_id not in self._arena.sub_groups:
            super().unscale_and_clip_grads(sub_group_id, total_norm)

    def _factor(self, total_norm: torch.Tensor | None) -> float:
        """Return what gradients are multiplied by; same arithmetic as the base's unscale_and_clip_grads.

        `total_norm` is the norm of the scaled gradients; None means as if it were below the threshold.
        """
        combined_scale = self.loss_scale
        if self.clip_grad > 0.0:
            if total_norm is None:
                clip = torch.ones((), dtype=torch.float32)
            else:
                clip = torch.clamp((total_norm / self.loss_scale + 1e-6) / self.clip_grad, min=1.0)
            combined_scale = clip * self.loss_scale
        return float(1.0 / combined_scale)

    def _optimizer_step(self, sub_group_id: int) -> None:
        """Step a device sub-group here; the first host sub-group collects all of them."""
        if sub_group_id not in self._arena.sub_groups:
            self._align_backup_group(self.sub_group_to_group_id[sub_group_id])
            super()._optimizer_step(sub_group_id)
        elif sub_group_id == min(self._arena.sub_groups):
            coordinator = self._running()
            coordinator.collect(self._upload)
            for i, steps in coordinator.steps.items():
                self.optimizer.state[self._flats[i]]["step"] = steps

    def _align_backup_group(self, group_id: int) -> None:
        main = self.optimizer.param_groups[group_id]
        backup = self.backup_optimizer.param_groups[group_id]
        backup.update({key: main[key] for key in ("lr", "betas", "eps", "weight_decay")})
        backup["decoupled_weight_decay"] = bool(self.optimizer.adam_w_mode)

    def _upload(self, sub_group: int) -> None:
        """Copy new weights to the device, in stream order: the next backward comes after it."""
        staging = self._arena.sub_groups[sub_group].staging
        self.fp16_partitioned_groups_flat[sub_group].data.copy_(staging, non_blocking=True)

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        if sub_group_id in self._arena.sub_groups:
            self._unflatten_partitioned_parameters(sub_group_id)
        else:
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)

    def _post_step(self, timer_names: set[str]) -> None:
        super()._post_step(timer_names)
        self._bypassed.clear()
        self._running().end_step()

    # -------------------------------------------------------------------------------------- the end

    @property
    def statistics(self) -> Statistics:
        """Return counts and times since the start; they outlive close()."""
        return self._coordinator.statistics if self._coordinator is not None else self._last_statistics

    def close(self) -> None:
        """Finish the last step, end the optimizer process, restore the cores. Safe to call twice.

        Happens by itself in engine.destroy(), when the optimizer is collected, and at interpreter exit (the
        last two without finishing the step: nobody can read the result any more).
        """
        if self._coordinator is None:
            return
        try:
            self.flush()
        except OptimizerProcessError as error:
            _log.warning("closing after a failure: %s", error)
        self._last_statistics = self._coordinator.statistics
        self._coordinator = None
        self._finalizer()

    def destroy(self) -> None:
        """Close, let DeepSpeed release its hooks and buffers, and give the arena back.

        DeepSpeed keeps a destroyed engine referenced from its hooks, so waiting for the garbage collector
        would keep the memory. Afterwards the host's flat parameters are empty.
        """
        self.close()
        super().destroy()
        self._release_arena()


def _cores_of_this_rank() -> Cores:
    """Return this rank's fair share of the cores its host's ranks may use. Communicates."""
    mine = Seat(host=socket.gethostname(), cores=TRAINER_BINDING.available())
    seats: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seats, mine)
    return share_of_rank(seats, dist.get_rank())


def _hyper_reader(reference: weakref.ref[SharedMemorySuperOffload]) -> Callable[[int], AdamHyper]:
    """Return a reader of current hyper-parameters that does not keep the optimizer alive."""

    def read(sub_group: int) -> AdamHyper:
        optimizer = reference()
        if optimizer is None:
            raise RuntimeError("the optimizer has been collected")
        group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[sub_group]]
        beta1, beta2 = group["betas"]
        return AdamHyper(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            bias_correction=bool(group["bias_correction"]),
        )

    return read


def _shut_down(process: OptimizerProcess, dispatcher: EventDispatcher | None, pinned: list[int], bound: bool) -> None:
    """End everything that outlives Python references; does nothing in a forked child."""
    if not process.belongs_to_this_process:
        return
    if dispatcher is not None:
        dispatcher.close()
    process.close()
    page_unlock(pinned)
    if bound:
        TRAINER_BINDING.release()
