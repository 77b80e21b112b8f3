"""What the report says of a run, complete or not."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from superoffload import commands, config, config_file
from superoffload.errors import UserError
from superoffload.reporting import curves, example, records, report
from tests.helpers.runs import make_checkpoint

pytestmark = pytest.mark.unit


class Page(HTMLParser):
    """The text of a page by the tag around it, its charts, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.loads: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self._tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        self.charts += [json.loads(value or "") for name, value in attrs if name == "data-chart"]
        if tag not in ("meta", "link"):
            self._tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._tags and self._tags.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if data.strip() and self._tags:
            self.texts.setdefault(self._tags[-1], []).append(data.strip())


def page_of(folder: Path) -> Page:
    return Page(report.html(records.read(folder)))


def write_metrics(folder: Path, *lines: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_whole_of_a_run(tmp_path: Path) -> None:
    example.write(tmp_path)
    page = page_of(tmp_path)
    assert page.texts["h1"] == ["meta-llama/Llama-3.1-8B"]
    assert page.texts["h2"] == [
        "Training", "Answers at the first and the last evaluation", "Use the model", "Speed", "Memory", "Data",
        "Settings", "Environment",
    ]  # fmt: skip
    titles = ["Loss", "Learning rate", "Gradient norm before clipping", "step 300", "step 3,000", "Throughput",
              "Where the time of a step goes", "Device memory", "Host memory", "Lengths of rows"]  # fmt: skip
    assert list(dict.fromkeys(page.texts["h3"])) == titles
    assert "Finished after 3,000 of 3,000 steps" in page.texts["p"]
    assert {"planned 121.3", "held out", "clipped", "backward"} <= set(page.texts["li"])
    assert "98.5%" in page.texts["td"]  # of packs


def test_it_loads_nothing(tmp_path: Path) -> None:
    example.write(tmp_path)
    assert page_of(tmp_path).loads == ["data:,"]
    assert "default-src 'none'" in report.html(records.read(tmp_path))


def test_what_a_model_and_a_user_write_stays_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"{{ 7*7 }}"
    write_metrics(tmp_path, {"step": 1, "loss": 1, f"loss/{evil}": 1.0})
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 1, "prompts": [evil], "answers": [evil]}) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"model": {"name": evil}, "environment": {"a": {evil: evil}}}))
    html = report.html(records.read(tmp_path))
    assert html.count("<script") == 1 and "<img" not in html
    page = Page(html)
    assert page.loads == ["data:,"]
    assert evil in "".join(page.texts["p"])
    names = [line["name"] for chart in page.charts for line in chart["lines"]]
    assert evil in names


def test_a_run_that_died_after_its_first_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "lr": 1e-5}\n{"step": 2, "lo')
    page = page_of(tmp_path)
    assert page.texts["h1"] == [tmp_path.name]
    assert "Not finished: step 1 is the last on record" in page.texts["p"]
    assert page.texts["h2"] == ["Training"]
    assert any("1 of 2 lines cannot be read" in text for text in page.texts["p"])


def test_a_run_that_died_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"model": {"name": "m"}, "total_steps": 7}))
    assert "Not finished: no step of 7 is on record" in page_of(tmp_path).texts["p"]


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ({"global_step": 4, "stopped_by": "SIGTERM"}, "Stopped by SIGTERM after 4 of 9 steps"),
        ({"global_step": 9, "stopped_by": None}, "Finished after 9 of 9 steps"),
        ({"global_step": 9}, "Finished after 9 of 9 steps"),
    ],
)
def test_how_a_run_ended(summary: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"total_steps": 9}))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert report.state(records.read(tmp_path)) == expected


def test_the_page_says_how_the_last_save_ended(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"global_step": 9, "checkpoint_note": "NO CHECKPOINT WAS SAVED"}))
    assert "NO CHECKPOINT WAS SAVED" in page_of(tmp_path).texts["p"]


