"""Trackers: metrics.jsonl and Weights & Biases."""

import contextlib
import json
import sys
import types
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from superoffload import config
from superoffload.training import tracking
from superoffload.training.trackers import names
from superoffload.training.trackers.json_lines import JsonLines

pytestmark = pytest.mark.unit


class FakeWandb(types.ModuleType):
    """A stand-in for the wandb package, in which one of the three functions can fail."""

    def __init__(self, failing: str = "") -> None:
        super().__init__("wandb")
        self.failing = failing
        self.calls: list[tuple[str, Any]] = []

    def _call(self, name: str, value: Any) -> None:
        self.calls.append((name, value))
        if name == self.failing:
            raise RuntimeError(f"{name} is down")

    def init(self, **options: Any) -> Any:
        self._call("init", options)
        return types.SimpleNamespace(id=options["id"] or "new-id")

    def log(self, values: dict[str, Any], step: int) -> None:
        self._call("log", (step, values))

    def finish(self) -> None:
        self._call("finish", None)


def start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str = "", is_rank_0: bool = True, **resumed: Any
) -> tuple[tracking.Trackers, FakeWandb]:
    fake = FakeWandb(failing)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    values = {
        "model_name": "org/m",
        "output_dir": str(folder),
        "report_to": ("wandb",),
        "wandb_tags": ("a", "b"),
        "lr": 2e-5,
    }
    return tracking.start(config.build(values), is_rank_0, **resumed), fake


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_numbers_reach_both_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers, fake = start(tmp_path, monkeypatch)
    trackers.log(1, {"step": 1, "loss": 2.5, "tokens_per_s": 10.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5, "tokens_per_s": 10.0}]
    trackers.log(1, {"step": 1, "eval_loss": 2.0})
    trackers.finish()
    assert [name for name, _ in fake.calls] == ["init", "log", "log", "finish"]
    assert fake.calls[2][1] == (1, {"perf/step": 1, "eval/loss": 2.0})
    options = fake.calls[0][1]
    assert options["config"]["lr"] == 2e-5
    assert options["config"]["model_name"] == "org/m"
    assert options["tags"] == ["a", "b"]
    assert options["name"].startswith("m_bs1_seq2048_ac0_T")
    assert fake.calls[1][1] == (1, {"perf/step": 1, "train/loss": 2.5, "perf/tokens_per_s": 10.0})


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_the_file_stays_valid_json_whatever_the_numbers(
    number: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers, fake = start(tmp_path, monkeypatch)
    trackers.log(1, {"step": 1, "loss": 2.5, "grad_norm": number})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": 2.5, "grad_norm": None}
    assert fake.calls[1][1] == (1, {"perf/step": 1, "train/loss": 2.5, "train/grad_norm": number})
    resumed, _ = start(tmp_path, monkeypatch, step=1)
    resumed.finish()
    assert (tmp_path / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize(
    ("failing", "calls"),
    [("init", ["init"]), ("log", ["init", "log", "finish"]), ("finish", ["init", "log", "log", "finish"])],
)
def test_a_failing_wandb_never_stops_a_run(
    failing: str, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trackers, fake = start(tmp_path, monkeypatch, failing)
    trackers.log(1, {"loss": 2.5})
    trackers.log(2, {"loss": 2.4})
    trackers.finish()
    assert [name for name, _ in fake.calls] == calls
    assert len(lines(tmp_path)) == 2
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert f"{failing} is down" in warnings[0]


def test_other_ranks_track_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers, fake = start(tmp_path, monkeypatch, is_rank_0=False)
    trackers.log(1, {"loss": 2.5})
    trackers.finish()
    assert fake.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_metrics_file_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    trackers, fake = start(tmp_path, monkeypatch)
    trackers.log(1, {"loss": 2.5})
    trackers.finish()
    assert [name for name, _ in fake.calls] == ["init", "log", "finish"]


def test_the_run_name_is_that_of_upstream() -> None:
    values = {"model_name": "org/Model-8B/", "output_dir": "o", "batch_size": 4, "activation_checkpointing": True}
    name = names.run_name(config.build(values), datetime(2026, 1, 2, 3, 4, 5))
    assert name == "Model-8B_bs4_seq2048_ac1_T20260102_030405"


def test_a_resumed_run_continues_its_file_and_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = start(tmp_path, monkeypatch)
    for step in (1, 2, 3, 4):
        first.log(step, {"step": step})
    state = first.state()
    assert state == {"run_ids": {"wandb": "new-id"}}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # truncated by a crash
    second, fake = start(tmp_path, monkeypatch, step=2, state=state)
    second.log(3, {"step": 3, "again": True})
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert (fake.calls[0][1]["id"], fake.calls[0][1]["resume"]) == ("new-id", "allow")
    start(tmp_path, monkeypatch)
    assert lines(tmp_path) == []


def test_answers_are_recorded_if_there_are_prompts(tmp_path: Path) -> None:
    asked = config.build({"model_name": "m", "output_dir": str(tmp_path), "sample_prompts": "p.txt"})
    silent = config.build({"model_name": "m", "output_dir": str(tmp_path)})
    for chosen, is_rank_0 in ((asked, False), (silent, True)):
        tracking.start_samples(chosen, is_rank_0).log(1, {"step": 1})
    assert list(tmp_path.iterdir()) == []
    first = tracking.start_samples(asked, True)
    for step in (1, 2, 3):
        first.log(step, {"step": step, "prompts": ["a"], "answers": ["b"]})
    tracking.start_samples(asked, True, step=2).log(3, {"step": 3, "answers": []})
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 2, 3] and kept[2]["answers"] == []
    tracking.start_samples(silent, True, step=0)
    assert (tmp_path / "samples.jsonl").read_text() == ""  # those of another run


def test_a_resume_onto_a_full_disk_loses_no_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = config.build({"model_name": "m", "output_dir": str(tmp_path)})
    tracking.start(asked, True).log(1, {"step": 1})
    (tmp_path / "metrics.jsonl.partial").mkdir()  # in place of the full disk: it cannot be written
    tracking.start(asked, True, step=1).log(2, {"step": 2})
    assert lines(tmp_path) == [{"step": 1}]
    assert "metrics.jsonl failed to start and is disabled" in caplog.text


def test_lines_are_written_again_when_the_disk_has_space(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = JsonLines(tmp_path / "metrics.jsonl", 0)
    healthy = made._file
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        made._file = full
        made.log(1, {"step": 1})
        made.log(2, {"step": 2})
        made._file = healthy
        made.log(3, {"step": 3})
        with contextlib.suppress(OSError):
            full.close()
    assert lines(tmp_path) == [{"step": 3}]
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "cannot be written (No space left on device); lines may be missing there"
    ]
