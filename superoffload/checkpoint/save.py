"""Save a checkpoint: complete or absent, with the same outcome on every rank; a failure leaves older ones intact."""

import copy
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from transformers.dynamic_module_utils import custom_object_save

from superoffload import config as settings
from superoffload import distributed
from superoffload.checkpoint import manifest
from superoffload.config import Config
from superoffload.log import logger
from superoffload.offload.zero3.optimizer import SharedMemorySuperOffload
from superoffload.protocols import Engine, Model, Tokenizer

BYTES_PER_PARAMETER = {"fp32": 12, "bf16": 6}  # master and the two moments; ZeRO-3's model states hold no weights
SMALL_FILES_BYTES = 2**20  # model states, manifest, tokenizer


class _RecordingEngine:
    """Wraps DeepSpeed's checkpoint engine so that a failed write cannot desynchronise the ranks.

    An exception inside `save_checkpoint` on one rank would leave the others in its barriers forever. Here it is kept in
    `errors`, and the partial file is removed to free space. `files` holds the manifest's entries of this rank's files.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.errors: list[Exception] = []
        self.files: dict[str, manifest.Entry] = {}
        self.begun = self.committed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, info: Any) -> None:
        """Record that DeepSpeed has passed its first barrier."""
        self._inner.create(info)
        self.begun = True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a folder, or keep the error."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.errors.append(error)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file to disk, or keep the error and remove the partial file."""
        if self.errors:
            return
        try:
            self.files[Path(path).name] = self._write(state_dict, Path(path))
        except (OSError, RuntimeError) as error:
            # After a failed write torch's writer raises a RuntimeError of its own, which does not name the cause.
            cause = error.__context__
            self.errors.append(cause if isinstance(cause, OSError) else error)
            Path(path).unlink(missing_ok=True)

    def _write(self, state_dict: Any, path: Path) -> manifest.Entry:
        if isinstance(self._inner, TorchCheckpointEngine):  # it passes what it is given to torch.save
            with manifest.HashedFile(path) as file:
                self._inner.save(state_dict, file)
            return file.entry()
        self._inner.save(state_dict, str(path))
        manifest.sync(path)
        return manifest.describe(path)

    def commit(self, info: Any) -> Any:
        """Record that only DeepSpeed's last barrier remains."""
        self.committed = True
        return self._inner.commit(info)


def save(
    engine: Engine, tokenizer: Tokenizer, config: Config, progress: dict[str, int], extra: dict[str, Any]
) -> Path | None:
    """Save the run's state and the tokenizer, then point `latest` to the new checkpoint (collective).

    `progress` holds at least `step`; `extra` is what this rank needs to resume besides model, optimizer and schedule.
    Every rank writes its files and reports whether it could; one collective decides, and only then does rank 0 publish.
    If any rank failed, the partial checkpoint is removed and older ones stay as they were. Never raises for a failed
    write: returns the checkpoint's folder, or None on every rank if saving failed. Raises `OptimizerProcessError` on a
    rank whose optimizer process has died in the last step.
    """
    if isinstance(engine.optimizer, SharedMemorySuperOffload):
        engine.optimizer.flush()  # an error within `save_checkpoint` would leave the other ranks in its first barrier
    folder = Path(config.output.output_dir)
    tag = _free_tag(folder, progress["step"])
    state = {"progress": progress, "config": settings.flat(config), **extra}
    entries, errors = _write_rank_files(engine, folder, tag, state)
    if distributed.is_rank_0() and not errors:
        errors += _attempt(lambda: save_tokenizer(tokenizer, folder))
        errors += _attempt(lambda: save_model_config(engine.module, folder))
    _log_errors(errors)
    outcomes = distributed.all_gather_objects({"ok": not errors, "files": entries})
    complete = all(outcome["ok"] for outcome in outcomes)
    if complete and distributed.is_rank_0():
        files = {name: entry for outcome in outcomes for name, entry in outcome["files"].items()}
        errors = _attempt(lambda: _publish(folder, tag, state, files))
        _log_errors(errors)
    if not distributed.all_ranks_ok(complete and not errors):
        if distributed.local_rank() == 0:
            shutil.rmtree(folder / tag, ignore_errors=True)
        return None
    if distributed.is_rank_0():
        _log_errors(_attempt(lambda: _remove_obsolete(folder, tag, config.checkpoint.keep_checkpoints)))
    return folder / tag


