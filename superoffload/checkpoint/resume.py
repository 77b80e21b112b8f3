"""Resume from a checkpoint as if the run had never stopped: find an intact one, compare the settings, restore.

`latest` alone is not trusted: every rank checks the size and checksum of its own files against the manifest. If one is
damaged, a warning names it, and the next older complete checkpoint is used.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superoffload import config as settings
from superoffload import distributed
from superoffload.checkpoint import manifest
from superoffload.checkpoint.manifest import Manifest
from superoffload.config import Config
from superoffload.ds_config import DsConfig
from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.protocols import Engine


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to resume from, intact on every rank."""

    path: Path
    manifest: Manifest

    @property
    def universal(self) -> bool:
        """Return whether any number of ranks can resume from it: `superoffload convert` wrote it."""
        return bool(self.manifest.get("universal"))


def find(config: Config) -> Source | None:
    """Find the checkpoint that `--resume` asks for and check it on every rank (collective); None: do not resume.

    Raises `UserError` if no checkpoint is intact, or if it belongs to a different run.
    """
    wanted = config.checkpoint.resume
    if wanted == "none":
        return None
    candidates: list[tuple[Path, Manifest]] = distributed.broadcast_from_rank_0(
        _candidates(config) if distributed.is_rank_0() else None
    )
    if not candidates:
        if wanted == "auto":
            if any(Path(config.output.output_dir).glob(manifest.TAGS)):
                logger.warning("%s has no complete checkpoint: starting from the model", config.output.output_dir)
            return None
        raise UserError(f"--resume {wanted}: no complete checkpoint there; a complete one has a {manifest.MANIFEST}")
    for path, described in candidates:
        _check_world_size(path, described)
        found = [text for text in distributed.all_gather_objects(_damage(path, described)) if text]
        if not found:
            _check_same_run(config, path, described)
            return Source(path, described)
        logger.warning("%s cannot be used: %s", path, "; ".join(found))
    raise UserError(
        f"--resume {wanted}: every checkpoint is damaged ({'; '.join(found)}); --resume none starts from the model"
    )


def _candidates(config: Config) -> list[tuple[Path, Manifest]]:
    """List the complete checkpoints to try: the one that `latest` names, then the others, newest first."""
    auto = config.checkpoint.resume == "auto"
    folder = Path(config.output.output_dir if auto else config.checkpoint.resume)
    if not auto and (described := manifest.read(folder)):
        return [(folder, described)]
    found = manifest.complete_checkpoints(folder)
    latest = manifest.read_latest(folder)
    named = folder / (latest or "nothing") if latest is not None else None
    if named is not None and named in found:
        found.sort(key=lambda path: path != named)
    elif found:
        what = f"names {named.name}, which is not complete" if named else "is missing"
        logger.warning("%s %s: using the newest complete checkpoint, %s", folder / manifest.LATEST, what, found[0].name)
    return [(path, described) for path in found if (described := manifest.read(path))]


def _damage(path: Path, described: Manifest) -> str:
    """Describe the first of this rank's files that is damaged; empty if none is."""
    own = f"pp_rank_{distributed.rank()}_"
    everything = bool(described.get("universal")) and distributed.is_rank_0()
    return manifest.damage(path, described, [name for name in described["files"] if everything or own in name])


def _check_world_size(path: Path, described: Manifest) -> None:
    saved = described["world_size"]
    if saved != distributed.world_size() and not described.get("universal"):
        raise UserError(
            f"{path} was saved by {saved} ranks, this run has {distributed.world_size()}: use {saved} ranks, or "
            f"convert it for any number of ranks: superoffload convert {path} NEW_FOLDER"
        )


def _check_same_run(config: Config, path: Path, described: Manifest) -> None:
    found = settings.differences(config, described["config"])
    if described.get("universal"):
        # A step has the same packs however they are distributed over ranks and micro-batches.
        distribution = ("--batch_size:", "--gradient_accumulation_steps:")
        found = [text for text in found if not text.startswith(distribution)]
        saved = _packs_per_step(described["config"], described["world_size"])
        current = _packs_per_step(settings.flat(config), distributed.world_size())
        if saved != current:
            found.append(f"rows or packs per step: checkpoint has {saved}, this run has {current}")
    if not found:
        return
    if not config.checkpoint.resume_anyway:
        raise UserError(
            f"{path} belongs to a different run ({'; '.join(found)}); --resume_anyway resumes with the new values, "
            "--resume none starts from the model"
        )
    logger.warning("Resuming with settings that differ from the checkpoint's: %s", "; ".join(found))


def _packs_per_step(values: dict[str, Any], world_size: int) -> int:
    return int(values["batch_size"] * values["gradient_accumulation_steps"] * world_size)


def with_checkpoint_format(ds_config: DsConfig, source: Source | None) -> DsConfig:
    """Return the ds_config, set to load the universal format if the checkpoint has it."""
    if source is None or not source.universal:
        return ds_config
    return {**ds_config, "checkpoint": {**ds_config.get("checkpoint", {}), "load_universal": True}}


def restore(engine: Engine, source: Source) -> dict[str, Any]:
    """Load model, optimizer and schedule into the engine (collective).

    Returns what `save` was given: `progress`, `config` and the entries of `extra`.
    """
    groups = engine.optimizer.param_groups
    decays = [group["weight_decay"] for group in groups]
    path, state = engine.load_checkpoint(str(source.path.parent), tag=source.path.name)
    if source.universal:  # DeepSpeed gives every group the values of the first one
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay
    if path is None:
        raise UserError(f"{source.path}: DeepSpeed could not load it")
    progress = state["progress"]
    logger.info("Resuming from %s: step %d, epoch %d", source.path, progress["step"], progress["epoch"])
    return state
