"""What a recipe says when a rank was killed: the stand-in for the launcher exits as DeepSpeed's does."""

import re
import shlex
from pathlib import Path

import pytest

from superoffload.commands import plan
from tests.helpers.recipes import SCRIPTS, call, changed, program, script_of
from tests.helpers.recipes import stand_in as stand_in

COUNT = "kills_before=$(oom_kills)"
TWO_LESS = "kills_before=$(($(oom_kills) - 2))"


@pytest.mark.parametrize(
    ("status", "line", "words"),
    [
        (247, COUNT, "signal 9 (SIGKILL), but not by the kernel for lack of memory"),  # DeepSpeed's launcher: -9
        (137, COUNT, "signal 9 (SIGKILL), but not by the kernel for lack of memory"),
        (249, COUNT, "signal 7 (SIGBUS): usually /dev/shm or host memory is too small. /dev/shm has "),
        (135, COUNT, "signal 7 (SIGBUS): usually /dev/shm or host memory is too small. /dev/shm has "),
        (247, TWO_LESS, "The kernel killed 2 process(es) for lack of host memory"),
        (249, TWO_LESS, "The kernel killed 2 process(es) for lack of host memory"),
        (1, TWO_LESS, "The kernel killed 2 process(es) for lack of host memory"),  # of a rank that lost another
    ],
)
def test_a_killed_rank_is_explained(status: int, line: str, words: str, stand_in: Path) -> None:
    program(stand_in / "deepspeed", f"exit {status}")
    more = ["--columns", "a=b c", "--max_length=99", "--verify_steps", "-1", "--revision", "a b"]
    script = changed("llama-8b", stand_in.parent, COUNT, line)
    result = call(script, stand_in, "superoffload", "8", *more)
    assert result.returncode == status
    assert words in result.stderr
    if "/dev/shm has" in words:
        assert "/dev/shm has nothing" not in result.stderr
    prefix = "What the run needs: "
    (command,) = [line for line in result.stderr.splitlines() if line.startswith(prefix)]
    arguments = shlex.split(command.removeprefix(prefix))
    assert arguments[:6] == ["superoffload", "plan", "--gpus", "1", "--nodes", "1"]
    assert arguments[-3:] == ["--max_length=99", "--revision", "a b"]
    values = plan.command.make_context("plan", arguments[2:]).params
    assert values["model_name"] == "meta-llama/Llama-3.1-8B"
    assert (values["batch_size"], values["offload_ratio"], values["max_length"]) == (8, 0.8, 99)
    assert values["deepspeed_config"].endswith("/configs/superoffload.json")


def test_the_flags_of_plan_are_known_to_the_recipes() -> None:
    (text,) = re.findall(r'^planned="([^"]*)"$', (SCRIPTS / "_launch.sh").read_text(), re.MULTILINE)
    taken = {flag for option in plan.command.params for flag in (*option.opts, *option.secondary_opts)}
    own = {"--recipe", "--gpus", "--nodes", "--gpu_memory", "--host_memory", "--link", "--tokens", "--json", "--plot"}
    assert set(text.replace("\\\n", "").split()) == taken - own


@pytest.mark.parametrize("status", [0, 1, 2, 3, 143])
def test_no_other_end_is_explained(status: int, stand_in: Path) -> None:
    program(stand_in / "deepspeed", f"exit {status}")
    result = call(script_of("llama-8b"), stand_in, "superoffload")
    assert (result.returncode, result.stderr) == (status, "")
