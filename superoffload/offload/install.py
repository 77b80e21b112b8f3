"""Put the optimizer where DeepSpeed's engine looks for it; the only patch of this package.

    with installed():
        engine, *_ = deepspeed.initialize(...)

DeepSpeed's engine imports its SuperOffload class inside the function that builds the optimizer, so it is enough to
replace one module attribute while that function runs. Nothing stays patched afterwards.
"""

from __future__ import annotations

import base64
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import deepspeed
import hjson
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from . import operators
from .settings import OffloadSettings
from .zero3 import contract

_log = getLogger(__name__)

LOSS = "its checkpoints lack the Adam moments, clipping disables its overlap, a dead worker goes unnoticed for 60 s"
"""The disadvantages of DeepSpeed's own SuperOffload."""


@contextmanager
def installed(settings: OffloadSettings | None = None) -> Iterator[None]:
    """Let `super_offload: true` select this package's optimizer for every engine built inside the block.

    If the optimizer cannot be used, a warning says why, and DeepSpeed's own class is built instead; on an
    accelerator that this class does not support, plain ZeRO-Offload.
    """
    operators.prepare()
    seam = importlib.import_module(contract.SEAM_MODULE)
    stock = getattr(seam, contract.SEAM_NAME)
    setattr(seam, contract.SEAM_NAME, _builder(stock, settings))
    try:
        yield
    finally:
        setattr(seam, contract.SEAM_NAME, stock)


def _builder(stock: Callable[..., Any], settings: OffloadSettings | None) -> Callable[..., Any]:
    def build(module: torch.nn.Module, init_optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        problem = _problem_of_arguments(init_optimizer, kwargs) or environment_problem()
        if problem is None:
            from .zero3.optimizer import SharedMemorySuperOffload  # only in a supported environment

            return SharedMemorySuperOffload(module, init_optimizer, *args, offload_settings=settings, **kwargs)
        why = f"SuperOffload falls back to DeepSpeed's own class because of: {problem}; {LOSS}."
        if get_accelerator().device_name() == "cuda":
            _log.warning("%s", why)
            return stock(module, init_optimizer, *args, **kwargs)
        _log.warning("%s That class needs CUDA, so plain ZeRO-Offload is used, whose checkpoints are complete.", why)
        return DeepSpeedZeroOptimizer_Stage3(module, init_optimizer, *args, **kwargs)

    return build


def _problem_of_arguments(optimizer: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Name what this package does not support among the engine's arguments, which are final; None if there is nothing.

    DeepSpeed's configuration may have been overridden by them; it is read for what they do not hold.
    """
    offload, param_offload = kwargs.get("offload_optimizer_config"), kwargs.get("offload_param_config")
    ds_config = _read(kwargs.get("ds_config"))
    checks: tuple[tuple[bool, str], ...] = (
        (type(optimizer) is not DeepSpeedCPUAdam, f"optimizer {type(optimizer).__name__} instead of DeepSpeedCPUAdam"),
        (_device(offload) != "cpu", f"optimizer offload to {_device(offload)}"),
        (_device(param_offload) == "nvme", "parameter offload to NVMe"),
        (kwargs.get("zenflow_config") is not None, "ZenFlow"),
        (bool(kwargs.get("elastic_checkpoint")), "elastic checkpoints"),
        (bool((ds_config.get("compile") or {}).get("deepcompile")), "DeepCompile"),
        (_autocasts_to_fp16(ds_config), "torch_autocast in float16, whose GradScaler steps the optimizer"),
    )
    return next((why for holds, why in checks if holds), None)


def _read(ds_config: Any) -> Mapping[str, Any]:
    """Return the configuration that was given to deepspeed.initialize, in each form that DeepSpeed has accepted.

    These are a dict, the path of a file in Hjson (JSON with comments), and the same text in base64.
    """
    if ds_config is None or isinstance(ds_config, Mapping):
        return ds_config or {}
    path = Path(ds_config)
    text = path.read_text("utf-8") if os.path.exists(path) else base64.urlsafe_b64decode(ds_config).decode()
    found: Mapping[str, Any] = hjson.loads(text)
    return found


def _device(config: Any) -> str:
    device = getattr(config, "device", None)
    return str(getattr(device, "value", device))


def _autocasts_to_fp16(ds_config: Mapping[str, Any]) -> bool:
    autocast = ds_config.get("torch_autocast") or {}
    dtype = str(autocast.get("dtype", "")).removeprefix("torch.")
    return bool(autocast.get("enabled")) and dtype in ("float16", "half", "fp16")


def environment_problem() -> str | None:
    """Check the operating system and the installed DeepSpeed; return what is wrong with it, None if nothing is."""
    if not hasattr(os, "memfd_create") or not hasattr(os, "sched_setaffinity"):
        return "an operating system without memfd_create (Linux is needed)"
    if _version(deepspeed.__version__) < contract.FIRST_SUPPORTED:
        supported = ".".join(map(str, contract.FIRST_SUPPORTED))
        return f"DeepSpeed {deepspeed.__version__}, which is older than {supported}"
    found = contract.problems()
    if found:
        return f"DeepSpeed {deepspeed.__version__} differs from the tested versions: {'; '.join(found)}"
    if deepspeed.__version__.split("+")[0] not in contract.TESTED_VERSIONS:
        tested = ", ".join(contract.TESTED_VERSIONS)
        _log.info("DeepSpeed %s passes the contract; tested versions: %s", deepspeed.__version__, tested)
    return None


def _version(text: str) -> tuple[int, ...]:
    parts = text.split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
