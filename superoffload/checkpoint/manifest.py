"""The format of a checkpoint: file names, marker files, checksums. Imports neither torch nor DeepSpeed.

A checkpoint is a folder `OUTPUT_DIR/global_stepN` with DeepSpeed's files, one pair per rank. While it is being written,
it holds a file `incomplete`. Once every rank has written its files, `manifest.json` lists each file with its size and
checksum, `incomplete` is removed, and `latest` is replaced by rename. A folder with a manifest is complete.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from superoffload.errors import UserError

LATEST = "latest"
MANIFEST = "manifest.json"
INCOMPLETE = "incomplete"
TAGS = "global_step*"
PARTIAL = ".partial"
READ_BYTES = 2**24
PARTS = {"saved_at": int | float, "world_size": int, "files": dict, "config": dict, "progress": dict}

Manifest = dict[str, Any]
Entry = dict[str, Any]
"""What the manifest says about one file: `bytes` and `xxh3_128`."""


def tags(step: int) -> list[str]:
    """List the possible names of a step's checkpoint; the first free one is used, so that none is overwritten."""
    return [f"global_step{step}", *(f"global_step{step}_{number}" for number in range(2, 1000))]


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Replace the content of a file atomically: after a crash or an error it holds the old text or the new one."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    except OSError:  # what a full disk has taken of the text must not fill it further
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


class HashedFile:
    """A file to write that is hashed on the way, so that its checksum does not need a second read.

    A context manager; on leaving without an error the file is on disk. It offers what `torch.save` needs of a file,
    but no `fileno`, through which torch could write data that is not hashed.
    """

    def __init__(self, path: Path) -> None:
        """Create the file; raises OSError."""
        self._file = path.open("wb")
        self._checksum = xxhash.xxh3_128()
        self._bytes = 0

    def write(self, data: Any) -> int:
        """Write a bytes-like object."""
        self._checksum.update(data)
        self._bytes += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        """Flush buffered data to the operating system."""
        self._file.flush()

    def entry(self) -> Entry:
        """Return the manifest's entry for what has been written."""
        return {"bytes": self._bytes, "xxh3_128": self._checksum.hexdigest()}

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def describe(path: Path) -> Entry:
    """Read a file and return its manifest entry."""
    checksum = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            checksum.update(piece)
    return {"bytes": path.stat().st_size, "xxh3_128": checksum.hexdigest()}


def begin(folder: Path) -> None:
    """Create the folder of a checkpoint, marked as incomplete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INCOMPLETE).touch()


def build(config: dict[str, Any], progress: dict[str, int], world_size: int, files: dict[str, Entry]) -> Manifest:
    """Build the manifest of a checkpoint; `config` holds the flat settings of the run."""
    return {
        "saved_at": time.time(),
        "world_size": world_size,
        "versions": {package: version(package) for package in ("torch", "deepspeed", "transformers")},
        "progress": progress,
        "config": config,
        "files": files,
    }


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder."""
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def publish(output_dir: Path, tag: str, manifest: Manifest) -> None:
    """Declare a checkpoint complete and point `latest` to it."""
    write(output_dir / tag, manifest)
    (output_dir / tag / INCOMPLETE).unlink()
    sync(output_dir / tag)
    replace_text(output_dir / LATEST, tag)


def read(folder: Path) -> Manifest | None:
    """Return the manifest of a checkpoint folder, None if it has no readable one, or one of another form.

    Raises `UserError` if it names a file outside the folder.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), kind) for key, kind in PARTS.items()):
        return None
    if not all(isinstance(entry, dict) for entry in manifest["files"].values()):
        return None
    for name in manifest["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder / MANIFEST}: names {name!r}, which lies outside the checkpoint; do not use it")
    return manifest


def read_latest(output_dir: Path) -> str | None:
    """Return the tag in `latest`, None if there is no such file. Raises `UserError` for a path instead of a name."""
    path = output_dir / LATEST
    if not path.is_file():
        return None
    tag = path.read_text(encoding="utf-8", errors="replace").strip()
    if tag and (Path(tag).name != tag or tag == ".."):
        raise UserError(f"{path}: names {tag!r}, which lies outside the folder; do not use it")
    return tag


def is_incomplete(folder: Path) -> bool:
    """Return whether the marker of an interrupted save is there."""
    return (folder / INCOMPLETE).exists()


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """List the complete checkpoints of an output folder, newest first."""
    found = [(manifest["saved_at"], path) for path in output_dir.glob(TAGS) if (manifest := read(path))]
    return [path for _, path in sorted(found, reverse=True)]


def incomplete_checkpoints(output_dir: Path) -> list[Path]:
    """List what interrupted saves left in an output folder."""
    return [path for path in output_dir.glob(TAGS) if is_incomplete(path)]


def damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> str:
    """Describe the first of the files that differs from what was written; empty if none does."""
    for name in names:
        entry = manifest["files"][name]
        try:
            found = describe(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found["bytes"] != entry.get("bytes"):
            return f"{name} has {found['bytes']} bytes instead of {entry.get('bytes')}"
        if found != entry:
            return f"{name} does not match its checksum"
    return ""


def require_intact(folder: Path) -> None:
    """Raise `UserError` if a checkpoint's file is damaged; without a manifest it cannot be verified, and passes."""
    manifest = read(folder)
    if manifest is not None and (found := damage(folder, manifest, manifest["files"])):
        raise UserError(f"{folder}: damaged: {found}; use another checkpoint")


def remove(folder: Path) -> None:
    """Remove a checkpoint so that an interrupted removal never leaves what looks complete."""
    (folder / INCOMPLETE).touch()
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)
