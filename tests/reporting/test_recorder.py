"""What a run leaves for its report, and that it never fails because of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from superoffload import config, distributed
from superoffload.data.rows import RowCounts
from superoffload.data.statistics import Statistics
from superoffload.reporting import recorder, records, report, runs
from superoffload.training.progress import Progress

STATISTICS = Statistics(
    counts=RowCounts(given=3, dropped=0, truncated=1, bad=0), rows=3, tokens=30, target_tokens=12,
    percentiles=(1,) * 7, histogram=((5, 1), (10, 2)), longest=10, packs=2, fill=0.75, packed=True, steps_per_epoch=2,
)  # fmt: skip
PLAN = {"parameters": 1000, "trained_parameters": 900, "planned_memory": {"host_bytes": 5}}


class Attached(list[Path]):
    """Trackers that keep the files they are given."""

    finished = False

    def attach(self, path: Path) -> None:
        assert not self.finished
        self.append(path)

    def finish(self) -> None:
        self.finished = True


def make_run(folder: Path, step: int = 0) -> Any:
    chosen = config.build({"model_name": "org/m", "output_dir": str(folder)})
    batches = SimpleNamespace(statistics=lambda: STATISTICS)
    return SimpleNamespace(
        config=chosen, progress=Progress(step=step), batches=batches, last_step=9, trackers=Attached(),
        samples=Attached(),
    )  # fmt: skip


def recorded(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text()))


def test_run_json_says_what_the_run_is(one_rank: None, tmp_path: Path) -> None:
    recorder.start(make_run(tmp_path), PLAN, lambda: {"packages": {"torch": "2"}})
    found = recorded(tmp_path)
    (start,) = found.pop("starts")
    assert start["step"] == 0 and start["at"] > 1.7e9
    data = found.pop("data")
    assert data["histogram"] == [[5, 1], [10, 2]] and data["counts"]["truncated"] == 1 and data["fill"] == 0.75
    assert found == {
        "model": {"name": "org/m", "parameters": 1000, "trained_parameters": 900},
        "mode": "superoffload",
        "device": "CPU",
        "ranks": 1,
        "total_steps": 9,
        "planned_memory": {"host_bytes": 5},
        "environment": {"packages": {"torch": "2"}},
    }


def test_a_resumed_run_adds_its_start_and_a_new_one_begins_again(one_rank: None, tmp_path: Path) -> None:
    for step, expected in ((4, [4]), (0, [0]), (5, [0, 5]), (7, [0, 5, 7])):
        recorder.start(make_run(tmp_path, step), PLAN, dict)
        assert [start["step"] for start in recorded(tmp_path)["starts"]] == expected
    (tmp_path / "run.json").write_text("{")
    recorder.start(make_run(tmp_path, 8), PLAN, dict)
    assert [start["step"] for start in recorded(tmp_path)["starts"]] == [8]


def test_the_trackers_get_the_report(one_rank: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "superoffload")
    run = make_run(tmp_path)
    recorder.start(run, {}, dict)
    recorder.end(run)
    assert run.trackers == [tmp_path / "report.html"]
    assert "org/m" in run.trackers[0].read_text()
    assert caplog.messages == [f"Report: {tmp_path / 'report.html'}"]


def test_the_error_that_ends_a_run_is_on_record(one_rank: None, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(RuntimeError), recorder.recording(run, PLAN, dict):
        raise RuntimeError("the loss was NaN\nmore")
    assert run.trackers == [tmp_path / "report.html"] and run.trackers.finished and run.samples.finished
    found = records.read(tmp_path)
    assert report.state(found) == "Failed; step 0 of 9 is the last on record. the loss was NaN"
    assert recorded(tmp_path)["model"]["name"] == "org/m"
    (tmp_path / "summary.json").write_text(json.dumps({"global_step": 9, "ended_at": 1e12}))  # as after the last step
    assert runs.read(tmp_path).state == "died"
    with recorder.recording(run := make_run(tmp_path), PLAN, dict):
        pass
    assert "error" not in recorded(tmp_path) and run.trackers.finished


def test_the_list_of_runs_reads_what_is_recorded(one_rank: None, tmp_path: Path) -> None:
    recorder.start(make_run(tmp_path), PLAN, dict)
    found = runs.read(tmp_path)
    assert (found.model, found.mode, found.total_steps, found.state) == ("org/m", "superoffload", 9, "died")


def test_what_goes_wrong_is_a_warning(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path)
    (tmp_path / "run.json.partial").mkdir()
    recorder.start(run, PLAN, dict)
    recorder.end(run)  # there are no records
    monkeypatch.setattr(report, "view", lambda _: {})
    (tmp_path / "metrics.jsonl").touch()
    recorder.end(run)  # the template lacks all its values
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "run.json was not written: " in caplog.messages[0]
    assert f"No report was written: {tmp_path}: has neither run.json nor metrics.jsonl" in caplog.messages[1]
    assert "No report was written: 'title' is undefined" in caplog.messages[2]
    assert run.trackers == []


def test_other_ranks_write_nothing(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_rank_0", lambda: False)
    recorder.start(make_run(tmp_path), PLAN, pytest.fail)
    recorder.end(make_run(tmp_path))
    assert list(tmp_path.iterdir()) == []
