"""The output folder of a run: created, writable, and used by one run at a time."""

from collections.abc import Iterable
from pathlib import Path

from superoffload import config_file, distributed
from superoffload.checkpoint.folder_lock import lock
from superoffload.checkpoint.manifest import replace_text
from superoffload.config import Config
from superoffload.data import mixture
from superoffload.errors import UserError

CONFIG_FILE = "config.yaml"


def prepare(folder: str, inputs: Iterable[tuple[str, str]] = ()) -> int | None:
    """Create the output folder and write to it once, so that an error shows before training, not after; then lock it.

    `inputs` holds what the run reads, as pairs of a flag and a value of it. Returns what `lock` returns on rank 0, None
    on the other ranks. Raises `UserError` if the folder cannot be created, written or locked, or is one of these, whose
    files would be overwritten.
    """
    for flag, name in inputs:
        source = Path(mixture.name_of(name) if flag == "dataset_name" else name).expanduser()
        if source.is_dir() and source.resolve() == Path(folder).resolve():
            raise UserError(
                f"--output_dir {folder}: is the folder of --{flag}, which the run would write to; choose another folder"
            )
    probe = Path(folder) / f".probe_{distributed.rank()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    return lock(folder) if distributed.is_rank_0() else None


def write_settings(config: Config) -> None:
    """Write every setting of the run to `config.yaml` on rank 0, atomically.

    Raises `UserError` if that fails.
    """
    if distributed.is_rank_0():
        path = Path(config.output.output_dir) / CONFIG_FILE
        try:
            replace_text(path, config_file.write(config))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); free some space") from error
