"""Equality with ZeRO-Offload: parameters, gradients, moments, weights, steps, losses, norms, bit for bit.

All cases of one world size run in one launch; each test checks one of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.offload_training import Case, on_cpu, train
from tests.helpers.ranks import run_ranks

WARMUP = {"warmup_min_lr": 0.0, "warmup_max_lr": 3e-3, "warmup_num_steps": 2}
COSINE = {"type": "WarmupCosineLR", "params": {"total_num_steps": 10, "warmup_num_steps": 2}}
LINEAR = {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": 12}}
ONE_CYCLE = {
    "type": "OneCycle",
    "params": {
        "cycle_min_lr": 1e-4,
        "cycle_max_lr": 4e-3,
        "cycle_first_step_size": 4,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.95,
    },
}

CASES = {
    "plain": Case(),
    "clip-none": Case(clip=1e4),
    "clip-some": Case(clip=2.1),
    "clip-all": Case(clip=0.1),
    "accumulation": Case(clip=1.1, accumulation=4, steps=6),
    "groups": Case(clip=2.1, groups=True, scheduler=COSINE),
    "group-betas": Case(clip=2.1, group_betas=True),
    "linear": Case(scheduler=LINEAR),
    "one-cycle": Case(clip=2.1, scheduler=ONE_CYCLE),
    "l2": Case(adamw_mode=False),
    "no-bias-correction": Case(bias_correction=False),
    "fp16-overflow": Case(dtype="fp16", clip=2.1, loss_factor=1.0),
    "fp16-static": Case(dtype="fp16", loss_scale=96.0),
    "fp32": Case(dtype="fp32", clip=2.1),
    "bf16-state": Case(low_precision_state=True, clip=2.1),
    "nan": Case(clip=2.1, nan_steps=(3, 4)),
    "dropped": Case(clip=2.1, dropped_steps=(2, 5)),
    "dropped-unclipped": Case(dropped_steps=(2, 5), unused_steps=(5,)),
    "two-backwards": Case(clip=100.0, twice_steps=(2, 6)),
    "lr-moved": Case(clip=100.0, lr_moved_steps=(3, 6)),
    "gradient-set": Case(clip=100.0, gradient_set_steps=(3,)),
    "by-hand": Case(clip=3.7, by_hand=3, steps=6),
    "unmanaged": Case(clip=3.7, unmanaged=3, steps=6),
    "unused": Case(clip=2.1, unused_steps=(2, 3, 7)),
    "checkpointing": Case(clip=2.1, checkpointing=True),
    "ratio-half": Case(ratio=0.5),
    "ratio-zero": Case(ratio=0.0),
    "device-share": Case(ratio=0.5, device_share=True, clip=2.1),
    "bf16-device-share": Case(ratio=0.5, device_share=True, low_precision_state=True, clip=2.1),
    "device-only": Case(ratio=0.0, device_share=True, clip=2.1),
    "gradient-set-twice": Case(clip=100.0, gradient_set_steps=(2, 3), twice_steps=(3,)),
    "no-direct-gradients": Case(direct_gradients=False, clip=2.1),
    "no-speculation": Case(speculate=False, clip=2.1),
    "trials": Case(speculate=None, steps=22),
    "in-turns": Case(in_turns=True, clip=2.1, nan_steps=(4,), dropped_steps=(6,)),
    "no-fused-kernel": Case(fused=False, clip=2.1),
}

SLOW_ON_ONE_RANK = (
    "clip-none",
    "linear",
    "l2",
    "no-bias-correction",
    "fp16-static",
    "fp32",
    "dropped",
    "by-hand",
    "gradient-set-twice",
    "no-direct-gradients",
    "ratio-half",
    "ratio-zero",
    "group-betas",
    "bf16-state",
    "bf16-device-share",
    "unmanaged",
    "checkpointing",
    "no-fused-kernel",
)
QUICK_ON_ONE_RANK = tuple(n for n in CASES if n not in SLOW_ON_ONE_RANK)
QUICK_ON_TWO_RANKS = ("clip-some", "accumulation", "nan", "unused", "device-share", "in-turns")
SLOW_ON_TWO_RANKS = tuple(n for n in CASES if n not in QUICK_ON_TWO_RANKS)


def run_cases(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Train every case in both modes; runs on every rank."""
    checked = {n: replace(CASES[n], verify_steps=4) for n in names}  # which must not fail, nor change a result
    return {n: {"zero": train(CASES[n], False), "ours": train(checked[n], True)} for n in names}


