"""Let the configurations take turns, only one at a time, so that a change in the machine's load affects all of them."""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from superoffload.bench.grid import Case, Order
from superoffload.bench.player import Failed, Player

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured: rounds, steps of each turn, steps before the first round, ranks; one after the other, or not.

    alone: why only one configuration is in memory at a time, and takes all its turns in a row; None: it does not.
    """

    rounds: int
    steps: int
    warmup_steps: int
    ranks: int
    alone: str | None
    folder: Path


@dataclass(slots=True)
class Outcome:
    """What one configuration did: the numbers of each of its turns, what it is, its memory, or why it failed."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    described: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    failure: str | None = None


@dataclass(slots=True)
class Measured:
    """What all configurations did, by their names, and the rates of the matrix product; as far as it came."""

    outcomes: dict[str, Outcome]
    product_flops_per_s: list[float] = field(default_factory=list)
    interrupted: bool = False


def play(cases: Sequence[Case], orders: Sequence[Order], plan: Plan, say: Say) -> Measured:
    """Start every configuration and let all take turns. A failure ends its configuration; Ctrl-C and SIGTERM end all.

    Raises `UserError` if the matrix product cannot be measured at the start.
    """
    found = Measured({case.name: Outcome() for case in cases})
    try:
        with ExitStack() as stack:
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            stack.callback(signal.signal, signal.SIGTERM, before)
            game = _Game(plan, say, found, stack)
            named = list(zip((case.name for case in cases), orders, strict=True))
            for group in ([one] for one in named) if plan.alone else [named]:
                game.play(group)
    except KeyboardInterrupt:
        found.interrupted = True
    return found


class _Game:
    """The processes that are running, and what they have done."""

    def __init__(self, plan: Plan, say: Say, found: Measured, stack: ExitStack) -> None:
        self._plan, self._say, self._found, self._stack = plan, say, found, stack
        self._running: dict[str, Player] = {}
        ruler = stack.enter_context(Player("ruler", None, 1, plan.folder / "ruler.log"))
        ruler.receive()
        self._ruler: Player | None = ruler

    def play(self, group: Sequence[tuple[str, Order]]) -> None:
        """Start some configurations, let them take all their turns, and end them."""
        for name, order in group:
            self._attempt(name, partial(self._start, name, order))
        for number in range(self._plan.rounds):
            self._measure_product()
            for name in turns(list(self._running), number):
                self._attempt(name, partial(self._turn, name, number))
        self._measure_product()
        for name in list(self._running):
            self._attempt(name, partial(self._finish, name))

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Failed as error:
            self._say(f"{name}: FAILED: {error}")
            self._found.outcomes[name].failure = str(error)
            if name in self._running:
                self._running.pop(name).end()

    def _start(self, name: str, order: Order) -> None:
        began = time.monotonic()
        number = list(self._found.outcomes).index(name) + 1
        player = Player("worker", order, self._plan.ranks, self._plan.folder / f"configuration_{number}.log")
        self._running[name] = self._stack.enter_context(player)
        player.receive()
        self._found.outcomes[name].described = player.ask("describe")
        ready = time.monotonic()
        player.ask("turn", max(1, self._plan.warmup_steps - 1))
        self._say(f"{name}: ready after {ready - began:.0f} s, {self._plan.warmup_steps} steps of warm-up in "
                  f"{time.monotonic() - ready:.0f} s")  # fmt: skip

    def _turn(self, name: str, number: int) -> None:
        turn = self._running[name].ask("turn", self._plan.steps)
        self._found.outcomes[name].turns.append({"round": number, **turn})
        self._say(f"round {number + 1} of {self._plan.rounds}, {name}: {turn['step_time_s']:.3f} s per step, "
                  f"{turn['target_tokens_per_s']:.0f} target tokens/s")  # fmt: skip

    def _finish(self, name: str) -> None:
        self._found.outcomes[name].memory = self._running[name].ask("memory")
        self._running.pop(name).finish()

    def _measure_product(self) -> None:
        """Measure it, or do without from now on: what the configurations have done is worth more."""
        if self._running and self._ruler:
            try:
                self._found.product_flops_per_s.append(self._ruler.ask("measure"))
            except Failed as error:
                self._say(f"matrix product: FAILED: {error}")
                self._ruler = None


def turns(names: Sequence[str], number: int) -> list[str]:
    """Return the order of a round: there and back again, so that no configuration always follows the same one."""
    return list(names) if number % 2 == 0 else list(reversed(names))
