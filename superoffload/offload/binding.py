"""Binding of this process's threads to cores, and the way back."""

from __future__ import annotations

import os
import threading

from .affinity import Cores


class TrainerBinding:
    """Bind every thread of this process while at least one engine wants it; restore the masks afterwards.

    Engines of one process share the binding: the first to take it decides, the last to release it restores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before: dict[int, set[int]] = {}
        self._original: Cores | None = None

    def available(self) -> Cores:
        """Return the cores this process may use, as they were before any binding by this class."""
        with self._lock:
            return self._original or tuple(sorted(os.sched_getaffinity(0)))

    def take(self, cores: Cores) -> None:
        """Restrict all present threads to `cores`; threads started later inherit it."""
        with self._lock:
            self._holders += 1
            if self._holders > 1:
                return
            self._original = tuple(sorted(os.sched_getaffinity(0)))
            for thread in _thread_ids():
                mask = _get(thread)
                if mask is not None and _set(thread, set(cores)):
                    self._before[thread] = mask

    def release(self) -> None:
        """Undo one take(); the last one gives every thread its former mask, new threads the original one."""
        with self._lock:
            if self._holders == 0:
                return
            self._holders -= 1
            if self._holders or self._original is None:
                return
            for thread in _thread_ids():
                _set(thread, self._before.get(thread, set(self._original)))
            self._before, self._original = {}, None


TRAINER_BINDING = TrainerBinding()
"""The one binding of this process."""


def _thread_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _get(thread: int) -> set[int] | None:
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:  # the thread ended meanwhile
        return None


def _set(thread: int, cores: set[int]) -> bool:
    try:
        os.sched_setaffinity(thread, cores)
    except (ProcessLookupError, PermissionError):
        return False
    return True
