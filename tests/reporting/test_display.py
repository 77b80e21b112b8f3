"""Which display a run has, and what is on a terminal during and after it."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.errors import ConsoleError
from rich.live import Live

from superoffload import log
from superoffload.reporting import choice
from superoffload.reporting.choice import wants_rich
from superoffload.reporting.display import Display
from superoffload.reporting.live import LiveDisplay
from superoffload.reporting.panel import Panel
from tests.helpers.on_terminal import run_display


@pytest.mark.parametrize("columns", [80, 200])
def test_a_run_from_its_start_to_its_end(columns: int, tmp_path: Path) -> None:
    terminal = run_display(["step", "warn", "step", "error", "step"], columns, tmp_path)
    assert terminal.status == 0
    lines = terminal.lines()
    text = "\n".join(lines)
    assert lines[0].endswith("INFO before")
    assert lines[-1].endswith("INFO after")
    assert lines[-2].startswith("╰") and len(lines[-2]) == columns
    assert text.count("org/model") == 1  # drawn in its place
    assert text.count("look here") == 1
    assert "4/10" in text and "2.5000" in text
    assert "Step 4 |" not in text
    above = text[: text.index("╭")].replace("\n", "")  # a long line is wrapped, not cut
    assert above.count("an error") == 12 and "look here" not in above
    assert not terminal.screen.cursor.hidden


@pytest.mark.parametrize(
    ("word", "status", "last"), [("user", 2, "Error: --flag: wrong"), ("bug", 1, "ValueError: a bug")]
)
def test_an_error_is_the_last_thing_on_the_screen(word: str, status: int, last: str, tmp_path: Path) -> None:
    terminal = run_display(["step", word], 80, tmp_path)
    assert terminal.status == status
    assert terminal.lines()[-1] == last
    assert "\n".join(terminal.lines()).count("org/model") == 1


def test_a_run_that_is_killed_leaves_the_cursor_visible(tmp_path: Path) -> None:
    terminal = run_display(["step", "kill"], 80, tmp_path)
    assert terminal.status == -9
    assert "4/10" in "\n".join(terminal.lines())
    assert not terminal.screen.cursor.hidden


def test_what_another_rank_says_before_it_dies_stays(tmp_path: Path) -> None:
    terminal = run_display(["step", "other", "kill"], 80, tmp_path)
    assert terminal.lines()[-1] == "[rank 1] Error: memory ran out"
    assert "\n".join(terminal.lines()).count("org/model") == 1


def test_a_terminal_that_grows(tmp_path: Path) -> None:
    terminal = run_display(["step", "grow", "step"], 80, tmp_path)
    assert terminal.status == 0
    assert len(terminal.lines()[-2]) == 120


def test_a_display_that_fails_leaves_the_run_alone(tmp_path: Path) -> None:
    terminal = run_display(["break", "step", "step", "warn"], 80, tmp_path)
    assert terminal.status == 0
    text = "\n".join(terminal.lines())
    assert text.count("The display failed and is disabled") == 1
    assert "look here" in text and "Step 4 | Loss: 2.5" in text and "Traceback" not in text
    assert terminal.lines()[-1].endswith("INFO after")


@pytest.mark.unit
def test_a_display_that_cannot_be_made_or_started_leaves_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise ConsoleError("no console")

    monkeypatch.setenv("TERM", "xterm")
    output = SimpleNamespace(display="rich", log_level="INFO")
    monkeypatch.setattr(choice, "_panel", fail)
    run: Any = SimpleNamespace(config=SimpleNamespace(output=output))
    assert type(choice.choose(run)) is Display
    assert caplog.messages == ["The live display cannot be made, lines follow instead: no console"]

    monkeypatch.setattr(Live, "start", fail)
    with LiveDisplay(Panel("m", 10, 0)):
        assert log.screen.display is None
    assert caplog.messages[1:] == ["The display failed and is disabled: no console"]


def test_no_color_is_obeyed(tmp_path: Path) -> None:
    assert b"\x1b[36m" in run_display(["step"], 80, tmp_path).raw
    assert b"\x1b[36m" not in run_display(["step"], 80, tmp_path, NO_COLOR="1").raw


@pytest.mark.unit
@pytest.mark.parametrize(
    ("display", "level", "term", "is_terminal", "expected"),
    [
        ("auto", "INFO", "xterm", True, True),
        ("auto", "INFO", "xterm", False, False),
        ("auto", "INFO", "dumb", True, False),
        ("auto", "DEBUG", "xterm", True, False),
        ("rich", "INFO", "xterm", False, True),
        ("rich", "DEBUG", "xterm", False, True),
        ("rich", "INFO", "dumb", True, False),
        ("plain", "INFO", "xterm", True, False),
    ],
)
def test_choice(
    display: str, level: str, term: str, is_terminal: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert wants_rich(display, level) is expected
