"""Both processes always have a core, and ranks share fairly."""

from __future__ import annotations

import pytest

from superoffload.offload.shared.affinity import Seat, share_of_rank, split_cores

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("count", [2, 3, 4, 16, 64])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.8, 0.9, 1.0])
def test_both_processes_have_a_core_and_share_none(count: int, fraction: float) -> None:
    cores = tuple(range(10, 10 + count))
    split = split_cores(cores, fraction)
    assert split.trainer and split.optimizer
    assert split.trainer + split.optimizer == cores
    if 0 < round(fraction * count) < count:
        assert len(split.optimizer) == round(fraction * count)


def test_a_single_core_is_shared() -> None:
    split = split_cores((5,), 0.8)
    assert split.trainer == split.optimizer == (5,)


def test_no_core_is_an_error() -> None:
    with pytest.raises(ValueError, match="no cores"):
        split_cores((), 0.5)


@pytest.mark.parametrize(("cores", "ranks"), [(16, 4), (10, 4), (7, 3), (4, 4)])
def test_unbound_ranks_divide_their_host(cores: int, ranks: int) -> None:
    seats = [Seat(host="a", cores=tuple(range(cores)))] * ranks
    shares = [share_of_rank(seats, r) for r in range(ranks)]
    assert sorted(c for share in shares for c in share) == list(range(cores))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_of_other_hosts_are_ignored() -> None:
    seats = [Seat(host=h, cores=(0, 1, 2, 3)) for h in ("a", "b", "a", "b")]
    assert share_of_rank(seats, 0) == share_of_rank(seats, 1) == (0, 1)
    assert share_of_rank(seats, 2) == share_of_rank(seats, 3) == (2, 3)


def test_ranks_bound_by_a_launcher_keep_their_cores() -> None:
    seats = [Seat(host="a", cores=(0, 1)), Seat(host="a", cores=(2, 3))]
    assert share_of_rank(seats, 1) == (2, 3)


def test_more_ranks_than_cores_share_cores() -> None:
    seats = [Seat(host="a", cores=(0, 1))] * 5
    assert [share_of_rank(seats, r) for r in range(5)] == [(0,), (1,), (0,), (1,), (0,)]


def hyperthreads(physical: int, threads: int = 2) -> dict[int, tuple[int, ...]]:
    """Number the cores as Linux usually does: first one thread of every physical core, then the others."""
    return {c + physical * t: tuple(c + physical * u for u in range(threads)) for c in range(physical) for t in (0, 1)}


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("physical", [2, 6, 48])
def test_hyperthreads_of_one_core_serve_one_process(physical: int, fraction: float) -> None:
    siblings = hyperthreads(physical)
    split = split_cores(tuple(range(2 * physical)), fraction, siblings)
    assert sorted(split.trainer + split.optimizer) == list(range(2 * physical))
    for cores in (split.trainer, split.optimizer):
        assert cores and all(set(siblings[c]) <= set(cores) for c in cores)
    wanted = min(physical - 1, max(1, round(fraction * physical)))
    assert len(split.optimizer) == 2 * wanted


def test_the_hyperthreads_of_a_single_core_are_divided() -> None:
    split = split_cores((3, 7), 0.9, {3: (3, 7), 7: (3, 7)})
    assert (split.trainer, split.optimizer) == ((3,), (7,))


def test_hyperthreads_that_a_launcher_has_split_count_as_cores() -> None:
    split = split_cores((0, 1, 2, 3), 0.5, hyperthreads(4))
    assert (split.trainer, split.optimizer) == ((0, 1), (2, 3))


@pytest.mark.parametrize(("physical", "ranks"), [(8, 4), (7, 3), (5, 4)])
def test_ranks_share_no_physical_core(physical: int, ranks: int) -> None:
    siblings = hyperthreads(physical)
    seats = [Seat(host="a", cores=tuple(range(2 * physical)))] * ranks
    shares = [share_of_rank(seats, r, siblings) for r in range(ranks)]
    assert sorted(c for share in shares for c in share) == list(range(2 * physical))
    assert all(set(siblings[c]) <= set(share) for share in shares for c in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 2


def test_ranks_divide_hyperthreads_if_there_are_too_few_cores() -> None:
    seats = [Seat(host="a", cores=(0, 1, 2, 3))] * 4
    assert [share_of_rank(seats, r, hyperthreads(2)) for r in range(4)] == [(0,), (1,), (2,), (3,)]
