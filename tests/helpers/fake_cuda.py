"""A CUDA runtime and an accelerator that record what is asked of them, for code whose device is not here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SUCCESS, OUT_OF_MEMORY = 0, 2


class Runtime:
    """What `torch.cuda.cudart()` and the library libcudart offer; a failed call leaves a pending error, as CUDA's do.

    `capacity` is the number of regions that can be registered.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.registered: dict[int, int] = {}
        self.pending = SUCCESS
        self.cudaGetErrorName = _ErrorName()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if len(self.registered) == self.capacity:
            self.pending = OUT_OF_MEMORY
            return OUT_OF_MEMORY
        self.registered[address] = nbytes
        return SUCCESS

    def cudaHostUnregister(self, address: int) -> int:
        if self.registered.pop(address, None) is None:
            self.pending = OUT_OF_MEMORY
            return OUT_OF_MEMORY
        return SUCCESS

    def cudaGetErrorString(self, error: int) -> str:
        return {OUT_OF_MEMORY: "out of memory"}[error]

    def cudaGetLastError(self) -> int:
        error, self.pending = self.pending, SUCCESS
        return error

    def launch_kernel(self, *_: Any, **__: Any) -> None:
        """Do what torch does for every kernel: ask for the last error after the launch, and raise it."""
        error = self.cudaGetLastError()
        if error != SUCCESS:
            raise RuntimeError(f"CUDA error: {self.cudaGetErrorString(error)}")


class _ErrorName:
    restype: Any = None

    def __call__(self, error: int) -> bytes:
        return {OUT_OF_MEMORY: b"cudaErrorMemoryAllocation"}[error]


class Stream:
    """A stream, whose work is whatever the test says has been queued on it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def wait_event(self, event: Event) -> None:
        self.calls.append(("wait_event", event))

    def wait_stream(self, other: Stream) -> None:
        self.calls.append(("wait_stream", other))


_STREAM = Stream


class Event:
    """An event that is done when the test says so; waits are recorded in its accelerator."""

    def __init__(self, accelerator: Accelerator, *, blocking: bool = False) -> None:
        self.accelerator = accelerator
        self.blocking = blocking
        self.recorded_on: Stream | None = None
        self.done = threading.Event()

    def record(self, stream: Stream | None = None) -> None:
        self.recorded_on = stream or self.accelerator.current
        self.accelerator.calls.append(("record", self))
        if self.accelerator.immediate:
            self.done.set()

    def synchronize(self) -> None:
        self.accelerator.calls.append(("synchronize", self))
        self.accelerator.contexts.add(self.accelerator.current_device())  # CUDA opens one for the calling thread
        if not self.done.wait(10):
            raise AssertionError("nothing completes this event")


class Accelerator:
    """Asynchronous, with several devices. A new thread's device is 0, as on CUDA."""

    def __init__(self, *, immediate: bool = True, events_can_block: bool = True) -> None:
        self.immediate = immediate
        self.events_can_block = events_can_block
        self.calls: list[tuple[str, Any]] = []
        self.contexts: set[int] = set()
        self.device_of_thread: dict[int, int] = {}
        self.default = Stream()
        self.current = self.default

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def current_stream(self) -> Stream:
        return self.current

    @property
    def Stream(self) -> type:
        return _STREAM

    def Event(self, **options: Any) -> Event:
        if options and not self.events_can_block:
            raise TypeError("Event() takes no keyword arguments")
        return Event(self, **options)

    def device_name(self) -> str:
        return "cuda"

    def is_synchronized_device(self) -> bool:
        return False

    def current_device(self) -> int:
        return self.device_of_thread.get(threading.get_ident(), 0)

    def synchronize(self, device: int) -> None:
        self.calls.append(("synchronize device", device))

    def set_device(self, device: int) -> None:
        self.device_of_thread[threading.get_ident()] = device
        self.contexts.add(device)
