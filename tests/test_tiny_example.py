"""The example runs from start to end; its module imports nothing heavy."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from superoffload import tiny
from tests.helpers.on_terminal import Terminal
from tests.helpers.ranks import REPOSITORY, environment, free_port, run


def test_importing_loads_no_heavy_package() -> None:
    code = "import sys, superoffload.tiny; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(tiny.__file__).parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_it_shows_little_before_the_display_and_only_its_end(columns: int, tmp_path: Path) -> None:
    words = ["setsid", "--ctty", "--wait", "bash", str(REPOSITORY / "scripts" / "finetune_tiny_cpu.sh"), "superoffload"]
    words += ["--max_steps", "4", "--log_interval", "1", "--save_steps", "2"]

    def start(terminal: str) -> "subprocess.Popen[bytes]":
        subprocess.run(["stty", "-F", terminal, "tostop"], check=True)  # stops jobs in the background that write
        env = environment(OUTPUT_DIR="out", MASTER_PORT=str(free_port()), TERM="xterm")
        with open(terminal, "r+b", buffering=0) as file:
            return subprocess.Popen(words, stdin=file, stdout=file, stderr=file, cwd=tmp_path, env=env)

    terminal = Terminal(columns, start, timeout_s=240, rows=80)
    lines = terminal.lines()
    assert terminal.status == 0, "\n".join(lines)
    top = next(number for number, line in enumerate(lines) if line.startswith("╭"))
    wrapped = [line for line in lines[:top] if line.startswith(("20", "=", "Fine"))]
    assert len(wrapped) <= 10, lines[:top]
    if columns == 200:
        assert wrapped == lines[:top]  # nothing of libraries and the launcher
    text = "\n".join(lines)
    assert text.count("╭") == text.count("╰") == 1
    assert "4/4" in text and "100%" in text
    assert "Checkpoint saved in out/global_step2" in text and "Checkpoint saved in out/global_step4" in text
    assert lines[-1].startswith("Answered right: 0% of 200")
    kept = (tmp_path / "out/run.log").read_text()
    assert "[stdout] DeepSpeed" in kept and kept.count("INFO [superoffload.steps] Step") == 4


def test_the_example_runs_to_its_last_line(tmp_path: Path) -> None:
    """The script writes, trains, saves, exports, loads and scores; here it stops after two steps."""
    script = REPOSITORY / "scripts" / "finetune_tiny_cpu.sh"
    result = run(["bash", str(script), "superoffload", "--max_steps", "2"], cwd=tmp_path,
                 OUTPUT_DIR="out", MASTER_PORT=str(free_port()))  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Checkpoint saved in out/global_step2" in result.stderr
    assert "Loading" not in result.stderr  # the libraries' progress bars
    shown = result.stdout.splitlines()[-2 - len(tiny.TASKS) :]
    assert shown[0].split() == ["Held-out", "prompt", "right", "answer", "before", "after"]
    assert all(line.startswith(task.instruction) for line, task in zip(shown[1:-1], tiny.TASKS, strict=True))
    assert re.fullmatch(r"Answered right: 0% of 200 held-out prompts before, \d+% after", shown[-1])
