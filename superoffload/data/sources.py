"""Find and read a data set: a hub id, a folder, or a file -> rows in a `datasets.Dataset`.

Files of JSON and CSV are kept as they are, one row as one piece of JSON in the column `RAW`, and read where they
are tokenised. A reader that guesses a type for each column would turn answers that are numbers or dates
into such, could not hold rows whose fields differ in type, and would give up a file for one broken line.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from superoffload import hub
from superoffload.data.formats import BadRow
from superoffload.errors import UserError
from superoffload.log import shows_bars

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
TEXT_FILES = (".json", ".jsonl", ".csv")
RAW = "superoffload_raw_row"
READER_VERSION = 1
LOOKED_AT = 100  # rows whose keys are the columns of a JSON file


def open_rows(name: str, split: str, flag: str = "dataset_name") -> datasets.Dataset:
    """Open a split of a data set; raise `UserError` where it cannot be found or read, or is empty."""
    if not shows_bars():
        datasets.disable_progress_bars()
    try:
        rows = _open(Path(name).expanduser(), name, split, flag)
    except UserError as error:
        raise error if str(error).startswith("--") else UserError(f"--{flag} {name}: {error}") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__
        if isinstance(cause, UserError):  # raised by a reader of ours, below
            raise UserError(f"--{flag} {name}: {cause}") from error
        raise UserError(f"--{flag} {name}: {_reason(error)}") from error
    if len(rows) == 0:
        raise UserError(f"--{flag} {name}: holds no rows")
    return rows


def _open(path: Path, name: str, split: str, flag: str) -> datasets.Dataset:
    if path.is_file():
        if path.suffix not in READERS:
            raise UserError(
                f"--{flag} {name}: unknown file type {path.suffix or '(none)'}; known are {', '.join(READERS)}"
            )
        if path.stat().st_size == 0:
            raise UserError(f"--{flag} {name}: is an empty file")
        if path.suffix in TEXT_FILES:
            return _raw([path])
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    if path.is_dir():
        return _open_folder(path, name, split, flag)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in READERS:
        raise UserError(f"--{flag} {name}: no such file or folder")
    hub.check(
        flag, name, "dataset", lambda: (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    )
    return datasets.load_dataset(name, split=split)


def _open_folder(path: Path, name: str, split: str, flag: str) -> datasets.Dataset:
    if (path / "dataset_info.json").exists():
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").exists():
        parts = datasets.load_from_disk(str(path))
        if split not in parts:
            raise UserError(f"--{flag} {name}: no split {split}; there are {', '.join(parts)}")
        return parts[split]
    try:
        files = datasets.load_dataset_builder(str(path)).config.data_files or {}
    except datasets.exceptions.DataFilesNotFoundError:
        raise UserError(f"--{flag} {name}: holds no {', '.join(READERS)} file") from None
    if split not in files:
        raise UserError(f"--{flag} {name}: no split {split}; there are {', '.join(map(str, files)) or '(none)'}")
    paths = [Path(file) for file in files[split]]
    if all(file.suffix in TEXT_FILES and file.is_file() for file in paths):
        return _raw(paths)
    return datasets.load_dataset(str(path), split=split)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # datasets wraps the reader's own words, which say more
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _raw(paths: list[Path]) -> datasets.Dataset:
    # Size and time of a file are part of what datasets keys its own cache by; tuples, because it deals out lists.
    stamps = tuple((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    try:
        return datasets.Dataset.from_generator(
            _raw_rows,
            gen_kwargs={"stamps": stamps, "version": READER_VERSION},
            features=datasets.Features({RAW: datasets.Value("large_binary")}),
        )
    except ValueError as error:
        if "corresponds to no data" in str(error):  # how datasets words a generator that yields nothing
            raise UserError("holds no rows") from error
        raise


def _raw_rows(stamps: tuple[tuple[str, int, int], ...], version: int) -> Iterator[dict[str, bytes]]:
    for name, _, _ in stamps:
        path = Path(name)
        for row in _csv_rows(path) if path.suffix == ".csv" else _json_rows(path):
            yield {RAW: row}


def _json_rows(path: Path) -> Iterator[bytes]:
    """Yield the rows of a file: the elements of one array, or its lines, unread."""
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
    """Tell a line of JSON lines, even a broken one, from the first line of an object over many lines."""
    return line.strip() not in (b"{", b"") and not line.rstrip().endswith((b":", b"[", b","))


def _one_object(content: bytes, first: bytes) -> Iterator[bytes]:
    """Yield the rows of `{"data": [...]}`, or else the lines."""
    try:
        whole = json.loads(content)
    except ValueError:
        yield from (line.strip() for line in content.splitlines() if line.strip())
        return
    lists = [value for value in whole.values() if isinstance(value, list)]
    yield from (json.dumps(row).encode() for row in (lists[0] if len(lists) == 1 else [whole]))


def _elements(content: bytes) -> Iterator[bytes]:
    """Yield the elements of an array; raise `UserError` with the row's number where it is broken.

    Bytes that are no UTF-8 stay marked inside their element, so that one such row can be skipped.
    """
    text = content.decode("utf-8", errors="surrogateescape")
    decoder = json.JSONDecoder()
    place, number = _after_blank(text, text.index("[") + 1), 0
    while text[place : place + 1] != "]":
        try:
            element, place = decoder.raw_decode(text, place)
            place = _after_blank(text, place)
            if text[place : place + 1] == ",":
                place = _after_blank(text, place + 1)
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        except json.JSONDecodeError as error:
            raise UserError(
                f"row {number + 1}: broken JSON in line {error.lineno} ({error.msg}); where the next row of the array "
                "begins is then unknown, so mend it, or use JSON lines"
            ) from error
        number += 1
        yield json.dumps(element).encode()


def _after_blank(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def _csv_rows(path: Path) -> Iterator[bytes]:
    """Yield the rows of a CSV file with a heading line; every value stays text."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for row in csv.DictReader(file, restkey="", restval=None):
            yield json.dumps(row).encode()


def columns_of(rows: datasets.Dataset) -> list[str]:
    """List the columns; of rows kept raw the keys that the first of them have."""
    if rows.column_names != [RAW]:
        return list(rows.column_names)
    names: dict[str, None] = {}
    for raw in rows[:LOOKED_AT][RAW]:
        try:
            names.update(dict.fromkeys(parse({RAW: raw})))
        except BadRow:
            continue
    return list(names)


def parse(row: dict[str, Any]) -> dict[str, Any]:
    """Read a row that may be kept raw; raise `BadRow` for broken JSON, invalid UTF-8 and what is no record."""
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
    if "" in value and isinstance(value[""], list):  # what DictReader calls the fields that no heading has
        raise BadRow("has more fields than the heading line")
    return value
