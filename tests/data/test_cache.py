"""Tokenising once: what is kept, what is counted, and what changes the cache's key."""

import os
from dataclasses import replace

import pytest

from superoffload.config import DataSettings
from superoffload.data import cache
from superoffload.data.cache import Request, tokenised
from superoffload.errors import UserError
from tests.data.conftest import make_tokenizer


def pairs(count=6, answer="yes"):
    return [{"prompt": f"question {n}", "completion": answer} for n in range(count)]


def load(name, tokenizer, **settings):
    return tokenised(Request(name=name, split="train"), tokenizer, DataSettings(**settings))


def test_rows_lengths_and_targets(jsonl, tokenizer):
    rows = load(jsonl(pairs()), tokenizer)
    assert len(rows) == 6 and rows.counts.given == 6
    for index, (ids, labels) in enumerate(rows.read(range(6))):
        assert len(ids) == len(labels) == rows.lengths[index]
        assert (labels[1:] != -100).sum() == rows.targets[index] > 0
    assert "question 5" in tokenizer.decode(rows.read([5])[0][0])
    assert rows.read([]) == []


def test_workers_give_the_same_rows(jsonl, tokenizer):
    name = jsonl(pairs(30))
    alone = [ids.tolist() for ids, _ in load(name, tokenizer).read(range(30))]
    shutil_key = os.listdir(cache.datasets.config.HF_DATASETS_CACHE / "superoffload")
    (cache.datasets.config.HF_DATASETS_CACHE / "superoffload").rename(cache.datasets.config.HF_DATASETS_CACHE / "old")
    assert [ids.tolist() for ids, _ in load(name, tokenizer, num_proc=2).read(range(30))] == alone
    assert set(shutil_key) == set(os.listdir(cache.datasets.config.HF_DATASETS_CACHE / "superoffload"))


def test_truncated_and_dropped_rows_are_counted(jsonl, tokenizer):
    rows = [*pairs(4), {"prompt": "q", "completion": "word " * 200}, {"prompt": "long " * 200, "completion": "a"}]
    loaded = load(jsonl(rows), tokenizer, max_length=64)
    assert (loaded.counts.truncated, loaded.counts.dropped, len(loaded)) == (1, 1, 5)
    assert loaded.lengths.max() == 64


def test_more_than_half_dropped_says_which_length_would_keep_them(jsonl, tokenizer):
    name = jsonl([*pairs(2), *({"prompt": "long " * n, "completion": "a"} for n in (50, 60, 70))])
    with pytest.raises(UserError, match=r"--max_length 48: 3 of 5 rows .*--max_length (\d+) would keep") as error:
        load(name, tokenizer, max_length=48)
    enough = int(str(error.value).split("--max_length ")[2].split()[0])
    assert load(name, tokenizer, max_length=enough).counts.dropped == 0
    assert load(name, tokenizer, max_length=enough - 1).counts.dropped == 1


def test_rows_without_any_answer_say_so(jsonl, tokenizer):
    with pytest.raises(UserError, match="at any length"):
        load(jsonl([{"messages": [{"role": "user", "content": "q"}]}] * 3), tokenizer)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": 3, "completion": "a"}, "prompt is int"),
        ({"prompt": "q"}, "completion is missing"),
        (b'{"prompt": "q", "comple', "broken JSON"),
        (b'{"prompt": "q", "completion": "\xff"}', "invalid UTF-8"),
    ],
)
def test_malformed_row_is_named_or_skipped(jsonl, tokenizer, bad, reason, processes):
    name = jsonl([*pairs(4), bad, *pairs(2)])
    with pytest.raises(UserError, match=f"--dataset_name .*: row 5: {reason}.*--skip_bad_rows"):
        load(name, tokenizer, num_proc=processes)
    skipped = load(name, tokenizer, skip_bad_rows=True, num_proc=processes)
    assert (skipped.counts.bad, len(skipped), skipped.counts.dropped) == (1, 6, 0)
    assert skipped.counts.first_bad.startswith(f"row 5: {reason}")


