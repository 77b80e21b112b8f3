"""Which accesses to memory are ordered: a race detector with vector clocks.

An *actor* is whatever executes in an order of its own: a thread of the host, a stream of the device, the optimizer
process. Each has a clock, which says how far it has seen every actor. Waiting for another actor takes over what that
one has seen. Two accesses to the same bytes, at least one of them a write, must be ordered: the later actor must have
seen the earlier access. Otherwise they race, even if they happened to come out right this time.

The method is that of FastTrack (Flanagan and Freund 2009); torch.cuda._sanitizer does the same for kernels alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Clock = dict["Actor", int]


class Actor:
    """Something that executes in an order of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {}

    def join(self, clock: Clock) -> None:
        """Take over what another actor had seen."""
        for actor, time in clock.items():
            if time > self.clock.get(actor, 0):
                self.clock[actor] = time

    def tick(self) -> int:
        """Begin the next access; return its time."""
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def has_seen(self, actor: Actor, time: int) -> bool:
        return self.clock.get(actor, 0) >= time


@dataclass(slots=True)
class Access:
    """One access to the bytes from `begin` to `end`; `what` says by which operation."""

    actor: Actor
    time: int
    begin: int
    end: int
    write: bool
    what: str

    def lies_in(self, other: Access) -> bool:
        return other.begin <= self.begin and self.end <= other.end

    def conflicts_with(self, other: Access) -> bool:
        overlap = self.begin < other.end and other.begin < self.end
        return overlap and (self.write or other.write) and self.actor is not other.actor


@dataclass
class Block:
    """The memory of one storage. `owner`: the stream whose allocations may reuse it; None for memory of the host."""

    name: str
    owner: Actor | None
    accesses: list[Access] = field(default_factory=list)
    recorded: set[Actor] = field(default_factory=set)
    alive: weakref.ref[torch.UntypedStorage] | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a block, in bytes."""

    address: int
    begin: int
    end: int

    def overlaps(self, other: Span) -> bool:
        return self.address == other.address and self.begin < other.end and other.begin < self.end


class Memory:
    """Every storage that has been accessed, and the accesses that a later one could race with."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._blocks: dict[int, Block] = {}
        self.finished = Actor("whoever has read a result")
        """What the device has certainly done; lets memory be reused, and orders nothing else."""

    def span(self, tensor: torch.Tensor) -> Span:
        """Return the bytes from a tensor's first to its last element."""
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        begin = int(tensor.storage_offset()) * tensor.itemsize
        end = begin + int(last + 1) * tensor.itemsize if tensor.numel() else begin
        return Span(tensor.untyped_storage().data_ptr(), begin, end)

    def add(self, tensor: torch.Tensor, owner: Actor | None, name: str = "") -> Block:
        """Note a storage, unless it is known already; `owner` None makes it the host's, with no accesses yet."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        block = self._blocks.get(address)
        if block is None:
            block = Block(name or f"a tensor of {tuple(tensor.shape)}", owner)
            if address:
                self._blocks[address] = block
                block.alive = weakref.ref(storage, lambda _: self._freed(address, block))
        elif owner is None:
            block.owner, block.name, block.accesses = None, name or block.name, []
        return block

    def is_known(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._blocks

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        block = self._blocks.get(tensor.untyped_storage().data_ptr())
        return block is not None and block.owner is None

    def access(self, actor: Actor, span: Span, write: bool, what: str) -> int:
        """Note an access and report those that it races with; return its time."""
        new = Access(actor, actor.tick(), span.begin, span.end, write, what)
        block = self._blocks.get(span.address)
        if block is None or span.begin == span.end:
            return new.time
        kept = []
        for old in block.accesses:
            seen = actor.has_seen(old.actor, old.time)
            if not seen and old.conflicts_with(new):
                self._report(f"{_verb(new)} {block.name} without waiting for {_verb(old)} it")
            obsolete = old.lies_in(new) and seen and (write or (old.actor is actor and not old.write))
            if not obsolete:
                kept.append(old)
        block.accesses = [*kept, new]
        return new.time

    def record_stream(self, tensor: torch.Tensor, stream: Actor) -> None:
        block = self._blocks.get(tensor.untyped_storage().data_ptr())
        if block is not None:
            block.recorded.add(stream)

    def change(self, actor: Actor, what: str, *, forget: bool) -> None:
        """Forget the accesses of one operation of an actor, or turn them into writes."""
        for block in list(self._blocks.values()):
            mine = [a for a in block.accesses if a.actor is actor and a.what == what]
            if forget:
                block.accesses = [a for a in block.accesses if a not in mine]
            else:
                for access in mine:
                    access.write = True

    def unlock(self, address: int, actor: Actor) -> None:
        """Report accesses of other actors that `actor` has not seen when it takes the memory away from the device."""
        for old in self._blocks[address].accesses if address in self._blocks else ():
            if not actor.has_seen(old.actor, old.time):
                self._report(f"{actor.name} unlocks {self._blocks[address].name} without waiting for {_verb(old)} it")

    def _freed(self, address: int, block: Block) -> None:
        """Check that whoever gets this memory next on the owner's stream comes after its last users."""
        if self._blocks.get(address) is block:
            del self._blocks[address]
        if block.owner is None:
            return
        for old in block.accesses:
            reusers = (block.owner, self.finished, *block.recorded)  # the allocator waits for the recorded streams
            if not any(a.has_seen(old.actor, old.time) for a in reusers):
                self._report(
                    f"{block.name} is freed for reuse on {block.owner.name} without record_stream, "
                    f"and without waiting for {_verb(old)} it"
                )


def _verb(access: Access) -> str:
    return f"{access.actor.name} ({access.what}), which {'writes' if access.write else 'reads'}"
