"""`from superoffload import finetune`: a run from Python."""

import json
import math
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from superoffload import api, cli, finetune
from superoffload.errors import UserError
from tests.helpers import documents
from tests.helpers.forked import launch
from tests.helpers.ranks import REPOSITORY, environment
from tests.helpers.runs import logged


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys, superoffload; before = [n for n in sys.modules if n.startswith('superoffload')];"
        "from superoffload import finetune; print(before, {'torch', 'deepspeed', 'yaml', 'click'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "['superoffload'] {'click'}\n"


@pytest.mark.unit
def test_the_example_of_the_documentation_takes_the_settings() -> None:
    block, *_ = documents.blocks(documents.read(REPOSITORY / "docs/python.md"), "python")
    given: dict[str, Any] = {}

    def take(**settings: Any) -> Any:
        given.update(settings)
        return api.Finetuned(output_dir=Path(), steps=0, final_loss=0.0, checkpoint=None, export=None)

    exec(block.replace("from superoffload import finetune", ""), {"finetune": take})
    assert cli.parse(api._flags(given)).training.lr == 2e-5


@pytest.mark.unit
def test_the_settings_become_flags() -> None:
    settings = {
        "config": "run.yaml",
        "dataset_name": ["a", "b"],
        "output_dir": Path("out"),
        "packing": False,
        "lr": 1e-5,
    }
    more = {"export": True, "revision": None, "wandb_tags": (), "freeze": None, "columns": "-x"}
    flags = api._flags({**settings, **more})
    assert flags == ["--config=run.yaml", "--dataset_name=a", "b", "--output_dir=out", "--no_packing", "--lr=1e-05",
                     "--export", "--columns=-x"]  # fmt: skip


@pytest.mark.unit
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modelname": "m"}, "finetune: modelname: there is no such setting; did you mean model_name?"),
        ({"local_rank": 0}, "finetune: local_rank: there is no such setting"),
        ({"packing": "no"}, "--packing 'no': must be True or False"),
        ({"lr": "fast"}, "'fast' is not a valid float"),
        ({"lr": -1}, "--lr -1.0: must be 0 < value <= 10"),
        ({"output_dir": None}, "--output_dir"),
        ({"wandb_tags": ["a", "--lr=1"]}, "--wandb_tags --lr=1: begins as a flag does; make it the first value"),
    ],
)
def test_a_mistake_is_found_before_a_process_starts(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        finetune(**{"model_name": "m", "output_dir": "o", **settings})
    assert message in str(raised.value)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("status", "lines", "error", "text"),
    [
        (2, ["INFO x", "Error: --lr: wrong", "later"], UserError, "--lr: wrong"),
        (3, ["ERROR NO MODEL WAS EXPORTED"], UserError, "the last checkpoint or the export failed"),
        (1, ["Traceback", "ValueError: a bug"], RuntimeError, "status 1; its last line: ValueError: a bug"),
        (-9, [], RuntimeError, "killed by signal 9"),
    ],
)
def test_what_a_status_becomes(status: int, lines: list[str], error: type[Exception], text: str) -> None:
    found = api._error(status, deque(lines))
    assert type(found) is error and text in str(found)


@pytest.mark.unit
def test_the_summary_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    asked = cli.parse(["--model_name", "m", "--output_dir", str(tmp_path)])
    for text in (None, '{"ended_at": 5.0}'):
        if text is not None:
            (tmp_path / "summary.json").write_text(text)
        with pytest.raises(RuntimeError, match=r"the run has ended, but .*summary.json could not be written; see "):
            api._result(asked, 6.0)


@pytest.mark.unit
def test_what_was_not_asked_for_is_none(tmp_path: Path) -> None:
    asked = cli.parse(["--model_name", "m", "--output_dir", str(tmp_path)])
    (tmp_path / "model_step1").mkdir()  # of an earlier run
    summary = {"global_step": 1, "final_loss": None, "checkpoint": None, "ended_at": 5.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = api._result(asked, 4.0)
    assert (found.steps, found.checkpoint, found.export) == (1, None, None) and math.isnan(found.final_loss)


@pytest.mark.slow
def test_a_call_equals_the_command(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    settings = {"model_name": model_folder, "dataset_name": rows_file, "max_length": 128, "deterministic": True}
    folder = tmp_path / "call"
    done = finetune(**settings, output_dir=folder, max_steps=2, lr=1e-3, save_checkpoint=True, export=True)
    assert "Step 1 | Loss" in capsys.readouterr().err
    flags = ["--model_name", str(model_folder), "--dataset_name", str(rows_file), "--max_length", "128"]
    flags += ["--deterministic", "--max_steps", "2", "--lr", "1e-3", "--save_checkpoint", "--export"]
    assert launch(1, *flags, "--output_dir", str(tmp_path / "command")).returncode == 0
    assert logged(folder) == logged(tmp_path / "command")
    weights = [tmp_path / name / "model_step2" / "model.safetensors" for name in ("call", "command")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (done.steps, done.checkpoint, done.export) == (2, folder / "global_step2", folder / "model_step2")
    assert math.isfinite(done.final_loss) and done.final_loss == logged(folder)[-1]["loss"]
    assert dict(os.environ) == before


def test_a_user_error_of_the_run_is_raised(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--deepspeed_config /missing.json: "):  # said before torch is imported
        finetune(model_name=model_folder, deepspeed_config="/missing.json", output_dir=tmp_path)


CHILD = """
import os, signal, sys
signal.signal(signal.SIGINT, lambda *_: (print("saved"), sys.exit(0)))
os.kill(os.getppid(), signal.SIGINT)
signal.pause()
"""


def test_ctrl_c_reaches_the_run_and_is_raised_after_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            api._run([sys.executable, "-c", CHILD], environment())
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "saved\n"
