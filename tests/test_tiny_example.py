"""The example runs from start to end; its module imports nothing heavy."""

import re
import subprocess
import sys
from pathlib import Path

from superoffload import tiny
from tests.helpers.ranks import REPOSITORY, free_port, run


def test_importing_loads_no_heavy_package() -> None:
    code = "import sys, superoffload.tiny; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(tiny.__file__).parents[1])


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
