"""Train on the simulated asynchronous device: the cases of the equality tests, whole or with a wait taken away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tests.helpers.async_device import AsyncDevice
from tests.helpers.offload_training import Case, train
from tests.helpers.sabotage import without

Outcome = tuple[list[str], list[str]]
"""Hazards, and what differs from ZeRO-Offload."""


def equality(cases: dict[str, Case], seeds: Sequence[int]) -> dict[str, list[Outcome]]:
    """Train every case in both modes, ours once for each seed; runs on every rank."""
    outcomes: dict[str, list[Outcome]] = {}
    for name, case in cases.items():
        zero = train(case, False)
        outcomes[name] = []
        for seed in seeds:
            with AsyncDevice(seed) as device:
                ours = train(case, True)
            outcomes[name].append((device.hazards, differences(zero, ours)))
            assert device.counts["to host"] and device.counts["from host"]  # else nothing was simulated
    return outcomes


def hazards_without(waits: dict[str, Case]) -> dict[str, list[str]]:
    """Train every case with its wait taken away, and return the hazards; runs on every rank."""
    hazards = {}
    for wait, case in waits.items():
        with without(wait), AsyncDevice(0) as device:
            train(replace(case, steps=3), True)
        hazards[wait] = device.hazards
    return hazards


def differences(zero: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return the names of all results that are not equal bit for bit."""
    found = [key for key in ("steps", "skipped") if ours[key] != zero[key]]
    for key in ("losses", "norms"):
        pairs = zip(ours[key], zero[key], strict=True)
        if not all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs):
            found.append(key)
    for name, tensor in zero["tensors"].items():
        if not torch.equal(tensor.nan_to_num(), ours["tensors"][name].nan_to_num()):
            found.append(name)
    return found
