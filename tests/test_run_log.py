"""run.log holds what the screen does not show; errors are in both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY

PROGRAM = """
import logging, sys, warnings
from superoffload import cli, log
from superoffload.errors import UserError
from superoffload.run_log import run_log
level, folder, end = sys.argv[1:]
log.setup(level)
run_log.capture(level)
library = logging.getLogger("DeepSpeed")  # as its import does
library.addHandler(logging.StreamHandler(sys.stdout))
library.propagate = False
library.setLevel(logging.WARNING)
print("printed early")
log.logger.warning("own warning")
run_log.open(folder)
print("printed", "late")
library.warning("warning of a library")
library.error("error of a library")
warnings.warn("python's warning")
warnings.warn("a library's future", FutureWarning)
warnings.warn("`torch.distributed.reduce_scatter_tensor` is deprecated. Please use another.", FutureWarning)
log.logger.info("own info")
log.logger.debug("own detail")
def main(config):
    if end == "user":
        raise UserError("--flag: wrong")
    if end == "bug":
        raise ValueError("a bug")
    return 0
cli.parse = lambda argv: None
cli.SILENT_RANK_PATIENCE_S = 0
cli.run(main)
"""
QUIET = ["printed early", "printed late", "warning of a library", "python's warning"]
SHOWN = ["own warning", "error of a library", "own info"]


def run(folder: Path, level: str = "INFO", end: str = "well", rank: str = "0") -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, level, str(folder), end],
        capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "RANK": rank}, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == ({"well": 0, "user": 2, "bug": 1}[end], "")
    return done.stderr, (folder / "run.log").read_text()


def test_the_screen_shows_what_is_ours_and_the_file_everything(tmp_path: Path) -> None:
    screen, file = run(tmp_path)
    for text in SHOWN:
        assert (screen.count(text), file.count(text)) == (1, 1), text
    for text in QUIET:
        assert (screen.count(text), file.count(text)) == (0, 1), text
    assert "own detail" not in screen + file
    assert file.splitlines()[0].endswith(f"Started: -c INFO {tmp_path} well")
    assert file.count("a library's future") == 1 and "is deprecated" not in screen + file
    assert file.index("printed early") < file.index("printed late")


def test_at_debug_the_screen_shows_everything(tmp_path: Path) -> None:
    screen, file = run(tmp_path, "DEBUG")
    for text in (*SHOWN, *QUIET, "own detail"):
        assert (screen.count(text), file.count(text)) == (1, 1), text


def test_the_file_is_complete_if_the_screen_shows_errors_only(tmp_path: Path) -> None:
    screen, file = run(tmp_path, "ERROR")
    assert [line.split(maxsplit=2)[2] for line in screen.splitlines()] == ["ERROR error of a library"]
    assert all(text in file for text in (*SHOWN, *QUIET))


def test_a_second_run_and_another_rank_append_to_it(tmp_path: Path) -> None:
    run(tmp_path)
    screen, file = run(tmp_path, rank="3")
    assert [line.split(maxsplit=2)[2] for line in screen.splitlines()] == ["ERROR [rank 3] error of a library"]
    of_rank_3 = [line for line in file.splitlines() if "[rank 3]" in line]
    assert [line.partition("] ")[2].split("] ")[1] for line in of_rank_3[:3]] == [
        "own warning", "warning of a library", "error of a library",
    ]  # fmt: skip
    assert "python's warning" in of_rank_3[3]
    assert file.count("Started") == 1


@pytest.mark.parametrize(("end", "text"), [("user", "Error: --flag: wrong"), ("bug", "ValueError: a bug")])
def test_what_ended_the_run_is_on_the_screen_and_in_the_file(end: str, text: str, tmp_path: Path) -> None:
    screen, file = run(tmp_path, end=end)
    assert screen.splitlines()[-1] == text
    assert text in file.splitlines()[-1]
    assert ("Traceback" in screen, "Traceback" in file) == (end == "bug",) * 2


@pytest.mark.parametrize("problem", ["Is a directory", "No space left on device"])
def test_a_file_that_cannot_be_written_is_one_warning(problem: str, tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.mkdir() if problem == "Is a directory" else path.symlink_to("/dev/full")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "INFO", str(tmp_path), "well"],
        capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "RANK": "0"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"run.log: cannot be written ({problem})") == 1
    assert "Traceback" not in done.stderr and "own info" in done.stderr
