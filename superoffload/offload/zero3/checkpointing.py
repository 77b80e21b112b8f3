"""Adam state in DeepSpeed's checkpoints, in the format of ZeRO-Offload.

For sub-groups that the CPU steps, `optimizer.state[flat]` always holds `step` and the arena's moments, so a save
only has to wait for commits. Sub-groups that the accelerator steps (`ratio` below 1) keep their moments in
`backup_optimizer`, which DeepSpeed does not save. They are shown in `optimizer.state` while a state dict is taken,
and moved back after a load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch

from ..shared.bias import ProductHistory
from ..shared.state import SubGroupState
from .surface import CpuAdam

_log = getLogger(__name__)

PRODUCT_HISTORY_KEY = "superoffload_beta_products"
"""Extra entry in the optimizer's state dict: (step, beta1, beta2, anchor step). ZeRO-Offload ignores it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamStateBook:
    """Where the Adam state of each sub-group is kept.

    flats: DeepSpeed's flat fp32 parameters, the keys of both optimizers' `state`.
    host: the arena's tensors of the sub-groups that the CPU steps.
    main: the DeepSpeedCPUAdam. backup: the accelerator's Adam; None without a device share.
    """

    flats: list[torch.Tensor]
    host: Mapping[int, SubGroupState]
    main: CpuAdam
    backup: torch.optim.Optimizer | None

    def publish(self, steps: Mapping[int, int]) -> None:
        """Show the arena's moments and these step counts in `main.state` of every host sub-group."""
        for i, state in self.host.items():
            entry = {"step": steps[i], "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
            self.main.state[self.flats[i]] = entry

    def set_steps(self, steps: Mapping[int, int]) -> None:
        """Update the step counts of the host sub-groups in `main.state`."""
        for i in self.host:
            self.main.state[self.flats[i]]["step"] = steps[i]

    @contextmanager
    def device_share_shown(self) -> Iterator[None]:
        """Show the device share's state in `main.state`, in ZeRO-Offload's format, during the block."""
        shown = []
        for i, flat in enumerate(self.flats):
            entry = self.backup.state.get(flat) if self.backup is not None and i not in self.host else None
            if entry:
                shown.append(flat)
                moments = {key: entry[key] for key in ("exp_avg", "exp_avg_sq")}
                self.main.state[flat] = {"step": int(entry["step"]), **moments}
        try:
            yield
        finally:
            for flat in shown:
                del self.main.state[flat]

    def adopt(self, steps: dict[int, int]) -> list[int]:
        """Move the moments that a load has put into `main.state` to where they belong; write the counts to `steps`.

        Returns the sub-groups without moments in the checkpoint, whose moments restart from zero. The caller has
        flushed, so the trainer may write the arena's moments.
        """
        missing = []
        for i, flat in enumerate(self.flats):
            loaded = self.main.state.pop(flat, None) or {}
            complete = "exp_avg" in loaded and "exp_avg_sq" in loaded
            if not complete:
                missing.append(i)
            if i in self.host:
                steps[i] = int(loaded["step"]) if complete else 0
                _fill(self.host[i].exp_avg, loaded.get("exp_avg"))
                _fill(self.host[i].exp_avg_sq, loaded.get("exp_avg_sq"))
            elif self.backup is not None:
                self.backup.state.pop(flat, None)
                if complete:
                    self.backup.state[flat] = _device_entry(loaded, flat.device)
        self.publish(steps)
        return missing


def warn_of_missing_moments(missing: list[int], total: int) -> None:
    """Warn that the optimizer restarts for some sub-groups."""
    if missing:
        _log.warning(
            "the checkpoint holds no Adam moments for %d of %d sub-groups (DeepSpeed's own SuperOffload does "
            "not save them): they restart from zero, so the next steps will differ from an uninterrupted run",
            len(missing),
            total,
        )


def history_to_state_dict(history: ProductHistory) -> tuple[int, float, float, int]:
    """Return the history as plain numbers."""
    return history.step, *history.betas, history.anchor_step


def history_from_state_dict(state_dict: Mapping[str, Any]) -> ProductHistory | None:
    """Return the history that a checkpoint of this class holds; None for any other checkpoint."""
    saved = state_dict.get(PRODUCT_HISTORY_KEY)
    if saved is None:
        return None
    step, beta1, beta2, anchor_step = saved
    return ProductHistory(step=step, betas=(beta1, beta2), anchor_step=anchor_step)


def uninterrupted_history(step: int, beta1: float, beta2: float) -> ProductHistory:
    """Return the history of an uninterrupted run with constant betas after `step` steps."""
    fresh = ProductHistory.fresh(beta1, beta2)
    return ProductHistory(step=step, betas=fresh.betas, anchor_step=0)


def _fill(target: torch.Tensor, source: torch.Tensor | None) -> None:
    if source is None:
        target.zero_()
    elif source is not target:
        target.copy_(source.detach().view(-1))


def _device_entry(loaded: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Return a state entry as torch's Adam keeps it: the step is a float tensor on the host."""
    moments = {key: loaded[key].detach().to(device).clone() for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.tensor(float(loaded["step"])), **moments}
