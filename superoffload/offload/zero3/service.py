"""Construction and shutdown of the optimizer process, and the coordinator that talks to it."""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from logging import getLogger
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from ..settings import OffloadSettings
from ..shared.affinity import CoreSplit, Seat, share_of_rank, split_cores
from ..shared.bias import ProductHistory
from ..shared.messages import AdamHyper
from ..trainer.binding import TRAINER_BINDING, read_siblings
from ..trainer.bookkeeping import Statistics, startup_phase
from ..trainer.coordinator import Coordinator
from ..trainer.dispatch import EventDispatcher
from ..trainer.pinning import page_lock, page_unlock
from ..trainer.process import OptimizerProcess, WorkerSetup
from ..trainer.trials import SpeculationTrials
from ..worker import fused
from .partitions import ArenaPartitions
from .surface import CpuAdam, ZeroOptimizer
from .transfers import Transfers
from .verification import Verification

_log = getLogger(__name__)


class OptimizerService:
    """Owns the optimizer process and everything that must end with it.

    Holds no reference to DeepSpeed's optimizer, which owns it: when that one is collected, the finalizer of this
    object ends the process. The finalizer also runs at interpreter exit.
    """

    process: OptimizerProcess

    def __init__(self, settings: OffloadSettings, optimizer_fraction: float) -> None:
        """Give `optimizer_fraction` of the cores to the optimizer process, which start() starts (collective)."""
        self._settings = settings
        self.cores = _split_cores_of_this_rank(optimizer_fraction)
        self.transfers = Transfers()
        self.verification = Verification(settings)
        self._coordinator: Coordinator | None = None
        self._last_statistics = Statistics()

    def start(self, zero: ZeroOptimizer, partitions: ArenaPartitions) -> None:
        """Start the optimizer process on its share of the cores."""
        accelerator = get_accelerator()
        on_cpu = accelerator.device_name() == "cpu"
        bind = self._settings.bind_trainer if self._settings.bind_trainer is not None else not on_cpu
        setup = self._worker_setup(zero, partitions, shares_cores=not bind)
        with startup_phase("starting the optimizer process"), partitions.hand_over() as arena_fd:
            self.process = OptimizerProcess(setup, arena_fd)
        with startup_phase("page-locking"):  # meanwhile, the optimizer process loads its libraries
            transferred = partitions.arena.transferred() if zero.offload_optimizer_pin_memory else []
            pinned = page_lock(transferred, accelerator.device_name())
        if bind:
            TRAINER_BINDING.take(self.cores.trainer)
        device = accelerator.current_device()
        dispatcher = None
        if self.transfers.asynchronous:
            dispatcher = EventDispatcher(self.process, self.transfers.record, partial(accelerator.set_device, device))
        unpin = partial(page_unlock, pinned, partial(accelerator.synchronize, device))
        self._finalizer = weakref.finalize(self, _shut_down, self.process, dispatcher, unpin, bind)
        coordinator = Coordinator(
            self.process,
            {i: len(zero.fp16_groups[i]) for i in partitions.host},
            _hyper_reader(zero.optimizer, zero.sub_group_to_group_id),
            ProductHistory.fresh(*zero.optimizer.defaults["betas"]),
            self._settings.notice_interval_s,
        )
        if not bind and self._settings.speculate is None:
            coordinator.trials = SpeculationTrials()
        if dispatcher is not None:
            coordinator.send_speculation = dispatcher.send
            coordinator.settle = lambda: dispatcher.settle(coordinator.pump)
        if self.verification.begin(partitions.host, zero.optimizer):
            coordinator.verify_decision = self.verification.decided
        self._coordinator = coordinator

    def _worker_setup(self, zero: ZeroOptimizer, partitions: ArenaPartitions, *, shares_cores: bool) -> WorkerSetup:
        """Return the setup of the optimizer process.

        Where the trainer computes on the same cores, a step gets all of them, because the trainer waits for it.
        """
        op = zero.optimizer.ds_opt_adam
        everything = set(self.cores.trainer + self.cores.optimizer)  # which overlap if the rank has a single core
        cores = tuple(sorted(everything)) if shares_cores else self.cores.optimizer
        return WorkerSetup(
            layout=partitions.arena.layout,
            cores=cores,
            threads_beside_trainer=len(self.cores.optimizer),
            op_name=op.__name__,
            op_path=str(op.__file__),
            fused_path=fused.build() if self._settings.fused and zero.dtype == torch.bfloat16 else None,
            adamw_mode=bool(zero.optimizer.adam_w_mode),
            chunk_numel=self._settings.chunk_numel_per_thread * len(cores),
            shares_cores=shares_cores,
        )

    @property
    def is_running(self) -> bool:
        """Return whether start() has been called and close() has not."""
        return self._coordinator is not None

    @property
    def coordinator(self) -> Coordinator:
        """Return the coordinator. Raises RuntimeError after close()."""
        if self._coordinator is None:
            raise RuntimeError("this optimizer has been closed")
        return self._coordinator

    def begin_step(self) -> None:
        """Wait for the copy stream, which has written norms and sums that DeepSpeed reads in a step.

        Raises RuntimeError after close().
        """
        _ = self.coordinator
        self.transfers.synchronize()

    @property
    def statistics(self) -> Statistics:
        """Return counts and times since the start; they remain available after close()."""
        found = self._coordinator.statistics if self._coordinator is not None else self._last_statistics
        found.upload_s = self.transfers.upload_s
        return found

    def flush(self) -> None:
        """Wait until fp32 parameters and moments are those after the last step(), and all copies have ended."""
        if self._coordinator is None:
            return
        self.transfers.synchronize()
        if self._coordinator.has_uncommitted:
            self._coordinator.flush()

    def close(self) -> None:
        """Finish the last step, end the optimizer process, restore the cores. Safe to call twice."""
        if self._coordinator is None:
            return
        try:
            self.flush()
        except RuntimeError as error:  # of the optimizer process, or of the device
            _log.warning("closing after a failure: %s", error)
        self._last_statistics = self._coordinator.statistics
        self._coordinator = None
        self._finalizer()


def _split_cores_of_this_rank(optimizer_fraction: float) -> CoreSplit:
    """Divide this rank's fair share of the cores that its host's ranks may use (collective)."""
    own = Seat(host=socket.gethostname(), cores=TRAINER_BINDING.available())
    seats: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seats, own)
    siblings = read_siblings(own.cores)
    return split_cores(share_of_rank(seats, dist.get_rank(), siblings), optimizer_fraction, siblings)


def _hyper_reader(main: CpuAdam, group_of: Mapping[int, int]) -> Callable[[int], AdamHyper]:
    """Return a function that reads the current hyper-parameters of a sub-group from its param group."""

    def read(sub_group: int) -> AdamHyper:
        group = main.param_groups[group_of[sub_group]]
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


def _shut_down(
    process: OptimizerProcess, dispatcher: EventDispatcher | None, unpin: Callable[[], None], bound: bool
) -> None:
    """End everything that outlives Python references; do nothing in a forked child."""
    if not process.belongs_to_this_process:
        return
    if dispatcher is not None:
        dispatcher.close()
    process.close()
    unpin()
    if bound:
        TRAINER_BINDING.release()
