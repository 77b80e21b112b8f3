"""Reading files and folders."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from superoffload.data.formats import BadRow
from superoffload.data.sources import columns_of, open_rows, parse
from superoffload.errors import UserError
from tests.helpers.rows import WriteJsonLines

pytestmark = pytest.mark.unit

ROWS: list[dict[str, Any]] = [{"instruction": f"i{n}", "input": "", "output": f"o{n}"} for n in range(5)]


def write(path: Path, rows: Sequence[dict[str, Any]] = ROWS) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path.with_suffix("")))
        next(path.with_suffix("").glob("*.arrow")).rename(path)


def rows_of(name: Path, split: str = "train") -> list[dict[str, Any]]:
    return [parse(row) for row in open_rows(str(name), split)]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "arrow"])
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"rows.{suffix}")
    assert rows_of(tmp_path / f"rows.{suffix}") == ROWS
    assert columns_of(open_rows(str(tmp_path / f"rows.{suffix}"), "train")) == ["instruction", "input", "output"]


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl")
    write(folder / "test.jsonl", ROWS[:2])
    assert rows_of(folder) == ROWS
    assert rows_of(folder, "test") == ROWS[:2]
    with pytest.raises(
        UserError,
        match="no split validation; the splits are train, test|no split validation; the splits are test, train",
    ):
        open_rows(str(folder), "validation")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved") == ROWS
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--dataset_name"):
        open_rows(str(tmp_path / "empty"), "train")


@pytest.mark.parametrize("text", [b"", b"[]", b"[ \n ]", b"instruction,output\n"])
def test_no_rows(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / ("rows.csv" if text.startswith(b"i") else "rows.json")
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"file is empty|has no rows"):
        open_rows(str(path), "train")


def test_missing_or_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(UserError, match=r"unknown file type \.txt"):
        open_rows(str(tmp_path / "rows.txt"), "train")
    with pytest.raises(UserError, match=r"--eval_dataset .*no such file"):
        open_rows(str(tmp_path / "rows.json"), "train", "eval_dataset")


def test_values_keep_their_type_even_if_other_rows_have_another(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"output": "2024-01-01"},
        {"output": 5},
        {"output": [{"a": 1}], "more": None},
        {"output": "007"},
    ]
    write(tmp_path / "rows.jsonl", rows)
    assert rows_of(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.csv").write_text("output,more\n007,\n2024-01-01,NA\n")
    assert rows_of(tmp_path / "rows.csv") == [{"output": "007", "more": ""}, {"output": "2024-01-01", "more": "NA"}]


def test_forms_of_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in (
        json.dumps(ROWS),
        "\ufeff" + json.dumps(ROWS),
        json.dumps({"version": 1, "data": ROWS}, indent=2),
        "\n\n".join(map(json.dumps, ROWS)),
    ):
        path.write_text(text)
        assert rows_of(path) == ROWS
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert rows_of(path) == ROWS[:1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b'{"a": ', "broken JSON"), (b'{"a": "\xff"}', "invalid UTF-8"), (b"[1]", "list, not a record"), (b"7", "int")],
)
def test_broken_lines_are_bad_rows_of_their_own(jsonl: WriteJsonLines, line: bytes, reason: str) -> None:
    rows = open_rows(jsonl([b'{"a": "x"}', line, b'{"a": "y"}']), "train")
    assert len(rows) == 3 and columns_of(rows) == ["a"]
    with pytest.raises(BadRow, match=reason):
        parse(rows[1])
    assert parse(rows[2]) == {"a": "y"}


def test_broken_array_names_row_and_line(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"a": 1},\n{"a": 2},\n{"a": }]')
    with pytest.raises(UserError, match=r"rows.json: row 3: broken JSON in line 3"):
        open_rows(str(tmp_path / "rows.json"), "train")


def test_csv_with_a_field_too_many(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n1,2,3\n")
    rows = open_rows(str(tmp_path / "rows.csv"), "train")
    with pytest.raises(BadRow, match="more fields"):
        parse(rows[1])


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl")
    first = open_rows(str(tmp_path / "rows.jsonl"), "train")._fingerprint
    assert open_rows(str(tmp_path / "rows.jsonl"), "train")._fingerprint == first
    write(tmp_path / "rows.jsonl", ROWS[::-1])
    assert rows_of(tmp_path / "rows.jsonl") == ROWS[::-1]
    assert open_rows(str(tmp_path / "rows.jsonl"), "train")._fingerprint != first


def test_changed_typed_file_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == ROWS
    write(tmp_path / "rows.parquet", ROWS[::-1])
    assert rows_of(tmp_path / "rows.parquet") == ROWS[::-1]
