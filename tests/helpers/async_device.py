"""A simulated asynchronous device: what CUDA's streams, events and copies promise, and nothing more.

    with AsyncDevice(seed=3) as device:
        train(case, True)
    assert not device.hazards

The device computes on the CPU, and its arithmetic happens at once. Two things are as on CUDA:

* *Copies between device and host are late.* A copy to the host with non_blocking=True fills its target with NaN; the
  values land when something has waited for them, or at a random moment before. A copy from the host reads its source at
  once, and again when it ends: the source must not have changed.
* *Order is only what was asked for.* Every access to memory is noted, by which stream, thread or process, and races are
  reported as hazards (happens_before.py). So a missing wait is found in every run that passes the place, not only when
  the delays are unlucky. This covers memory that is freed while another stream uses it without record_stream, memory
  that is unlocked while the device uses it, and the optimizer process (watched_process.py).

In one point it is stricter than CUDA: reading a scalar of the device (`float()`, `.item()`) waits for nothing.

Host memory is the arena and what is pinned through the accelerator; operators on it run on the host. All other tensors
are the device's. Threads of the host are ordered by the dispatcher's queue, by streams, and by the socket, alone.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from queue import SimpleQueue
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from superoffload.offload.shared.state import Arena
from superoffload.offload.trainer import dispatch, pinning
from superoffload.offload.trainer.process import OptimizerProcess
from superoffload.offload.zero3 import service
from tests.helpers.fake_cuda import SUCCESS, Runtime
from tests.helpers.happens_before import Actor, Clock, Memory, Span
from tests.helpers.watched_process import ProcessWatch


class Event:
    """Recorded on a stream; whoever waits for it has seen what that stream had been asked by then."""

    def __init__(self, device: AsyncDevice) -> None:
        self._device = device
        self._clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._device.current_stream()
        with self._device.lock:
            stream.join(self._device.host.clock)
            self._clock = dict(stream.clock)

    def synchronize(self) -> None:
        self._device.delay()
        self._device.host_waits_for(self._clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._device.current_stream()).join(self._clock)

    def query(self) -> bool:
        """Return whether the calling thread has waited for it: the device gives no hint."""
        return all(self._device.host.has_seen(actor, time) for actor, time in self._clock.items())


class Stream(Actor):
    """A stream; what is queued on it comes after everything that the queueing thread has seen."""

    def __init__(self, device: AsyncDevice, name: str) -> None:
        super().__init__(name)
        self._device = device

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._device)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def query(self) -> bool:
        return self.record_event().query()


@dataclass(slots=True, eq=False)
class Copy:
    """A copy that has been queued and not ended."""

    stream: Stream
    time: int
    host: Span
    end: Callable[[], None]


class AsyncDevice:
    """The device, while the block runs: DeepSpeed's accelerator, and the observer of every operator of this thread."""

    def __init__(self, seed: int = 0, delay_s: float = 0.002) -> None:
        """Let copies end at moments that depend on `seed`; waiting for an event takes up to `delay_s`."""
        self.hazards: list[str] = []
        self.counts: Counter[str] = Counter()
        self.lock = threading.RLock()
        self.memory = Memory(self._report)
        self.default = Stream(self, "the default stream")
        self._random = random.Random(seed)
        self._delay_s = delay_s
        self._eagerness = (0.0, 0.001, 0.02)[seed % 3]
        self._copies: list[Copy] = []
        self._thread = threading.local()
        self._streams = [self.default]
        self._exit = ExitStack()

    # -------------------------------------------------------------------------------- streams and threads

    @property
    def host(self) -> Actor:
        """The calling thread."""
        if not hasattr(self._thread, "actor"):
            self._thread.actor = Actor(f"thread {threading.current_thread().name}")
        actor: Actor = self._thread.actor
        return actor

    def make_stream(self) -> Stream:
        self._streams.append(Stream(self, f"stream {len(self._streams)}"))
        return self._streams[-1]

    def current_stream(self) -> Stream:
        return getattr(self._thread, "stream", None) or self.default

    @contextmanager
    def use_stream(self, stream: Stream | None) -> Iterator[None]:
        before = self.current_stream()
        self._thread.stream = stream or before
        try:
            yield
        finally:
            self._thread.stream = before

    def host_waits_for(self, clock: Clock) -> None:
        with self.lock:
            self.host.join(clock)
            self._end_copies(self.host)

    def synchronize(self) -> None:
        for stream in list(self._streams):
            stream.synchronize()

    def delay(self) -> None:
        with self.lock:
            delay_s = self._random.random() * self._delay_s
        time.sleep(delay_s)

    def _report(self, hazard: str) -> None:
        if hazard not in self.hazards:
            self.hazards.append(hazard)

    # ------------------------------------------------------------------------------------------- operators

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what an operator reads and writes, and call it."""
        schema = _schema(function)
        if schema.is_view:
            return function(*args, **kwargs)
        with self.lock:
            if self._copies and self._random.random() < self._eagerness:
                self._end([self._copies[0]])
            if function is torch.ops.aten.copy_.default:
                return self._copy(*args, **kwargs)
            read, written = schema.tensors(args, kwargs)
            used = [t for t in (*read, *written) if t.numel()]
            on_host = bool(used) and all(self.memory.is_on_host(t) for t in used)
            if not on_host and any(self.memory.is_on_host(t) for t in used if t.dim()):
                self._report(f"{function} mixes memory of the host and of the device")
            actor = self.host if on_host else self._queue_on_stream()
            if function is torch.ops.aten._local_scalar_dense.default:
                self.memory.finished.join(actor.clock)
            for tensors, write in ((read, False), (written, True)):
                for tensor in tensors:
                    self._access(actor, tensor, write, str(function))
        result = function(*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in used}
        for tensor in _flat((result,)):
            if tensor.untyped_storage().data_ptr() not in known:
                self.memory.add(tensor, None if on_host else self.current_stream())
                self._access(actor, tensor, True, str(function))
        return result

    def _queue_on_stream(self) -> Stream:
        stream = self.current_stream()
        stream.join(self.host.clock)
        return stream

    def _access(self, actor: Actor, tensor: torch.Tensor, write: bool, what: str) -> int:
        if not self.memory.is_known(tensor):
            self.memory.add(tensor, self.current_stream())
        return self.memory.access(actor, self.memory.span(tensor), write, what)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Copy between any two places; between host and device the copy ends later, if it may."""
        to_host, from_host = self.memory.is_on_host(target), self.memory.is_on_host(source)
        actor = self.host if to_host and from_host else self._queue_on_stream()
        on_host = target if to_host else source
        self._end_copies(actor, self.memory.span(on_host))  # what this copy touches, as the stream would have left it
        self._access(actor, source, False, "copy")
        at = self._access(actor, target, True, "copy")
        if to_host == from_host:
            return target.copy_(source)
        self.counts["to host" if to_host else "from host"] += 1
        value = source.to(target.dtype, copy=True).expand_as(target)
        if to_host:
            target.fill_(torch.nan if target.is_floating_point() else 0)
        else:
            target.copy_(value)
        self._copies.append(
            Copy(
                stream=self.current_stream(),
                time=at,
                host=self.memory.span(on_host),
                end=partial(_land, target, value) if to_host else partial(self._compare, source, value),
            )
        )
        if not non_blocking:
            self.host_waits_for(self.current_stream().clock)
        return target

    def _compare(self, source: torch.Tensor, value: torch.Tensor) -> None:
        if not torch.equal(source.to(value.dtype).expand_as(value).nan_to_num(), value.nan_to_num()):
            self._report("the source of a copy to the device has changed before the copy ended")

    def _end_copies(self, actor: Actor, host: Span | None = None) -> None:
        """End the copies that `actor` has waited for: all, or those from and to a piece of the host's memory."""
        seen = [c for c in self._copies if actor.has_seen(c.stream, c.time)]
        self._end([c for c in seen if host is None or host.overlaps(c.host)])

    def _end(self, ended: list[Copy]) -> None:
        self._copies = [c for c in self._copies if c not in ended]
        with _disable_current_modes(), torch.no_grad():
            for copy in ended:
                copy.end()

    # ----------------------------------------------------------------------------------- begin and end

    def __enter__(self) -> AsyncDevice:
        watch, enter = ProcessWatch(self), self._exit.enter_context
        self._exit.callback(set_accelerator, get_accelerator())
        set_accelerator(Accelerator(self))
        runtime = _LockedPages(self)
        enter(mock.patch.object(torch.cuda, "cudart", lambda: runtime))
        enter(mock.patch.object(service, "page_lock", lambda tensors, _: pinning.page_lock(tensors, "cuda")))
        enter(mock.patch.object(dispatch, "SimpleQueue", lambda: _OrderingQueue(self)))
        enter(mock.patch.object(Arena, "__init__", watch.mapping(Arena.__init__)))
        enter(mock.patch.object(OptimizerProcess, "send", watch.sending(OptimizerProcess.send)))
        enter(mock.patch.object(OptimizerProcess, "receive", watch.receiving(OptimizerProcess.receive)))
        enter(mock.patch.object(torch.Tensor, "to", self._moving(torch.Tensor.to)))
        enter(mock.patch.object(torch.Tensor, "cpu", lambda tensor: self._fetched(tensor)))
        enter(mock.patch.object(torch.Tensor, "record_stream", lambda t, s: self.memory.record_stream(t, s)))
        enter(_Operators(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()
        self.synchronize()

    def _moving(self, to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Return Tensor.to, which copies from host to device although both are called "cpu"."""

        def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device", args[0] if args else None)
            if isinstance(device, str | torch.device) and self.memory.is_on_host(tensor):
                on_device = torch.empty(tensor.shape, dtype=tensor.dtype)
                tensor = on_device.copy_(tensor, non_blocking=kwargs.get("non_blocking", False))
            return to(tensor, *args, **kwargs)

        return moved

    def _fetched(self, tensor: torch.Tensor) -> torch.Tensor:
        """Do what Tensor.cpu does: copy to the host, unless the tensor is there."""
        if self.memory.is_on_host(tensor):
            return tensor
        copy = tensor.clone()
        self.memory.finished.join(self.current_stream().clock)
        self.memory.add(copy, None, "a copy on the host")
        return copy


def _land(target: torch.Tensor, value: torch.Tensor) -> None:
    target.copy_(value)


class Accelerator(CPU_Accelerator):  # type: ignore[misc]  # DeepSpeed is untyped
    """DeepSpeed's view of the device: a CPU with streams."""

    def __init__(self, device: AsyncDevice) -> None:
        super().__init__()
        self._device = device

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True

    def synchronize(self, device_index: Any = None) -> None:
        self._device.synchronize()

    def Stream(self, *_: Any, **__: Any) -> Any:
        return self._device.make_stream()

    def Event(self, *_: Any, **__: Any) -> Any:
        return Event(self._device)

    def stream(self, stream: Any) -> Any:
        return self._device.use_stream(stream)

    def current_stream(self, device_index: Any = None) -> Any:
        return self._device.current_stream()

    def default_stream(self, device_index: Any = None) -> Any:
        return self._device.default

    def pin_memory(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        pinned = tensor.clone()
        self._device.memory.add(pinned, None, f"a pinned tensor of {tuple(tensor.shape)}")
        return pinned

    def pin_empty(self, *size: int, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return self.pin_memory(torch.empty(size, dtype=dtype))

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return self._device.memory.is_on_host(tensor)

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return not self._device.memory.is_on_host(tensor)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    def __init__(self, device: AsyncDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.run(func, args, kwargs or {})


class _OrderingQueue:
    """A SimpleQueue whose reader has seen what the writer had seen."""

    def __init__(self, device: AsyncDevice) -> None:
        self._device = device
        self._queue: SimpleQueue[tuple[Clock, Any]] = SimpleQueue()

    def put(self, item: Any) -> None:
        self._queue.put((dict(self._device.host.clock), item))

    def get(self) -> Any:
        clock, item = self._queue.get()
        self._device.host_waits_for(clock)
        return item


class _LockedPages(Runtime):
    """A CUDA runtime that checks, when pages are unlocked, that the device has finished with them."""

    def __init__(self, device: AsyncDevice) -> None:
        super().__init__(capacity=1 << 20)
        self._device = device

    def cudaHostUnregister(self, address: int) -> int:
        self._device.counts["unlocked"] += 1
        self._device.memory.unlock(address, self._device.host)
        return SUCCESS


@dataclass(frozen=True, slots=True)
class _Schema:
    """What an operator does with its arguments, by position and by name."""

    is_view: bool
    names: tuple[str, ...]
    written: frozenset[str]

    def tensors(self, args: Any, kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the tensors that are read alone, and those that are written."""
        read: list[torch.Tensor] = []
        written: list[torch.Tensor] = []
        for name, value in (*zip(self.names, args, strict=False), *kwargs.items()):
            (written if name in self.written else read).extend(_flat((value,)))
        return read, written


@cache
def _schema(function: Any) -> _Schema:
    schema = function._schema
    names = tuple(a.name for a in schema.arguments)
    if function.namespace == "c10d":  # collectives do not say what they write
        return _Schema(False, names, frozenset(names))
    written = frozenset(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return _Schema(is_view and not written, names, written)


def _flat(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _flat(value)
