"""`superoffload runs`: what is said of a run from the files of its output folder."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from superoffload import commands
from superoffload.checkpoint import folder_lock
from superoffload.errors import UserError
from superoffload.reporting import runs, runs_table
from tests.helpers.runs import make_checkpoint

pytestmark = pytest.mark.unit

DESCRIPTION = {
    "model": {"name": "owner/model"}, "mode": "superoffload", "starts": [{"at": 100.0, "step": 0}], "total_steps": 300,
}  # fmt: skip
ENDED = {"ended_at": 200.0, "stopped_by": None}


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "epoch": step / 150, "loss": 5 - step / 100, "lr": 1e-5, **more}) + "\n"


def write_run(folder: Path, lines: str = line(100) + line(200), summary: Any = None, **description: Any) -> Path:
    """Write the files of a run that ended, or died if there is no summary."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**DESCRIPTION, **description}))
    (folder / "metrics.jsonl").write_text(lines)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_run_that_died(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "out", line(100) + json.dumps({"step": 100, "eval_loss": 3.5}) + "\n" + line(200))
    make_checkpoint(folder, 200, 1.0)
    found = runs.read(folder)
    assert (found.model, found.mode, found.step, found.total_steps) == ("owner/model", "superoffload", 200, 300)
    assert (found.loss, found.eval_loss, found.state, found.checkpoint) == (3.0, 3.5, "died", "global_step200")
    assert abs(found.active_at - time.time()) < 60


def test_the_states(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "out", line(200), {"global_step": 300, **ENDED})
    assert (runs.read(folder).state, runs.read(folder).step) == ("finished", 300)
    handle = folder_lock.lock(str(folder))
    assert runs.read(folder).state == "running"
    folder_lock.unlock(handle)
    (folder / "run.json").write_text(json.dumps({**DESCRIPTION, "error": "the loss was NaN"}))
    assert runs.read(folder).state == "died"
    stopped = write_run(tmp_path / "stopped", summary={"global_step": 300, **ENDED, "stopped_by": "SIGTERM"})
    assert runs.read(stopped).state == "stopped"
    (stopped / "summary.json").write_text(json.dumps({"global_step": 205, **ENDED}))
    assert (runs.read(stopped).state, runs.read(stopped).step) == ("stopped", 205)
    (stopped / "summary.json").write_text(json.dumps({"global_step": 300, "ended_at": 99.0}))  # of an earlier start
    assert (runs.read(stopped).state, runs.read(stopped).step) == ("died", 200)


def test_a_run_without_run_json_is_described_by_its_settings(tmp_path: Path) -> None:
    settings = "model: {model_name: owner/model}\noffload: {deepspeed_config: configs/zerooffload.json}\n"
    (tmp_path / "config.yaml").write_text(settings + "training: {num_train_epochs: 2}\n")
    (tmp_path / "metrics.jsonl").write_text(line(150))
    (tmp_path / "summary.json").write_text('{"global_step": 150}')
    found = runs.read(tmp_path)
    assert (found.model, found.mode, found.total_steps, found.state) == ("owner/model", "zerooffload", None, "stopped")
    (tmp_path / "metrics.jsonl").write_text(line(300))
    assert runs.read(tmp_path).state == "finished"
    (tmp_path / "config.yaml").write_text("model: [")
    assert runs.read(tmp_path).model is None


@pytest.mark.parametrize(
    ("lines", "step", "loss"),
    [
        ("", 0, None),
        (line(100) + line(200)[:40], 100, 4.0),  # being written, or truncated by a crash
        (line(100) + "\0\0\0", 100, 4.0),
        (line(100, loss=None), 100, float("nan")),
        ("[1, 2]\n", 0, None),
    ],
    ids=["empty", "truncated", "zeros", "infinite", "another form"],
)
def test_unusual_metrics(lines: str, step: int, loss: float | None, tmp_path: Path) -> None:
    found = runs.read(write_run(tmp_path / "out", lines))
    assert (found.step, str(found.loss)) == (step, str(loss))


def test_only_the_end_of_the_metrics_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "TAIL_BYTES", 200)
    evaluation = json.dumps({"step": 1, "eval_loss": 3.5}) + "\n"
    found = runs.read(write_run(tmp_path / "out", evaluation + "".join(map(line, range(1, 101)))))
    assert (found.step, found.loss, found.eval_loss) == (100, 4.0, None)


