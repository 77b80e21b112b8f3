"""Reads and writes that do not come from training: checkpoints, and DeepSpeed's accessors for users.

They see committed values, and what they write voids speculations on the old values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .bias import ProductHistory
from .checkpointing import (
    PRODUCT_HISTORY_KEY,
    AdamStateBook,
    history_from_state_dict,
    history_to_state_dict,
    uninterrupted_history,
    warn_of_missing_moments,
)
from .coordinator import Coordinator

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class OutsideAccess(_Base):  # type: ignore[misc]
    """Mix into DeepSpeed's ZeRO-3 optimizer, over ArenaPartitions."""

    _coordinator: Coordinator | None
    _state_book: AdamStateBook

    def flush(self) -> None:
        """Wait until fp32 parameters, gradients and moments are those after the last step()."""
        if self._coordinator is not None and self._coordinator.has_uncommitted:
            self._coordinator.flush()

    def set_fp32_grad_for_param(self, value: torch.Tensor, param: torch.nn.Parameter) -> None:
        """Replace a gradient from its full value; a speculation on the old one is void."""
        self._fill_accumulation_buffer(param)
        super().set_fp32_grad_for_param(value, param)
        self._touched(param)

    def set_local_grad_for_param(self, value: torch.Tensor, param: torch.nn.Parameter) -> None:
        """Replace this rank's part of a gradient; a speculation on the old one is void."""
        self._fill_accumulation_buffer(param)
        super().set_local_grad_for_param(value, param)
        self._touched(param)

    def update_fp32_grad_for_param_vectorized(
        self, update_func: Callable[..., torch.Tensor], param_list: list[torch.nn.Parameter]
    ) -> None:
        """Replace gradients by a function of them; speculations on the old ones are void. Communicates."""
        for param in param_list:
            self._fill_accumulation_buffer(param)
        super().update_fp32_grad_for_param_vectorized(update_func, param_list)
        for param in param_list:
            self._touched(param)

    def set_full_hp_param(
        self, value: torch.Tensor, param: torch.nn.Parameter, optim_state_key: str | None = None
    ) -> None:
        """Replace a master parameter or moment from its full value; a speculation on the old one is void."""
        super().set_full_hp_param(value, param, optim_state_key)
        self._touched(param)

    def set_local_hp_param(
        self, value: torch.Tensor, param: torch.nn.Parameter, optim_state_key: str | None = None
    ) -> None:
        """Replace this rank's part of a master parameter or moment; a speculation on the old one is void."""
        super().set_local_hp_param(value, param, optim_state_key)
        self._touched(param)

    def refresh_fp32_params(self) -> None:
        """Take the master parameters from the low-precision weights; speculations are void."""
        self._before_replacement()
        super().refresh_fp32_params()

    def _touched(self, param: torch.nn.Parameter) -> None:
        if param.requires_grad:
            sub_group = self.grad_position[self.get_param_id(param)][0]
            if sub_group in self._arena.sub_groups:
                self._running().cancel(sub_group)

    # ---------------------------------------------------------------------------------- checkpoints

    def checkpoint_event_prologue(self) -> None:
        """Finish the last step's commits before DeepSpeed reads anything for a checkpoint. Communicates."""
        self.flush()
        super().checkpoint_event_prologue()

    def _rigid_state_dict(self) -> dict[str, Any]:
        self.flush()
        with self._state_book.device_share_shown():
            state_dict: dict[str, Any] = super()._rigid_state_dict()
        state_dict[PRODUCT_HISTORY_KEY] = history_to_state_dict(self._running().history)
        return state_dict

    def _rigid_load_state_dict(self, state_dict: dict[str, Any], load_optimizer_states: bool = True) -> None:
        self._before_replacement()
        super()._rigid_load_state_dict(state_dict, load_optimizer_states)
        if load_optimizer_states:
            self._after_loading_moments(history_from_state_dict(state_dict))

    def load_hp_checkpoint_state_from_checkpoint_dir_stage3(self, checkpoint_dir: str) -> None:
        """Load a universal checkpoint, moments included."""
        self._before_replacement()
        super().load_hp_checkpoint_state_from_checkpoint_dir_stage3(checkpoint_dir)
        self._after_loading_moments(None)

    def load_module_checkpoint_state_from_checkpoint_dir_stage3(
        self, checkpoint_dir: str, load_from_fp32_weights: bool
    ) -> None:
        """Load the weights of a universal checkpoint; moments stay as they are."""
        self._before_replacement()
        super().load_module_checkpoint_state_from_checkpoint_dir_stage3(checkpoint_dir, load_from_fp32_weights)

    def _before_replacement(self) -> None:
        self.flush()
        self._running().discard()

    def _after_loading_moments(self, history: ProductHistory | None) -> None:
        coordinator = self._running()
        missing = self._state_book.adopt(coordinator.steps)
        warn_of_missing_moments(missing, len(self._flats))
        if history is None and self._arena.sub_groups:
            last = max(self._arena.sub_groups)
            beta1, beta2 = self.optimizer.param_groups[self.sub_group_to_group_id[last]]["betas"]
            history = uninterrupted_history(coordinator.steps[last], beta1, beta2)
        if history is not None:
            coordinator.history = history

    def _running(self) -> Coordinator:
        if self._coordinator is None:
            raise RuntimeError("this optimizer has been closed")
        return self._coordinator
