"""Resume from a checkpoint as if the run had never stopped: compare the settings, find an intact one, restore.

`latest` alone is not trusted: every rank checks the size and checksum of its own files against the manifest. If one is
damaged, a warning names it, and the next older complete checkpoint is used. Settings are compared first, from the
manifest alone, because reading the files of a large model takes minutes.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from superoffload import config as settings
from superoffload import distributed
from superoffload.checkpoint import manifest, trust
from superoffload.checkpoint.manifest import Manifest
from superoffload.config import Config
from superoffload.ds_config import DsConfig
from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.protocols import Engine

LENGTH = ("--num_train_epochs:", "--max_steps:")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to resume from, intact on every rank."""

    path: Path
    manifest: Manifest

    @property
    def universal(self) -> bool:
        """Return whether any number of ranks can resume from it: `superoffload convert` wrote it."""
        return bool(self.manifest.get("universal"))


def find(config: Config) -> list[Source]:
    """List the complete checkpoints that `--resume` allows, the one to try first in front (collective).

    Empty to start from the model. Reads manifests only: `first_intact` reads the files. Raises `UserError` if there is
    none, or if the first belongs to a different run or to another number of ranks.
    """
    wanted = config.checkpoint.resume
    if wanted == "none":
        return []
    found: list[tuple[Path, Manifest]] | str = distributed.broadcast_from_rank_0(
        _candidates(config) if distributed.is_rank_0() else None
    )
    if isinstance(found, str):
        raise UserError(found)
    if found:
        _check_world_size(*found[0])
        _check_same_run(config, *found[0])
    elif wanted == "auto":
        if any(Path(config.output.output_dir).glob(manifest.TAGS)):
            logger.warning("%s has no complete checkpoint: starting from the model", config.output.output_dir)
    else:
        raise UserError(f"--resume {wanted}: no complete checkpoint there; a complete one has a {manifest.MANIFEST}")
    return [Source(path, described) for path, described in found]


def first_intact(config: Config, candidates: list[Source]) -> Source | None:
    """Return the first of the candidates that every rank finds intact (collective); None if there are no candidates.

    Reads every file of this rank. Raises `UserError` if all are damaged, or if one is not to be trusted.
    """
    found: list[str] = []
    for source in candidates:
        _check_world_size(source.path, source.manifest)
        problems = distributed.all_gather_objects(_problems(source, trusted=config.checkpoint.trust_checkpoint))
        for refusal in (refused for _, refused in problems if refused):
            raise UserError(refusal)
        found = [damage for damage, _ in problems if damage]
        if not found:
            if source is not candidates[0]:
                _check_same_run(config, source.path, source.manifest)
            return source
        logger.warning("%s cannot be used: %s", source.path, "; ".join(found))
    if found:
        raise UserError(
            f"--resume {config.checkpoint.resume}: every checkpoint is damaged ({'; '.join(found)}); --resume none "
            "starts from the model"
        )
    return None


def _candidates(config: Config) -> list[tuple[Path, Manifest]] | str:
    """List the complete checkpoints: the one that `latest` names, then the others, newest first; or say what is wrong.

    Called on rank 0 alone, so an error must not be raised here: the other ranks wait for what this returns.
    """
    try:
        return _complete(config)
    except UserError as error:
        return str(error)


def _complete(config: Config) -> list[tuple[Path, Manifest]]:
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


def _problems(source: Source, *, trusted: bool) -> tuple[str, str]:
    """Describe the first of this rank's files that is damaged, or else the first that is not to be trusted."""
    own = f"pp_rank_{distributed.rank()}_"
    names = [name for name in source.manifest["files"] if own in name or source.universal]
    # Every rank loads every tensor of a checkpoint for any number of ranks; one of them reads all of it beforehand.
    hashed = [] if source.universal and not distributed.is_rank_0() else names
    if damage := manifest.damage(source.path, source.manifest, hashed):
        return damage, ""
    # DeepSpeed loads the files of a checkpoint for any number of ranks itself, also those that the manifest leaves out.
    loaded = trust.stored(source.path) if source.universal else [source.path / name for name in names]
    try:
        trust.check(source.path, loaded, trusted=trusted)
    except UserError as error:
        return "", str(error)
    return "", ""


def _check_world_size(path: Path, described: Manifest) -> None:
    saved = described["world_size"]
    if saved != distributed.world_size() and not described.get("universal"):
        raise UserError(
            f"{path} was saved by {saved} ranks, this run has {distributed.world_size()}: use {saved} ranks, or "
            f"convert it for any number of ranks: superoffload convert {path} NEW_FOLDER"
        )


def _check_same_run(config: Config, path: Path, described: Manifest) -> None:
    """Raise `UserError` for settings that make a different run.

    A longer run is the same run; so is one that deals out the packs otherwise, from a converted checkpoint or with
    another `--sequence_parallel_size` and as many packs per step.
    """
    found = settings.differences(config, described["config"])
    parts, ranks, saved = "--sequence_parallel_size:", described["world_size"], described["config"]
    as_many = _packs_per_step(settings.flat(config), ranks) == _packs_per_step(saved, ranks)
    if described.get("universal") or (as_many and any(text.startswith(parts) for text in found)):
        # The position in the data is counted in packs, however they are distributed over ranks and micro-batches.
        distribution = ("--batch_size:", "--gradient_accumulation_steps:", parts)
        found = [text for text in found if not text.startswith(distribution)]
    longer = [text for text in found if text.startswith(LENGTH)]
    if longer and longer == found and _is_longer(settings.flat(config), described["config"]):
        logger.warning(
            "Training longer than the run of %s (%s): the order of the data continues, and the schedule is stretched "
            "to the new last step, so the learning rate of the next steps is that of the longer schedule",
            path,
            "; ".join(longer),
        )
        return
    if not found:
        return
    if not config.checkpoint.resume_anyway:
        raise UserError(
            f"{path} belongs to a different run ({'; '.join(found)}); --resume_anyway resumes with the new values, "
            "--resume none starts from the model"
        )
    logger.warning("Resuming with settings that differ from the checkpoint's: %s", "; ".join(found))


