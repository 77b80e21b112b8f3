"""Save a checkpoint: complete or absent, the same answer on every rank, nothing older lost.

A checkpoint is a folder `OUTPUT_DIR/global_stepN` of DeepSpeed's files, one pair per rank. While it is written it holds
a file `incomplete`; once every rank has said that its share is on the disk, `manifest.json` names every file with
its size and checksum, `incomplete` goes, and `latest` is replaced by rename. What has a manifest is complete.
"""

import copy
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
import xxhash

from superoffload import config as settings
from superoffload import distributed
from superoffload.config import Config
from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.metrics import GIB, Progress, Saved

LATEST = "latest"
MANIFEST = "manifest.json"
INCOMPLETE = "incomplete"
BYTES_PER_PARAMETER = 12  # float32 master and the two moments; the sharded model state is empty shells
ROOM_BYTES = 2**20  # for shells, manifest, tokenizer

NOT_ASKED = Saved(None, "No checkpoint was saved: --save_checkpoint was not given")


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


class _RecordingEngine:
    """Stands before DeepSpeed's checkpoint engine and keeps a failed write from leaving the collectives.

    An exception inside `save_checkpoint` on one rank would leave the others in its barriers for ever. Here it is
    kept in `errors`, and what was half written is removed to make room. `written` lists this rank's files.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.errors: list[Exception] = []
        self.written: list[Path] = []
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
        """Write one file through to the disk, or keep the error and remove the piece."""
        if self.errors:
            return
        try:
            self._inner.save(state_dict, path)
            sync(Path(path))
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
            self.errors.append(error)
            Path(path).unlink(missing_ok=True)

    def commit(self, info: Any) -> Any:
        """Note that only the last barrier is left."""
        self.committed = True
        return self._inner.commit(info)


def save(engine: Any, tokenizer: Any, config: Config, progress: Progress, extra: dict[str, Any]) -> Saved:
    """Save the run's state, then the tokenizer, then publish the tag in `latest` (collective).

    `extra` is what this rank wants back on resume beside model, optimizer and schedule. Every rank writes its
    share and says whether it could; one collective decides, and only then does rank 0 publish. If any rank
    failed, the partial tag is removed and an older checkpoint stays as it was. Never raises for a failed write:
    the returned `Saved` says how it ended, alike on every rank.
    """
    folder = Path(config.output.output_dir)
    tag = _free_tag(folder, progress.step)
    state = {"progress": asdict(progress), "config": settings.flat(config), **extra}
    entries, errors = _write_shares(engine, folder, tag, state)
    if distributed.speaks() and not errors:
        errors += _attempt(lambda: save_tokenizer(tokenizer, folder))
        errors += _attempt(lambda: save_model_config(engine.module, folder))
    _report(errors)
    everything = distributed.gather({"ok": not errors, "files": entries})
    complete = all(share["ok"] for share in everything)
    if complete and distributed.speaks():
        files = {name: entry for share in everything for name, entry in share["files"].items()}
        errors = _attempt(lambda: _publish(folder, tag, _manifest(config, progress, files)))
        _report(errors)
    if not distributed.agree(complete and not errors):
        if distributed.local_rank() == 0:
            shutil.rmtree(folder / tag, ignore_errors=True)
        return Saved(None, "NO CHECKPOINT WAS SAVED: writing it failed, see the errors above", failed=True)
    if distributed.speaks():
        _report(_attempt(lambda: _tidy(folder, tag, config.checkpoint.keep_checkpoints)))
    return Saved(folder / tag, f"Checkpoint saved in {folder / tag}")


def _report(errors: list[Exception]) -> None:
    for error in errors:
        logger.error("Error saving the checkpoint: %s", error)


def _attempt(action: Callable[[], Any]) -> list[Exception]:
    try:
        action()
    except Exception as error:  # noqa: BLE001  the guard of the end of a run: reported, and the run ends in order
        return [error]
    return []


def _free_tag(folder: Path, step: int) -> str:
    """Name the checkpoint, the same on all ranks (collective), so that an older one of the same step stays whole."""
    names = [f"global_step{step}", *(f"global_step{step}_{number}" for number in range(2, 1000))]
    free = next((i for i, name in enumerate(names) if not (folder / name).exists()), 0)
    return names[int(distributed.of_rank_0(free))]


def _write_shares(
    engine: Any, folder: Path, tag: str, state: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[Exception]]:
    """Let every rank write its files through DeepSpeed (collective); return this rank's files and errors."""
    # Most of what can go wrong shows before DeepSpeed's collectives begin; then none of them is entered.
    blocked = _attempt(lambda: _begin(engine, folder, tag))
    if not distributed.agree(not blocked):
        return {}, blocked or [RuntimeError("another rank cannot write")]
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
    errors = [*recorder.errors, *raised]
    entries: dict[str, dict[str, Any]] = {}
    if not errors:
        errors += _attempt(lambda: entries.update({path.name: describe(path) for path in recorder.written}))
    return entries, errors


