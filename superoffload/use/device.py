"""Choose the device to compute on, before DeepSpeed is imported."""

import os

import torch

from superoffload.errors import UserError


def choose(requested: str) -> None:
    """Make DeepSpeed, and so this package, compute on `cpu` or `cuda`; with `auto` on a CUDA device if there is one.

    Raises `UserError` if there is no CUDA device.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use auto or cpu, or see superoffload doctor")
    if requested != "auto":
        os.environ["DS_ACCELERATOR"] = requested
