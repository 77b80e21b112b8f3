"""Turns: their order, failures, and interruption. The processes are fakes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superoffload.bench import grid, rounds
from superoffload.bench.player import Failed
from tests.helpers.reports import ONE

pytestmark = pytest.mark.unit

NUMBERS = {"step_time_s": 1.0, "target_tokens_per_s": 10.0}
CASES = grid.cases({**ONE, "batch_size": (1, 2, 3)}, ())
ORDERS = [grid.Order(flags=case.flags, mode="superoffload", random_weights=True, documents=9) for case in CASES]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace processes by fakes; return a function that plays and returns what happened in which order."""

    def play(
        answer: Callable[[str, int], Any], alone: str | None = None
    ) -> tuple[list[str], rounds.Measured, set[str]]:
        asked: list[str] = []
        living: set[str] = set()

        class Player:
            def __init__(self, module: str, order: Any, ranks: int, log: Path) -> None:
                self.name = "ruler" if order is None else f"batch {order.flags['batch_size']}"
                living.add(self.name)

            def receive(self) -> None:
                self.ask("start")

            def ask(self, command: str, *_: Any) -> Any:
                asked.append(f"{self.name}: {command}")
                result = answer(asked[-1], asked.count(asked[-1]))
                return result if result is not None else {"turn": NUMBERS, "measure": 1e12}.get(command, {})

            def end(self) -> None:
                living.discard(self.name)

            finish = end

            def __enter__(self) -> "Player":
                return self

            def __exit__(self, *_: object) -> None:
                self.end()

        monkeypatch.setattr(rounds, "Player", Player)
        plan = rounds.Plan(rounds=2, steps=3, warmup_steps=4, ranks=1, alone=alone, folder=Path())
        return asked, rounds.play(CASES, ORDERS, plan, lambda _: None), living

    return play


def test_all_take_turns_in_alternating_order_with_the_matrix_product_between(played: Any) -> None:
    asked, found, living = played(lambda *_: None)
    names = ["batch 1", "batch 2", "batch 3"]
    start = [f"{name}: {command}" for name in names for command in ("start", "describe", "turn")]
    turns = [[f"{name}: turn" for name in order] for order in (names, names[::-1])]
    product = ["ruler: measure"]
    end = [f"{name}: memory" for name in names]
    assert asked == ["ruler: start", *start, *product, *turns[0], *product, *turns[1], *product, *end]
    assert [turn["round"] for turn in found.outcomes["batch 2"].turns] == [0, 1]
    assert found.product_flops_per_s == [1e12] * 3 and not living


def test_alone_each_takes_all_its_turns_before_the_next_starts(played: Any) -> None:
    asked, _, _ = played(lambda *_: None, alone="--alone")
    names = [line.split(":")[0] for line in asked if not line.startswith("ruler")]
    assert names == [name for name in ("batch 1", "batch 2", "batch 3") for _ in range(6)]


@pytest.mark.parametrize("broken", ["batch 2: start", "batch 2: turn", "batch 2: memory"])
def test_a_failure_ends_its_configuration_and_the_others_go_on(played: Any, broken: str) -> None:
    def answer(line: str, _: int) -> None:
        if line == broken:
            raise Failed("no memory")

    _, found, living = played(answer)
    assert {name: outcome.failure for name, outcome in found.outcomes.items()} == {
        "batch 1": None, "batch 2": "no memory", "batch 3": None
    }  # fmt: skip
    assert all(len(found.outcomes[name].turns) == 2 for name in ("batch 1", "batch 3"))
    assert not found.interrupted and not living


def test_an_interruption_ends_every_process_and_keeps_what_there_is(played: Any) -> None:
    def answer(line: str, times: int) -> None:
        if line == "batch 2: turn" and times == 3:  # the first one was warm-up
            raise KeyboardInterrupt

    _, found, living = played(answer)
    assert found.interrupted and not living
    assert [len(outcome.turns) for outcome in found.outcomes.values()] == [1, 1, 2]


def test_the_turns_go_on_without_the_matrix_product(played: Any) -> None:
    def answer(line: str, times: int) -> None:
        if line == "ruler: measure" and times == 2:
            raise Failed("killed")

    asked, found, living = played(answer)
    assert found.product_flops_per_s == [1e12] and asked.count("ruler: measure") == 2
    assert all(len(outcome.turns) == 2 and not outcome.failure for outcome in found.outcomes.values())
    assert not living
