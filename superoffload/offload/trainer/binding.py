"""Bind the threads of this process to cores, as many as there are cores, and restore both."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

from ..shared.affinity import Cores, Siblings, parse_list

_TOPOLOGY = Path("/sys/devices/system/cpu")


class TrainerBinding:
    """Binds every thread of this process while at least one engine needs it; restores the masks afterwards.

    Meanwhile torch computes with as many threads as there are cores, because more would wait for each other.

    The engines of a process share the binding: the first take() sets it, the last release() restores the masks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before: dict[int, set[int]] = {}
        self._original: Cores | None = None
        self._torch_threads = 0

    def available(self) -> Cores:
        """Return the cores that this process may use, as they were before any binding by this class."""
        with self._lock:
            return self._original or tuple(sorted(os.sched_getaffinity(0)))

    def take(self, cores: Cores) -> None:
        """Restrict all current threads to `cores`; threads that start later inherit the mask."""
        with self._lock:
            self._holders += 1
            if self._holders > 1:
                return
            self._original = tuple(sorted(os.sched_getaffinity(0)))
            self._torch_threads = torch.get_num_threads()
            torch.set_num_threads(min(self._torch_threads, len(cores)))
            for thread in _thread_ids():
                mask = _get(thread)
                if mask is not None and _set(thread, set(cores)):
                    self._before[thread] = mask

    def release(self) -> None:
        """Undo one take(). The last call restores the mask of every thread; newer threads get the original one."""
        with self._lock:
            if self._holders == 0:
                return
            self._holders -= 1
            if self._holders or self._original is None:
                return
            for thread in _thread_ids():
                _set(thread, self._before.get(thread, set(self._original)))
            torch.set_num_threads(self._torch_threads)
            self._before, self._original = {}, None


TRAINER_BINDING = TrainerBinding()
"""The one binding of this process."""


def read_siblings(cores: Cores, topology: Path = _TOPOLOGY) -> Siblings:
    """Return the hyperthreads of each core's physical core, as Linux reports them; empty where it does not."""
    siblings = {}
    for core in cores:
        try:
            text = (topology / f"cpu{core}" / "topology" / "thread_siblings_list").read_text(encoding="utf-8")
            siblings[core] = parse_list(text)
        except (OSError, ValueError):
            return {}
    return siblings


def _thread_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _get(thread: int) -> set[int] | None:
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:  # the thread has ended
        return None


def _set(thread: int, cores: set[int]) -> bool:
    try:
        os.sched_setaffinity(thread, cores)
    except (ProcessLookupError, PermissionError):
        return False
    return True
