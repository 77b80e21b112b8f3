"""The processes of a configuration: answers, failures and ends."""

from pathlib import Path

import pytest

from superoffload.bench import player as players
from superoffload.bench.player import Failed, Player


def test_a_process_that_is_killed_is_noticed_and_none_is_left(tmp_path: Path) -> None:
    with Player("ruler", None, 1, tmp_path / "log") as player:
        (process,) = player._processes
        process.kill()  # long before it has imported torch
        with pytest.raises(Failed, match="killed by SIGKILL, usually for lack of host memory"):
            player.receive()
    assert process.poll() is not None


def test_the_failure_of_a_rank_is_the_reason_and_its_log_says_more(tmp_path: Path) -> None:
    with Player("ruler", None, 1, tmp_path / "log") as player:
        player.receive()
        assert player.ask("measure") > 0
        with pytest.raises(Failed, match="has no attribute 'guess'"):
            player.ask("guess")
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_process_that_cannot_start_is_its_last_line(tmp_path: Path) -> None:
    with Player("no_such_module", None, 1, tmp_path / "log") as player, pytest.raises(Failed, match="No module named"):
        player.receive()


@pytest.mark.unit
def test_ranks_know_that_all_are_on_this_machine() -> None:
    """As the launcher tells them: otherwise DeepSpeed's ranks on the CPU would be slower than those of a run."""
    environment = players._environment(1, 2, 29500)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT")
    assert [environment[name] for name in names] == ["1", "1", "2", "2", "29500"]