def _publish(folder: Path, tag: str, state: dict[str, Any], files: dict[str, manifest.Entry]) -> None:
    described = manifest.build(state["config"], state["progress"], distributed.world_size(), files)
    manifest.publish(folder, tag, described)


def _log_errors(errors: list[Exception]) -> None:
    for error in errors:
        logger.error("Error saving the checkpoint: %s", error)


def _attempt(action: Callable[[], Any]) -> list[Exception]:
    try:
        action()
    except Exception as error:  # noqa: BLE001  a failed save is logged, and the run still ends in order
        return [error]
    return []


def _free_tag(folder: Path, step: int) -> str:
    """Choose the name of the checkpoint, the same on all ranks (collective)."""
    names = manifest.tags(step)
    free = next((name for name in names if not (folder / name).exists()), names[0])
    return str(distributed.broadcast_from_rank_0(free))


def _write_rank_files(
    engine: Engine, folder: Path, tag: str, state: dict[str, Any]
) -> tuple[dict[str, manifest.Entry], list[Exception]]:
    """Let every rank write its files through DeepSpeed (collective); return this rank's files and errors."""
    parameters = sum(parameter.ds_tensor.numel() for parameter in engine.module.parameters())  # type: ignore[attr-defined]
    size = parameters * BYTES_PER_PARAMETER[state["config"]["optimizer_state"]]
    needs = distributed.all_gather_objects((platform.node(), size))
    needed = sum(size for node, size in needs if node == platform.node()) + SMALL_FILES_BYTES
    # Most errors show up before DeepSpeed's collectives begin; then no rank enters them.
    blocked = _attempt(lambda: _begin(folder, tag, needed))
    if not distributed.all_ranks_ok(not blocked):
        return {}, blocked or [RuntimeError("another rank cannot write")]
    recorder = _RecordingEngine(engine.checkpoint_engine)
    engine.checkpoint_engine = recorder
    try:
        raised = _attempt(lambda: engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False))
    finally:
        engine.checkpoint_engine = recorder._inner
    if raised and recorder.begun and not recorder.committed:
        # Between its collectives DeepSpeed also copies its conversion scripts and collects state. If that failed on
        # this rank, the other ranks still wait for the rest of `save_checkpoint`.
        engine.optimizer.checkpoint_event_epilogue()
        distributed.barrier()
    return recorder.files, [*recorder.errors, *raised]


def _begin(folder: Path, tag: str, needed: int) -> None:
    """Create the checkpoint's folder; raise OSError if this machine has less free space than `needed` bytes."""
    manifest.begin(folder / tag)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free / 2**30:.2f} GiB free, the checkpoint needs {needed / 2**30:.2f} GiB")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files, and `special_tokens_map.json`, which transformers 5 no longer writes."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "special_tokens_map.json"
    if not path.exists():
        path.write_text(json.dumps(tokenizer.special_tokens_map, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_model_config(model: Model, folder: Path) -> None:
    """Write `config.json` and `generation_config.json`, so that an export does not need the original model."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.use_cache = True  # it is off only for training
    config.save_pretrained(folder)
    if getattr(model, "_auto_class", None) is not None:
        custom_object_save(model, folder, config=config)  # the code that the model brings along
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # Not `save_pretrained`: it rejects contradictions that published models contain.
        generation.to_json_file(folder / "generation_config.json")


def _remove_obsolete(folder: Path, tag: str, keep: int) -> None:
    """Remove what a new complete checkpoint makes obsolete: interrupted saves, and all but the newest `keep`."""
    for path in manifest.incomplete_checkpoints(folder):
        if path.name != tag:
            logger.warning("Removing %s: saving it was interrupted", path)
            shutil.rmtree(path)
    for path in manifest.complete_checkpoints(folder)[max(1, keep) :]:
        if path.name != tag:
            logger.info("Removing %s: --keep_checkpoints %d", path, keep)
            manifest.remove(path)
