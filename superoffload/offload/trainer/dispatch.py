"""Send speculations once the device has delivered the gradients that they read.

On CUDA the copies of gradients to the host are asynchronous. A thread waits for the event of each sub-group and
only then sends the task to the optimizer process. Before a decision, the trainer itself waits for all gradients,
because sub-groups without a speculation are stepped then. Accelerators without streams do not need this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from ..shared.messages import Task
from .coordinator import Channel
from .process import OptimizerProcessError


class EventDispatcher:
    """Owns the thread. If the optimizer process has died, the next call from the trainer's own thread reports it."""

    def __init__(self, process: Channel, record_event: Callable[[], Any], set_device: Callable[[], None]) -> None:
        """Start the thread.

        record_event: returns an event that follows all gradients that have been queued for copying to the host.
        set_device: makes the rank's device current in the calling thread; a new thread starts on device 0, and waiting
        there would open a context on that device.
        """
        self._process = process
        self._record_event = record_event
        self._set_device = set_device
        self._queue: SimpleQueue[tuple[Any, Task] | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._in_flight = 0
        self._failure: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, name="superoffload-dispatch", daemon=True)
        self._thread.start()

    def send(self, task: Task) -> None:
        """Send `task` once every gradient that has been queued so far has arrived."""
        with self._changed:
            self._in_flight += 1
        self._queue.put((self._record_event(), task))

    def settle(self, relieve: Callable[[], None]) -> None:
        """Wait until every task has been sent and every gradient has arrived, speculated or not.

        Calls `relieve` meanwhile, so that the socket cannot fill up. Raises the device's error if an event failed.
        """
        while not self._is_idle():
            relieve()
        if self._failure is not None:
            raise self._failure
        self._record_event().synchronize()

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)
        self._thread.join(timeout=5.0)

    def _is_idle(self) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._in_flight == 0, timeout=0.05)

    def _run(self) -> None:
        try:
            self._set_device()
        except RuntimeError as error:
            self._failure = error
        while (item := self._queue.get()) is not None:
            event, task = item
            try:
                event.synchronize()
                self._process.send(task)
            except OptimizerProcessError:
                pass
            except RuntimeError as error:  # a device error; OptimizerProcessError, caught above, is also a RuntimeError
                self._failure = error
            finally:
                with self._changed:
                    self._in_flight -= 1
                    self._changed.notify_all()
