"""Go on from a checkpoint as if nothing had happened: find an intact one, compare the settings, restore.

`latest` alone is not believed: every rank checks the size and checksum of its own files against the manifest, and
where one is damaged the next older complete checkpoint is taken, with a warning that names what was wrong.
"""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superoffload import config as settings
from superoffload import distributed
from superoffload.checkpoint import LATEST, complete_checkpoints, damage, read_manifest
from superoffload.config import Config
from superoffload.ds_config import Document
from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.metrics import Progress


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to go on from, intact on every rank."""

    path: Path
    manifest: dict[str, Any]

    @property
    def universal(self) -> bool:
        """Tell whether any number of ranks can go on from it: `superoffload convert` made it."""
        return bool(self.manifest.get("universal"))


def lock(folder: str) -> int | None:
    """Refuse an output folder into which another run writes; the lock ends with this process, however it ends.

    Returns the handle that holds it, None where the file system knows no locks. Raises `UserError`.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(
            f"--output_dir {folder}: another run is writing there; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s): take care that no other run writes there", folder, error.strerror)
        os.close(handle)
        return None
    return handle


def unlock(handle: int | None) -> None:
    """Let the output folder go at the end of a run."""
    if handle is not None:
        os.close(handle)


def find(config: Config) -> Source | None:
    """Choose the checkpoint that `--resume` means and check it on every rank (collective); None: start anew.

    Raises `UserError` where there is none that is intact, or where it is one of another run.
    """
    wanted = config.checkpoint.resume
    if wanted == "none":
        return None
    candidates: list[tuple[Path, Any]] = distributed.of_rank_0(_candidates(config) if distributed.speaks() else None)
    if not candidates:
        if wanted == "auto":
            if any(Path(config.output.output_dir).glob("global_step*")):
                logger.warning("%s holds no complete checkpoint: starting anew", config.output.output_dir)
            return None
        raise UserError(f"--resume {wanted}: no complete checkpoint there; a complete one has a manifest.json")
    for path, manifest in candidates:
        _check_world_size(path, manifest)
        found = [text for text in distributed.gather(_damage(path, manifest)) if text]
        if not found:
            _check_same_run(config, path, manifest)
            return Source(path, manifest)
        logger.warning("%s cannot be used: %s", path, "; ".join(found))
    raise UserError(f"--resume {wanted}: every checkpoint is damaged ({'; '.join(found)}); --resume none starts anew")


def _candidates(config: Config) -> list[tuple[Path, Any]]:
    """List the complete checkpoints to try: the one that `latest` names first, then by age."""
    auto = config.checkpoint.resume == "auto"
    folder = Path(config.output.output_dir if auto else config.checkpoint.resume)
    if not auto and read_manifest(folder):
        return [(folder, read_manifest(folder))]
    found = complete_checkpoints(folder)
    named = folder / _read(folder / LATEST) if (folder / LATEST).is_file() else None
    if named is not None and named in found:
        found.sort(key=lambda path: path != named)
    elif found:
        what = f"names {named.name}, which is not complete" if named else "is missing"
        logger.warning("%s %s: taking the newest complete checkpoint, %s", folder / LATEST, what, found[0].name)
    return [(path, read_manifest(path)) for path in found]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() or "nothing"


def _damage(path: Path, manifest: dict[str, Any]) -> str:
    """Say which file of this rank's is not as it was written; empty where all are."""
    mark = f"pp_rank_{distributed.rank()}_"
    everything = bool(manifest.get("universal")) and distributed.speaks()
    return damage(path, manifest, [name for name in manifest["files"] if everything or mark in name])


def _check_world_size(path: Path, manifest: dict[str, Any]) -> None:
    there = manifest["world_size"]
    if there != distributed.world_size() and not manifest.get("universal"):
        raise UserError(
            f"{path} was saved by {there} ranks, this run has {distributed.world_size()}: start it with {there}, or "
            f"make a checkpoint for any number of ranks: superoffload convert {path} NEW_FOLDER"
        )


def _check_same_run(config: Config, path: Path, manifest: dict[str, Any]) -> None:
    found = settings.differences(config, manifest["config"])
    if manifest.get("universal"):
        # The same packs belong to a step however its rows are shared out among ranks and micro-batches.
        shared_out = ("--batch_size:", "--gradient_accumulation_steps:")
        found = [text for text in found if not text.startswith(shared_out)]
        there, here = (
            _packs_per_step(manifest["config"], manifest["world_size"]),
            _packs_per_step(settings.flat(config), distributed.world_size()),
        )
        found += [f"rows or packs per step: there {there}, here {here}"] if there != here else []
    if not found:
        return
    if not config.checkpoint.resume_anyway:
        raise UserError(
            f"{path} is of another run ({'; '.join(found)}); --resume_anyway goes on with the new values, "
            "--resume none starts anew"
        )
    logger.warning("Going on with other settings than the checkpoint's: %s", "; ".join(found))


def _packs_per_step(values: dict[str, Any], ranks: int) -> int:
    return int(values["batch_size"] * values["gradient_accumulation_steps"] * ranks)


def prepared(document: Document, source: Source | None) -> Document:
    """Return DeepSpeed's dict, told where the checkpoint is of the universal format."""
    if source is None or not source.universal:
        return document
    return {**document, "checkpoint": {**document.get("checkpoint", {}), "load_universal": True}}


def restore(engine: Any, source: Source) -> tuple[Progress, dict[str, Any]]:
    """Load model, optimizer and schedule into the engine (collective); return progress and what `save` was given."""
    groups = engine.optimizer.param_groups
    decays = [group["weight_decay"] for group in groups]
    path, state = engine.load_checkpoint(str(source.path.parent), tag=source.path.name)
    if source.universal:  # DeepSpeed gives every group the values of the first one
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay
    if path is None:
        raise UserError(f"{source.path}: DeepSpeed could not load it")
    progress = Progress(**state["progress"])
    logger.info("Going on from %s: step %d, epoch %d", source.path, progress.step, progress.epoch)
    return progress, state
