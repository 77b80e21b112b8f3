"""The subclass of DeepSpeed's ZeRO-3 optimizer: which hook calls which object.

In the last backward of a round DeepSpeed calls `partition_grads` with each bucket of gradients, and from there
`_offload_grad_partition_at_boundary` for each parameter. In `step()` it calls `_overflow_clean_up`, or else, for every
sub-group, `unscale_and_clip_grads`, `_optimizer_step` and `_reassign_or_swap_out_partitioned_parameters`, and
`_post_step` at the end. contract.py lists these names and is tested against the installed version.

The base class is ZeRO-Offload's, not DeepSpeed's own SuperOffload, of which nothing is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from ..settings import OffloadSettings
from ..trainer.bookkeeping import Statistics
from .accumulation import AccumulationBuffer, set_up
from .checkpointing import AdamStateBook
from .external_access import ExternalAccess
from .gathering import GatherGate
from .gradients import HostGradients
from .partitions import ArenaPartitions
from .service import OptimizerService
from .stepping import HostStep
from .surface import DsParameter


class SharedMemorySuperOffload(DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]  # DeepSpeed is untyped
    """Steps ZeRO-3's host sub-groups in another process, over shared memory, speculating during backward.

    The objects that hooks delegate to hold no reference to this one; hooks pass it where it is needed.
    """

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
        """Build DeepSpeed's optimizer over the arena and start the optimizer process (collective)."""
        settings = offload_settings or OffloadSettings()
        self._accumulation = AccumulationBuffer()  # DeepSpeed's constructor calls hooks that need these four
        self._partitions = ArenaPartitions()
        self._service = OptimizerService(settings, kwargs.get("cpuadam_cores_perc", 0.8))
        self._gradients = HostGradients(settings, self._partitions, self._service)
        super().__init__(module, init_optimizer, param_names, timers, ds_config, **kwargs)
        book = AdamStateBook(
            flats=self._partitions.flats,
            host=self._partitions.host,
            main=self.optimizer,
            backup=getattr(self, "backup_optimizer", None),
        )
        self._host_step = HostStep(self._partitions, self._service, book)
        self._access = ExternalAccess(self._partitions, self._service, self._gradients, book)
        self._gate = GatherGate(self._service.transfers)
        self._gate.install(self)
        self._service.start(self, self._partitions)
        book.publish(self._service.coordinator.steps)

    # ---------------------------------------------------------------------- flat parameters in the arena

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """Return the flat fp32 parameters; a reader from outside waits for commits first."""
        if not self._partitions.in_own_access:
            self.flush()
        return self._partitions.flats

    @fp32_partitioned_groups_flat.setter
    def fp32_partitioned_groups_flat(self, value: list[torch.Tensor]) -> None:
        self._partitions.flats = value

    @property
    def fp16_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """Return the flat low-precision weights; a reader from outside waits for uploads first."""
        if not self._partitions.in_own_access:
            self._service.transfers.synchronize()
        return self._partitions.weights

    @fp16_partitioned_groups_flat.setter
    def fp16_partitioned_groups_flat(self, value: list[torch.Tensor]) -> None:
        self._partitions.weights = value

    def _setup_for_real_optimizer(self) -> None:
        set_up(self)

    def _create_fp32_partitions(self) -> None:
        self._partitions.create(self, str(get_accelerator()._name), self._service.cores.optimizer)

    def initialize_optimizer_states(self) -> None:
        """Attach the gradients to the flat parameters."""
        self._partitions.attach_gradients()

    # --------------------------------------------------------------------------------------- backward

    @property
    def grad_partitions_flat_buffer(self) -> torch.Tensor | None:
        """Return DeepSpeed's accumulation buffer, which is allocated when it is first asked for."""
        return self._accumulation.whole(self)

    @property
    def _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition(self) -> dict[int, torch.Tensor]:
        return self._accumulation.views(self)

    @_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.setter
    def _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition(self, value: dict[int, torch.Tensor]) -> None:
        self._accumulation.set_views(value)

    def partition_grads(
        self, params_to_release: list[DsParameter], grad_partitions: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Move the gradients of one bucket to the host."""
        return self._gradients.partition(self, params_to_release, grad_partitions, super().partition_grads)

    def _offload_grad_partition_at_boundary(self, param: DsParameter, grad_buffer: torch.Tensor, *args: Any) -> None:
        with self._gradients.writing(self, param, grad_buffer):
            super()._offload_grad_partition_at_boundary(param, grad_buffer, *args)

    def _finalize_offload_gradient_accumulation(self) -> None:
        with self._gradients.finishing_accumulation():
            super()._finalize_offload_gradient_accumulation()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients; between backward and step this drops the batch and its speculations."""
        self._gradients.drop_batch()
        super().zero_grad(set_to_none)

    # ------------------------------------------------------------------------------------------- step

    def step(self, closure: None = None) -> None:
        """Take one optimizer step, or skip it on overflow (collective)."""
        self._service.begin_step()
        with self._partitions.own_access():
            super().step(closure)

    def _overflow_clean_up(self, prev_scale: float) -> None:
        self._gradients.abandon_round()
        super()._overflow_clean_up(prev_scale)

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: torch.Tensor) -> None:
        """Decide the factor at the first call; scale device gradients now, those on the host when they are stepped."""
        self._host_step.decide(self, total_norm)
        if sub_group_id not in self._partitions.host:
            super().unscale_and_clip_grads(sub_group_id, total_norm)

    def _optimizer_step(self, sub_group_id: int) -> None:
        self._host_step.step(self, sub_group_id, super()._optimizer_step)

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        self._host_step.reassign(self, sub_group_id, super()._reassign_or_swap_out_partitioned_parameters)

    def _post_step(self, timer_names: set[str]) -> None:
        with self._gate.holding_persistent_parameters_back(self):
            super()._post_step(timer_names)
        self._gradients.end_round()

    # ------------------------------------------------------------------------- access from outside

    def set_fp32_grad_for_param(self, value: torch.Tensor, param: DsParameter) -> None:
        """Replace a gradient from its full value."""
        with self._access.writing_gradients(self, [param]):
            super().set_fp32_grad_for_param(value, param)

    def set_local_grad_for_param(self, value: torch.Tensor, param: DsParameter) -> None:
        """Replace this rank's part of a gradient."""
        with self._access.writing_gradients(self, [param]):
            super().set_local_grad_for_param(value, param)

    def update_fp32_grad_for_param_vectorized(
        self, update_func: Callable[..., torch.Tensor], param_list: list[DsParameter]
    ) -> None:
        """Replace gradients by a function of them (collective)."""
        with self._access.writing_gradients(self, param_list):
            super().update_fp32_grad_for_param_vectorized(update_func, param_list)

    def set_full_hp_param(self, value: torch.Tensor, param: DsParameter, optim_state_key: str | None = None) -> None:
        """Replace a master parameter or moment from its full value."""
        with self._access.writing_state(self, param):
            super().set_full_hp_param(value, param, optim_state_key)

    def set_local_hp_param(self, value: torch.Tensor, param: DsParameter, optim_state_key: str | None = None) -> None:
        """Replace this rank's part of a master parameter or moment."""
        with self._access.writing_state(self, param):
            super().set_local_hp_param(value, param, optim_state_key)

    def refresh_fp32_params(self) -> None:
        """Copy the low-precision weights to the master parameters."""
        self._access.before_replacement()
        super().refresh_fp32_params()

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Move states of the device to the host, once every copy has ended."""
        self.flush()
        super().offload_states(*args, **kwargs)

    # ------------------------------------------------------------------------------------ checkpoints

    def checkpoint_event_prologue(self) -> None:
        """Finish the last step's commits before DeepSpeed reads anything for a checkpoint (collective)."""
        self.flush()
        super().checkpoint_event_prologue()

    def _rigid_state_dict(self) -> dict[str, Any]:
        return self._access.state_dict(super()._rigid_state_dict)

    def _rigid_load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        self._access.load_state_dict(self, state_dict, load_optimizer_states, super()._rigid_load_state_dict)

    def load_hp_checkpoint_state_from_checkpoint_dir_stage3(self, checkpoint_dir: str) -> None:
        """Load a universal checkpoint, including the moments."""
        self._access.before_replacement()
        super().load_hp_checkpoint_state_from_checkpoint_dir_stage3(checkpoint_dir)
        self._access.adopt_moments(self, history=None)

    def load_module_checkpoint_state_from_checkpoint_dir_stage3(
        self, checkpoint_dir: str, load_from_fp32_weights: bool
    ) -> None:
        """Load the weights of a universal checkpoint; the moments stay unchanged."""
        self._access.before_replacement()
        super().load_module_checkpoint_state_from_checkpoint_dir_stage3(checkpoint_dir, load_from_fp32_weights)

    # ------------------------------------------------------------------------------- outside DeepSpeed

    @property
    def statistics(self) -> Statistics:
        """Return counts and times since the start; they remain available after close()."""
        return self._service.statistics

    def flush(self) -> None:
        """Wait until fp32 parameters and moments are those after the last step(), and all copies have ended."""
        self._service.flush()

    def close(self) -> None:
        """Finish the last step, end the optimizer process, restore the cores. Safe to call twice.

        engine.destroy() calls it. If the optimizer is collected or the interpreter exits first, the process ends
        without finishing the step, because its result cannot be read any more.
        """
        self._service.close()
        self._gate.remove()

    def destroy(self) -> None:
        """Close, let DeepSpeed release its hooks and buffers, and free the arena.

        DeepSpeed's hooks keep a destroyed engine referenced, so its memory cannot wait for the garbage collector.
        Afterwards the flat parameters on the host are empty.
        """
        self.close()
        with self._accumulation.closing(), self._partitions.releasing(self.optimizer):
            super().destroy()
