"""The curves of runs in one picture."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from superoffload import commands, config, config_file
from superoffload.errors import UserError
from superoffload.reporting import comparison, records

# Not marked `unit`: what draws. On its first import ever, matplotlib runs fc-list to find the fonts.


def make_run(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": 2.0 / step, "target_tokens_per_s": 100.0} for step in (1, 2, 3)]
    lines.append({"step": 3, "eval_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = config.build({"model_name": "org/m", "output_dir": str(folder), **values})
    (folder / "config.yaml").write_text(config_file.write(made))
    return folder


def labels(*folders: Path) -> list[str]:
    return comparison.labels([records.read(folder) for folder in folders])


@pytest.mark.unit
def test_runs_are_named_by_the_settings_in_which_they_differ(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", lr=1e-5, model_name="/x/models/m8/")
    second = make_run(tmp_path / "b", lr=2e-5, model_name="/y/models/m8/", packing=False)
    assert labels(first, second) == ["packing True, lr 1e-05", "packing False, lr 2e-05"]
    third = make_run(tmp_path / "c", lr=1e-5, model_name="m8", batch_size=1, eval_percentage=0.0, use_wandb=True)
    assert labels(first, second, third) == [
        "a: packing True, lr 1e-05", "b: packing False, lr 2e-05", "c: packing True, lr 1e-05",
    ]  # fmt: skip
    assert labels(first) == ["a"]


@pytest.mark.unit
def test_a_run_without_settings_is_named_by_its_folder(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (second / "config.yaml").unlink()
    assert labels(first, second) == ["a", "b"]


def test_the_picture_has_the_curves_of_all_runs(tmp_path: Path) -> None:
    runs = [records.read(make_run(tmp_path / name, lr=lr)) for name, lr in (("a", 1e-5), ("b", 2e-5))]
    loss, speed = comparison.figure(runs).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[2.0, 1.0, pytest.approx(2 / 3)], [1.0]] * 2
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["lr 1e-05", "lr 2e-05"]
    assert len(speed.lines) == 2


@pytest.mark.parametrize(("name", "head"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml")])
def test_the_command_writes_it(name: str, head: bytes, tmp_path: Path) -> None:
    folders = [str(make_run(tmp_path / name)) for name in "ab"]
    result = CliRunner().invoke(commands.group, ["plot", *folders, "--out", str(tmp_path / name)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / name).read_bytes().startswith(head)


@pytest.mark.parametrize(
    ("name", "words"),
    [("x.txt", r"x.txt: must end with one of .png, .svg, .pdf"), ("none/x.png", "none/x.png: cannot be written")],
)
def test_mistakes_are_one_line(name: str, words: str, tmp_path: Path) -> None:
    run = records.read(make_run(tmp_path / "a"))
    with pytest.raises(UserError, match=words):
        comparison.draw([run], tmp_path / name)


@pytest.mark.unit
def test_without_matplotlib_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(
        UserError, match=r'--out: needs matplotlib; install it with: pip install "superoffload\[plots\]'
    ):
        comparison.figure([])
