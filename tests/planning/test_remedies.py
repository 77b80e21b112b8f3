"""What is offered fits, by the same arithmetic, and nothing smaller does."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from superoffload.planning.budget.job import Job
from superoffload.planning.budget.memory import budget
from superoffload.planning.budget.shape import built_in
from superoffload.planning.remedies import LENGTH_STEP, Capacity, Remedy, Search
from tests.helpers.planning import recipe

pytestmark = pytest.mark.unit

GIB = 2**30
SWITCHES: dict[str, dict[str, Any]] = {
    "--loss_kernel chunked": {"chunked_loss": False},
    "--activation_checkpointing": {"recompute": False},
    "--activation_checkpointing offload": {"offload_activations": False},
    "--tiled_mlp auto": {"tiled": 0},
    "--offload_params": {"offload_params": False},
    "--optimizer_state bf16": {"bf16_state": False},
}
# A recipe, changes of its job, and how much of what it needs there is on the device (if it is not on the CPU), in
# host memory and on disk.
CASES: list[tuple[str, dict[str, Any], float, float, float]] = [
    ("llama-8b", {}, 0.95, 2, 2),
    ("llama-8b", {}, 0.7, 2, 2),
    ("llama-8b", {}, 0.7, 0.99, 2),
    ("llama-8b", {}, 2, 0.9, 2),
    ("llama-8b", {}, 1, 0.9, 2),
    ("llama-8b", {"chunked_loss": False}, 0.9, 2, 2),
    ("llama-8b", {"recompute": False}, 0.5, 2, 2),
    ("llama-8b", {"recompute": False, "chunked_loss": False, "batch": 16}, 0.15, 1.3, 2),
    ("llama-8b", {"saves": True, "kept": 5}, 2, 2, 0.7),
    ("llama-8b", {"mode": "zerooffload", "ratio": 1.0}, 2, 0.8, 2),
    ("llama-8b", {"accumulation": 4}, 2, 0.97, 2),
    ("llama-8b", {"on_cpu": True, "recompute": False}, 0, 0.9, 2),
    ("llama-8b", {"on_cpu": True}, 0, 0.97, 2),
    ("gpt-oss-20b", {}, 0.3, 2, 2),
    ("qwen3-30b-a3b", {}, 0.6, 1.2, 2),
    ("seed-oss-36b", {}, 0.8, 0.8, 2),
    ("llama-70b", {}, 0.5, 1.0, 2),
    ("llama-70b", {}, 0.3, 0.5, 2),
    ("llama-70b", {"length": 32768, "batch": 1}, 0.5, 2, 2),
    ("llama-8b", {"length": 131072, "batch": 1, "offload_activations": True}, 0.9, 2, 2),
    ("llama-70b", {"ranks": 1, "ranks_per_node": 1}, 0.4, 1.5, 2),
]


def search_of(case: tuple[str, dict[str, Any], float, float, float]) -> tuple[Search, Job]:
    name, changes, *shares = case
    shape, wanted = recipe(name, **changes)
    need = budget(shape, wanted)
    device, host, disk = (
        int(share * size) for share, size in zip(shares, (need.device_peak, need.host_peak, need.disk), strict=True)
    )
    capacity = Capacity(device=None if wanted.on_cpu else device, host=host, disk=disk)
    return Search(shape=shape, capacity=capacity), wanted


def smaller(flag: str, job: Job, original: Job) -> Job:
    """Take back one step of a flag."""
    if flag in SWITCHES:
        return replace(job, **SWITCHES[flag])
    name, value = flag.split()
    nodes = original.ranks // original.ranks_per_node
    if name == "--offload_ratio":
        back = job.ratio + (0.01 if job.ratio < original.ratio else -0.01)
        limit = min if job.ratio < original.ratio else max
        return replace(job, ratio=limit(round(back, 2), original.ratio))
    if name == "--batch_size":
        return replace(job, batch=job.batch + 1)
    if name == "--max_length":
        return replace(job, length=min(job.length + LENGTH_STEP, original.length))
    if name == "--sequence_parallel_size":
        parts = max(original.parts, int(value) // 2)
        return replace(job, parts=parts, packed=original.packed or parts > 1)
    if name == "--keep_checkpoints":
        return replace(job, kept=job.kept + 1)
    if name == "--gpus":
        per_node = max(original.ranks_per_node, int(value) // 2)
        return replace(job, ranks_per_node=per_node, ranks=per_node * nodes)
    assert name == "--nodes", flag
    return replace(job, ranks=max(nodes, int(value) // 2) * job.ranks_per_node)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_remedy_fits_and_nothing_smaller_does(case: tuple[str, dict[str, Any], float, float, float]) -> None:
    search, wanted = search_of(case)
    remedies, nearest = search.remedies(wanted)
    assert bool(remedies) == (nearest is None)
    for remedy in remedies:
        assert search.fits(remedy.job), remedy.flags
        assert remedy.budget == budget(search.shape, remedy.job)
        for flag in remedy.flags:
            assert not search.fits(smaller(flag, remedy.job, wanted)), (remedy.flags, flag)
    assert len({remedy.flags for remedy in remedies}) == len(remedies)


def test_the_cases_offer_every_flag_alone_or_in_a_pair() -> None:
    offered = {flag.split()[0] for case in CASES for remedy in remedies_of(case) for flag in remedy.flags}
    assert offered == {*(flag.split()[0] for flag in SWITCHES), "--offload_ratio", "--batch_size", "--max_length",
                       "--keep_checkpoints", "--sequence_parallel_size", "--gpus", "--nodes"}  # fmt: skip
    assert {len(remedy.flags) for case in CASES for remedy in remedies_of(case)} == {1, 2}


@pytest.mark.parametrize(
    ("place", "flag", "changes"),
    [
        ("device", "--batch_size 3", {"batch": 3}),
        ("device", "--max_length 3840", {"length": 3840}),
        ("device", "--offload_ratio 0.81", {"ratio": 0.81}),
        ("host", "--offload_ratio 0.79", {"ratio": 0.79}),
        ("disk", "--keep_checkpoints 4", {"kept": 4}),
    ],
)
def test_the_smallest_step_of_each_flag_is_tried(place: str, flag: str, changes: dict[str, Any]) -> None:
    shape, wanted = recipe("llama-8b", sub_group=10**7, batch=4, length=4096, saves=True, kept=5)
    need = budget(shape, replace(wanted, **changes))
    enough = {"device": need.device_peak, "host": need.host_peak, "disk": need.disk}[place]
    capacity = replace(Capacity(device=None, host=None), **{place: enough})
    assert (flag,) in [remedy.flags for remedy in Search(shape=shape, capacity=capacity).remedies(wanted)[0]]


def remedies_of(case: tuple[str, dict[str, Any], float, float, float]) -> Iterator[Remedy]:
    search, wanted = search_of(case)
    yield from search.remedies(wanted)[0]


def test_pairs_are_offered_where_no_single_setting_is_enough() -> None:
    """More machines alone would do, but a person may not have them."""
    search, wanted = search_of(("llama-8b", {}, 0.7, 0.9, 2))
    flags = [remedy.flags for remedy in search.remedies(wanted)[0]]
    assert ["--nodes"] == [pair[0].split()[0] for pair in flags if len(pair) == 1]
    pairs = [pair for pair in flags if len(pair) == 2]
    assert pairs
    assert not any("--nodes" in flag or "--gpus" in flag for pair in pairs for flag in pair)


def test_a_job_that_fits_needs_no_remedy() -> None:
    search, wanted = search_of(("llama-8b", {}, 1, 1, 1))
    assert search.remedies(wanted) == ((), None)


def test_the_nearest_miss_is_named_where_two_flags_are_not_enough() -> None:
    shape, wanted = recipe("llama-70b", ranks=1, ranks_per_node=1)
    search = Search(shape=shape, capacity=Capacity(device=GIB, host=GIB))
    remedies, nearest = search.remedies(wanted)
    assert remedies == ()
    assert nearest and len(nearest.flags) == 2
    missing = sum(search.capacity.missing(nearest.budget).values())
    assert 0 < missing < sum(search.missing(wanted).values())


def test_ranks_share_a_row_only_if_they_divide_its_heads() -> None:
    shape, wanted = recipe("llama-70b", ranks=8, ranks_per_node=8)
    search = Search(
        shape=replace(shape, heads=6), capacity=Capacity(device=int(0.6 * budget(shape, wanted).device_peak), host=None)
    )
    flags = {flag for remedy in search.remedies(wanted)[0] for flag in remedy.flags}
    assert {flag for flag in flags if "parallel" in flag} <= {"--sequence_parallel_size 2"}
    assert not any(
        "parallel" in flag for remedy in search.remedies(replace(wanted, eager=True))[0] for flag in remedy.flags
    )


def test_flags_for_longer_rows_add_up() -> None:
    shape, wanted = recipe("llama-8b", batch=1)
    search = Search(shape=shape, capacity=Capacity(device=80 * 10**9, host=None))
    found = search.longest(wanted)
    offload, tiled = "--activation_checkpointing offload", "--tiled_mlp auto"
    assert list(found) == ["", offload, f"{offload} {tiled}"]
    lengths = [length or 0 for length in found.values()]
    assert lengths == sorted(lengths) and lengths[0] == search.largest(wanted, "length")
    with_both = replace(wanted, offload_activations=True, tiled="auto")
    assert search.longest(with_both) == {"": lengths[2]}
    assert list(search.longest(replace(wanted, on_cpu=True))) == [""]


@pytest.mark.parametrize("name", ["llama-8b", "qwen3-30b-a3b", "llama-70b"])
@pytest.mark.parametrize(("field", "unit"), [("batch", 1), ("length", LENGTH_STEP)])
def test_the_largest_fits_and_the_next_does_not(name: str, field: str, unit: int) -> None:
    shape, wanted = recipe(name)
    search = Search(shape=shape, capacity=Capacity(device=80 * 10**9, host=None))
    largest = search.largest(wanted, field)
    assert largest and largest % unit == 0
    assert search.fits(replace(wanted, **{field: largest}))  # type: ignore[arg-type]
    assert not search.fits(replace(wanted, **{field: largest + unit}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("parts", "batch"), [(1, 1), (2, 1), (1, 3)])
def test_the_largest_length_may_lie_beyond_a_length_that_does_not_fit(parts: int, batch: int) -> None:
    """With one tile more, tiles are smaller."""
    shape = built_in("mixtral-8x7b")
    _, wanted = recipe("llama-8b", batch=batch, parts=parts, tiled="auto", offload_activations=True)
    lengths = range(LENGTH_STEP, 2**15 * parts, LENGTH_STEP)
    need = {length: budget(shape, replace(wanted, length=length)).device_peak for length in lengths}
    falls = [length for length in lengths[1:-1] if need[length] > need[length + LENGTH_STEP]]
    assert len(falls) > 2
    for fall in falls:
        search = Search(shape=shape, capacity=Capacity(device=need[fall + LENGTH_STEP], host=None))
        fitting = [length for length in lengths if not search.missing(replace(wanted, length=length))]
        assert search.largest(wanted, "length") == fitting[-1] > fall


def test_nothing_is_largest_where_nothing_fits() -> None:
    shape, wanted = recipe("llama-8b")
    search = Search(shape=shape, capacity=Capacity(device=GIB, host=None))
    assert search.largest(wanted, "batch") is None


@pytest.mark.parametrize("value", [10**9, 10**30])
@pytest.mark.parametrize(("field", "place"), [("batch", "device"), ("length", "device"), ("kept", "disk")])
def test_absurd_numbers_are_searched_as_fast(field: str, place: str, value: int) -> None:
    shape, fitting = recipe("llama-8b", batch=1, saves=True, kept=1)
    need = budget(shape, fitting)
    enough = {"device": need.device_peak, "disk": need.disk}[place]
    capacity = replace(Capacity(device=None, host=None), **{place: enough})
    search = Search(shape=shape, capacity=capacity)
    remedies, _ = search.remedies(replace(fitting, **{field: value}))  # type: ignore[arg-type]
    assert remedies[0].job == fitting


def test_bf16_state_halves_the_checkpoints() -> None:
    shape, wanted = recipe("llama-8b", saves=True, kept=1)
    search = Search(shape=shape, capacity=Capacity(device=None, host=None, disk=int(0.6 * budget(shape, wanted).disk)))
    remedies, nearest = search.remedies(wanted)
    assert ([remedy.flags for remedy in remedies], nearest) == ([("--optimizer_state bf16",)], None)


def test_an_unknown_capacity_is_not_checked() -> None:
    shape, wanted = recipe("llama-8b")
    assert Capacity(device=None, host=None).missing(budget(shape, wanted)) == {}
    assert set(Capacity(device=0, host=GIB, disk=0).missing(budget(shape, wanted))) == {"device", "host"}
