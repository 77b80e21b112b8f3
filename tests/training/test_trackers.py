"""Each tracker with its real library, offline: numbers arrive, and a resumed run continues its curve."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from superoffload import cli, config
from superoffload.errors import UserError
from superoffload.training import tracking
from tests.helpers.ranks import REPOSITORY

# Two runs in two processes: the first logs steps 1 to 4 and ends, the second resumes from step 2 and logs 3 and 5.
PROGRAM = """
import json, sys
from pathlib import Path
from superoffload import config
from superoffload.training import tracking
name, folder = sys.argv[1:3]
state = json.loads(sys.argv[3]) if len(sys.argv) > 3 else None
made = config.build({"model_name": "org/m", "output_dir": folder, "report_to": [name], "wandb_project": "p",
                     "wandb_run_name": "r"})
trackers = tracking.start(made, True, 2 if state else 0, state)
for step in (3, 5) if state else (1, 2, 3, 4):
    values = {"step": step, "loss": (10 if state else 1) * step, "host_bytes": 7, "loss/a": None}
    trackers.log(step, values)
kept = trackers.state()
page = Path(folder) / "report.html"
page.write_text("<p>" + (" again" if state else ""))
trackers.attach(page)
trackers.finish()
print(json.dumps(kept))
"""


def run(name: str, folder: Path, *state: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(folder), *state], capture_output=True, text=True, timeout=120,
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]), **env},
    )  # fmt: skip
    assert (done.returncode, "is disabled" in done.stderr) == (0, False), done.stderr
    return done.stdout.splitlines()[-1]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    state = run("tensorboard", tmp_path)
    assert run("tensorboard", tmp_path) == state  # again from the start, in place of the first
    assert run("tensorboard", tmp_path, state) == state
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30), (5, 50)]
    assert [event.value for event in events.Scalars("memory/host_bytes")] == [7] * 4
    assert '"model_name": "org/m"' in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    state = run("trackio", tmp_path, **env)
    assert run("trackio", tmp_path, state, **env) == state
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
        artifacts = connection.execute("select * from artifacts").fetchall()
    assert len({row[0] for row in rows}) == 1
    assert [row for row in artifacts if "report-r" in row] == artifacts != []
    assert [row[1] for row in rows] == [1, 2, 3, 4, 3, 5]
    assert json.loads(rows[-1][2])["train/loss"] == 50


def test_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    env = {"MLFLOW_TRACKING_URI": (tmp_path / "store").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    state = run("mlflow", tmp_path, **env)
    assert run("mlflow", tmp_path, state, **env) == state
    (losses,) = (tmp_path / "store").glob("*/*/metrics/train/loss")
    (page,) = (tmp_path / "store").glob("*/*/artifacts/report.html")
    assert page.read_text() == "<p> again"
    assert [tuple(map(float, line.split()[1:])) for line in losses.read_text().splitlines()] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (30, 3), (50, 5),
    ]  # fmt: skip


def test_wandb(tmp_path: Path) -> None:
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_DATA_DIR": str(tmp_path / "data")}
    state = run("wandb", tmp_path, **env)
    assert run("wandb", tmp_path, state, **env) == state
    first, second = (tmp_path / "wandb").glob("offline-run-*")
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]
    for folder in (first, second):
        (records,) = folder.glob("*.wandb")
        assert f"report-{json.loads(state)['run_ids']['wandb']}".encode() in records.read_bytes()


def settings(*words: str) -> config.TrackingSettings:
    return cli.parse(["--model_name", "m", "--output_dir", "o", *words]).tracking


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ()),
        (["--report_to", "none"], ()),
        (["--use_wandb"], ("wandb",)),
        (["--report_to", "tensorboard", "wandb", "--use_wandb"], ("tensorboard", "wandb")),
    ],
)
def test_the_trackers_that_flags_choose(words: list[str], expected: tuple[str, ...]) -> None:
    assert settings(*words).trackers == expected


@pytest.mark.unit
def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    tracking.check(settings())
    with pytest.raises(UserError, match="--report_to mlflow: the package mlflow is not installed; run: pip install ml"):
        tracking.check(settings("--report_to", "mlflow"))
    with pytest.raises(UserError, match="--use_wandb: the package wandb is not installed"):
        tracking.check(settings("--use_wandb"))
    with pytest.raises(UserError, match="report_to"):
        settings("--report_to", "excel")


@pytest.mark.unit
def test_the_wandb_run_of_an_old_checkpoint_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def record(_: config.Config, run_id: str | None) -> Any:
        given.append(run_id)
        raise RuntimeError

    monkeypatch.setattr(tracking, "Wandb", record)
    made = config.build({"model_name": "m", "output_dir": str(tmp_path), "use_wandb": True})
    tracking.start(made, True, 2, {"run_id": "old"})
    assert given == ["old"]
