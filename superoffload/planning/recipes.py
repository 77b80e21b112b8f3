"""The values of a recipe in scripts/, as the flags that it passes on."""

import re
from pathlib import Path
from typing import Any

from superoffload.ds_config import REPOSITORY
from superoffload.errors import UserError
from superoffload.planning.budget import shape
from superoffload.setting import AUTO

SCRIPTS = REPOSITORY / "scripts"
# What the memory and the time of a run depend on: the names in a recipe and what they become.
NUMBERS = {"MAX_LENGTH": "max_length", "KEEP_CHECKPOINTS": "keep_checkpoints", "SAVE_STEPS": "save_steps"}
SWITCHES = {
    "PACKING": "packing",
    "SAVE_CHECKPOINT": "save_checkpoint",
    "EXPORT": "export",
}


def _paths() -> dict[str, Path]:
    found = {path: re.fullmatch(r"finetune_(.*)_\d+gpu\.sh", path.name) for path in SCRIPTS.glob("finetune_*gpu.sh")}
    return {match[1]: path for path, match in sorted(found.items()) if match}


def names() -> tuple[str, ...]:
    """List the recipes for GPUs."""
    return tuple(_paths())


def values(name: str) -> dict[str, str]:
    """Return the values in a recipe, by their names there. Raises `UserError` for an unknown recipe."""
    paths = _paths()
    if name not in paths:
        raise UserError(f"--recipe {name}: must be one of {', '.join(paths) or '(none: scripts/ is not installed)'}")
    text = paths[name].read_text(encoding="utf-8")
    return {key: value for key, value in re.findall(r'^([A-Z_]+)="?([^"\s]*)"?', text, re.M)}


def model(name: str) -> str:
    """Return the short name of a recipe's model, whose shape is built in."""
    return shape.built_in(values(name)["MODEL_NAME"]).name


def devices(name: str) -> int:
    """Return the number of devices that a recipe uses on each machine."""
    return int(values(name)["GPUS_PER_NODE"])


def batch(name: str) -> int:
    """Return the batch that a recipe's script divides among all devices."""
    return int(values(name)["BATCH_SIZE"])


def settings(name: str, superoffload: bool) -> dict[str, Any]:
    """Return the settings of a recipe by flag, as scripts/_launch.sh passes them, with the model's built-in shape.

    The batch is that of a device with the recipe's own number of devices. Outside of the mode superoffload the whole
    optimizer is on the host. Raises `UserError` for an unknown recipe.
    """
    found = values(name)
    recomputed = found["ACTIVATION_CHECKPOINTING"]
    tiles = found.get("TILED_MLP", "0")  # recipes of earlier versions do not have it
    return {
        "model_name": model(name),
        "batch_size": batch(name) // devices(name),
        "offload_ratio": float(found["OFFLOAD_RATIO"]) if superoffload else 1.0,
        "sub_group_size": int(float(found["SUB_GROUP_SIZE"])),
        "attn_implementation": found["ATTN_IMPLEMENTATION"],
        **{flag: int(found[key]) for key, flag in NUMBERS.items()},
        **{flag: found[key] == "true" for key, flag in SWITCHES.items()},
        "activation_checkpointing": {"true": "full", "false": "none"}.get(recomputed, recomputed),
        "tiled_mlp": tiles if tiles == AUTO else int(tiles),
    }
