"""Forms, encodings and compressions of JSON and CSV files."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from superoffload.data import files
from superoffload.data.files import kind_of, raw_rows
from superoffload.errors import BadRow, UserError

pytestmark = pytest.mark.unit

ROWS: list[dict[str, Any]] = [{"instruction": f"i{n}", "output": f"ö{n}"} for n in range(4)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
TABLE = "instruction,output\n" + "".join(f"i{n},ö{n}\n" for n in range(4))
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def rows_of(path: Path, content: str | bytes, encoding: str = "utf-8") -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return [json.loads(row) for row in raw_rows(path)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.json", "json"), ("a.JSONL", "json"), ("a.ndjson", "json"), ("a.b.jsonl.GZ", "json"), ("a.tsv.zst", "csv"),
        ("A.CSV", "csv"), ("a.parquet", "parquet"), ("a.arrow", "arrow"),
        ("a.parquet.gz", None), ("a.gz", None), ("a.txt", None), ("json", None), ("a.json.xz", None),
    ],
)  # fmt: skip
def test_the_ending_says_what_a_file_holds(name: str, kind: str | None) -> None:
    assert kind_of(Path(name)) == kind


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    assert rows_of(tmp_path / "rows.jsonl", LINES, encoding) == ROWS
    assert rows_of(tmp_path / "rows.json", json.dumps(ROWS, indent=1, ensure_ascii=False), encoding) == ROWS
    assert rows_of(tmp_path / "rows.csv", TABLE, encoding) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_bytes_that_are_not_utf_16_are_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnicodeDecodeError):
        rows_of(tmp_path / name, "a,b\n".encode("utf-16") + b"\x00\xdc\x00\xdc")


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".GZ"])
def test_compressed_files_of_several_parts(tmp_path: Path, ending: str) -> None:
    def compress(data: bytes) -> bytes:
        if ending == ".bz2":
            return bz2.compress(data)
        return gzip.compress(data) if ending != ".zst" else bytes(pyarrow.compress(data, codec="zstd", asbytes=True))

    def parts(text: str) -> bytes:
        middle = len(text) // 2
        return compress(text[:middle].encode()) + compress(text[middle:].encode())

    assert rows_of(tmp_path / f"rows.jsonl{ending}", parts(LINES)) == ROWS
    assert rows_of(tmp_path / f"rows.json{ending}", parts(json.dumps(ROWS, indent=1))) == ROWS
    assert rows_of(tmp_path / f"rows.csv{ending}", parts(TABLE)) == ROWS
    with pytest.raises(OSError, match=r"[Tt]runcated"):
        rows_of(tmp_path / f"cut.jsonl{ending}", compress(LINES.encode() * 100)[:-6])


def test_tabs_separate_the_columns_of_tsv(tmp_path: Path) -> None:
    text = 'instruction\toutput\ni, 0\tsaid "so"\n"i\n1"\t\n'
    expected = [{"instruction": "i, 0", "output": 'said "so"'}, {"instruction": "i\n1", "output": ""}]
    assert rows_of(tmp_path / "rows.tsv", text) == expected
    assert rows_of(tmp_path / "rows.TSV.gz", gzip.compress(text.encode())) == expected


PRETTY = "\n".join(json.dumps(row, indent=1) for row in ROWS)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:]),
        json.dumps(ROWS[:2], indent=2) + json.dumps(ROWS[2:], indent=2),
        "\n\n" + json.dumps(ROWS[:3]) + json.dumps(ROWS[3]),
        "[]" + json.dumps(ROWS) + "[]",
        PRETTY,
        PRETTY.replace("\n", "\r\n"),
        "\n" + LINES.replace("\n", "\n\n"),
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1", "tags": ["a", "b"], "data": ROWS}) + "\n\n",
        json.dumps({"version": "1", "tags": ["a", "b"], "data": ROWS}, indent=1),
    ],
    ids=[
        "arrays", "arrays of many lines", "array and object", "empty arrays", "objects of many lines", "line endings",
        "blank lines", "an object that holds the rows", "and other things", "and many lines",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_forms_of_json(tmp_path: Path, name: str, text: str) -> None:
    assert rows_of(tmp_path / name, text) == ROWS


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"id": 1, "conversations": TURNS},
        {"dialogue": TURNS},
        {"instruction": "i", "output": "o", "sources": [{"title": "t"}]},
        {"question": "q", "tags": ["a"]},
    ],
    ids=["messages", "conversations", "unknown name", "pair", "no records"],
)
def test_a_single_row_that_holds_a_list_is_a_row(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    assert rows_of(tmp_path / "rows.jsonl", json.dumps(row, indent=indent)) == [row]


def test_lines_that_hold_lists_are_rows(tmp_path: Path) -> None:
    rows = [{"data": ROWS}, {"data": ROWS[:1]}]
    assert rows_of(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))) == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(ROWS) + "\nthat was all", "row 5: broken JSON in line 2"),
        (json.dumps(ROWS) + "]", "row 5: broken JSON"),
        (json.dumps(ROWS)[:-1], "row 5: broken JSON"),
        (json.dumps(ROWS)[:-9], "row 4: broken JSON"),
        ('[{"a": 1}\n{"a": 2}]', "row 2: broken JSON in line 2"),
        ("[", "row 1: broken JSON"),
        (PRETTY + "}", "row 5: broken JSON in line 16"),
        (PRETTY.replace('"i2"', "i2"), "row 3: broken JSON in line 10"),
    ],
)
def test_text_that_hides_rows_is_an_error_with_the_number_of_the_row(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rows_of(tmp_path / "rows.json", text)


@pytest.mark.parametrize("first", ['{"a": ', '{"a": "x', '{"a": 1},', "{'a': 1}", "{", '{"a": 1,'])
def test_a_broken_first_line_is_a_row_of_its_own(tmp_path: Path, first: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{first}\n{LINES}")
    rows = list(raw_rows(tmp_path / "rows.jsonl"))
    assert rows[0].decode() == first.strip()
    assert list(map(json.loads, rows[1:])) == ROWS


def test_values_are_passed_on_as_they_are_written(tmp_path: Path) -> None:
    text = b'{"a": 1, "a": 2, "n": 1.50, "b": "\xff"}'
    for content in (text, b"[" + text + b"]", b"[\n" + text + b"\n]"):
        (tmp_path / "rows.json").write_bytes(content)
        assert list(raw_rows(tmp_path / "rows.json")) == [text]
    with pytest.raises(BadRow, match="'a' twice"):
        rows_of(tmp_path / "rows.json", b'{"data": [' + text.replace(b"\xff", b"") + b"]}")


def test_only_the_first_lines_of_json_lines_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES)
    read: list[bytes] = []

    def lines(file: Any, encoding: str) -> Any:
        for line in file:
            read.append(line)
            yield line

    monkeypatch.setattr(files, "_utf8_lines", lines)
    rows = raw_rows(tmp_path / "rows.jsonl")
    for number, row in enumerate(rows, 1):
        assert json.loads(row) == ROWS[number - 1]
        assert len(read) == number


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("instruction,output,output\nq,first,second\n", "names the column output twice"),
        ("instruction;output\nq;a\n", "separated by ';'; separate the values by commas in .csv"),
        ('a,b\n1,"2\n3,4\n', "row 1: broken CSV"),
        ('a,b\n1,2\n3,"4" and more\n', "row 2: broken CSV"),
    ],
)
def test_csv_that_would_lose_text_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rows_of(tmp_path / "rows.csv", text)


def test_columns_of_csv_without_a_name_may_repeat(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "rows.csv", ",a,\n0,x,\n") == [{"": "", "a": "x"}]
