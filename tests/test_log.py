import os
import subprocess
import sys

from tests.helpers.ranks import REPOSITORY

PROGRAM = """
import logging
from superoffload import log
log.setup("INFO")
log.setup("INFO")
log.logger.info("an info")
log.logger.error("an error")
log.logger.debug("a detail")
log.steps.info("a step")
logging.getLogger("DeepSpeed").info("a library's info")
logging.raiseExceptions = False
log.logger.error("a record without its argument: %s %s", 1)
"""


def on_a_pipe(rank: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "RANK": rank}, timeout=60,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "")
    return [line.split(maxsplit=2)[2] for line in result.stderr.splitlines()]  # without date and time


def test_rank_0_writes_each_line_once() -> None:
    assert on_a_pipe("0") == ["INFO an info", "ERROR an error", "INFO a step"]


def test_another_rank_shows_errors_only() -> None:
    assert on_a_pipe("1") == ["ERROR [rank 1] an error"]


def test_a_command_does_not_say_that_deepspeed_found_no_accelerator() -> None:
    program = "from superoffload import log; log.hide_choice_of_cpu(); import deepspeed.accelerator as a; "
    program += "from deepspeed.utils import logger; a.get_accelerator(); logger.warning('another')"
    env = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=env,
        timeout=120,
        check=True,
    )
    assert "Setting accelerator" not in done.stdout + done.stderr and "another" in done.stdout
