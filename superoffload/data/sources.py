"""Find and read a data set: a hub id, a folder, or a file -> rows in a `datasets.Dataset`.

Rows of JSON and CSV files are kept unparsed, each as one piece of JSON in the column `RAW`, and are parsed when they
are tokenised. A reader that guesses a type for each column would convert answers that look like numbers or dates,
could not hold rows whose fields differ in type, and would reject a whole file for one broken line.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from superoffload import hub
from superoffload.data.formats import BadRow
from superoffload.errors import UserError, first_line
from superoffload.log import shows_bars

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
TEXT_FILES = (".json", ".jsonl", ".csv")
RAW = "superoffload_raw_row"
READER_VERSION = 1
SAMPLED_ROWS = 100  # the keys of this many rows are the columns of a JSON file


def open_rows(name: str, split: str, flag: str = "dataset_name") -> datasets.Dataset:
    """Open a split of a data set. Raises `UserError` if it cannot be found or read, or has no rows."""
    if not shows_bars():
        datasets.disable_progress_bars()
    try:
        rows = _open(Path(name).expanduser(), name, split, flag)
    except UserError as error:
        raise error if str(error).startswith("--") else UserError(f"--{flag} {name}: {error}") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__
        if isinstance(cause, UserError):  # raised by a reader of this file, wrapped by datasets
            raise UserError(f"--{flag} {name}: {cause}") from error
        raise UserError(f"--{flag} {name}: {_reason(error)}") from error
    if len(rows) == 0:
        raise UserError(f"--{flag} {name}: has no rows")
    return rows


def _open(path: Path, name: str, split: str, flag: str) -> datasets.Dataset:
    if path.is_file():
        if path.suffix not in READERS:
            raise UserError(
                f"--{flag} {name}: unknown file type {path.suffix or '(none)'}; known types are {', '.join(READERS)}"
            )
        if path.stat().st_size == 0:
            raise UserError(f"--{flag} {name}: the file is empty")
        if path.suffix in TEXT_FILES:
            return _raw([path])
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    if path.is_dir():
        return _open_folder(path, name, split, flag)
    if hub.looks_like_path(name) or path.suffix in READERS:
        raise UserError(f"--{flag} {name}: no such file or folder")
    name, _, revision = name.partition("@")
    hub.check(
        flag, name, "dataset", lambda: (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    )
    return datasets.load_dataset(name, split=split, revision=revision or None)


def _open_folder(path: Path, name: str, split: str, flag: str) -> datasets.Dataset:
    if (path / "dataset_info.json").exists():
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").exists():
        parts = datasets.load_from_disk(str(path))
        if split not in parts:
            raise UserError(f"--{flag} {name}: no split {split}; the splits are {', '.join(parts)}")
        return parts[split]
    try:
        files = datasets.load_dataset_builder(str(path)).config.data_files or {}
    except datasets.exceptions.DataFilesNotFoundError:
        raise UserError(f"--{flag} {name}: contains no {', '.join(READERS)} file") from None
    if split not in files:
        raise UserError(f"--{flag} {name}: no split {split}; the splits are {', '.join(map(str, files)) or '(none)'}")
    paths = [Path(file) for file in files[split]]
    if all(file.suffix in TEXT_FILES and file.is_file() for file in paths):
        return _raw(paths)
    return datasets.load_dataset(str(path), split=split)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # datasets wraps the reader's error, which says more
        error = error.__cause__
    return first_line(error)


def _raw(paths: list[Path]) -> datasets.Dataset:
    # datasets hashes these stamps into the key of its own cache, so a changed file is read again. A tuple, because
    # datasets splits lists among processes.
    stamps = tuple((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
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
        path = Path(name)
        for row in _csv_rows(path) if path.suffix == ".csv" else _json_rows(path):
            yield {RAW: row}


def _json_rows(path: Path) -> Iterator[bytes]:
    """Yield the unparsed rows of a file: the elements of one array, or the lines."""
    with path.open("rb") as file:
        start = file.read(3)
        file.seek(3 if start == b"\xef\xbb\xbf" else 0)  # a byte-order mark
        first = next((line for line in file if line.strip()), b"")
        file.seek(3 if start == b"\xef\xbb\xbf" else 0)
        if first.lstrip().startswith(b"["):
            yield from _elements(file.read())
        elif _is_whole(first):
            yield from (line.strip() for line in file if line.strip())
        else:
            yield from _one_object(file.read(), first)


def _is_whole(line: bytes) -> bool:
    """Return whether a line is a row of JSON lines, even a broken one, and not the start of an object of many lines."""
    return line.strip() not in (b"{", b"") and not line.rstrip().endswith((b":", b"[", b","))


def _one_object(content: bytes, first: bytes) -> Iterator[bytes]:
    """Yield the rows of `{"data": [...]}`, the object itself if it has no such list, or the lines if it is not JSON."""
    try:
        whole = json.loads(content)
    except ValueError:
        yield from (line.strip() for line in content.splitlines() if line.strip())
        return
    lists = [value for value in whole.values() if isinstance(value, list)]
    yield from (json.dumps(row).encode() for row in (lists[0] if len(lists) == 1 else [whole]))


def _elements(content: bytes) -> Iterator[bytes]:
    """Yield the elements of an array. Raises `UserError` with the row's number if the array is broken.

    Bytes that are not UTF-8 are kept as surrogates in their element, so that such a row can be skipped.
    """
    text = content.decode("utf-8", errors="surrogateescape")
    decoder = json.JSONDecoder()
    position, number = _after_blank(text, text.index("[") + 1), 0
    while text[position : position + 1] != "]":
        try:
            element, position = decoder.raw_decode(text, position)
            position = _after_blank(text, position)
            if text[position : position + 1] == ",":
                position = _after_blank(text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except json.JSONDecodeError as error:
            raise UserError(
                f"row {number + 1}: broken JSON in line {error.lineno} ({error.msg}), which hides where the next row "
                "begins; fix it, or use JSON lines"
            ) from error
        number += 1
        yield json.dumps(element).encode()


def _after_blank(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def _csv_rows(path: Path) -> Iterator[bytes]:
    """Yield the rows of a CSV file with a header line; every value stays text."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for row in csv.DictReader(file, restkey="", restval=None):
            yield json.dumps(row).encode()


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


def parse(row: dict[str, Any]) -> dict[str, Any]:
    """Parse a row. Raises `BadRow` if it is broken JSON or invalid UTF-8, or not an object."""
    if RAW not in row:
        return row
    try:
        value = json.loads(row[RAW])
    except UnicodeDecodeError:
        raise BadRow("invalid UTF-8") from None
    except ValueError as error:
        raise BadRow(f"broken JSON ({error})") from None
    except RecursionError:
        raise BadRow("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise BadRow(f"is {type(value).__name__}, not a record")
    if "" in value and isinstance(value[""], list):  # the key of DictReader for fields beyond the header
        raise BadRow("has more fields than the header line")
    return value
