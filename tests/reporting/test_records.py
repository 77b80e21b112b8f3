"""What can be read of a run, whatever became of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from superoffload.errors import UserError
from superoffload.reporting import example, records
from tests.helpers.runs import make_checkpoint

pytestmark = pytest.mark.unit


def write(folder: Path, **files: Any) -> Path:
    """Write files of a run: `metrics` as lines, the others as JSON."""
    for name, content in files.items():
        if name == "metrics":
            (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in content))
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_the_whole_of_a_run(tmp_path: Path) -> None:
    example.write(tmp_path)
    found = records.read(tmp_path)
    assert len(found.steps) == 300 and len(found.evaluations) == 10 and len(found.samples) == 2
    assert found.last_step == found.run["total_steps"] == 3000
    assert found.settings["lr"] == 1e-5 and found.settings["max_grad_norm"] == 1.0
    assert found.export == tmp_path / "model_step3000" and found.checkpoint is None
    assert found.notes == () and found.sources == []


def test_a_run_that_died_has_all_but_what_was_cut_off(tmp_path: Path) -> None:
    write(tmp_path, metrics=['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": null}', '{"step": 3, "lo'])
    found = records.read(tmp_path)
    assert found.series("loss") == [(1, 2.0), (2, None)]
    assert (found.last_step, found.summary, found.settings) == (2, {}, {})
    assert found.notes == ("metrics.jsonl: 1 of 3 lines cannot be read, as after a run that was killed",)


@pytest.mark.parametrize(
    "line", ["[]", "3", '"step"', '{"step": "1", "loss": 1}', '{"step": null, "loss": 1}', "", "\0"]
)
def test_lines_of_another_form_are_left_out(line: str, tmp_path: Path) -> None:
    write(tmp_path, metrics=[line, '{"step": 2, "loss": 1.5}'])
    assert records.read(tmp_path).series("loss") == [(2, 1.5)]


def test_what_is_no_number_is_none() -> None:
    assert [records.number(value) for value in (1, 2.5, True, "1", None, float("nan"), 10**400)] == [
        1,
        2.5,
        *[None] * 5,
    ]


def test_files_that_are_not_json_are_notes(tmp_path: Path) -> None:
    write(tmp_path, metrics=[])
    for name in ("run.json", "summary.json"):
        (tmp_path / name).write_text("{")
    (tmp_path / "config.yaml").write_text("lr: fast\n")
    found = records.read(tmp_path)
    assert (found.run, found.summary, found.settings) == ({}, {}, {})
    assert [note.split(":")[0].split(" ")[0] for note in found.notes] == ["run.json", "summary.json", "--config"]


@pytest.mark.parametrize(("ended_at", "counts"), [(150.0, False), (250.0, True), (None, False)])
def test_a_summary_of_an_earlier_start_does_not_count(ended_at: float | None, counts: bool, tmp_path: Path) -> None:
    begun = [{"at": 100.0, "step": 0}, {"at": 200.0, "step": 5}]
    write(tmp_path, run={"starts": begun}, summary={"global_step": 9, "ended_at": ended_at})
    assert bool(records.read(tmp_path).summary) is counts


def test_a_summary_counts_if_nothing_says_when_the_run_started(tmp_path: Path) -> None:
    write(tmp_path, metrics=[], summary={"global_step": 9})
    assert records.read(tmp_path).last_step == 9


def test_the_newest_checkpoint_and_export(tmp_path: Path) -> None:
    write(tmp_path, metrics=[])
    make_checkpoint(tmp_path, 5, saved_at=1.0)
    newest = make_checkpoint(tmp_path, 9, saved_at=2.0)
    (tmp_path / "model_step5").mkdir()
    found = records.read(tmp_path)
    assert found.checkpoint == newest and found.export is None  # the folder has no model in it


def test_sources_are_those_of_the_metrics(tmp_path: Path) -> None:
    write(tmp_path, metrics=['{"step": 1, "loss": 1, "loss/a/b": 1}', '{"step": 1, "eval_loss": 1, "eval_loss/c": 2}'])
    assert records.read(tmp_path).sources == ["a/b", "c"]


def test_a_folder_without_records_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither run.json nor metrics.jsonl; give the output folder of a run"):
        records.read(tmp_path)
