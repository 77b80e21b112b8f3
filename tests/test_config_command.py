"""The command `superoffload config`, and completion in the shell, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from superoffload import config_file
from tests.helpers import documents
from tests.helpers.ranks import REPOSITORY


def superoffload(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from superoffload.commands import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **more}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_the_command_checks_a_file_and_prints_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {lr: 2e-5}\npacking: no\n")
    done = superoffload("config", "--check", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: 2 settings, all valid\n", "")
    path.write_text("eval_steps: 5\n")
    done = superoffload("config", "--check", str(path))
    assert done.returncode == 2 and done.stderr.startswith("Error: --eval_steps 5: there is nothing to evaluate")
    assert json.loads(superoffload("config", "--schema").stdout) == json.loads(json.dumps(config_file.schema()))
    assert superoffload("config").returncode == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["superoffload", "pla"], "plain,plan"),
        (["superoffload", "preview", "--max_l"], "plain,--max_length"),
        (["superoffload", "preview", "--dataset_format", "al"], "plain,alpaca"),
        (["superoffload", "preview", "--dataset_name", "a", "--max_l"], "plain,--max_length"),
    ],
)
def test_the_shell_completes(words: list[str], expected: str) -> None:
    done = superoffload(
        _SUPEROFFLOAD_COMPLETE="bash_complete", COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1)
    )
    assert done.stdout.splitlines() == [expected]
    assert done.stderr == ""


def test_bash_takes_the_completion(tmp_path: Path) -> None:
    """The line of docs/config_file.md, and then what Bash does at Tab."""
    program = tmp_path / "superoffload"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from superoffload.commands import main; main()" "$@"\n')
    program.chmod(0o755)
    (line,) = [
        line
        for block in documents.blocks(documents.read(REPOSITORY / "docs/config_file.md"), "bash")
        for line in block.splitlines()
        if line.startswith("eval")
    ]
    tab = "COMP_WORDS=(superoffload conf); COMP_CWORD=1; _superoffload_completion superoffload conf superoffload"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"{line}\n{tab}\necho ${{COMPREPLY[@]}}"], capture_output=True, text=True, env=environment
    )
    assert (done.stdout, done.stderr) == ("config\n", "")


def test_misspelt_flags_and_commands_are_near_something() -> None:
    assert "'--max_length'" in superoffload("preview", "--max_lenght", "8").stderr
    assert "'plan'" in superoffload("plam").stderr
