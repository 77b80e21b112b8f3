"""A checkpoint that another number of ranks can go on from: DeepSpeed's universal format."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from deepspeed.checkpoint import ds_to_universal

from superoffload.checkpoint import MANIFEST, describe, read_manifest, require_intact
from superoffload.errors import UserError


def convert(checkpoint: Path, target: Path, workers: int) -> None:
    """Write the universal form of a complete checkpoint to the new folder `target`: complete or absent.

    `workers` processes run at a time, each holding some tensors. Raises `UserError` where the checkpoint is not
    complete or not intact, or the target exists.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None or manifest.get("universal"):
        raise UserError(f"{checkpoint}: not a complete checkpoint of a run (a folder global_stepN with a {MANIFEST})")
    if target.exists():
        raise UserError(f"{target}: exists already; name a new folder")
    require_intact(checkpoint)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        ds_to_universal.main(_arguments(checkpoint, partial, workers))
        files = {str(path.relative_to(partial)): describe(path) for path in partial.rglob("*") if path.is_file()}
        described = {**manifest, "universal": True, "files": files}
        (partial / MANIFEST).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _arguments(checkpoint: Path, target: Path, workers: int) -> argparse.Namespace:
    """Fill in what DeepSpeed's converter takes from its command line."""
    values: dict[str, Any] = {
        "input_folder": str(checkpoint),
        "output_folder": str(target),
        "num_extract_workers": workers,
        "num_merge_workers": workers,
        "keep_temp_folder": False,
        "strict": True,
        "inject_missing_state": False,
    }
    return argparse.Namespace(**values)
