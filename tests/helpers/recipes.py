"""Run the recipes of scripts/ with a stand-in for what starts their ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
TINY = SCRIPTS / "finetune_tiny_cpu.sh"
# model, GPUs, max_length, sub-group, ratio, leaf module, attention: the values of upstream's scripts, but for the ratio
# of three, which is 0.9 there and does not fit (tests/planning/test_recipes.py), and for llama-8b_longcontext, which
# upstream does not have
RECIPES = {
    "llama-8b": ("meta-llama/Llama-3.1-8B", 1, 4096, 4e8, 0.8, None, "auto"),
    "llama-8b_longcontext": ("meta-llama/Llama-3.1-8B", 1, 131072, 4e8, 0.8, None, "auto"),
    "phi-4": ("microsoft/phi-4", 1, 4096, 4e8, 0.9, None, "auto"),
    "qwen3-14b": ("Qwen/Qwen3-14B", 1, 4096, 4e8, 0.9, None, "auto"),
    "gpt-oss-20b": ("openai/gpt-oss-20b", 1, 8192, 8e8, 0.95, "GptOssExperts", "eager"),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", 2, 4096, 4e8, 0.9, "Qwen3MoeSparseMoeBlock", "auto"),
    "seed-oss-36b": ("ByteDance-Seed/Seed-OSS-36B-Instruct", 2, 4096, 4e8, 0.92, None, "auto"),
    "llama-70b": ("meta-llama/Llama-3.3-70B-Instruct", 4, 4096, 4e8, 0.92, None, "auto"),
}
# Other values that differ from those of the other recipes, by flag.
OTHER_VALUES: dict[str, dict[str, object]] = {
    "llama-8b_longcontext": {
        "batch_size": 1,
        "dataset_name": ("emozilla/pg19",),
        "dataset_percentage": 1.0,
        "activation_checkpointing": "offload",
        "tiled_mlp": "auto",
        "long_rows": "split",
    }
}


def script_of(recipe: str) -> Path:
    return SCRIPTS / f"finetune_{recipe}_{RECIPES[recipe][1]}gpu.sh"


def changed(recipe: str, folder: Path, line: str, replacement: str) -> Path:
    """Copy a recipe and _launch.sh to a folder with one line of either replaced; return the recipe's copy."""
    copy = folder / "repository" / "scripts"
    copy.mkdir(parents=True)
    texts = {"recipe.sh": script_of(recipe).read_text(), "_launch.sh": (SCRIPTS / "_launch.sh").read_text()}
    assert sum(text.count(f"\n{line}\n") for text in texts.values()) == 1
    for name, text in texts.items():
        (copy / name).write_text(text.replace(f"\n{line}\n", f"\n{replacement}\n"))
    return copy / "recipe.sh"


def program(path: Path, commands: str) -> None:
    """Write an executable bash script."""
    path.write_text(f"#!/bin/bash\n{commands}\n")
    path.chmod(0o755)


def starter(folder: Path, commands: str) -> None:
    """Write what a recipe starts its ranks with: the launcher, or Python if there is one rank."""
    program(folder / "deepspeed", commands)
    program(folder / "python3", f'[[ $1 != -c ]] || exec {sys.executable} "$@"\n{commands}')


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """Make a folder for PATH whose `deepspeed` and `python3` write their arguments to `$SEEN`, and exit with 7."""
    folder = tmp_path / "bin"
    folder.mkdir()
    starter(folder, 'for word in "$@"; do printf "%s\\n" "$word"; done > "$SEEN"; exit 7')
    return folder


def call(script: Path, stand_in: Path, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a recipe from a folder outside the repository, with the stand-in before this environment's programs."""
    folder = stand_in.parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    path = f"{stand_in}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "SEEN": str(stand_in.parent / "seen"), **env}
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, env=environment, cwd=folder, timeout=60
    )


def seen(stand_in: Path) -> tuple[list[str], list[str]]:
    """Return the arguments that the stand-in received: those before the training script, and the script's."""
    arguments = (stand_in.parent / "seen").read_text().splitlines()
    script = arguments.index(str(REPOSITORY / "finetune_zero3.py"))
    return arguments[:script], arguments[script + 1 :]
