"""Access that does not come from training: checkpoints, and the accessors that DeepSpeed offers to users.

Readers see committed values. Writers void the speculations on the old values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..shared.bias import ProductHistory
from .checkpointing import (
    PRODUCT_HISTORY_KEY,
    AdamStateBook,
    history_from_state_dict,
    history_to_state_dict,
    uninterrupted_history,
    warn_of_missing_moments,
)
from .gradients import HostGradients
from .partitions import ArenaPartitions
from .service import OptimizerService
from .surface import DsParameter, ZeroOptimizer, position


class ExternalAccess:
    """Orders reads and writes from outside against the work of the optimizer process."""

    def __init__(
        self,
        partitions: ArenaPartitions,
        service: OptimizerService,
        gradients: HostGradients,
        book: AdamStateBook,
    ) -> None:
        self._partitions = partitions
        self._service = service
        self._gradients = gradients
        self._book = book

    @contextmanager
    def writing_gradients(self, zero: ZeroOptimizer, params: Sequence[DsParameter]) -> Iterator[None]:
        """Let the block write gradients of `params`, through DeepSpeed; speculations on the old ones are void."""
        self._gradients.fill_accumulation_buffers(zero, params)
        yield
        self._service.verification.forget_gradients()
        self._void_speculations(zero, params)

    @contextmanager
    def writing_state(self, zero: ZeroOptimizer, param: DsParameter) -> Iterator[None]:
        """Let the block write a master parameter or moment; a speculation on the old value is void."""
        yield
        self._service.verification.forget()
        self._void_speculations(zero, [param])

    def before_replacement(self) -> None:
        """Prepare for the replacement of all values: finish the last step, abandon the current round."""
        self._service.flush()
        self._service.coordinator.discard()
        self._service.verification.forget()

    def state_dict(self, base: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the state dict that `base` builds, plus the device share's moments and the beta products."""
        self._service.flush()
        with self._book.device_share_shown():
            state_dict = base()
        state_dict[PRODUCT_HISTORY_KEY] = history_to_state_dict(self._service.coordinator.history)
        return state_dict

    def load_state_dict(
        self,
        zero: ZeroOptimizer,
        state_dict: dict[str, Any],
        load_moments: bool,
        base: Callable[[dict[str, Any], bool], None],
    ) -> None:
        """Load a state dict with `base`, then move the moments to where they belong."""
        self.before_replacement()
        base(state_dict, load_moments)
        if load_moments:
            self.adopt_moments(zero, history_from_state_dict(state_dict))

    def adopt_moments(self, zero: ZeroOptimizer, history: ProductHistory | None) -> None:
        """Move the moments that DeepSpeed has loaded to where they belong.

        history: the beta products of the checkpoint; None means those of a run without interruption.
        """
        coordinator = self._service.coordinator
        missing = self._book.adopt(coordinator.steps)
        warn_of_missing_moments(missing, len(self._partitions.flats))
        if history is None and self._partitions.host:
            last = max(self._partitions.host)
            beta1, beta2 = self._book.main.param_groups[zero.sub_group_to_group_id[last]]["betas"]
            history = uninterrupted_history(coordinator.steps[last], beta1, beta2)
        if history is not None:
            coordinator.history = history

    def _void_speculations(self, zero: ZeroOptimizer, params: Sequence[DsParameter]) -> None:
        for param in params:
            if param.requires_grad:
                sub_group = position(zero, param)[0]
                if sub_group in self._partitions.host:
                    self._service.coordinator.cancel(sub_group)