def _begin(engine: Any, folder: Path, tag: str) -> None:
    """Make the tag's folder with its mark, and compare the room on this machine with what is to come (collective)."""
    mine = sum(parameter.ds_tensor.numel() for parameter in engine.module.parameters()) * BYTES_PER_PARAMETER
    needs = distributed.gather((platform.node(), mine))
    (folder / tag).mkdir(parents=True, exist_ok=True)
    (folder / tag / INCOMPLETE).touch()
    needed = sum(size for node, size in needs if node == platform.node()) + ROOM_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free / GIB:.2f} GiB free, the checkpoint needs {needed / GIB:.2f} GiB")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files, and `special_tokens_map.json` where transformers leaves it out."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "special_tokens_map.json"
    if not path.exists():
        path.write_text(json.dumps(tokenizer.special_tokens_map, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_model_config(model: Any, folder: Path) -> None:
    """Write `config.json` and `generation_config.json`, so that an export needs the original model no more."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.use_cache = True  # off for training alone
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # Not `save_pretrained`: it refuses contradictions that published models do have.
        generation.to_json_file(folder / "generation_config.json")


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_through(path: Path, text: str) -> None:
    """Replace a file's content in one step that a crash cannot split."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def describe(path: Path) -> dict[str, Any]:
    """Return a file's size in bytes and its XXH3 checksum."""
    checksum = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(2**24):
            checksum.update(piece)
    return {"bytes": path.stat().st_size, "xxh3_128": checksum.hexdigest()}


def _manifest(config: Config, progress: Progress, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    versions = {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "saved_at": time.time(),
        "world_size": distributed.world_size(),
        "versions": versions,
        "progress": asdict(progress),
        "config": settings.flat(config),
        "files": files,
    }


def _publish(folder: Path, tag: str, manifest: dict[str, Any]) -> None:
    """Declare a tag complete and point `latest` to it."""
    _write_through(folder / tag / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    (folder / tag / INCOMPLETE).unlink()
    sync(folder / tag)
    _write_through(folder / LATEST, tag)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint folder; None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "files" in manifest else None


def damage(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> str:
    """Say which of the files is not as it was written; empty where all are."""
    for name in names:
        entry = manifest["files"][name]
        try:
            found = describe(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found["bytes"] != entry["bytes"]:
            return f"{name} has {found['bytes']} bytes instead of {entry['bytes']}"
        if found != entry:
            return f"{name} has another checksum than when it was written"
    return ""


def require_intact(folder: Path) -> None:
    """Raise `UserError` where a file of a checkpoint is not as it was written; without a manifest nobody knows."""
    manifest = read_manifest(folder)
    if manifest is not None and (found := damage(folder, manifest, manifest["files"])):
        raise UserError(f"{folder}: damaged: {found}; use another checkpoint")


def complete_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of an output folder, the one saved last first."""
    found = [(manifest["saved_at"], path) for path in folder.glob("global_step*") if (manifest := read_manifest(path))]
    return [path for _, path in sorted(found, reverse=True)]


def _tidy(folder: Path, tag: str, keep: int) -> None:
    """Remove what a newer complete checkpoint makes superfluous: pieces of saves that failed, and all but `keep`."""
    for path in folder.glob("global_step*"):
        if path.name != tag and (path / INCOMPLETE).exists():
            logger.warning("Removing %s: saving it was cut off", path)
            shutil.rmtree(path)
    for path in complete_checkpoints(folder)[max(1, keep) :]:
        if path.name != tag:
            logger.info("Removing %s: --keep_checkpoints %d", path, keep)
            (path / INCOMPLETE).touch()  # a removal that is cut off must not leave what looks complete
            (path / MANIFEST).unlink()
            shutil.rmtree(path)
