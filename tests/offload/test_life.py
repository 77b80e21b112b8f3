"""The life of the optimizer process: one clear message if it dies, no orphan, no zombie, cores restored."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from superoffload.offload.shared.affinity import split_cores
from tests.helpers.forked import Output, Program
from tests.helpers.ranks import REPOSITORY, free_port, rank_environment, run

DONE_WITHIN_S = 10.0
MODULE = ["-m", "tests.helpers.offload_life"]


def start(scenario: str, **environment: str) -> tuple[Program, Output]:
    """Start a trainer that plays a scenario of offload_life.py."""
    output = Output()
    return Program([*MODULE, scenario], rank_environment(0, 1, free_port()) | environment, output), output


def play(scenario: str, timeout_s: float = 90.0, **environment: str) -> tuple[int, str]:
    """Run a scenario to its end; return its exit status and output. Leaves nothing behind."""
    trainer, output = start(scenario, **environment)
    try:
        status = trainer.wait(timeout_s)
    finally:
        if trainer.poll() is None:
            trainer.kill()
    return status, "".join(output.read())


def optimizer_pids(output: str) -> list[int]:
    return [int(p) for p in re.findall(r"OPTIMIZER PID (\d+)", output)]


def gone(pid: int) -> bool:
    """Return whether no process, not even a zombie, has this id."""
    return not Path(f"/proc/{pid}").exists()


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DONE_WITHIN_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(
    "moment",
    [pytest.param("idle", marks=pytest.mark.slow), "speculation", pytest.param("commit", marks=pytest.mark.slow)],
)
def test_a_killed_optimizer_process_is_noticed_and_named(moment: str) -> None:
    status, output = play(f"killed-{moment}")
    assert status == 1, output[-3000:]
    (seconds,) = re.findall(r"NOTICED AFTER ([\d.]+)", output)
    assert float(seconds) < DONE_WITHIN_S
    message = [line for line in output.splitlines() if "OptimizerProcessError:" in line]
    assert len(message) == 1, output[-3000:]
    assert "was killed by SIGKILL" in message[0] and "out of memory" in message[0]
    assert "Resume from the last checkpoint" in message[0]
    assert all(gone(p) for p in optimizer_pids(output))


@pytest.mark.slow
def test_an_optimizer_process_out_of_memory_says_so() -> None:
    """The system refuses memory here; if it kills the process instead, the test above applies.

    Either a tensor is refused, which is reported with the task, or the interpreter, which then exits.
    """
    status, output = play("out-of-memory")
    assert status == 1, output[-3000:]
    (message,) = [line for line in output.splitlines() if "OptimizerProcessError:" in line]
    assert "failed in SPECULATE of sub-group" in message or "exited with status 1" in message
    assert "Cannot allocate memory" in output or "MemoryError" in output
    assert "Resume from the last checkpoint" in message
    assert all(gone(p) for p in optimizer_pids(output))


def test_a_stopped_optimizer_process_is_waited_for_and_reported() -> None:
    status, output = play("stopped")
    assert status == 0, output[-3000:]
    assert "is alive, but stopped or slow" in output
    assert "FINISHED equal=True" in output


@pytest.mark.slow
def test_an_optimizer_process_stopped_for_70_s_is_waited_for() -> None:
    status, output = play("stopped-long", timeout_s=150.0)
    assert status == 0, output[-3000:]
    assert "FINISHED equal=True" in output


@pytest.mark.parametrize("moment", ["idle", pytest.param("busy", marks=pytest.mark.slow)])
def test_no_orphan_remains_when_the_trainer_is_killed(moment: str) -> None:
    trainer, output = start(f"trainer-{moment}")
    try:
        while "READY TO DIE" not in output.read()[0]:
            assert trainer.poll() is None, output.read()
            time.sleep(0.02)
        os.kill(trainer.pid, signal.SIGKILL)
        assert trainer.wait(30) == -signal.SIGKILL
        seen, _ = output.read()
        (pid,) = optimizer_pids(seen)
        assert soon(lambda: gone(pid))
    finally:
        trainer.kill()


def test_an_exception_in_the_trainer_ends_both() -> None:
    status, output = play("exception")
    assert status == 1 and "ValueError: the data loader failed" in output
    assert all(gone(p) for p in optimizer_pids(output))


@pytest.fixture(scope="module")
def normal() -> tuple[int, str]:
    """Play it in an interpreter of its own, which starts and ends as any other."""
    done = run([sys.executable, *MODULE, "normal"], 90, REPOSITORY, **rank_environment(0, 1, free_port()))
    return done.returncode, done.stdout + done.stderr


def test_a_normal_exit_needs_no_call(normal: tuple[int, str]) -> None:
    status, output = normal
    assert status == 0, output[-3000:]
    assert "Traceback" not in output
    assert all(gone(p) for p in optimizer_pids(output))


@pytest.mark.slow
def test_two_engines_in_one_process() -> None:
    status, output = play("two-engines")
    assert status == 0, output[-3000:]
    assert "TWO equal=True" in output
    first, second = optimizer_pids(output)
    assert first != second and gone(first) and gone(second)


@pytest.mark.slow
def test_destroying_leaves_no_process_no_memory_and_the_former_cores() -> None:
    status, output = play("destroy")
    assert status == 0, output[-3000:]
    assert "CHILDREN 0" in output and "CORES RESTORED True" in output and "MAPPINGS 0" in output


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_cores_are_split_and_given_back() -> None:
    before = sorted(os.sched_getaffinity(0))
    status, output = play("cores")
    assert status == 0, output[-3000:]
    split = split_cores(tuple(before), 0.8)
    assert f"OPTIMIZER CORES {[split.optimizer]} TRAINER CORES {[split.trainer]}" in output
    assert f"OMP_NUM_THREADS={len(split.optimizer)}" in output
    assert f"AFTERWARDS {before}" in output


def test_the_training_script_is_not_run_again(normal: tuple[int, str]) -> None:
    _, output = normal
    assert output.count("SCRIPT STARTS") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_left_to_the_trainer(number: signal.Signals) -> None:
    """A terminal or a scheduler signals every process of a job."""
    status, output = play("signals", SIGNAL=str(number.value))
    assert status == 0, output[-3000:]
    assert "STEPPED AFTER SIGNAL" in output


@pytest.mark.slow
def test_a_forked_child_does_not_end_the_optimizer_process() -> None:
    status, output = play("fork")
    assert status == 0, output[-3000:]
    assert "STEPPED AFTER FORK" in output


def test_an_optimizer_process_that_cannot_start_says_why() -> None:
    status, output = play("no-start")
    assert status == 1
    assert "could not start" in output and "OptimizerProcessError" in output
