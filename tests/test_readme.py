"""Holds the README to what is there: its commands, what they print, and its tree."""

import re
import shlex
from pathlib import Path

import pytest

from superoffload import cli, commands
from tests.ranks import REPOSITORY
from tests.test_scripts import call, seen, stand_in  # noqa: F401  a fixture

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True) for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]  # fmt: skip
RECIPES = [words for words in COMMANDS if words[0] == "bash" and words[1].startswith("scripts/finetune_")]
SCRIPT = [words for words in COMMANDS if words[0] == "deepspeed"]
TOOLS = [words for words in COMMANDS if words[0] == "superoffload"]


def test_every_command_is_of_a_kind_that_is_tried_here() -> None:
    others = [words for words in COMMANDS if words not in [*RECIPES, *SCRIPT, *TOOLS]]
    assert others == [["bash", "scripts/test.sh"]]  # what runs this
    assert len(RECIPES) >= 4
    assert SCRIPT
    assert TOOLS


@pytest.mark.parametrize("words", RECIPES, ids=" ".join)
def test_a_recipe_is_called_rightly(words: list[str], stand_in: Path) -> None:  # noqa: F811
    result = call(REPOSITORY / words[1], stand_in, *words[2:])
    assert result.returncode == 7, result.stderr  # the stand-in's
    cli.parse(seen(stand_in)[1])


@pytest.mark.parametrize("words", SCRIPT, ids=" ".join)
def test_the_script_takes_the_flags(words: list[str]) -> None:
    flags = words[words.index("finetune_zero3.py") + 1 :]
    if flags == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            cli.parse(flags)
    else:
        cli.parse(flags)


@pytest.mark.parametrize("words", TOOLS, ids=" ".join)
def test_the_tool_takes_the_arguments(words: list[str]) -> None:
    commands.group.commands[words[1]].make_context(words[1], words[2:])


def test_the_dry_run_prints_what_is_shown(stand_in: Path) -> None:  # noqa: F811
    line, shown = re.search(r"`(DRY_RUN=1 [^`]*)`[^`]*```\n(.*?)```", README, re.S).groups()  # type: ignore[union-attr]
    words = shlex.split(line)
    place = words.index("bash")
    result = call(
        REPOSITORY / words[place + 1], stand_in, *words[place + 2 :], **dict(w.split("=") for w in words[:place])
    )
    assert result.stdout.replace(str(REPOSITORY), "...").rstrip() == shown.replace(" \n", "\n").rstrip()


def test_the_tree_is_the_one_that_is_there() -> None:
    """Every name in the tree is a file or folder, and every module of the package is in the tree."""
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.S).group(1)  # type: ignore[union-attr]
    folders: list[str] = []
    named: set[Path] = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r", ", re.split(r"\s{2,}", line.strip())[0]):
            found = list(REPOSITORY.glob("/".join([*folders[:depth], name.rstrip("/")])))
            assert found, line
            named |= set(found)
            if name.endswith("/"):
                folders[depth:] = [name.rstrip("/")]
    package = REPOSITORY / "superoffload"
    modules = {path for folder in (package, package / "data") for path in folder.glob("*.py")}
    assert {path.name for path in modules - named} <= {"__init__.py"}
