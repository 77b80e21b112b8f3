"""The offload engine on a simulated asynchronous device: no races, equal to ZeRO-Offload, and every wait is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.async_training import Outcome, equality, hazards_without
from tests.helpers.offload_training import Case
from tests.helpers.ranks import ACCELERATOR, run_ranks
from tests.helpers.sabotage import WAITS
from tests.helpers.verification_faults import FAULTS, caught_by_verification

pytestmark = pytest.mark.skipif(ACCELERATOR != "cpu", reason="simulated on the CPU")

CASES = {
    "plain": Case(),
    "clip-some": Case(clip=2.1),
    "accumulation": Case(clip=1.1, accumulation=4),
    "overlap-comm": Case(clip=2.1, overlap_comm=True, persistence_threshold=0),
    "unmanaged": Case(clip=3.7, unmanaged=3),
    "nan-and-dropped": Case(clip=2.1, nan_steps=(1,), dropped_steps=(2, 4)),
    "gradient-set-twice": Case(clip=100.0, gradient_set_steps=(1, 2), twice_steps=(2,)),
    "clip-all": Case(clip=0.1),
    "no-speculation": Case(speculate=False, clip=2.1),
    "no-direct-gradients": Case(direct_gradients=False, clip=2.1),
    "bf16-state": Case(low_precision_state=True, clip=2.1),
    "fp16-overflow": Case(dtype="fp16", clip=2.1),
    "device-share": Case(ratio=0.5, device_share=True, clip=2.1),
    "unused": Case(clip=2.1, unused_steps=(1, 3), overlap_comm=True),
    "full-buckets": Case(clip=2.1, reduce_bucket_size=2100, evaluated_steps=(1, 3)),
    "small-buckets": Case(clip=2.1, reduce_bucket_size=500, overlap_comm=True, accumulation=2),
    "lr-moved": Case(clip=100.0, lr_moved_steps=(1, 3)),
    "checkpointing": Case(clip=2.1, checkpointing=True, overlap_comm=True),
}
QUICK_ON_ONE_RANK = ("clip-some", "accumulation", "unmanaged")
QUICK_ON_TWO_RANKS = ("overlap-comm",)

# What each missing wait leads to: a piece of the hazard, and the case that shows it.
SHOWN_BY: dict[str, tuple[str, Case]] = {
    "speculations wait for gradients": ("(SPECULATE", Case()),
    # These gradients are queued after DeepSpeed has waited for its stream, at the end of backward, for the last time.
    "decide waits for gradients": ("(STEP", Case(unmanaged=2)),
    "gradients wait for the last commit": ("writes gradients", Case()),
    "readers wait for commits": ("reads parameters", Case()),
    "uploads wait for the optimizer process": ("reads staging", Case()),
    "staging is rewritten after its upload": ("(SPECULATE", Case()),
    "gathers wait for uploads": ("_allgather_base_", Case(overlap_comm=True, persistence_threshold=0)),
    "gathers wait for steps on the device": (
        "_allgather_base_",
        Case(ratio=0.5, device_share=True, overlap_comm=True, persistence_threshold=0),
    ),
    "uploads wait for readers of the old weights": ("(copy), which writes", Case(evaluated_steps=(1,))),
    "copies wait for gradients": ("_to_copy", Case()),
    "gradients are kept until they are copied": ("freed for reuse", Case()),
    "buckets are filled again after their copies": ("(copy), which writes", Case(reduce_bucket_size=2100)),
    "steps wait for copies": ("pow", Case(accumulation=2)),
    "accumulation is finished on the copy stream": ("reads gradients", Case(unmanaged=2)),
    "accumulation waits for gradients": (
        "reads gradients",
        Case(twice_steps=(1,), speculate=False, reduce_bucket_size=100_000),
    ),
    "readers wait for gradients": (
        "reads gradients",
        Case(gradient_set_steps=(1,), speculate=False, reduce_bucket_size=100_000),
    ),
    "pages are unlocked after the device has finished": ("unlocks staging", Case(persistence_threshold=0)),
}
ON_TWO_RANKS = ("gathers wait for uploads", "gathers wait for steps on the device")
# One of each kind: copies, the optimizer process, streams, uploads, memory that is reused, pages.
QUICK_WAITS = (
    "speculations wait for gradients",
    "gradients wait for the last commit",
    "copies wait for gradients",
    "uploads wait for readers of the old weights",
    "gradients are kept until they are copied",
    "pages are unlocked after the device has finished",
)


def run(ranks: int, names: Sequence[str], seeds: Sequence[int], steps: int, timeout_s: float) -> list[Any]:
    return run_ranks(ranks, equality, {n: replace(CASES[n], steps=steps) for n in names}, seeds, timeout_s=timeout_s)


def assert_sound(outcomes: Sequence[Outcome]) -> None:
    for hazards, differences in outcomes:
        assert (hazards, differences) == ([], [])


@pytest.fixture(scope="module")
def one_rank() -> list[Any]:
    return run(1, QUICK_ON_ONE_RANK, (1,), 5, 230)


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    return run(2, QUICK_ON_TWO_RANKS, (0,), 5, 230)


@pytest.mark.parametrize("name", QUICK_ON_ONE_RANK)
def test_no_race_and_equal_to_zero_offload_on_one_rank(one_rank: list[Any], name: str) -> None:
    assert_sound(one_rank[0][name])


@pytest.mark.parametrize("name", QUICK_ON_TWO_RANKS)
def test_no_race_and_equal_to_zero_offload_on_two_ranks(two_ranks: list[Any], name: str) -> None:
    for results in two_ranks:
        assert_sound(results[name])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("ranks", "seeds"), [(1, range(9)), (2, range(3))], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("name", CASES)
def test_more_seeds(name: str, ranks: int, seeds: Sequence[int]) -> None:
    for results in run(ranks, [name], seeds, 10, 1100):
        assert_sound(results[name])


def without(waits: Sequence[str]) -> dict[str, list[str]]:
    """Return the hazards without each of the waits."""
    hazards: dict[str, list[str]] = {}
    for ranks in (1, 2):
        cases = {wait: SHOWN_BY[wait][1] for wait in waits if (wait in ON_TWO_RANKS) == (ranks == 2)}
        hazards |= run_ranks(ranks, hazards_without, cases, timeout_s=280)[0] if cases else {}
    return hazards


def assert_shown(wait: str, hazards: dict[str, list[str]]) -> None:
    assert any(SHOWN_BY[wait][0] in hazard for hazard in hazards[wait]), hazards[wait]


@pytest.fixture(scope="module")
def quickly_sabotaged() -> dict[str, list[str]]:
    return without(QUICK_WAITS)


def test_every_wait_has_its_case() -> None:
    assert SHOWN_BY.keys() == WAITS.keys()


@pytest.mark.parametrize("wait", QUICK_WAITS)
def test_a_missing_wait_is_noticed(quickly_sabotaged: dict[str, list[str]], wait: str) -> None:
    assert_shown(wait, quickly_sabotaged)


@pytest.mark.slow
@pytest.mark.parametrize("wait", [wait for wait in WAITS if wait not in QUICK_WAITS])
def test_more_missing_waits_are_noticed(wait: str) -> None:
    assert_shown(wait, without([wait]))


PHASES = {
    "none": None,
    "a stale gradient on rank 1": "gradient",
    "a stale upload": "upload",
    "stale new weights": "update",
    "a rounding difference": "commit",
}
QUICK_FAULTS = ("none", "a stale gradient on rank 1", "a stale upload", "a rounding difference")


@pytest.fixture(scope="module")
def caught() -> list[Any]:
    """Return what the check of the first steps says of some faults, on two ranks."""
    return run_ranks(2, caught_by_verification, QUICK_FAULTS, timeout_s=230)


@pytest.mark.parametrize("fault", QUICK_FAULTS)
def test_the_first_steps_verify_themselves(caught: list[Any], fault: str) -> None:
    assert_caught(caught, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in QUICK_FAULTS])
def test_more_faults_are_caught(fault: str) -> None:
    assert_caught(run_ranks(2, caught_by_verification, [fault], timeout_s=230), fault)


def assert_caught(caught: Sequence[dict[str, str | None]], fault: str) -> None:
    phase, line = PHASES[fault], caught[0][fault]
    assert [results[fault] for results in caught] == [line] * 2  # the same on every rank
    if phase is None:
        assert line is None
    else:
        assert line is not None and f", {phase}: " in line and "\n" not in line
        assert "on rank 1: sub-group" in line or "rank 1" not in fault
