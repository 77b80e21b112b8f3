"""Find and read a data set: a hub id, a folder, or a file -> rows in a `datasets.Dataset`.

Rows of JSON and CSV files are kept unparsed, each as one piece of JSON in the column `RAW`, and are parsed when they
are tokenised. A reader that guesses a type for each column would convert answers that look like numbers or dates,
could not hold rows whose fields differ in type, and would reject a whole file for one broken line.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet, types

from superoffload import hub
from superoffload.data import files
from superoffload.data.folders import files_of_splits, is_saved, listing_configs, refuse_config
from superoffload.data.messages import decode
from superoffload.errors import BadRow, UserError, first_line
from superoffload.log import shows_bars

RAW = "superoffload_raw_row"
READER_VERSION = 3
SAMPLED_ROWS = 100  # the keys of this many rows are the columns of a JSON file


def open_rows(name: str, split: str, flag: str = "dataset_name", config: str | None = None) -> datasets.Dataset:
    """Open a split of a data set, `split` as in `train` or `train[:10%]`.

    `flag` is the flag that named it. Raises `UserError` if it cannot be found or read, or has no rows.
    """
    if not shows_bars():
        datasets.disable_progress_bars()
    try:
        rows = _open(name, split, flag, config)
        if len(rows) == 0:
            raise UserError("has no rows")
        _check_first(rows, split)
    except UserError as error:
        raise error if str(error).startswith("--") else UserError(f"--{flag} {name}: {error}") from error
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__
        if isinstance(cause, UserError):  # raised by a reader of this file, wrapped by datasets
            raise UserError(f"--{flag} {name}: {cause}") from error
        raise UserError(f"--{flag} {name}: {_reason(error)}") from error
    return rows


def _open(name: str, split: str, flag: str, config: str | None) -> datasets.Dataset:
    if not name.strip():
        raise UserError("is empty; give the name of a data set")
    path = Path(name).expanduser()
    config_flag = flag.replace("dataset_name", "dataset_config").replace("eval_dataset", "eval_config")
    if path.is_file():
        refuse_config(config, config_flag)
        if "+" in split:
            raise UserError(f"a file has no splits, so {split} would take it several times")
        return _sliced(split, lambda _: _open_file(path))
    if path.is_dir():
        return _sliced(split, _splits_of(path, config, config_flag))
    id_, colon, rest = name.partition(":")
    is_path = hub.looks_like_path(name) or files.kind_of(path)
    if is_path and not (colon and Path(id_).expanduser().is_dir()):
        raise UserError("no such file or folder")
    if colon:
        raise UserError(
            f"no such file or folder; for the config {rest} of {id_}, use --{flag} {id_} --{config_flag} {rest}"
        )
    name, _, revision = name.partition("@")
    hub.check(
        flag, name, "dataset", lambda: (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    )
    with listing_configs(name, config, config_flag):
        return datasets.load_dataset(name, config, split=split, revision=revision or None)


def _sliced(split: str, open_split: Callable[[str], datasets.Dataset]) -> datasets.Dataset:
    """Open splits as `datasets` does on the hub: `train`, `train[:100]`, `train[10%:]`, `train+test`."""
    pieces = []
    for piece in split.split("+"):
        name, bracket, _ = (part.strip() for part in piece.partition("["))
        rows = open_split(name)
        if bracket:
            [part] = datasets.ReadInstruction.from_spec(piece.strip()).to_absolute({name: len(rows)})
            if part.from_ >= part.to:
                raise UserError(f"has no rows in {piece.strip()}: {name} has {len(rows)}")
            rows = rows.select(range(part.from_, part.to))
        pieces.append(rows)
    return datasets.concatenate_datasets(pieces) if len(pieces) > 1 else pieces[0]


def _splits_of(path: Path, config: str | None, config_flag: str) -> Callable[[str], datasets.Dataset]:
    """Return a function that opens a split of a folder."""
    saved = is_saved(path)
    if saved:
        refuse_config(config, config_flag)
    if (path / "dataset_info.json").exists():
        return lambda split: datasets.load_from_disk(str(path))
    splits: Mapping[str, Any] = (
        datasets.load_from_disk(str(path)) if saved else files_of_splits(path, config, config_flag)
    )

    def open_split(split: str) -> datasets.Dataset:
        if split not in splits:
            raise UserError(f"no split {split}; the splits are {', '.join(map(str, splits))}")
        return splits[split] if saved else _read(splits[split])

    return open_split


def _open_file(path: Path) -> datasets.Dataset:
    if not files.kind_of(path):
        raise UserError(
            f"unknown file type {''.join(path.suffixes[-2:]) or '(none)'}; known types are {files.ENDINGS}; "
            f"JSON and CSV may be compressed ({', '.join(files.COMPRESSIONS)})"
        )
    if path.stat().st_size == 0:
        raise UserError("the file is empty")
    return _read([path])


def _read(paths: Sequence[Path]) -> datasets.Dataset:
    """Read files of one kind."""
    kinds = {files.kind_of(path): path.name for path in paths}
    if len(kinds) > 1:
        raise UserError(
            f"holds files of several kinds ({', '.join(sorted(kinds.values()))}), which may be copies of one another; "
            "name one file, or make a folder for each kind"
        )
    [kind] = kinds
    if kind in ("json", "csv"):
        return _raw(paths)
    features = _merged_features(paths) if kind == "parquet" else None
    return datasets.load_dataset(kind, data_files=[str(path) for path in paths], split="train", features=features)


def _merged_features(paths: Sequence[Path]) -> datasets.Features | None:
    """Return the columns of Parquet files whose columns differ; None if they are all the same."""
    schemas = [parquet.read_schema(path) for path in paths]
    if all(schema.equals(schemas[0]) for schema in schemas):
        return None
    try:
        merged = pyarrow.unify_schemas(schemas, promote_options="permissive")
    except (pyarrow.ArrowTypeError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"its files do not fit together: {first_line(error)}") from error
    for schema in schemas:
        _check_numbers(schema, merged)
    return datasets.Features.from_arrow_schema(merged)


def _check_numbers(schema: pyarrow.Schema, merged: pyarrow.Schema) -> None:
    """Raise `UserError` if merging would write whole numbers inside records (2) as fractions (2.0)."""
    for column in schema:
        after = dict(_leaves(merged.field(column.name).type, column.name))
        for name, type_ in _leaves(column.type, column.name):
            if "." in name and types.is_integer(type_) and types.is_floating(after[name]):
                raise UserError(
                    f"its files do not fit together: {name} holds whole numbers in one, fractions in others"
                )


def _leaves(type_: pyarrow.DataType, name: str) -> Iterator[tuple[str, pyarrow.DataType]]:
    if types.is_struct(type_):
        for field in type_:
            yield from _leaves(field.type, f"{name}.{field.name}")
    elif types.is_list(type_) or types.is_large_list(type_):
        yield from _leaves(type_.value_type, name)
    else:
        yield name, type_


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # datasets wraps the reader's error, which says more
        error = error.__cause__
    return first_line(error)


def _raw(paths: Sequence[Path]) -> datasets.Dataset:
    # datasets hashes these stamps into the key of its own cache, so a changed file is read again. A tuple, because
    # datasets splits lists among processes. Links are not followed: their targets may have names without endings.
    stamps = tuple((str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    try:
        return datasets.Dataset.from_generator(
            _raw_rows,
            gen_kwargs={"stamps": stamps, "version": READER_VERSION},
            features=datasets.Features({RAW: datasets.Value("large_binary")}),
        )
    except ValueError as error:
        if "corresponds to no data" in str(error):  # the message of datasets if a generator yields nothing
            raise UserError("has no rows") from error
        raise


def _raw_rows(stamps: tuple[tuple[str, int, int], ...], version: int) -> Iterator[dict[str, bytes]]:
    for name, _, _ in stamps:
        try:
            for row in files.raw_rows(Path(name)):
                yield {RAW: row}
        except (UserError, OSError, ValueError) as error:
            if len(stamps) == 1:
                raise
            raise UserError(f"{Path(name).name}: {first_line(error)}") from error


def row_name(number: int, split: str) -> str:
    """Name a row of a split for errors, by its number from 0; in a part of a split, rows are counted from its start."""
    return f"row {number + 1}" + (f" of {split}" if "[" in split or "+" in split else "")


def _check_first(rows: datasets.Dataset, split: str) -> None:
    """Raise `UserError` if none of the first rows can be parsed, which says more than that there are no columns."""
    reasons = []
    for row in rows.select(range(min(len(rows), SAMPLED_ROWS))) if rows.column_names == [RAW] else ():
        try:
            parse(row)
            return
        except BadRow as error:
            reasons.append(error)
    if reasons:
        raise UserError(f"{row_name(0, split)}: {reasons[0]}") from reasons[0]


def columns_of(rows: datasets.Dataset) -> list[str]:
    """Return the columns; for unparsed rows, the keys of the first `SAMPLED_ROWS` rows."""
    if rows.column_names != [RAW]:
        return list(rows.column_names)
    names: dict[str, None] = {}
    for raw in rows[:SAMPLED_ROWS][RAW]:
        try:
            names.update(dict.fromkeys(parse({RAW: raw})))
        except BadRow:
            continue
    return list(names)


def parse(row: dict[str, Any], features: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parse a row. Raises `BadRow` if it is broken JSON or invalid UTF-8, has a key twice, or is not an object.

    `features` are those of the data set that holds the row; see `_without_fillers`.
    """
    if RAW not in row:
        return {name: _without_fillers(value, (features or {}).get(name)) for name, value in row.items()}
    try:
        value = decode(row[RAW])
    except UnicodeDecodeError:
        raise BadRow("invalid UTF-8") from None
    except ValueError as error:
        raise BadRow(f"broken JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadRow(f"is {type(value).__name__}, not a record")
    if "" in value and isinstance(value[""], list):  # the key of DictReader for fields beyond the header
        raise BadRow("has more fields than the header line")
    return value


def _without_fillers(value: Any, feature: Any) -> Any:
    """Remove the nulls that Arrow fills into records: it gives each record the fields of all records of its column.

    Records inside a value that Arrow holds as JSON have only their own fields, so those stay.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _without_fillers(item, feature.get(key)) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_without_fillers(item, inner) for item in value]
    return value