def test_damaged_files_say_less(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "out", summary={"global_step": 200, **ENDED})
    (folder / "latest").write_text("../elsewhere")
    (folder / "summary.json").write_text('{"global_')
    (folder / "run.json").write_text('{"model": 3, "total_steps": "many"')
    found = runs.read(folder)
    assert (found.model, found.step, found.state, found.checkpoint) == (None, 200, "died", None)
    (folder / "latest").write_text("global_step200")
    (folder / "global_step200").mkdir()
    (folder / "global_step200" / "manifest.json").write_text('{"saved_at')
    assert runs.read(folder).checkpoint is None


def test_runs_are_found_below_a_folder_the_last_active_first(tmp_path: Path) -> None:
    names = ["b", "a/deep", "c"]
    for age, name in enumerate(names):
        folder = write_run(tmp_path / name)
        for path in folder.iterdir():
            os.utime(path, (1e9 - age, 1e9 - age))
    write_run(tmp_path / "c" / "model_step200")
    write_run(tmp_path / ".hidden")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.yaml").touch()  # settings, but no run
    assert [run.folder for run in runs.find(tmp_path)] == [tmp_path / name for name in names]
    with pytest.raises(UserError, match="missing: no such folder"):
        runs.find(tmp_path / "missing")


def test_what_cannot_be_read_is_named_and_the_others_are_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    folder = write_run(tmp_path / "half")
    (folder / "run.json").write_text('{"model"')
    (folder / "latest").write_text("global_step5")
    notes: list[str] = []
    assert len(runs.find(tmp_path, notes)) == 2
    assert [note.partition(" cannot")[0] for note in notes] == [
        f"{folder}: run.json", f"{folder}: global_step5/manifest.json is missing or"
    ]  # fmt: skip
    done = CliRunner().invoke(commands.group, ["runs", str(tmp_path)])
    assert done.exit_code == 0 and all(word in done.output for word in ("good", "half", *notes))


@pytest.mark.parametrize("width", [runs_table.NARROW, 80, 200])
def test_the_table_fits_the_terminal(width: int, tmp_path: Path) -> None:
    model = {"name": "meta-llama/Llama-3.1-8B"}
    write_run(tmp_path / "llama-8b_superoffload_output_of_a_long_name_and_more", model=model)
    write_run(tmp_path / "short", line(1200), {"global_step": 1200, **ENDED}, total_steps=120000)
    found = runs.find(tmp_path)
    lines = runs_table.lines(found, tmp_path, found[0].active_at + 7300, width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert all(word in text for word in ("Llama-3.1-8B", "superoffload", "200/300", "1200/120000", "3.0000", "2 h"))
    assert "…" not in text and "\x1b" not in text
    assert "\x1b" in "\n".join(runs_table.lines(found, tmp_path, 0, width, colours=True))


def test_a_terminal_too_narrow_for_the_table_wraps_lines_that_leave_nothing_out(tmp_path: Path) -> None:
    found = runs.find(write_run(tmp_path / "llama-8b", model={"name": "meta-llama/Llama-3.1-8B"}))
    assert runs_table.lines(found, tmp_path, 0, 40) == runs_table.lines(found, tmp_path, 0, None)


def test_elsewhere_each_run_is_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / ("long" * 40), model={"name": "m" * 100})
    header, row = runs_table.lines(runs.find(tmp_path), tmp_path, 0, None)
    assert header.split() == ["run", "model", "mode", "state", "step", "loss", "eval", "saved", "active"]
    assert row.split()[:5] == ["long" * 40, "m" * 100, "superoffload", "died", "200/300"]


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h"), (2e5, "2 d")])
def test_how_long_ago(seconds: float, text: str) -> None:
    assert runs_table.ago(seconds) == text


def test_the_command(tmp_path: Path) -> None:
    runner = CliRunner()
    empty = runner.invoke(commands.group, ["runs", str(tmp_path)])
    assert (empty.exit_code, empty.stdout) == (0, "") and "no runs below it" in empty.stderr
    write_run(tmp_path / "out", line(100, loss=None))
    (found,) = json.loads(runner.invoke(commands.group, ["runs", str(tmp_path), "--json"]).stdout)
    assert (found["folder"], found["step"], found["loss"]) == (str(tmp_path / "out"), 100, None)
    assert "100/300" in runner.invoke(commands.group, ["runs", str(tmp_path)]).stdout
