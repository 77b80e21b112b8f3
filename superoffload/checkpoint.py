"""Save a checkpoint: complete or absent, the same answer on every rank, nothing older lost."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from superoffload import config as settings
from superoffload import distributed
from superoffload.config import Config
from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.metrics import Progress, Saved

LATEST = "latest"


def prepare_folder(folder: str) -> None:
    """Make the output folder and write to it once, so that a mistake shows before training and not after.

    Raises `UserError` where it cannot be made or written.
    """
    probe = Path(folder) / f".probe_{distributed.rank()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error


NOT_ASKED = Saved(None, "No checkpoint was saved: --save_checkpoint was not given")


class _RecordingEngine:
    """Stands before DeepSpeed's checkpoint engine and keeps a failed write from leaving the collectives.

    An exception inside `save_checkpoint` on one rank would leave the others in its barriers for ever. Here it is
    kept in `errors`, and what was half written is removed to make room.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.errors: list[Exception] = []
        self.begun = self.committed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, info: Any) -> None:
        """Note that the first barrier lies behind."""
        self._inner.create(info)
        self.begun = True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder, or keep the error."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.errors.append(error)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, or keep the error and remove the piece."""
        if self.errors:
            return
        try:
            self._inner.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
            self.errors.append(error)
            Path(path).unlink(missing_ok=True)

    def commit(self, info: Any) -> Any:
        """Note that only the last barrier is left."""
        self.committed = True
        return self._inner.commit(info)


def save(engine: Any, tokenizer: Any, config: Config, progress: Progress) -> Saved:
    """Save the run's state, then the tokenizer, then publish the tag in `latest` (collective).

    Every rank writes its share and says whether it could; one collective decides, and only then does rank 0
    replace `latest`, by rename. If any rank failed, the partial tag is removed and an older checkpoint stays
    as it was. Never raises for a failed write: the returned `Saved` says how it ended, alike on every rank.
    """
    folder = Path(config.output.output_dir)
    tag = _free_tag(folder, progress.step)
    errors = _write_shares(engine, folder, tag, {"progress": asdict(progress), "config": settings.flat(config)})
    if distributed.speaks() and not errors:
        errors += _attempt(lambda: save_tokenizer(tokenizer, folder))
    for error in errors:
        logger.error("Error saving the checkpoint: %s", error)
    complete = distributed.agree(not errors)
    if complete and distributed.speaks():
        errors = _attempt(lambda: _publish(folder, tag))
        for error in errors:
            logger.error("Error publishing the checkpoint: %s", error)
    if not distributed.agree(complete and not errors):
        if distributed.local_rank() == 0:
            shutil.rmtree(folder / tag, ignore_errors=True)
        return Saved(None, "NO CHECKPOINT WAS SAVED: writing it failed, see the errors above", failed=True)
    if distributed.local_rank() == 0:
        _remove_superseded(folder, tag, progress.step)
    return Saved(folder / tag, f"Checkpoint saved in {folder / tag}")


def _attempt(action: Any) -> list[Exception]:
    try:
        action()
    except Exception as error:  # noqa: BLE001  the guard of the end of a run: reported, and the run ends in order
        return [error]
    return []


def _free_tag(folder: Path, step: int) -> str:
    """Name the checkpoint, the same on all ranks (collective), so that an older one of the same step stays whole."""
    names = [f"global_step{step}", *(f"global_step{step}_{number}" for number in range(2, 1000))]
    free = next((i for i, name in enumerate(names) if not (folder / name).exists()), 0)
    return names[distributed.from_rank_0(free)]


def _write_shares(engine: Any, folder: Path, tag: str, state: dict[str, Any]) -> list[Exception]:
    """Let every rank write its files through DeepSpeed (collective); return this rank's errors."""
    # Most of what can go wrong shows before DeepSpeed's collectives begin; then none of them is entered.
    blocked = _attempt(lambda: (folder / tag).mkdir(parents=True, exist_ok=True))
    if not distributed.agree(not blocked):
        return blocked or [RuntimeError("another rank cannot write")]
    recorder = _RecordingEngine(engine.checkpoint_engine)
    engine.checkpoint_engine = recorder
    try:
        raised = _attempt(lambda: engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False))
    finally:
        engine.checkpoint_engine = recorder._inner
    if raised and recorder.begun and not recorder.committed:
        # DeepSpeed also copies its conversion scripts and collects state between its collectives; where that
        # failed on this rank, what follows in `save_checkpoint` is still owed to the others.
        engine.optimizer.checkpoint_event_epilogue()
        distributed.barrier()
    return [*recorder.errors, *raised]


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files, and `special_tokens_map.json` where transformers leaves it out."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "special_tokens_map.json"
    if not path.exists():
        path.write_text(json.dumps(tokenizer.special_tokens_map, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _publish(folder: Path, tag: str) -> None:
    """Point `latest` to a complete tag, in one step that a crash cannot split."""
    partial = folder / f"{LATEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / LATEST)


def _remove_superseded(folder: Path, tag: str, step: int) -> None:
    """Remove earlier checkpoints of the same step, which a second run into the same folder replaces."""
    for old in folder.glob(f"global_step{step}*"):
        if old.name != tag and (old.name == f"global_step{step}" or old.name.startswith(f"global_step{step}_")):
            shutil.rmtree(old, ignore_errors=True)


def load_weights(model: Any, folder: Path) -> None:
    """Give a whole (unsharded) model the float32 weights of the checkpoint that `latest` names.

    Raises `UserError` where they are those of another model.
    """
    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise UserError(f"{folder}: the checkpoint is of another model: {[*missing, *unexpected][0]} does not fit")