def _is_longer(current: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Return whether neither limit on the number of steps is lower than it was."""
    limits = [(current["max_steps"] or math.inf, saved["max_steps"] or math.inf)]
    limits.append((current["num_train_epochs"], saved["num_train_epochs"]))
    return all(now >= before for now, before in limits)


def _packs_per_step(values: dict[str, Any], world_size: int) -> int:
    groups = world_size // values.get("sequence_parallel_size", 1)  # the ranks of a group share their packs
    return int(values["batch_size"] * values["gradient_accumulation_steps"] * groups)


def progress_of(source: Source | None) -> dict[str, int]:
    """Return how far the run of a checkpoint has come, as `save` was given it; empty without a checkpoint.

    Release 0.1.0 counted steps in the epoch instead of packs.
    """
    if source is None:
        return {}
    progress: dict[str, int] = dict(source.manifest["progress"])
    if (steps := progress.pop("step_in_epoch", None)) is not None:
        progress["packs_in_epoch"] = steps * _packs_per_step(source.manifest["config"], source.manifest["world_size"])
    return progress


def with_checkpoint_format(ds_config: DsConfig, source: Source | None) -> DsConfig:
    """Return the ds_config, set to load the universal format if the checkpoint has it."""
    if source is None or not source.universal:
        return ds_config
    return {**ds_config, "checkpoint": {**ds_config.get("checkpoint", {}), "load_universal": True}}


def restore(engine: Engine, source: Source, *, trusted: bool) -> dict[str, Any]:
    """Load model, optimizer and position in the schedule into the engine (collective).

    Learning rate, weight decay and schedule are this run's, also where the checkpoint has other values. Returns what
    `save` was given: `progress`, `config` and the entries of `extra`. Raises `UserError` if the checkpoint's model
    trains other tensors, or if its optimizer state is divided into other sub-groups.
    """
    _check_same_model(engine, source.path, trusted=trusted)
    _check_same_sub_groups(engine, source, trusted=trusted)
    groups = engine.optimizer.param_groups
    fresh = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    scheduler = engine.lr_scheduler
    base_lrs, lr_lambdas = scheduler.base_lrs, scheduler.lr_lambdas
    with trust.loading(engine, trusted=trusted):
        path, state = engine.load_checkpoint(str(source.path.parent), tag=source.path.name)
    if path is None:
        raise UserError(f"{source.path}: DeepSpeed could not load it")
    scheduler.base_lrs, scheduler.lr_lambdas = base_lrs, lr_lambdas
    lrs = [base * factor(scheduler.last_epoch) for base, factor in zip(base_lrs, lr_lambdas, strict=True)]
    for group, values, lr in zip(engine.optimizer.param_groups, fresh, lrs, strict=True):
        group.update(values, lr=lr)
    scheduler._last_lr = lrs
    _own_moments(engine)
    progress = state["progress"]
    logger.info("Resuming from %s: step %d, epoch %d", source.path, progress["step"], progress["epoch"])
    return state


def _check_same_model(engine: Engine, path: Path, *, trusted: bool) -> None:
    """Raise `UserError` if the checkpoint's tensors in training differ from the model's in name or shape.

    Settings cannot tell: the model of the same name may have changed, and `--resume_anyway` allows another name.
    """
    files = sorted(path.glob("*_model_states.pt"))
    described = trust.load(files[0], trusted=trusted).get("param_shapes") if files else None
    if described is None:
        return
    saved = {name: tuple(shape) for group in described for name, shape in group.items()}
    model: Any = engine.module
    current = {name: tuple(tensor.ds_shape) for name, tensor in model.named_parameters() if tensor.requires_grad}
    for name in sorted({*saved, *current}):
        if saved.get(name) != current.get(name):
            raise UserError(
                f"{path}: belongs to a different model: {name} has the shape {saved.get(name, '(none)')} there, "
                f"{current.get(name, '(none)')} in this run; use that model, or --resume none"
            )


def _check_same_sub_groups(engine: Engine, source: Source, *, trusted: bool) -> None:
    """Raise `UserError` if the checkpoint's optimizer state is divided differently from the engine's.

    Sizes are compared, not settings: two sizes of sub-groups may divide a small model in the same way.
    """
    if source.universal or engine.optimizer.swap_optimizer:  # on NVMe, nothing of it is in memory
        return
    file = min(source.path.glob("*_optim_states.pt"))  # any rank's: all have the same sizes
    flats = trust.load(file, trusted=trusted)["optimizer_state_dict"]["fp32_flat_groups"]
    if [flat.numel() for flat in flats] != [flat.numel() for flat in engine.optimizer.fp32_partitioned_groups_flat]:
        size = source.manifest["config"].get("sub_group_size", "another")
        raise UserError(
            f"--sub_group_size {engine.optimizer.sub_group_size}: divides the optimizer's state differently from "
            f"{source.path}, which was saved with {size}; use {size}, or convert it: superoffload convert "
            f"{source.path} NEW_FOLDER"
        )


def _own_moments(engine: Engine) -> None:
    """Copy moments that still lie in the mapped files, one at a time: training changes them, and files get removed."""
    for state in engine.optimizer.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.untyped_storage().filename is not None:
                state[name] = value.clone()
