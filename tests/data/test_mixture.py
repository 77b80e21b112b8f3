"""Several sources: what each value asks for, what each source is called, and which rows an epoch draws."""

from pathlib import Path

import numpy as np
import pytest

from superoffload.data import mixture
from superoffload.data.mixture import Source
from superoffload.errors import UserError

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a few files and folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.parquet", "a:0.5", "a#3", "a.jsonl#4", "x/a.jsonl", "y/a.jsonl", "v1.5/rows.csv"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x")
    return tmp_path


def one(text: str) -> tuple[str, float | None, int | None]:
    (source,) = mixture.parse([text])
    return source.name, source.share, source.count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", ("a.jsonl", None, None)),
        ("a.jsonl:0.3", ("a.jsonl", 0.3, None)),
        ("a.jsonl:1", ("a.jsonl", 1.0, None)),
        ("a.jsonl:1e-3", ("a.jsonl", 0.001, None)),
        ("a.jsonl#500", ("a.jsonl", None, 500)),
        ("owner/name:.25", ("owner/name", 0.25, None)),
        ("owner/name#7", ("owner/name", None, 7)),
        ("v1.5:0.5", ("v1.5", 0.5, None)),
    ],
)
def test_a_share_or_a_number_of_rows(text: str, expected: tuple[str, float | None, int | None]) -> None:
    assert one(text) == expected


@pytest.mark.parametrize("text", ["a:0.5", "a#3", "a.jsonl#4", "./a#3"])
def test_a_file_of_that_whole_name_wins(text: str) -> None:
    assert one(text) == (text, None, None)


def test_such_a_file_takes_a_share_too() -> None:
    assert one("a#3:0.5") == ("a#3", 0.5, None)
    assert one("a:0.5#20") == ("a:0.5", None, 20)


@pytest.mark.parametrize(
    "text", ["C:\\data\\rows.jsonl", "owner/name:en", "owner/name:20220301.en", "none#x.jsonl", "a:b"]
)
def test_other_colons_and_hashes_are_part_of_the_name(text: str) -> None:
    assert one(text) == (text, None, None)


def test_a_configuration_takes_a_share() -> None:
    assert one("owner/name:en:0.5") == ("owner/name:en", 0.5, None)
    assert one("owner/name:2023:1") == ("owner/name:2023", 1.0, None)
    assert one("C:\\rows.jsonl#5") == ("C:\\rows.jsonl", None, 5)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a.jsonl:1.5"], "--dataset_name a.jsonl:1.5: after : comes the share"),
        (["a.jsonl:30"], "at most 1; a.jsonl#500 takes 500 rows"),
        (["a.jsonl:0"], "above 0"),
        (["a.jsonl:-0.5"], "above 0"),
        (["a.jsonl:half"], "after : comes the share"),
        (["a.jsonl:50%"], "after : comes the share"),
        (["a.jsonl:nan"], "after : comes the share"),
        (["a.jsonl:"], "after : comes the share"),
        (["a.jsonl#0"], "--dataset_name a.jsonl#0: after # comes the number of rows"),
        (["a.jsonl#-5"], "a whole number above 0"),
        (["a.jsonl#0.5"], "a whole number above 0"),
        (["a.jsonl#many"], "a whole number above 0"),
        (["a.jsonl#"], "a whole number above 0"),
        (["owner/name#0"], "a whole number above 0"),
        (["a.jsonl:0.5#5"], "either a share or a number of rows, not both"),
        (["a.jsonl", "b.parquet", "a.jsonl"], "--dataset_name a.jsonl: the same data set as a.jsonl"),
        (["a.jsonl:0.5", "./x/../a.jsonl#5"], "the same data set as a.jsonl:0.5"),
        (["owner/name", "owner/name:0.1"], "the same data set as owner/name"),
    ],
)
def test_a_mistake_is_one_line(texts: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        mixture.parse(texts)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_named_through_a_link_is_the_same_source(folder: Path) -> None:
    (folder / "link.jsonl").symlink_to(folder / "a.jsonl")
    with pytest.raises(UserError, match="the same data set"):
        mixture.parse(["a.jsonl", "link.jsonl"])


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["a.jsonl:0.3", "b.parquet", "tatsu-lab/alpaca#5"], ["a", "b", "alpaca"]),
        (["v1.5", "owner/gpt4.5-rows"], ["v1.5", "gpt4.5-rows"]),
        (["x/a.jsonl", "y/a.jsonl"], ["x/a.jsonl", "y/a.jsonl"]),
        (["x/a.jsonl", "y/a.jsonl", "b.parquet"], ["x/a.jsonl", "y/a.jsonl", "b"]),
        (["b.parquet", "owner/b"], ["b.parquet", "b"]),
        (["one/rows", "two/rows"], ["one/rows", "two/rows"]),
        (["owner/name:en", "owner/name:fr"], ["name:en", "name:fr"]),
        (["owner/name:en", "b.parquet"], ["name", "b"]),
    ],
)
def test_labels_are_short_and_differ(texts: list[str], labels: list[str]) -> None:
    assert [source.label for source in mixture.parse(texts)] == labels
    assert [source.label for source in mixture.parse(texts[::-1])] == labels[::-1]


def test_one_source_is_a_source() -> None:
    assert mixture.parse(["tatsu-lab/alpaca"]) == [Source("tatsu-lab/alpaca", "alpaca")]


def test_the_name_of_a_value_that_cannot_be_read_any_more() -> None:
    assert mixture.name_of("owner/name:0.5") == "owner/name"
    assert mixture.name_of("owner/name:7") == "owner/name:7"


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([10, 30], [1, 1], [20, 20]),
        ([10, 30], [3, 1], [30, 10]),
        ([3, 4, 3], [1, 1, 1], [4, 3, 3]),
        ([5, 6], [0.2, 0.8], [2, 9]),
        ([7], [5], [7]),
    ],
)
def test_an_epoch_has_all_rows_together_divided_by_weight(
    sizes: list[int], weights: list[float], expected: list[int]
) -> None:
    assert mixture.rows_per_epoch(sizes, weights, ["a", "b", "c"][: len(sizes)]).tolist() == expected


def test_a_source_that_no_epoch_would_hold_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--dataset_weights 1000 1: an epoch of 20 rows would hold none of b"):
        mixture.rows_per_epoch([10, 10], [1000, 1], ["a", "b"])


def test_rows_are_drawn_with_replacement_from_their_source_by_seed_and_epoch() -> None:
    source_of_row = np.repeat([0, 1], [400, 10])
    counts = np.array([300, 110])
    drawn = mixture.draw(source_of_row, counts, 7, 0)
    assert np.bincount(source_of_row[drawn]).tolist() == [300, 110]
    assert len(np.unique(drawn[300:])) == 10  # each of the ten, eleven times on average
    # 300 draws leave (1 - 1/400)^300 = 47 % of 400 rows out, so 211 differ on average; without replacement, 300 do.
    assert 190 < len(np.unique(drawn[:300])) < 232
    assert mixture.draw(source_of_row, counts, 7, 0).tolist() == drawn.tolist()
    assert mixture.draw(source_of_row, counts, 7, 1).tolist() != drawn.tolist()
    assert mixture.draw(source_of_row, counts, 8, 0).tolist() != drawn.tolist()
