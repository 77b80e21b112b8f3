"""A folder of data files -> the files of each split, by the configs in its README or by their names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

from superoffload import hub
from superoffload.data import files
from superoffload.errors import UserError


def files_of_splits(folder: Path, config: str | None, config_flag: str) -> dict[str, list[Path]]:
    """Return the files of each split, only those of a known kind.

    `config` is the value of `config_flag`. Raises `UserError` if the config is missing or unknown, or if there is no
    such file.
    """
    if hub.has_configs(folder / "README.md"):
        with listing_configs(str(folder), config, config_flag):
            found = datasets.load_dataset_builder(str(folder), name=config).config.data_files or {}
    else:
        refuse_config(config, config_flag)
        base = folder.resolve().as_posix()
        try:
            found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
        except EmptyDatasetError:
            found = {}
    # A file may match several patterns of its split.
    unique = {str(split): map(Path, dict.fromkeys(names)) for split, names in found.items()}
    splits = {split: [path for path in paths if _is_known(path)] for split, paths in unique.items()}
    splits = {split: paths for split, paths in splits.items() if paths}
    if not splits:
        raise UserError(f"contains no {files.ENDINGS} file")
    return splits


def _is_known(path: Path) -> bool:
    """Return whether a file is data; raise `UserError` if it is, but cannot be read."""
    if files.kind_of(path):
        return True
    if any(ending.lower() in files.KINDS for ending in path.suffixes[-2:-1]):
        raise UserError(
            f"{path.name}: cannot be decompressed; known are {', '.join(files.COMPRESSIONS)}, of JSON and CSV"
        )
    return False


def is_saved(folder: Path) -> bool:
    """Return whether `datasets.save_to_disk` wrote a folder."""
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def may_have_configs(name: str) -> bool:
    """Return whether a data set may have configs: one on the hub, or a folder whose README declares them."""
    path = Path(name).expanduser()
    return not path.exists() or (path.is_dir() and not is_saved(path) and hub.has_configs(path / "README.md"))


def refuse_config(config: str | None, config_flag: str) -> None:
    """Raise `UserError` if a config is named for a source that has none."""
    if config is not None:
        raise UserError(f"has no configs; leave out --{config_flag} {config}")


@contextmanager
def listing_configs(source: str, config: str | None, config_flag: str) -> Iterator[None]:
    """Turn an error of `datasets` about a missing or unknown config into a `UserError` that lists the configs."""
    try:
        yield
    except ValueError as error:
        names = datasets.get_dataset_config_names(source)
        if config is not None and config not in names:
            raise UserError(f"has no config {config}; its configs are {', '.join(names)}") from error
        if "Config name is missing" in str(error):
            raise UserError(f"has several configs; choose one with --{config_flag}: {', '.join(names)}") from error
        raise
