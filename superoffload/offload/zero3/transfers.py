"""Copies between device and arena, on a stream of their own, so that they overlap with forward and backward.

One stream carries both directions. So whoever waits for the latest copy has waited for all earlier ones: a gradient
that has arrived shows that the weights uploaded before it no longer use their staging region.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

_BUCKETS_IN_FLIGHT = 2
"""How many buckets of gradients may wait for their copy at once; each keeps device memory in use."""

_PIECE_NUMEL = 1 << 25
"""A gradient that the copy has to convert is converted in pieces, because each piece takes device memory."""


class Transfers:
    """Owns the copy stream. On an accelerator without streams, copies are finished when the call returns."""

    def __init__(self) -> None:
        accelerator = get_accelerator()
        self._stream: Any = None if accelerator.is_synchronized_device() else accelerator.Stream()
        self._downloads: deque[Any] = deque()
        self._uploads: dict[int, Any] = {}
        self._uploads_begun: Any = None
        self.upload_s = 0.0
        """Time in which uploads have been waited for so far, in seconds; 0 with streams."""

    @property
    def asynchronous(self) -> bool:
        """Return whether the accelerator has streams."""
        return self._stream is not None

    @contextmanager
    def downloading(self, sources: Iterable[torch.Tensor]) -> Iterator[None]:
        """Queue what the block copies to the host, after the work that produces `sources` on the current stream.

        The memory of `sources` is not reused before the copies have read it. Waits for the bucket before the last, so
        that copies which are slower than backward do not use up the device's memory.
        """
        if self._stream is None:
            yield
            return
        while len(self._downloads) >= _BUCKETS_IN_FLIGHT:
            self._downloads.popleft().synchronize()
        self._stream.wait_stream(get_accelerator().current_stream())
        with get_accelerator().stream(self._stream):
            yield
        for source in sources:
            source.record_stream(self._stream)
        self._downloads.append(self.record())

    def begin_uploads(self) -> None:
        """Let the uploads of this step follow everything on the current stream, which may still read old weights."""
        if self._stream is not None:
            self._stream.wait_stream(get_accelerator().current_stream())
            self._uploads_begun = self.record()

    @contextmanager
    def uploading(self, sub_group: int) -> Iterator[None]:
        """Queue what the block copies to the device; wait_for_uploads waits for it."""
        if self._stream is None:
            began = time.perf_counter()
            yield
            self.upload_s += time.perf_counter() - began
            return
        with get_accelerator().stream(self._stream):
            yield
        self._uploads[sub_group] = self.record()

    def wait_for_uploads(self, sub_groups: Iterable[int]) -> None:
        """Let the current stream wait for the new weights of these sub-groups.

        For a sub-group that was not uploaded, this is the work that preceded the uploads, such as its step on the
        device.
        """
        for sub_group in sub_groups:
            event = self._uploads.get(sub_group, self._uploads_begun)
            if event is not None:
                get_accelerator().current_stream().wait_event(event)

    def record(self) -> Any:
        """Return an event that follows every copy queued so far.

        Whoever waits for it sleeps, if the accelerator has such events, because the trainer has few cores.
        """
        event = _event()
        event.record(self._stream)
        return event

    def synchronize(self) -> None:
        """Wait until every copy has ended; raises the device's error if one failed."""
        if self._stream is not None:
            self.record().synchronize()
            self._downloads.clear()
            self._uploads.clear()
            self._uploads_begun = None


def download(gradient: torch.Tensor, target: torch.Tensor) -> None:
    """Queue the copy of a gradient to the arena; without more device memory than one piece of it."""
    pieces = zip(torch.split(gradient, _PIECE_NUMEL), torch.split(target, _PIECE_NUMEL), strict=True)
    for source, place in pieces:
        place.copy_(source.to(place.dtype), non_blocking=True)


def _event() -> Any:
    try:
        return get_accelerator().Event(blocking=True)
    except TypeError:
        return get_accelerator().Event()
