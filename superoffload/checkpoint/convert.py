"""Convert a checkpoint to DeepSpeed's universal format, from which any number of ranks can resume."""

import argparse
import shutil
from pathlib import Path

from superoffload.checkpoint import manifest
from superoffload.errors import UserError


def convert(checkpoint: Path, target: Path, workers: int, *, trusted: bool = False) -> None:
    """Write the universal form of a complete checkpoint to the new folder `target`: complete or absent, and on disk.

    `workers` processes run at a time; each holds a few tensors in memory. trusted: see `trust.check`. Raises
    `UserError` if the checkpoint is not complete, not intact or not to be trusted, if the target exists, or if its disk
    is too small.
    """
    from superoffload.checkpoint import trust  # imports torch, as the converter does; the checks before do not

    described = manifest.read(checkpoint)
    if described is None or described.get("universal"):
        raise UserError(
            f"{checkpoint}: not a complete checkpoint of a run (a folder global_stepN with a {manifest.MANIFEST})"
        )
    if target.exists():
        raise UserError(f"{target}: already exists; use a new folder")
    _check_space(target, described)
    manifest.require_intact(checkpoint)
    trust.check(checkpoint, sorted(checkpoint.glob("*.pt")), trusted=trusted)
    partial = target.with_name(f"{target.name}{manifest.PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _convert_files(checkpoint, partial, workers)
        paths = [path for path in partial.rglob("*") if path.is_file()]
        files = {str(path.relative_to(partial)): manifest.describe(path) for path in paths}
        for path in (*paths, *{path.parent for path in paths}):
            manifest.sync(path)
        manifest.write(partial, {**described, "universal": True, "files": files})
        partial.rename(target)
        manifest.sync(target.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_space(target: Path, described: manifest.Manifest) -> None:
    """Raise `UserError` unless the target's disk has room for the result and the converter's pieces of it."""
    needed = 2 * sum(entry["bytes"] for entry in described["files"].values())
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{target}: its disk has {free / 2**30:.2f} GiB free, conversion needs {needed / 2**30:.2f} GiB"
        )


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
