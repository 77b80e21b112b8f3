"""A file of JSON or CSV -> its rows, unparsed, in one pass over the file.

| ending                       | rows                                                                            |
| ---------------------------- | ------------------------------------------------------------------------------- |
| `.json`, `.jsonl`, `.ndjson` | lines, arrays, objects of several lines, or an object that holds a list of rows |
| `.csv`, `.tsv`               | lines below a header line; every value stays text                               |

Upper and lower case are the same. Such a file may be compressed (`.jsonl.gz`, `.zst`, `.bz2`) and encoded in UTF-8,
UTF-16 or UTF-32, with or without a byte-order mark.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow

from superoffload.data.formats import has_format
from superoffload.data.messages import decode
from superoffload.errors import UserError

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
ENDINGS = ", ".join(KINDS)
HIDES = "which hides where the next row begins; fix it, or use JSON lines"
SCANNER = json.JSONDecoder()
Span = tuple[int, int]


def kind_of(path: Path) -> str | None:
    """Return what a file's ending says it holds: `json`, `csv`, `parquet` or `arrow`; None if it is none of them."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSIONS:
        kind = KINDS.get(endings[-2]) if len(endings) > 1 else None
        return kind if kind in ("json", "csv") else None
    return KINDS.get(endings[-1]) if endings else None


def raw_rows(path: Path) -> Iterator[bytes]:
    """Yield the rows of a JSON or CSV file, each as one piece of JSON, which may be broken.

    Raises `UserError` if a row is broken such that the start of the next one is unknown, and `OSError` or `ValueError`
    if the file cannot be decompressed or decoded.
    """
    compression = COMPRESSIONS.get(path.suffix.lower())
    source = pyarrow.input_stream(str(path), compression=compression) if compression else path.open("rb")
    with io.BufferedReader(source) if compression else source as file:
        encoding = json.detect_encoding(file.peek(4)[:4])
        if kind_of(path) == "csv":
            tabs = ".tsv" in (ending.lower() for ending in path.suffixes)
            yield from _csv_rows(file, encoding, "\t" if tabs else ",")
        else:
            yield from _json_rows(_utf8_lines(file, encoding))


def _utf8_lines(file: Any, encoding: str) -> Iterable[bytes]:
    if encoding == "utf-8":
        return file  # type: ignore[no-any-return]
    if encoding == "utf-8-sig":
        file.read(3)
        return file  # type: ignore[no-any-return]
    return (line.encode() for line in io.TextIOWrapper(file, encoding=encoding, newline="\n"))


def _json_rows(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the rows of JSON lines while they are read; any other form of JSON is read into memory."""
    lines = iter(lines)
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    first = head[-1].strip() if head else b""
    if first.startswith(b"[") or _continues(first):
        whole = io.BytesIO()
        whole.writelines(chain(head, lines))
        yield from _read_whole(whole.getvalue())
        return
    wrapped = _wrapped(first)
    following = next((line for line in lines if line.strip()), b"") if wrapped else b""
    if wrapped and not following:
        yield from wrapped
        return
    yield from (line.strip() for line in chain([first, following], lines) if line.strip())


def _continues(line: bytes) -> bool:
    """Return whether a line is the start of an object, and not a row of JSON lines, even a broken one.

    JSON breaks off at the end of such a line. A text that does not end makes a broken row: texts do not continue in
    the next line.
    """
    text = line.decode("utf-8", errors="surrogateescape")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return bool(text) and error.pos >= len(text)
    except RecursionError:
        return False
    return False


def _wrapped(content: bytes | str) -> list[bytes]:
    """Return the rows of `{"data": [...]}`: an object that is no row itself and holds a single list of records.

    Turns of a conversation are not rows. Returns an empty list for anything else.
    """
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return []
    if not isinstance(whole, dict) or has_format(list(whole)):
        return []
    lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) != 1 or "role" in lists[0][0] or "from" in lists[0][0]:
        return []
    decode(content)  # raises if a key appears twice
    return [json.dumps(row).encode() for row in lists[0]]


def _read_whole(content: bytes) -> Iterator[bytes]:
    """Yield the rows of JSON values that follow one another: objects, and the elements of arrays.

    Raises `UserError` with the row's number if a value is broken; if not even a first object can be read, the lines are
    the rows. Bytes that are not UTF-8 stay as they are in their row, so that such a row can be skipped.
    """
    text = content.decode("utf-8", errors="surrogateescape")
    start = _after_blank(text, 0)
    if text.startswith("{", start):
        try:
            _, end = SCANNER.raw_decode(text, start)
        except json.JSONDecodeError:
            yield from (line.strip() for line in content.splitlines() if line.strip())
            return
        wrapped = [] if text[end:].strip() else _wrapped(text)
        if wrapped:
            yield from wrapped
            return
    number = 1
    try:
        for begin, end in _values(text, start):
            yield text[begin:end].encode("utf-8", errors="surrogateescape")
            number += 1
    except json.JSONDecodeError as error:
        raise UserError(f"row {number}: broken JSON in line {error.lineno} ({error.msg}), {HIDES}") from error


def _values(text: str, position: int) -> Iterator[Span]:
    while position < len(text):
        if text[position] == "[":
            position = yield from _elements(text, position)
        else:
            _, end = SCANNER.raw_decode(text, position)
            yield position, end
            position = _after_blank(text, end)


def _elements(text: str, position: int) -> Generator[Span, None, int]:
    """Yield the spans of the elements of an array; return the position of what follows it."""
    position = _after_blank(text, position + 1)
    while not text.startswith("]", position):
        _, end = SCANNER.raw_decode(text, position)
        yield position, end
        position = _after_blank(text, end)
        if text.startswith(",", position):
            position = _after_blank(text, position + 1)
        elif not text.startswith("]", position):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    return _after_blank(text, position + 1)


def _after_blank(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def _csv_rows(file: Any, encoding: str, delimiter: str) -> Iterator[bytes]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
    # Strict: a lenient reader takes everything after a stray quotation mark for one field.
    reader = csv.DictReader(text, restkey="", restval=None, delimiter=delimiter, strict=True)
    number = 1
    try:
        twice = [name for name, count in Counter(reader.fieldnames or ()).items() if name and count > 1]
        if twice:
            raise UserError(f"the header line names the column {twice[0]} twice; rename or remove one")
        _check_separator(reader.fieldnames or (), delimiter)
        for row in reader:
            yield json.dumps(row).encode()
            number += 1
    except csv.Error as error:
        raise UserError(f"row {number}: broken CSV ({error}), {HIDES}") from error


def _check_separator(names: Sequence[str], delimiter: str) -> None:
    """Raise `UserError` if a header line is a single name that holds other separators."""
    found = [mark for mark in ";\t|," if mark != delimiter and mark in "".join(names[:1])] if len(names) == 1 else []
    if found:
        raise UserError(
            f"the header line is separated by {found[0]!r}; separate the values by commas in .csv, by tabs in .tsv"
        )
