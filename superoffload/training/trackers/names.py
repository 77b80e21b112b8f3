"""What runs and numbers are called in trackers."""

from datetime import datetime
from typing import Any

from superoffload.config import Config

_OF_TRAINING = ("loss", "lr", "grad_norm", "epoch")


def headed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers under their names in trackers, as upstream names them."""
    return {_heading(key): value for key, value in values.items()}


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the same, without what is no number: the loss of a source without targets in these steps."""
    return {key: float(value) for key, value in headed(values).items() if value is not None}


def _heading(key: str) -> str:
    if key.startswith("eval_"):
        return f"eval/{key.removeprefix('eval_')}"
    if "/" in key:  # of one source: loss/NAME, target_tokens/NAME
        return key
    if key.startswith(("host_", "device_")):
        return f"memory/{key}"
    return f"{'train' if key in _OF_TRAINING else 'perf'}/{key}"


def run_name(config: Config, now: datetime) -> str:
    """Return `--wandb_run_name`, or name a run as upstream does: model, batch size, length, checkpointing, time."""
    if config.tracking.wandb_run_name is not None:
        return config.tracking.wandb_run_name
    model, training = config.model, config.training
    recomputed = {"none": 0, "full": 1}.get(model.activation_checkpointing, model.activation_checkpointing)
    short = model.model_name.rstrip("/").split("/")[-1]
    return f"{short}_bs{training.batch_size}_seq{config.data.max_length}_ac{recomputed}_T{now:%Y%m%d_%H%M%S}"
