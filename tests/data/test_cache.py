"""Tokenising once: what is kept, what is counted, and what changes the cache's key."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from superoffload.config import DataSettings
from superoffload.data import cache
from superoffload.data.cache import DatasetSpec, load_tokenized
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer
from tests.helpers.rows import BAD_ROWS, RawRow, WriteJsonLines, check_bad_row_is_named_or_skipped, load, pairs
from tests.helpers.tokenizers import make_chat_tokenizer

pytestmark = pytest.mark.unit


def test_rows_lengths_and_targets(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    rows = load(jsonl(pairs()), tokenizer)
    assert len(rows) == 6 and rows.counts.given == 6
    for index, (ids, labels) in enumerate(rows.read(range(6))):
        assert len(ids) == len(labels) == rows.lengths[index]
        assert (labels[1:] != -100).sum() == rows.targets[index] > 0
    assert "question 5" in tokenizer.decode(rows.read([5])[0][0])
    assert rows.read([]) == []


def test_nulls_that_arrow_fills_into_records_are_removed_and_those_of_json_stay(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [{"city": "Oslo"}, {"to": "x", "cc": None}]
    user = {"role": "user", "content": "q"}
    calls = [[{"function": {"name": "f", "arguments": arguments}}] for arguments in given]
    rows = [{"messages": [user, {"role": "assistant", "content": "a", "tool_calls": call}]} for call in calls]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "records.parquet")
    text = datasets.Value("string")
    turn = {
        "role": text,
        "content": text,
        "tool_calls": datasets.List({"function": {"name": text, "arguments": datasets.Json()}}),
    }
    typed = datasets.Dataset.from_list(rows, features=datasets.Features({"messages": datasets.List(turn)}))
    typed.to_parquet(tmp_path / "json.parquet")
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}"
        "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer = make_chat_tokenizer(template)
    for name, expected in (("records", [given[0], {"to": "x"}]), ("json", given)):
        loaded = load(str(tmp_path / f"{name}.parquet"), tokenizer)
        texts = [tokenizer.decode([i for i in labels if i >= 0]) for _, labels in loaded.read(range(2))]
        assert texts == [f"af{json.dumps(arguments)}<|end|>" for arguments in expected]


def test_truncated_and_dropped_rows_are_counted(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    rows = [*pairs(4), {"prompt": "q", "completion": "word " * 200}, {"prompt": "long " * 200, "completion": "a"}]
    loaded = load(jsonl(rows), tokenizer, max_length=64)
    assert (loaded.counts.truncated, loaded.counts.dropped, len(loaded)) == (1, 1, 5)
    assert loaded.lengths.max() == 64


def test_more_than_half_dropped_says_which_length_would_keep_them(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    name = jsonl([*pairs(2), *({"prompt": "long " * n, "completion": "a"} for n in (50, 60, 70))])
    with pytest.raises(UserError, match=r"--max_length 48: 3 of 5 rows .*--max_length (\d+) would keep") as error:
        load(name, tokenizer, max_length=48)
    enough = int(str(error.value).split("--max_length ")[2].split()[0])
    assert load(name, tokenizer, max_length=enough).counts.dropped == 0
    assert load(name, tokenizer, max_length=enough - 1).counts.dropped == 1


def test_rows_without_any_answer_say_so(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="at any length"):
        load(jsonl([{"messages": [{"role": "user", "content": "q"}]}] * 3), tokenizer)


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_malformed_row_is_named_or_skipped(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, bad: RawRow, reason: str
) -> None:
    check_bad_row_is_named_or_skipped(jsonl, tokenizer, bad, reason, num_proc=1)


@pytest.mark.parametrize("choice", [{"share": 0.5}, {"count": 50}, {"percentage": 50.0, "shuffled": True}])
def test_a_bad_row_has_the_number_it_has_in_the_file(
    choice: dict[str, Any], jsonl: WriteJsonLines, tokenizer: Tokenizer
) -> None:
    answer = {"role": "assistant", "content": "a"}
    roles = [f"bot{n}" if n > 60 and n % 2 == 0 else "user" for n in range(1, 101)]
    name = jsonl([{"messages": [{"role": role, "content": "q"}, answer]} for role in roles])
    spec = DatasetSpec(name=name, split="train", seed=3, **choice)
    with pytest.raises(UserError) as error:
        load_tokenized(spec, tokenizer, DataSettings())
    found = load_tokenized(spec, tokenizer, DataSettings(skip_bad_rows=True)).counts.first_bad
    for text in (str(error.value).partition(f"{name}: ")[2], found):
        match = re.match(r"row (\d+): message 1 has the role 'bot(\d+)'", text)
        assert match and match[1] == match[2], text


def test_a_bad_row_in_a_part_of_a_split_says_so(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    name = jsonl([*pairs(9), {"prompt": "q"}, *pairs(9)])
    with pytest.raises(UserError, match=r": row 3 of train\[7:\]: completion is missing"):
        load_tokenized(DatasetSpec(name=name, split="train[7:]"), tokenizer, DataSettings())
    with pytest.raises(UserError, match=r": row 1 of train\[:1\]: broken JSON"):
        load_tokenized(
            DatasetSpec(name=jsonl([b"{", *pairs(2)], "b.jsonl"), split="train[:1]"), tokenizer, DataSettings()
        )


def test_mostly_malformed_is_an_error_even_when_skipping(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"3 of 5 rows are malformed, e\.g\. row 3"):
        load(jsonl([*pairs(2), b"{", b"{", b"{"]), tokenizer, skip_bad_rows=True)


def test_every_setting_that_matters_changes_the_key(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []
    fill = cache._fill

    def record(folder: Path, make: Callable[[Path], None]) -> None:
        made.append(folder.name)
        fill(folder, make)

    monkeypatch.setattr(cache, "_fill", record)
    name = jsonl([{**row, "text": "t"} for row in pairs()])
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
    other_template = "{% for m in messages %}{{ m.role }}={{ m.content }}<eos>{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    variants: list[tuple[Tokenizer, dict[str, Any]]] = [
        (tokenizer, {}),
        (tokenizer, {"max_length": 32}),
        (tokenizer, {"long_rows": "split"}),
        (tokenizer, {"train_on_prompt": True}),
        (tokenizer, {"skip_bad_rows": True}),
        (tokenizer, {"drop_unrendered": True}),
        (tokenizer, {"keep_empty_answers": True}),
        (tokenizer, {"dataset_format": "text"}),
        (tokenizer, {"columns": "prompt=text"}),
        (tokenizer, {"chat_template": "plain"}),
        (make_chat_tokenizer(template), {"chat_template": "tokenizer"}),
        (make_chat_tokenizer(other_template), {"chat_template": "tokenizer"}),
        (tokenizer, {"chat_template": str(tmp_path / "own.jinja")}),
        (make_chat_tokenizer(eos_token="<|end|>"), {}),
        (make_chat_tokenizer(split_special_tokens=True), {}),
    ]
    for one_tokenizer, settings in variants * 2:
        load(name, one_tokenizer, **settings)
    assert len(made) == len(set(made)) == len(variants)
    (tmp_path / "own.jinja").write_text(other_template)
    load(name, tokenizer, chat_template=str(tmp_path / "own.jinja"))
    load(jsonl(pairs(7)), tokenizer)
    load_tokenized(DatasetSpec(name=name, split="train", percentage=50), tokenizer, DataSettings())
    assert len(set(made)) == len(variants) + 3
    load(name, tokenizer, packing=False, padding="max_length", num_proc=2, eval_percentage=10)
    load(name, make_chat_tokenizer())
    assert len(set(made)) == len(variants) + 3


def test_failed_attempt_leaves_nothing_behind(jsonl: WriteJsonLines, tokenizer: Tokenizer, own_cache: Path) -> None:
    with pytest.raises(UserError):
        load(jsonl([*pairs(3), b"{"]), tokenizer)
    assert [path for path in (own_cache / "superoffload").iterdir() if path.suffix != ".lock"] == []


def test_cache_that_cannot_be_written_says_what_to_do(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_tokenize", fail)
    with pytest.raises(UserError, match=r"No space left on device.*HF_DATASETS_CACHE"):
        load(jsonl(pairs()), tokenizer)


def test_other_rank_tokenises_if_nobody_else_does(
    jsonl: WriteJsonLines, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cache, "PATIENCE_S", 0.0)
    assert len(load(jsonl(pairs()), tokenizer)) == 6


def test_percentage_of_the_rows_starts_with_the_first(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    spec = DatasetSpec(name=jsonl(pairs(10)), split="train", percentage=30)
    rows = load_tokenized(spec, tokenizer, DataSettings())
    assert len(rows) == 3
    assert "question 0" in tokenizer.decode(rows.read([0])[0][0])
    assert len(load_tokenized(replace(spec, percentage=1), tokenizer, DataSettings())) == 1


def test_messages_of_a_typed_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "q", "name": "me"}, {"role": "assistant", "content": "the answer"}]
    datasets.Dataset.from_list([{"messages": turns}] * 3).to_parquet(str(tmp_path / "rows.parquet"))
    rows = load(str(tmp_path / "rows.parquet"), tokenizer)
    ids, labels = rows.read([2])[0]
    assert tokenizer.decode(ids[labels >= 0]) == "the answer<eos>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}", "does not write tool_calls of message 2"),
        (
            "{% for m in messages %}{{ m.content + 'x' if m.tool_calls else m.content }}{% endfor %}",
            "TypeError|write tool",
        ),
        ("{% for m in messages %}{{ m.content | upper if m.tool_calls else m.content }}{% endfor %}", "does not write"),
    ],
)
def test_row_that_a_template_cannot_write_is_named_or_skipped(
    jsonl: WriteJsonLines, template: str, reason: str
) -> None:
    tokenizer = make_chat_tokenizer(template)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]}
    bad = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    name = jsonl([good, good, bad])
    with pytest.raises(UserError, match=f"--dataset_name .*: row 3: .*({reason}).*--skip_bad_rows"):
        load(name, tokenizer)
    counts = load(name, tokenizer, skip_bad_rows=True).counts
    assert (counts.given, counts.bad) == (3, 1) and counts.first_bad.startswith("row 3: ")


def test_empty_answers_are_dropped_and_counted_unless_kept(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    empty = [{"prompt": "q", "completion": ""}, {"prompt": "q", "completion": "  "}]
    name = jsonl([*pairs(4), *empty])
    rows = load(name, tokenizer)
    assert (len(rows), rows.counts.empty_answers, rows.counts.dropped) == (4, 2, 2)
    kept = load(name, tokenizer, keep_empty_answers=True)
    assert (len(kept), kept.counts.empty_answers) == (6, 0)
    words = "--dataset_name .*: 2 of 2 rows have no target token at any length; empty answers: 2, which --keep_empty"
    with pytest.raises(UserError, match=words):
        load(jsonl(empty, "empty.jsonl"), tokenizer)


def test_dropped_fields_are_counted(jsonl: WriteJsonLines, tokenizer: Tokenizer) -> None:
    said = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    name = jsonl([{"messages": [{"role": "user", "content": "q"}, said]}] * 3)
    with pytest.raises(UserError, match="row 1: the plain template does not write reasoning_content of message 2"):
        load(name, tokenizer)
    assert load(name, tokenizer, drop_unrendered=True).counts.dropped_fields == 3
