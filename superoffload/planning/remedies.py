"""The smallest changes that make a job fit, each checked by computing its memory again. Imports no torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, floor
from typing import Any

from superoffload.planning.budget.job import Job
from superoffload.planning.budget.memory import Budget, budget
from superoffload.planning.budget.shape import Shape
from superoffload.setting import AUTO

LENGTH_STEP = 256
MOST_BATCH, MOST_LENGTH = 4096, 2**23
MOST_STEPS = 2**40  # of one flag; nothing larger can fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What there is, in bytes: on one device, in the memory of one machine, on disk; None: not known, not checked."""

    device: int | None
    host: int | None
    disk: int | None = None

    def missing(self, need: Budget) -> dict[str, int]:
        """Return the bytes that a budget takes beyond this, by place; empty if it fits."""
        pairs = {
            "device": (need.device_peak, self.device),
            "host": (need.host_peak, self.host),
            "disk": (need.disk, self.disk),
        }
        return {place: size - most for place, (size, most) in pairs.items() if most is not None and size > most}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change of a job: the flag that makes it, and the fields of `Job` that it sets."""

    flag: str
    changes: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One or two flags, the job with them, and what it needs."""

    flags: tuple[str, ...]
    job: Job
    budget: Budget


class Countdown(Sequence[Step]):
    """Steps that take a number down to `unit`, made when they are asked for: there may be a billion."""

    def __init__(self, flag: str, field: str, value: int, unit: int = 1, **changes: Any) -> None:
        self.flag, self.field, self.changes = flag, field, changes
        self.numbers = range(min(value - 1, MOST_STEPS * unit) // unit * unit, 0, -unit)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        number = self.numbers[index]
        return Step(flag=f"{self.flag} {number}", changes={self.field: number, **self.changes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The steps of one flag from the smallest change to the largest, and the places where they save memory.

    hardware: the flag is of `superoffload plan`, and means more devices or machines. divides_heads: the steps divide
    the model's heads among `Job.parts` ranks, so only divisors of their number can be taken.
    """

    steps: Callable[[Job], Sequence[Step]]
    saves: frozenset[str]
    hardware: bool = False
    divides_heads: bool = False

    def of(self, shape: Shape, job: Job) -> Sequence[Step]:
        """Return the steps that can be taken from a job of a model."""
        steps = self.steps(job)
        if self.divides_heads:
            return [step for step in steps if shape.heads and shape.heads % step.changes["parts"] == 0]
        return steps


def _switch(flag: str, possible: Callable[[Job], bool], **changes: Any) -> Callable[[Job], Sequence[Step]]:
    return lambda job: [Step(flag=flag, changes=changes)] if possible(job) else []


def _more_on_host(job: Job) -> list[Step]:
    return [_ratio(percent) for percent in range(floor(job.ratio * 100 + 1e-6) + 1, 101)]


def _less_on_host(job: Job) -> list[Step]:
    return [_ratio(percent) for percent in range(ceil(job.ratio * 100 - 1e-6) - 1, -1, -1)]


def _ratio(percent: int) -> Step:
    return Step(flag=f"--offload_ratio {percent / 100:g}", changes={"ratio": percent / 100})


def _batch(job: Job) -> Sequence[Step]:
    return Countdown("--batch_size", "batch", job.batch, divided=0)


def _length(job: Job) -> Sequence[Step]:
    return Countdown("--max_length", "length", job.length, LENGTH_STEP)


def _parts(job: Job) -> list[Step]:
    """Return the steps to more ranks per row; rows are then laid out without a mask, for a kernel of documents."""
    numbers = [number for number in (2, 4, 8) if number > job.parts and job.ranks % number == 0]
    steps = [
        Step(flag=f"--sequence_parallel_size {number}", changes={"parts": number, "packed": True}) for number in numbers
    ]
    return [] if job.eager else steps


def _devices(job: Job) -> list[Step]:
    nodes = job.ranks // job.ranks_per_node
    numbers = [number for number in (2, 4, 8) if number > job.ranks_per_node]
    return [_more_ranks(job, f"--gpus {n}", n * nodes, n) for n in numbers]


def _nodes(job: Job) -> list[Step]:
    numbers = [number for number in (2, 4, 8, 16) if number * job.ranks_per_node > job.ranks]
    return [_more_ranks(job, f"--nodes {n}", n * job.ranks_per_node, job.ranks_per_node) for n in numbers]


def _more_ranks(job: Job, flag: str, ranks: int, per_node: int) -> Step:
    """Return the step to so many ranks, among which a recipe's script divides its batch; it refuses a remainder."""
    changes = {"ranks": ranks, "ranks_per_node": per_node}
    if not job.divided:
        return Step(flag=flag, changes=changes)
    batch, rest = divmod(job.divided, ranks)
    if batch and not rest:
        return Step(flag=flag, changes={**changes, "batch": batch})
    batch = max(1, batch)
    return Step(flag=f"{flag} --batch_size {batch}", changes={**changes, "batch": batch, "divided": 0})


def _kept(job: Job) -> Sequence[Step]:
    return Countdown("--keep_checkpoints", "kept", job.kept)


def _recomputation(job: Job) -> list[Step]:
    full = Step(flag="--activation_checkpointing", changes={"recompute": True})
    offload = Step(flag="--activation_checkpointing offload", changes={"recompute": True, "offload_activations": True})
    if job.on_cpu:  # the host holds them anyway
        return [] if job.recompute else [full]
    return [] if job.offload_activations else [offload] if job.recompute else [full, offload]


# Flags for longer rows.
LONGER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--activation_checkpointing offload", {"recompute": True, "offload_activations": True}),
    ("--tiled_mlp auto", {"tiled": AUTO}),
)
DEVICE, HOST, DISK = frozenset({"device"}), frozenset({"host"}), frozenset({"disk"})
# What costs least comes first.
LADDERS = (
    Ladder(steps=_kept, saves=DISK),
    Ladder(steps=_more_on_host, saves=DEVICE),
    Ladder(steps=_less_on_host, saves=HOST),
    Ladder(steps=_switch("--loss_kernel chunked", lambda job: not job.chunked_loss, chunked_loss=True), saves=DEVICE),
    Ladder(steps=_recomputation, saves=DEVICE),
    Ladder(steps=_switch("--tiled_mlp auto", lambda job: not job.tiled, tiled=AUTO), saves=DEVICE),
    Ladder(steps=_batch, saves=DEVICE),
    Ladder(steps=_parts, saves=DEVICE, divides_heads=True),
    Ladder(steps=_length, saves=DEVICE),
    Ladder(steps=_switch("--offload_params", lambda job: not job.offload_params, offload_params=True), saves=DEVICE),
    Ladder(steps=_devices, saves=DEVICE, hardware=True),
    Ladder(steps=_nodes, saves=DEVICE | HOST, hardware=True),
    Ladder(
        steps=_switch("--optimizer_state bf16", lambda job: not job.bf16_state, bf16_state=True),
        saves=DEVICE | HOST | DISK,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Searches for changes to jobs of one model on one capacity."""

    shape: Shape
    capacity: Capacity

    def fits(self, job: Job) -> bool:
        """Return whether a job fits everywhere."""
        return not self.missing(job)

    def missing(self, job: Job) -> dict[str, int]:
        """Return what a job lacks, by place."""
        return self.capacity.missing(_budget(self.shape, job))

    def remedies(self, job: Job) -> tuple[tuple[Remedy, ...], Remedy | None]:
        """Return every smallest change that makes a job fit, and the nearest miss if there is none.

        Each flag alone, and if none is enough without more hardware, pairs, of which neither can be smaller. A job that
        fits has none.
        """
        if self.fits(job):
            return (), None
        found = [(ladder, step) for ladder in LADDERS if (step := self._first(ladder, job, self.fits))]
        single = [self._remedy(job, step) for _, step in found]
        if all(ladder.hardware for ladder, _ in found):
            single += self._pairs(job, [ladder for ladder in LADDERS if not (found and ladder.hardware)])
        return tuple(single), None if single else self._nearest(job)

    def largest(self, job: Job, field: str) -> int | None:
        """Return the largest batch (`batch`) or length (`length`) that fits with all else the same; None if none.

        A length is a multiple of LENGTH_STEP. Memory grows with both, except where `tiled=AUTO` makes one tile more, so
        tiles become smaller. It does grow from any number of tokens to the one that is greater by the largest tile, the
        model's width; so nothing larger fits if that many in a row do not.
        """
        unit, most = (1, MOST_BATCH) if field == "batch" else (LENGTH_STEP, MOST_LENGTH)

        def fits(number: int) -> bool:
            return self.fits(_with(job, {field: number * unit}))

        last = tried = _last(most // unit, fits)
        tile = ceil(self.shape.hidden / _with(job, {field: unit}).tokens) if job.tiled == AUTO else 0
        while tried < min(last + tile, most // unit):
            tried += 1
            last = tried if fits(tried) else last
        return unit * last or None

    def longest(self, job: Job) -> dict[str, int | None]:
        """Return `largest` length by flags: none, then those that let activations take less memory and lose no token.

        Each includes the flags before it. Flags that the job has already, or that the CPU has no use for, are left out.
        """
        result = {"": self.largest(job, "length")}
        names: list[str] = []
        for flag, changes in () if job.on_cpu else LONGER:
            changed = _with(job, changes)
            if changed != job:
                job = changed
                names.append(flag)
                result[" ".join(names)] = self.largest(job, "length")
        return result

    def _remedy(self, job: Job, *steps: Step) -> Remedy:
        changed = _with(job, {key: value for step in steps for key, value in step.changes.items()})
        return Remedy(flags=tuple(step.flag for step in steps), job=changed, budget=_budget(self.shape, changed))

    def _first(self, ladder: Ladder, job: Job, enough: Callable[[Job], bool]) -> Step | None:
        """Return the smallest step that is enough, None if there is none.

        Where a ladder saves memory, each step saves more; so the first step that is enough there is found by bisection,
        and is the best one elsewhere.
        """
        saves = _saves(ladder, job)
        if not saves & self.missing(job).keys():
            return None
        steps = ladder.of(self.shape, job)

        def too_little(number: int) -> bool:
            return bool(saves & self.missing(_with(job, steps[number - 1].changes)).keys())

        number = _last(len(steps), too_little)
        if number == len(steps):
            return None
        step = steps[number]
        return step if enough(_with(job, step.changes)) else None

    def _pairs(self, job: Job, ladders: Sequence[Ladder]) -> Iterator[Remedy]:
        """Yield the pairs of flags that are enough: the second as small as the first's end allows, then the first."""
        found: set[frozenset[int]] = set()
        for one, first in enumerate(ladders):
            steps = first.of(self.shape, job) if _saves(first, job) & self.missing(job).keys() else ()
            for two, second in enumerate(ladders):
                if not steps or one == two or frozenset({one, two}) in found:
                    continue
                pair = self._pair(job, first, steps[-1], second)
                if pair:
                    found.add(frozenset({one, two}))
                    yield pair

    def _pair(self, job: Job, first: Ladder, end: Step, second: Ladder) -> Remedy | None:
        other = self._first(second, _with(job, end.changes), self.fits)
        if other is None:
            return None
        step = self._first(first, _with(job, other.changes), self.fits)
        return self._remedy(job, step, other) if step else None

    def _nearest(self, job: Job) -> Remedy:
        """Return the end of one or two ladders at which the least is missing."""
        ends = [steps[-1] for ladder in LADDERS if (steps := ladder.of(self.shape, job))]
        tries = [self._remedy(job, *steps) for steps in [(), *((end,) for end in ends)]]
        tries += [self._remedy(job, one, two) for i, one in enumerate(ends) for two in ends[i + 1 :]]
        return min(tries, key=lambda remedy: sum(self.capacity.missing(remedy.budget).values()))


def _saves(ladder: Ladder, job: Job) -> frozenset[str]:
    """Return where a ladder saves memory: on the CPU, the host holds what would be on a device."""
    return ladder.saves | HOST if job.on_cpu and DEVICE <= ladder.saves else ladder.saves


@lru_cache(maxsize=10_000)
def _budget(shape: Shape, job: Job) -> Budget:
    return budget(shape, job)


def _with(job: Job, changes: dict[str, Any]) -> Job:
    return replace(job, **changes)


def _last(most: int, holds: Callable[[int], bool]) -> int:
    """Return the last of 1..most for which `holds` is true, by bisection; 0 if it is false for 1."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
