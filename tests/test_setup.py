"""The environment and its checks: setup.sh, the lock, the hooks."""

import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.ranks import REPOSITORY

FILES = ("pyproject.toml", "scripts/constraints.txt", "scripts/setup.sh")


def test_setup_is_done_once(tmp_path: Path) -> None:
    """A finished setup is recognised and costs nothing; an interpreter that is too old is an error."""
    for path in FILES:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((REPOSITORY / path).read_text())
    state = subprocess.run(
        f"cat {' '.join(FILES)} | cksum", shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").write_text(state)
    done = subprocess.run(["bash", "scripts/setup.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "")
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.8.1; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    refused = subprocess.run(
        ["bash", "scripts/setup.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=30,
        env={**os.environ, "PYTHON": str(old)},
    )  # fmt: skip
    assert refused.returncode == 2
    assert "is Python 3.8.1, but Python 3.11 or newer is required" in refused.stderr


def required() -> set[str]:
    """Return the names of the installed packages that `superoffload[dev]` needs, directly or indirectly."""
    found: set[tuple[str, str]] = set()
    todo = [("superoffload", ""), ("superoffload", "dev")]
    while todo:
        found.add(pair := todo.pop())
        name, extra = pair
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                pairs = {(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)}
                todo += pairs - found
    return {name for name, _ in found} - {"superoffload"}


@pytest.mark.unit
def test_every_required_package_is_locked() -> None:
    lines = [line for line in (REPOSITORY / FILES[1]).read_text().splitlines() if not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)
    cuda = {name for name in required() if re.match(r"(nvidia|cuda)-|triton$", name)}  # torch pins these itself
    others = [name for name in required() & locked.keys() if metadata.version(name).split("+")[0] != locked[name]]
    if others:  # scripts/test_versions.sh; they may require other packages
        pytest.skip(f"not the pinned versions: {', '.join(sorted(others))}")
    assert required() - cuda <= locked.keys()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in lines)  # no build label, no address


@pytest.mark.unit
def test_the_hooks_run_the_commands_of_the_test_script() -> None:
    commands = re.findall(r"^(?:ruff|mypy|codespell|shellcheck).*$", (REPOSITORY / "scripts/test.sh").read_text(), re.M)
    entries = re.findall(r"^ +entry: (.*)$", (REPOSITORY / ".pre-commit-config.yaml").read_text(), re.M)
    assert entries == [*commands[:-1], "shellcheck"]
    assert commands[-1].startswith("shellcheck ")  # a hook gets the names of the changed scripts