@pytest.fixture(scope="module")
def one_rank() -> list[Any]:
    return run_ranks(1, run_cases, QUICK_ON_ONE_RANK, timeout_s=230)


@pytest.fixture(scope="module")
def one_rank_slow() -> list[Any]:
    return run_ranks(1, run_cases, SLOW_ON_ONE_RANK, timeout_s=230)


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    return run_ranks(2, run_cases, QUICK_ON_TWO_RANKS, timeout_s=230)


@pytest.fixture(scope="module")
def two_ranks_slow() -> list[Any]:
    return run_ranks(2, run_cases, SLOW_ON_TWO_RANKS, timeout_s=580)


def assert_equal(zero: dict[str, Any], ours: dict[str, Any]) -> None:
    assert (zero["kind"], ours["kind"]) == ("DeepSpeedZeroOptimizer_Stage3", "SharedMemorySuperOffload")
    for key in ("steps", "skipped"):
        assert ours[key] == zero[key], key
    for key in ("losses", "norms"):
        pairs = list(zip(ours[key], zero[key], strict=True))
        assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs), key
    assert ours["tensors"].keys() == zero["tensors"].keys()
    unequal = [
        name
        for name, tensor in zero["tensors"].items()
        if not torch.equal(tensor.nan_to_num(), ours["tensors"][name].nan_to_num())
    ]
    assert not unequal


@pytest.mark.parametrize("name", QUICK_ON_ONE_RANK)
def test_equal_to_zero_offload_on_one_rank(one_rank: list[Any], name: str) -> None:
    assert_equal(**one_rank[0][name])


@pytest.mark.parametrize("name", QUICK_ON_TWO_RANKS)
def test_equal_to_zero_offload_on_two_ranks(two_ranks: list[Any], name: str) -> None:
    for results in two_ranks:
        assert_equal(**results[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_ON_ONE_RANK)
def test_more_equal_to_zero_offload_on_one_rank(one_rank_slow: list[Any], name: str) -> None:
    assert_equal(**one_rank_slow[0][name])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SLOW_ON_TWO_RANKS)
def test_more_equal_to_zero_offload_on_two_ranks(two_ranks_slow: list[Any], name: str) -> None:
    for results in two_ranks_slow:
        assert_equal(**results[name])


def test_cases_reach_what_they_are_meant_to_reach(one_rank: list[Any]) -> None:
    results = one_rank[0]
    stats = {name: r["ours"]["statistics"] for name, r in results.items()}
    assert stats["plain"].accepted > 0 and stats["plain"].clipped_steps == 0
    assert stats["two-backwards"].accepted > 0 and stats["two-backwards"].clipped_steps == 0
    assert 0 < stats["clip-some"].clipped_steps < 10
    assert stats["clip-all"].clipped_steps == 10 and stats["clip-all"].accepted == 0
    assert results["fp16-overflow"]["ours"]["skipped"] > 0
    assert stats["nan"].discarded_rounds == 2 and stats["nan"].steps == 8
    assert stats["dropped-unclipped"].discarded_rounds == 2
    assert stats["lr-moved"].cancelled > 0 and stats["two-backwards"].cancelled > 0
    assert stats["gradient-set"].cancelled == 1
    assert stats["no-speculation"].speculated == 0
    assert stats["trials"].stepping_rounds >= 8 or not on_cpu()  # both ways of a trial
    assert 0 < stats["in-turns"].accepted and 0 < stats["in-turns"].stepping_rounds < stats["in-turns"].steps
    assert stats["device-only"].speculated == 0
    accumulated = {name for name, r in results.items() if r["ours"]["has_accumulated"]}
    needed = {"accumulation", "fp16-overflow", "two-backwards", "gradient-set"}
    assert accumulated == needed & results.keys()