def test_changed_settings_come_first(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    made = config.build({"model_name": "m", "output_dir": "o", "lr": 3e-4, "wandb_tags": ("a", "b")})
    (tmp_path / "config.yaml").write_text(config_file.write(made))
    found = report.view(records.read(tmp_path))
    assert found["changed"] == [
        ("model_name", "m", ""), ("lr", "0.0003", "1e-05"), ("output_dir", "o", ""), ("wandb_tags", "a b", "(none)"),
    ]  # fmt: skip
    assert ("max_length", "2048", "2048") in found["others"]
    assert len(found["changed"]) + len(found["others"]) == len(config_file.settings())


def test_clipped_steps_are_marked(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, *({"step": step, "loss": 1, "grad_norm": norm} for step, norm in enumerate([0.5, 2.0, None]))
    )
    (tmp_path / "config.yaml").write_text("model_name: m\noutput_dir: o\n")
    found = records.read(tmp_path)
    assert curves.clipped(found) == ([(1, 2.0)], 1.0)
    (chart,) = [one for one in curves.training(found) if one.title.startswith("Gradient")]
    assert chart.note == "1 of 3 logged steps were clipped to 1, 1 were infinite or NaN"
    assert [series.name for series, _ in chart.series] == ["gradient norm", "limit 1", "clipped"]


def test_the_parts_of_a_step_add_up_to_its_time(tmp_path: Path) -> None:
    one = {"step": 1, "loss": 1, "step_time_s": 1.0, "tokens_per_s": 9.0, "data_s": 0.1, "forward_s": 0.5}
    write_metrics(tmp_path, one, {**one, "step": 2, "upload_s": 0.3})
    assert curves.step_parts(records.read(tmp_path)) == {
        "data": [(1, 0.1), (2, 0.1)], "forward": [(1, 0.5), (2, 0.5)], "upload": [(1, None), (2, 0.3)],
        "rest": [(1, pytest.approx(0.4)), (2, pytest.approx(0.1))],
    }  # fmt: skip


def test_several_data_sets_have_a_chart_and_a_table(tmp_path: Path) -> None:
    write_metrics(tmp_path, *({"step": step, "loss": 1, "loss/a": 3.0 - step, "loss/b": None} for step in (1, 2)),
                  {"step": 2, "eval_loss": 1, "eval_loss/a": 1.5})  # fmt: skip
    source = {"label": "a", "rows": 1200, "tokens": 34000, "target_share": 0.25}
    (tmp_path / "run.json").write_text(json.dumps({"data": {"packed": False, "sources": [source]}}))
    found = report.view(records.read(tmp_path))
    assert found["sources"] == [["a", "1,200", "34,000", "25.0%", "2.0000", "1.0000"]]
    (chart,) = [one for one in found["training"] if one.title == "Loss of each data set"]
    assert [(series.name, series.kind) for series, _ in chart.series] == [("a", "line"), ("a, held out", "dots")]


def test_the_commands_are_those_of_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "my run"
    out.mkdir()
    write_metrics(out, {"step": 5, "loss": 1})
    assert report.view(records.read(out))["use"] == []
    make_checkpoint(out, 5, saved_at=1.0)
    commands_of = dict(report.view(records.read(out))["use"])
    assert commands_of["Talk to it"] == f"superoffload chat '{out}'"
    assert commands_of["Export the newest checkpoint"] == f"superoffload export '{out}' '{out}/model_step5'"
    assert commands_of["Serve it with vLLM"] == f"vllm serve '{out}/model_step5'"
    (out / "model_step5").mkdir()
    (out / "model_step5/config.json").touch()
    assert "Export the newest checkpoint" not in dict(report.view(records.read(out))["use"])


def test_the_command_writes_it(tmp_path: Path) -> None:
    example.write(tmp_path)
    for words, path in (([], tmp_path / "report.html"), (["--out", str(tmp_path / "x.html")], tmp_path / "x.html")):
        result = CliRunner().invoke(commands.group, ["report", str(tmp_path), *words])
        assert result.output == f"{path}\n", result.output
        assert path.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "form", [{"data": [1]}, {"model": "m"}, {"environment": {"torch": 2}}], ids=lambda form: next(iter(form))
)
def test_records_of_another_form_are_one_line(form: dict[str, Any], tmp_path: Path) -> None:
    example.write(tmp_path)
    described = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**described, **form}))
    with pytest.raises(UserError, match=r"its records have another form than this version writes \(.*\); use "):
        commands.group.main(["report", str(tmp_path)], standalone_mode=False)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    example.write(tmp_path)
    with pytest.raises(UserError, match=r"none/x.html: cannot be written \(No such file or directory\)"):
        report.write(tmp_path, tmp_path / "none/x.html")
