"""The jobs of the recipes in scripts/, read from the commands that they would run."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from superoffload import cli, ds_config
from superoffload.planning.budget import job
from superoffload.planning.budget.job import Job
from tests.helpers.recipes import RECIPES, script_of

ALPACA_LENGTH = 1024  # tokens; about the longest row of the recipes' data set


def command(name: str, mode: str = "superoffload") -> list[str]:
    """Return the arguments that a recipe passes to the training script."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the launcher is
    done = subprocess.run(
        ["bash", str(script_of(name)), mode],
        capture_output=True, text=True, env={**os.environ, "PATH": path, "DRY_RUN": "1"}, timeout=60, check=True,
    )  # fmt: skip
    words = shlex.split(done.stdout.splitlines()[-1])
    return words[next(i for i, word in enumerate(words) if word.endswith("finetune_zero3.py")) + 1 :]


def recipe_job(name: str, mode: str = "superoffload") -> Job:
    """Return the job of a recipe; rows that are not packed are assumed to be as long as the data set's, at most."""
    settings = cli.parse(command(name, mode))
    ranks = RECIPES[name][1]
    merged = ds_config.merge_flags(ds_config.read_ds_config(settings), settings, ranks)
    wanted = job.of(merged.config, merged.ds_config, ranks, ranks)
    return wanted if merged.config.data.packs else replace(wanted, length=min(wanted.length, ALPACA_LENGTH))
