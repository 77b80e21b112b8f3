"""New weights are waited for where they are used: when DeepSpeed gathers a parameter.

So the next forward begins with the first layers while the weights of later ones are still being uploaded. DeepSpeed
releases all parameters when a step begins. Afterwards it makes them available, on one rank and on several, for a
module, in advance, or for GatheredParameters, only through two functions of a parameter. Each waits for the
sub-groups of the parameters that it gathers, on the stream that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .surface import DsParameter, ZeroOptimizer
from .transfers import Transfers


class GatherGate:
    """Lets gathers wait for uploads, on an accelerator with streams; does nothing on others."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._sub_group_of: dict[int, int] = {}
        self._gated: list[tuple[DsParameter, Any, Any]] = []

    def install(self, zero: ZeroOptimizer) -> None:
        """Wrap the functions of every parameter of the module: a gather is called on any of those it gathers."""
        if not self._transfers.asynchronous:
            return
        self._sub_group_of = {param.ds_id: i for i, group in enumerate(zero.fp16_groups) for param in group}
        for param in zero.module.parameters():
            self._gated.append((param, param.all_gather, param.all_gather_coalesced))
            param.all_gather = self._gate_all_gather(param, param.all_gather)
            param.all_gather_coalesced = self._gate_all_gather_coalesced(param.all_gather_coalesced)

    def remove(self) -> None:
        """Restore the functions."""
        for param, all_gather, all_gather_coalesced in self._gated:
            param.all_gather, param.all_gather_coalesced = all_gather, all_gather_coalesced
        self._gated.clear()

    @contextmanager
    def holding_persistent_parameters_back(self, zero: ZeroOptimizer) -> Iterator[None]:
        """Keep DeepSpeed from gathering the small parameters of all layers, which it otherwise does after a step.

        That gather would wait for all uploads. These parameters are gathered with their modules instead, as after a
        step that was skipped.
        """
        if not self._transfers.asynchronous:
            yield
            return
        persistent, zero.persistent_parameters = zero.persistent_parameters, []
        try:
            yield
        finally:
            zero.persistent_parameters = persistent

    def _gate_all_gather(self, own: DsParameter, plain: Callable[..., Any]) -> Callable[..., Any]:
        def all_gather(param_list: list[DsParameter] | None = None, *args: Any, **kwargs: Any) -> Any:
            self._wait(param_list or [own])
            return plain(param_list, *args, **kwargs)

        return all_gather

    def _gate_all_gather_coalesced(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def all_gather_coalesced(params: Iterable[DsParameter], *args: Any, **kwargs: Any) -> Any:
            params = list(params)
            self._wait(params)
            return plain(params, *args, **kwargs)

        return all_gather_coalesced

    def _wait(self, params: Iterable[DsParameter]) -> None:
        self._transfers.wait_for_uploads({self._sub_group_of[p.ds_id] for p in params if p.ds_id in self._sub_group_of})
