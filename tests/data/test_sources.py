"""Reading files and folders."""

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from superoffload import hub
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
    rows = open_rows(str(name), split)
    return [parse(row, rows.features) for row in rows]


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


CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.jsonl
- config_name: nb
  data_files:
  - split: train
    path: nb/*.jsonl
---
"""


def test_configs_of_a_folder(tmp_path: Path) -> None:
    for config, count in (("en", 5), ("nb", 2)):
        (tmp_path / config).mkdir()
        write(tmp_path / config / "a.jsonl", ROWS[:count])
    (tmp_path / "README.md").write_text(CARD)
    name = str(tmp_path)
    assert [parse(row) for row in open_rows(name, "train", config="nb")] == ROWS[:2]
    with pytest.raises(UserError, match=f"--dataset_name {name}: .*several configs; .* --dataset_config: en, nb"):
        open_rows(name, "train")
    with pytest.raises(UserError, match=f"--eval_dataset {name}: .*several configs; .* --eval_config: en, nb"):
        open_rows(name, "train", "eval_dataset")
    with pytest.raises(UserError, match="has no config de; its configs are en, nb"):
        open_rows(name, "train", config="de")
    (tmp_path / "README.md").write_text(CARD.replace("config_name: nb\n", "config_name: nb\n  default: true\n"))
    assert len(open_rows(name, "train")) == 2


@pytest.mark.parametrize("kind", ["file", "folder", "saved", "saved splits"])
def test_a_config_that_does_not_exist(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data"
    if kind == "file":
        write(path.with_suffix(".jsonl"))
        path = path.with_suffix(".jsonl")
    elif kind == "folder":
        path.mkdir()
        write(path / "rows.jsonl")
    else:
        rows = datasets.Dataset.from_list(ROWS)
        (datasets.DatasetDict({"train": rows}) if kind == "saved splits" else rows).save_to_disk(str(path))
    assert rows_of(path) == ROWS
    with pytest.raises(UserError, match="has no configs; leave out --dataset_config en"):
        open_rows(str(path), "train", config="en")


def test_a_config_after_the_id(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--dataset_name owner/name:en: .*--dataset_name owner/name --dataset_config en"
    ):
        open_rows("owner/name:en", "train")
    with pytest.raises(UserError, match=f"for the config en of {tmp_path}, use --dataset_name {tmp_path} --dataset_c"):
        open_rows(f"{tmp_path}:en", "train")
    with pytest.raises(UserError, match="none:en: no such file or folder$"):
        open_rows(f"{tmp_path}/none:en", "train")


def test_configs_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'nb']")
        if config not in ("en", "nb"):
            raise ValueError(f"BuilderConfig {config!r} not found. Available: ['en', 'nb']")
        if split != "train":
            raise ValueError(f"Unknown split {split!r}. Should be one of ['train'].")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(hub, "check", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda _: ["en", "nb"])
    assert len(open_rows("owner/name", "train", config="nb")) == 5
    for config, split, words in [
        (None, "train", "has several configs; choose one with --dataset_config: en, nb"),
        ("de", "train", "has no config de; its configs are en, nb"),
        ("en", "test", "Unknown split 'test'"),
    ]:
        with pytest.raises(UserError, match=f"--dataset_name owner/name: {words}"):
            open_rows("owner/name", split, config=config)


def test_a_folder_with_files_of_two_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl")
    write(folder / "b.csv", ROWS[:1])
    with pytest.raises(UserError, match=r"several kinds \(a.jsonl, b.csv\)"):
        open_rows(str(folder), "train")
    (folder / "b.csv").rename(folder / "b.txt")  # not data
    assert rows_of(folder) == ROWS
    write(folder / "b.json", ROWS[:2])
    assert rows_of(folder) == [*ROWS, *ROWS[:2]]
    (folder / "c.jsonl.xz").touch()
    with pytest.raises(UserError, match=r"c.jsonl.xz: cannot be decompressed; known are .gz, .zst, .bz2"):
        open_rows(str(folder), "train")


def test_a_file_that_matches_a_split_twice_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "train-train.jsonl")
    assert rows_of(tmp_path) == ROWS


def test_links_to_files_without_an_ending(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv")
    (tmp_path / "blob").write_bytes(gzip.compress((tmp_path / "rows.csv").read_bytes()))
    (tmp_path / "link.csv.gz").symlink_to(tmp_path / "blob")
    assert rows_of(tmp_path / "link.csv.gz") == ROWS


def test_each_split_of_a_folder_may_have_a_kind_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet")
    write(tmp_path / "test.csv", ROWS[:2])
    assert rows_of(tmp_path) == ROWS
    assert rows_of(tmp_path, "test") == ROWS[:2]


def test_folders_of_compressed_and_upper_case_files(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", ROWS[:2])
    (tmp_path / "train-0.jsonl").rename(tmp_path / "train-0.JSONL")
    with gzip.open(tmp_path / "train-1.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, ROWS[2:])))
    assert rows_of(tmp_path) == ROWS
    assert rows_of(tmp_path / "train-0.JSONL") == ROWS[:2]


def test_upper_case_endings_of_typed_files(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").rename(tmp_path / "rows.PARQUET")
    assert rows_of(tmp_path / "rows.PARQUET") == ROWS


CALL = {"name": "weather", "arguments": {"city": "Oslo"}}


def test_parquet_shards_with_different_columns(tmp_path: Path) -> None:
    shards: list[list[dict[str, Any]]] = [
        [{"instruction": "q", "output": "a"}],
        [{"output": "b", "more": 1, "instruction": "r", "calls": [CALL]}],
        [{"instruction": "s", "output": "c", "calls": [{"name": "mail", "arguments": {"to": "x"}}]}],
    ]
    for number, rows in enumerate(shards):
        write(tmp_path / f"train-{number}.parquet", rows)
    read = rows_of(tmp_path)
    assert [(row["instruction"], row["output"], row["more"]) for row in read] == [
        ("q", "a", None), ("r", "b", 1), ("s", "c", None),
    ]  # fmt: skip
    assert [row["calls"] for row in read] == [None, [CALL], shards[2][0]["calls"]]


@pytest.mark.parametrize(
    ("value", "other", "words"),
    [
        ("x", 1, ".*Field more has incompatible types: string vs int64"),
        ([{"n": 2}], [{"n": 2.5}], "more.n holds whole numbers in one, fractions in others"),
    ],
)
def test_parquet_shards_that_do_not_fit_together(tmp_path: Path, value: Any, other: Any, words: str) -> None:
    write(tmp_path / "train-0.parquet", [{"more": value}])
    write(tmp_path / "train-1.parquet", [{"more": other}])
    with pytest.raises(UserError, match=f"its files do not fit together: {words}"):
        open_rows(str(tmp_path), "train")


def test_nulls_that_arrow_fills_into_records_are_removed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": None, "calls": [CALL, {"name": "mail", "arguments": {"to": "x", "cc": ["y", None]}}]},
        {"text": "t", "calls": [{"name": "now", "arguments": {}}]},
    ]
    write(tmp_path / "rows.parquet", rows)
    assert open_rows(str(tmp_path / "rows.parquet"), "train")[0]["calls"][0]["arguments"]["to"] is None
    assert rows_of(tmp_path / "rows.parquet") == rows


@pytest.mark.parametrize("kind", ["file", "folder", "saved", "saved splits", "parquet"])
def test_parts_of_splits(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data"
    if kind in ("file", "parquet"):
        path = path.with_suffix(".jsonl" if kind == "file" else ".parquet")
        write(path)
    elif kind == "folder":
        path.mkdir()
        write(path / "train.jsonl")
        write(path / "test.jsonl", ROWS[:2])
    else:
        rows = datasets.Dataset.from_list(ROWS)
        splits = datasets.DatasetDict({"train": rows, "test": rows.select(range(2))})
        (splits if kind == "saved splits" else rows).save_to_disk(str(path))
    assert rows_of(path, "train[:2]") == ROWS[:2]
    assert rows_of(path, "train[-1:]") == ROWS[4:]
    assert rows_of(path, "train[40%:80%]") == ROWS[2:4]
    if kind in ("folder", "saved splits"):
        assert rows_of(path, "train+test[1:]") == [*ROWS, ROWS[1]]
    elif kind == "file":
        with pytest.raises(UserError, match="a file has no splits"):
            open_rows(str(path), "train+test")
    with pytest.raises(UserError, match=r"has no rows in train\[5:\]: train has 5"):
        open_rows(str(path), "train[5:]")
    with pytest.raises(UserError, match=r"--dataset_name .*: .*train\[:x\]"):
        open_rows(str(path), "train[:x]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1},\n{"a": 2},\n', r"row 1: broken JSON \(Extra data"),
        ("{'a': 1}\n", "row 1: broken JSON"),
        ("[[1]]", "row 1: is list, not a record"),
        ('{"a": 1, "a": 2}', "row 1: has the key 'a' twice"),
    ],
)
def test_a_file_without_a_good_row_says_what_is_wrong_with_the_first(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        open_rows(str(tmp_path / "rows.jsonl"), "train")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl.gz", b"not compressed", "incorrect header"),
        ("rows.jsonl", "a".encode("utf-16") + b"\x00\xdc", "codec can't decode"),
        ("rows.csv", b"a,a\n1,2\n", "names the column a twice"),
        ("rows.json", b'[{"a": 1}] end', "row 2: broken JSON"),
        ("rows.json.xz", b"", "unknown file type .json.xz; known types are .json, .*compressed"),
    ],
)
def test_unreadable_files_are_errors_of_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^--dataset_name .*{name}: .*{words}"):
        open_rows(str(tmp_path / name), "train")


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


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_current_folder(name: str) -> None:
    with pytest.raises(UserError, match=f"--dataset_name {name}: is empty"):
        open_rows(name, "train")


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


def test_an_error_names_the_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}]')
    (tmp_path / "b.json").write_text('[{"a": 1},\n{"a": }]')
    with pytest.raises(UserError, match=r"b\.json: row 2: broken JSON in line 2"):
        open_rows(str(tmp_path), "train")


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
