"""The values of a recipe in scripts/, as the flags that it passes on."""

import re
from typing import Any

from superoffload.ds_config import REPOSITORY
from superoffload.errors import UserError

SCRIPTS = REPOSITORY / "scripts"
# What the memory and the time of a run depend on: the names in a recipe and what they become.
NUMBERS = {"MAX_LENGTH": "max_length", "KEEP_CHECKPOINTS": "keep_checkpoints", "SAVE_STEPS": "save_steps"}
SWITCHES = {
    "PACKING": "packing",
    "SAVE_CHECKPOINT": "save_checkpoint",
    "EXPORT": "export",
}


def names() -> tuple[str, ...]:
    """List the recipes for GPUs."""
    found = (re.fullmatch(r"finetune_(.*)_\d+gpu\.sh", path.name) for path in sorted(SCRIPTS.glob("finetune_*gpu.sh")))
    return tuple(match[1] for match in found if match)


def values(name: str) -> dict[str, str]:
    """Return the values in a recipe, by their names there. Raises `UserError` for an unknown recipe."""
    paths = list(SCRIPTS.glob(f"finetune_{name}_*gpu.sh")) if name in names() else []
    if not paths:
        raise UserError(f"--recipe {name}: must be one of {', '.join(names()) or '(none: scripts/ is not installed)'}")
    text = paths[0].read_text(encoding="utf-8")
    return {key: value for key, value in re.findall(r'^([A-Z_]+)="?([^"\s]*)"?', text, re.M)}


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
    return {
        "model_name": name,
        "batch_size": batch(name) // devices(name),
        "offload_ratio": float(found["OFFLOAD_RATIO"]) if superoffload else 1.0,
        "sub_group_size": int(float(found["SUB_GROUP_SIZE"])),
        "attn_implementation": found["ATTN_IMPLEMENTATION"],
        **{flag: int(found[key]) for key, flag in NUMBERS.items()},
        **{flag: found[key] == "true" for key, flag in SWITCHES.items()},
        "activation_checkpointing": {"true": "full", "false": "none"}.get(recomputed, recomputed),
    }
