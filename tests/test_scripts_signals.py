"""Signals to a running recipe: ranks save, the exit status is theirs, and no process is left."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.recipes import TINY, changed, program, script_of, starter
from tests.helpers.recipes import stand_in as stand_in

# A rank that is asked to save does so once the file `release` exists.
SAVES = """
save() { echo saving > "$SEEN"; until [ -e "$RELEASE" ]; do sleep 0.05; done; echo saved > "$SEEN"; exit 5; }
trap save TERM USR1
"""


def below(folder: Path) -> list[psutil.Process]:
    """List the processes that run a program of the folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.startswith(f"{folder}/") for word in process.info["cmdline"] or ())
    ]


def default_signals() -> None:
    """Undo what a background process inherits: a shell cannot trap a signal that is ignored when it starts."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Started:
    """A running recipe, which has started a rank."""

    def __init__(self, script: Path, folder: Path, traps: str = SAVES) -> None:
        self.folder = folder
        self.seen = folder.parent / "seen"
        self.release = folder.parent / "release"
        loop = 'echo started > "$SEEN"; while :; do sleep 0.1; done'
        program(folder / "rank", f"{folder}/helper &\n{traps}\n{loop}")
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SEEN": str(self.seen), "RELEASE": str(self.release)}
        self.process = subprocess.Popen(
            ["bash", str(script), "superoffload"], env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
            cwd=folder, start_new_session=True, preexec_fn=default_signals,
        )  # fmt: skip
        self.wait_until(lambda: self.says("started"))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.process.poll() is None
            time.sleep(0.02)

    def says(self, word: str) -> bool:
        """Return whether this is the last word that the rank wrote."""
        return self.seen.exists() and self.seen.read_text() == f"{word}\n"

    def programs(self) -> set[str]:
        """Return the names of the stand-in's programs that run."""
        names = {path.name for path in self.folder.iterdir()}
        found: set[str] = set()
        for process in below(self.folder):
            found |= names & {Path(word).name for word in process.info["cmdline"]}
        return found


Start = Callable[..., Started]


@pytest.fixture
def start(stand_in: Path) -> Iterator[Start]:
    """Start a recipe, whose launcher has a rank below it, as DeepSpeed's has: neither forwards signals."""
    program(stand_in / "launch", f"trap '' INT; {stand_in}/rank --local_rank=0 & wait $!")
    starter(stand_in, f"exec {stand_in}/rank --local_rank 0")  # a recipe for one device has no launcher
    program(stand_in / "deepspeed", f"{stand_in}/launch & wait $!")
    program(stand_in / "helper", "sleep 300")  # as a worker that tokenises, which outlives its rank
    program(stand_in / "superoffload", ":")
    yield lambda script, *traps: Started(script, stand_in, *traps)
    for left in below(stand_in):
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()


def assert_nothing_is_left(stand_in: Path) -> None:
    psutil.wait_procs(below(stand_in), timeout=5)
    assert below(stand_in) == []


@pytest.mark.parametrize(
    ("script", "number"),
    [
        (script_of("llama-70b"), signal.SIGTERM),
        (script_of("llama-70b"), signal.SIGUSR1),
        (script_of("llama-70b"), signal.SIGINT),
        (script_of("llama-70b"), signal.SIGHUP),
        (script_of("llama-8b"), signal.SIGTERM),
        (script_of("llama-8b"), signal.SIGINT),
        (TINY, signal.SIGUSR1),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else value.name,
)
def test_signals_reach_the_ranks_and_their_status_comes_back(
    script: Path,
    number: signal.Signals,
    start: Start,
    stand_in: Path,
) -> None:
    recipe = start(script)
    os.killpg(recipe.process.pid, number)  # as a terminal does
    recipe.wait_until(lambda: recipe.says("saving"))
    recipe.release.touch()
    assert recipe.process.wait(timeout=20) == 5
    assert recipe.says("saved")
    assert_nothing_is_left(stand_in)


def test_ranks_are_waited_for_when_everything_is_signalled(start: Start) -> None:
    """A scheduler signals every process. The launcher ends at once, the ranks still save."""
    recipe = start(script_of("llama-70b"))
    for child in psutil.Process(recipe.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the rank's short sleep
            child.terminate()
    recipe.process.terminate()
    recipe.wait_until(lambda: recipe.programs() == {"rank"} and recipe.says("saving"))
    recipe.release.touch()
    assert recipe.process.wait(timeout=20) == 128 + signal.SIGTERM  # the launcher's
    assert recipe.says("saved")


def test_a_signal_that_is_repeated_at_once_changes_nothing(start: Start, stand_in: Path) -> None:
    recipe = start(changed("llama-8b", stand_in.parent, "force_after_s=3", "force_after_s=1000"))
    recipe.process.terminate()
    recipe.wait_until(lambda: recipe.says("saving"))
    recipe.process.terminate()
    recipe.release.touch()
    assert recipe.process.wait(timeout=20) == 5
    assert recipe.says("saved")


def test_a_later_signal_kills_ranks_that_hang(start: Start, stand_in: Path) -> None:
    script = changed("llama-8b", stand_in.parent, "force_after_s=3", "force_after_s=-1")
    recipe = start(script, "trap 'echo asked > \"$SEEN\"' TERM")
    recipe.process.terminate()
    recipe.wait_until(lambda: recipe.says("asked"))
    recipe.process.terminate()
    # The launcher's status, or that of the wait, which the signal interrupts.
    assert recipe.process.wait(timeout=20) in (128 + signal.SIGKILL, 128 + signal.SIGTERM)
    assert_nothing_is_left(stand_in)