def test_mostly_malformed_is_an_error_even_when_skipping(jsonl, tokenizer):
    with pytest.raises(UserError, match=r"3 of 5 rows are malformed, e\.g\. row 3"):
        load(jsonl([*pairs(2), b"{", b"{", b"{"]), tokenizer, skip_bad_rows=True)


def test_every_setting_that_matters_changes_the_key(jsonl, tokenizer, monkeypatch, tmp_path):
    made = []
    fill = cache._fill
    monkeypatch.setattr(cache, "_fill", lambda folder, make: (made.append(folder.name), fill(folder, make)))
    name = jsonl([{**row, "text": "t"} for row in pairs()])
    templated = make_tokenizer()
    templated.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
    other_template = make_tokenizer()
    other_template.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }}<eos>{% endfor %}"
    (tmp_path / "own.jinja").write_text(templated.chat_template)
    variants = [
        (tokenizer, {}),
        (tokenizer, {"max_length": 32}),
        (tokenizer, {"train_on_prompt": True}),
        (tokenizer, {"skip_bad_rows": True}),
        (tokenizer, {"dataset_format": "text"}),
        (tokenizer, {"columns": "prompt=text"}),
        (tokenizer, {"chat_template": "plain"}),
        (templated, {"chat_template": "tokenizer"}),
        (other_template, {"chat_template": "tokenizer"}),
        (tokenizer, {"chat_template": str(tmp_path / "own.jinja")}),
        (make_tokenizer(eos_token="<|end|>"), {}),
    ]
    for one_tokenizer, settings in variants * 2:
        load(name, one_tokenizer, **settings)
    assert len(made) == len(set(made)) == len(variants)
    (tmp_path / "own.jinja").write_text(other_template.chat_template)
    load(name, tokenizer, chat_template=str(tmp_path / "own.jinja"))
    load(jsonl(pairs(7)), tokenizer)
    tokenised(Request(name=name, split="train", percentage=50), tokenizer, DataSettings())
    assert len(set(made)) == len(variants) + 3
    load(name, tokenizer, packing=False, padding="max_length", num_proc=2, eval_percentage=10)
    load(name, make_tokenizer(), **{})
    assert len(set(made)) == len(variants) + 3


def test_failed_attempt_leaves_nothing_behind(jsonl, tokenizer, own_cache):
    with pytest.raises(UserError):
        load(jsonl([*pairs(3), b"{"]), tokenizer)
    assert [path for path in (own_cache / "superoffload").iterdir() if path.suffix != ".lock"] == []


def test_cache_that_cannot_be_written_names_the_way_out(jsonl, tokenizer, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_tokenise", fail)
    with pytest.raises(UserError, match=r"No space left on device.*HF_DATASETS_CACHE"):
        load(jsonl(pairs()), tokenizer)


def test_other_rank_waits_for_the_first_and_steps_in_only_where_nobody_works(jsonl, tokenizer, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cache, "PATIENCE_S", 0.3)
    assert len(load(jsonl(pairs()), tokenizer)) == 6


def test_share_of_the_rows_is_taken_from_the_first_on(jsonl, tokenizer):
    request = Request(name=jsonl(pairs(10)), split="train", percentage=30)
    rows = tokenised(request, tokenizer, DataSettings())
    assert len(rows) == 3
    assert len(tokenised(replace(request, percentage=1), tokenizer, DataSettings())) == 1


def test_messages_of_a_typed_file(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "q", "name": "me"}, {"role": "assistant", "content": "the answer"}]
    cache.datasets.Dataset.from_list([{"messages": turns}] * 3).to_parquet(str(tmp_path / "rows.parquet"))
    rows = load(str(tmp_path / "rows.parquet"), tokenizer)
    ids, labels = rows.read([2])[0]
    assert tokenizer.decode(ids[labels >= 0]) == "the answer<eos>"
