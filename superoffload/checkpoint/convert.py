"""Convert a checkpoint to DeepSpeed's universal format, from which any number of ranks can resume."""

import argparse
import shutil
from pathlib import Path

from superoffload.checkpoint import manifest
from superoffload.errors import UserError


def convert(checkpoint: Path, target: Path, workers: int) -> None:
    """Write the universal form of a complete checkpoint to the new folder `target`: complete or absent.

    `workers` processes run at a time; each holds a few tensors in memory. Raises `UserError` if the checkpoint is not
    complete or not intact, or if the target exists.
    """
    described = manifest.read(checkpoint)
    if described is None or described.get("universal"):
        raise UserError(
            f"{checkpoint}: not a complete checkpoint of a run (a folder global_stepN with a {manifest.MANIFEST})"
        )
    if target.exists():
        raise UserError(f"{target}: already exists; use a new folder")
    manifest.require_intact(checkpoint)
    partial = target.with_name(f"{target.name}{manifest.PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _convert_files(checkpoint, partial, workers)
        paths = [path for path in partial.rglob("*") if path.is_file()]
        files = {str(path.relative_to(partial)): manifest.describe(path) for path in paths}
        manifest.write(partial, {**described, "universal": True, "files": files})
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert_files(checkpoint: Path, target: Path, workers: int) -> None:
    """Call DeepSpeed's converter with what it usually parses from its command line."""
    from deepspeed.checkpoint import ds_to_universal  # only now: the checks above need no DeepSpeed

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(checkpoint),
            output_folder=str(target),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
