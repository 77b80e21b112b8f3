"""A trainer that plays one scenario; test_life.py runs it as a program. It has no `__main__` guard on purpose."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from superoffload.offload.shared.messages import Task, TaskKind
from superoffload.offload.trainer.process import OptimizerProcessError, WorkerSetup
from superoffload.offload.zero3 import service
from tests.helpers.offload_training import Case, Trainer, make_engine, snapshot


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def build(case: Case | None = None) -> tuple[Any, Trainer]:
    engine = make_engine(case or Case(), True)
    engine.optimizer._service.coordinator.wait_until_ready()
    say(f"OPTIMIZER PID {engine.optimizer._service.process.pid}")
    return engine, Trainer(engine, case or Case())


def after_sending(engine: Any, kind: TaskKind, action: Callable[[], None]) -> None:
    """Call `action` once, right after the next task of this kind has been sent."""
    send = engine.optimizer._service.process.send
    done: list[Task] = []

    def watched(task: Task, relieve: Callable[[], None] | None = None) -> None:
        send(task, relieve)
        if task.kind is kind and not done:
            done.append(task)
            action()

    engine.optimizer._service.process.send = watched
    engine.optimizer._service.coordinator.send_speculation = watched


def killed(moment: str) -> None:
    engine, trainer = build()
    trainer.run(0, 3)
    pid = engine.optimizer._service.process.pid
    died_at: list[float] = []

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)
        died_at.append(time.monotonic())

    if moment == "idle":
        engine.optimizer.flush()
        kill()
    else:
        after_sending(engine, TaskKind.SPECULATE if moment == "speculation" else TaskKind.COMMIT, kill)
    try:
        trainer.run(3, 5)
    except OptimizerProcessError:
        say(f"NOTICED AFTER {time.monotonic() - died_at[0]:.3f}")
        raise


def out_of_memory() -> None:
    """Forbid the optimizer process any allocation before it has allocated its scratch memory."""
    engine, trainer = build(Case(fused=False))
    limits = (1 << 20, 1 << 20)
    resource.prlimit(engine.optimizer._service.process.pid, resource.RLIMIT_AS, limits)
    trainer.run(0, 3)


def stopped(notice_interval_s: float, seconds: float | None = None) -> None:
    """Stop the optimizer process for some seconds, or until the trainer has reported it."""
    engine, trainer = build()
    trainer.run(0, 3)
    engine.optimizer._service.coordinator._notice_interval_s = notice_interval_s
    pid = engine.optimizer._service.process.pid
    os.kill(pid, signal.SIGSTOP)
    if seconds is not None:
        threading.Timer(seconds, os.kill, [pid, signal.SIGCONT]).start()
    else:
        logging.getLogger("superoffload.offload").addHandler(Continue(pid))
    trainer.run(3, 5)
    result = snapshot(engine)
    engine.destroy()
    reference, other = build()
    other.run(0, 5)
    expected = snapshot(reference)
    say(f"FINISHED equal={same(result, expected)}")


class Continue(logging.Handler):
    """Continue a stopped process once a warning says that it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self.pid = pid

    def emit(self, record: logging.LogRecord) -> None:
        if "is alive, but stopped or slow" in record.getMessage():
            say(record.getMessage())
            os.kill(self.pid, signal.SIGCONT)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(t, b["tensors"][n]) for n, t in a["tensors"].items())


def trainer_dies(busy: bool) -> None:
    _engine, trainer = build()  # alive until the end
    trainer.run(0, 2)
    say("READY TO DIE")
    if not busy:
        signal.pause()
    for step in itertools.count(2):
        trainer.run(step, step + 1)


def cores() -> None:
    engine = make_engine(Case(), True, bind_trainer=True)
    engine.optimizer._service.coordinator.wait_until_ready()
    pid = engine.optimizer._service.process.pid
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    threads = {tuple(sorted(os.sched_getaffinity(int(t.name)))) for t in Path(f"/proc/{pid}/task").iterdir()}
    ours = {tuple(sorted(os.sched_getaffinity(int(t.name)))) for t in Path("/proc/self/task").iterdir()}
    say(f"OPTIMIZER CORES {sorted(threads)} TRAINER CORES {sorted(ours)}")
    say(next(e for e in environment if e.startswith("OMP_NUM_THREADS")))
    engine.destroy()
    say(f"AFTERWARDS {sorted(os.sched_getaffinity(0))}")


def exception() -> None:
    _, trainer = build()
    trainer.run(0, 2)
    raise ValueError("the data loader failed")


def normal() -> None:
    _, trainer = build()
    trainer.run(0, 2)


def two_engines() -> None:
    (first, a), (second, b) = build(), build()
    for step in range(4):
        a.run(step, step + 1)
        b.run(step, step + 1)
    say(f"TWO equal={same(snapshot(first), snapshot(second))}")


def destroy() -> None:
    cores = os.sched_getaffinity(0)
    engine, trainer = build()
    trainer.run(0, 2)
    engine.destroy()
    engine.destroy()
    del engine, trainer
    gc.collect()
    say(f"CHILDREN {len(children())}")
    say(f"CORES RESTORED {os.sched_getaffinity(0) == cores}")
    maps = Path("/proc/self/maps").read_text().count("memfd:superoffload")
    say(f"MAPPINGS {maps}")


def children() -> list[str]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def signals() -> None:
    _, trainer = build()
    trainer.run(0, 2)
    number = int(os.environ["SIGNAL"])
    signal.signal(number, lambda *_: say("THE TRAINER HEARD"))
    os.killpg(0, number)
    trainer.run(2, 4)
    say("STEPPED AFTER SIGNAL")


def fork() -> None:
    engine, trainer = build()
    trainer.run(0, 2)
    child = os.fork()
    if child == 0:
        engine.optimizer._service._finalizer()
        engine.optimizer._service.process.close()
        os._exit(0)
    os.waitpid(child, 0)
    trainer.run(2, 4)
    say("STEPPED AFTER FORK")


def no_start() -> None:
    def broken(**values: Any) -> WorkerSetup:
        return WorkerSetup(**values | {"op_path": "/nonexistent.so"})

    with mock.patch.object(service, "WorkerSetup", broken):
        _, trainer = build()
        trainer.run(0, 2)


SCENARIOS = {
    "killed-idle": lambda: killed("idle"),
    "killed-speculation": lambda: killed("speculation"),
    "killed-commit": lambda: killed("commit"),
    "out-of-memory": out_of_memory,
    "stopped": lambda: stopped(0.5),
    "stopped-long": lambda: stopped(60.0, seconds=70.0),
    "trainer-idle": lambda: trainer_dies(busy=False),
    "trainer-busy": lambda: trainer_dies(busy=True),
    "cores": cores,
    "exception": exception,
    "normal": normal,
    "two-engines": two_engines,
    "destroy": destroy,
    "signals": signals,
    "fork": fork,
    "no-start": no_start,
}

say("SCRIPT STARTS")
torch.set_num_threads(1)
SCENARIOS[sys.argv[1]]()
