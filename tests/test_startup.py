"""What a process imports, and how it ends, if there is nothing to train."""

import subprocess
import sys

import pytest

from tests.helpers.ranks import REPOSITORY

HEAVY = {"torch", "deepspeed", "transformers", "datasets", "wandb", "huggingface_hub", "numpy"}
# Runs a script, or with -m a module, and writes as the last line of stderr which heavy libraries it has imported.
PROGRAM = f"""
import atexit, runpy, sys
atexit.register(lambda: sys.stderr.write(repr(sorted({HEAVY} & set(sys.modules)))))
sys.argv.pop(0)
if sys.argv[0] == "-m":
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPT = "finetune_zero3.py"
COMMAND = ["-m", "superoffload.commands"]


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ([SCRIPT, "--help"], 0),
        ([SCRIPT, "--model_name", "m", "--output_dir", "o", "--lr", "0"], 2),
        ([SCRIPT, "--model_name", "m", "--output_dir", "o", "--deepspeed_config", "missing.json"], 2),
        ([*COMMAND, "--help"], 0),
        ([*COMMAND, "unknown"], 2),
        ([*COMMAND, "runs", "missing"], 2),
        *[
            ([*COMMAND, name, "--help"], 0)
            for name in ("preview", "plan", "bench", "convert", "export", "push", "chat", "eval", "tiny")
        ],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_help_and_usage_errors_import_no_heavy_library(words: list[str], status: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, cwd=REPOSITORY, timeout=60
    )
    assert result.returncode == status, result.stderr
    *errors, imported = result.stderr.splitlines()
    assert imported == "[]"
    if status:
        assert (len(errors), errors[0][:7], result.stdout) == (1, "Error: ", "")
    else:
        assert (errors, result.stdout[:7]) == ([], "Usage: ")


def test_the_memory_of_a_known_model_is_computed_without_a_heavy_library() -> None:
    program = (
        "import sys; from superoffload.planning.budget import job, memory, shape; shape.built_in('llama-70b'); "
        f"print(sorted(({HEAVY} | {{'pydantic'}}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_deepspeeds_muon_is_imported_without_torchs_compiler() -> None:
    program = (
        "import sys; from superoffload.training import engine; engine._import_muon(); "
        "print(engine.MUON in sys.modules, 'torch._inductor.compile_fx' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "True False"
