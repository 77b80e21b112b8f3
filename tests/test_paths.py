"""A user's text becomes a path, or one line."""

import os
from pathlib import Path

import click
import pytest

from superoffload import cli, commands, config
from superoffload.errors import UserError
from superoffload.paths import path_of

pytestmark = pytest.mark.unit

REQUIRED = {"model_name": "m", "output_dir": "out"}
PATHS = [spec.name for spec in config.SPECS.values() if "path" in spec.metadata]
BAD = {
    "": "is empty",
    "x" * 256: "File name too long",
    "~no_such_user/x": "there is no user of that name",
    "a\0b": r"'a\\x00b': is not a path",
}


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("name", PATHS)
def test_a_flag_that_names_no_path_is_one_line(name: str, text: str) -> None:
    flags = [f"--{key}={value}" for key, value in {**REQUIRED, name: text}.items()]
    with pytest.raises(UserError, match=f"^--{name}.*{BAD[text]}"):
        cli.parse(flags)


def test_a_path_in_a_file_of_settings_is_looked_at_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text('model_name: m\noutput_dir: out\ndataset_name: [a, "b\\0"]\n')
    with pytest.raises(UserError, match=r"^--dataset_name 'b\\x00': is not a path"):
        cli.parse(["--config", str(file)])


@pytest.mark.parametrize("name", sorted(commands.group.commands))
def test_every_path_of_a_command_is_looked_at(name: str) -> None:
    found = commands.group.commands[name]
    parts = found.commands.values() if isinstance(found, click.Group) else [found]
    kinds = [type(param.type) for part in parts for param in part.params if isinstance(param.type, click.Path)]
    assert set(kinds) <= {cli.UserPath}
    for part in parts:
        for param in part.params:
            if isinstance(param.type, cli.UserPath | cli.PathText):
                with pytest.raises(UserError, match="there is no user of that name"):
                    param.type.convert("~no_such_user/x", param, None)


def test_what_is_closed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_stat(path: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    assert path_of(str(tmp_path / "missing"), "--out") == tmp_path / "missing"
    assert path_of(str(tmp_path)) == tmp_path
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^--out .*cannot be used \(Permission denied"):
        patch.setattr(os, "access", lambda *_: False)
        path_of(str(tmp_path), "--out")
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot be used \(Permission denied"):
        patch.setattr(Path, "stat", no_stat)
        path_of(str(tmp_path / "inside"))


def test_home_is_expanded_where_it_does_not_shape_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = cli.parse(["--model_name=~/m", "--output_dir=~/out"])
    assert (found.model.model_name, found.output.output_dir) == ("~/m", "/home/me/out")


@pytest.mark.parametrize("flags", [["--output_dir", "--model_name=m"], ["--model_name=m", "--output_dir"]])
def test_a_required_flag_needs_a_value(flags: list[str]) -> None:
    with pytest.raises(UserError, match="--model_name|--output_dir"):
        cli.parse(flags)


def test_a_value_may_begin_as_a_flag_does() -> None:
    assert cli.parse(["--model_name=-m", "--output_dir=-o"]).output.output_dir == "-o"
