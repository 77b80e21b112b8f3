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
