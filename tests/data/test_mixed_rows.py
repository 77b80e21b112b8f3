"""Rows of several sources: which are taken, held out and drawn, their statistics, and the source of each target."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from superoffload.config import DataSettings, TrainingSettings
from superoffload.data import cache, loader
from superoffload.data.collate import Batch, Layout
from superoffload.data.encode import IGNORED
from superoffload.data.loader import Batches
from superoffload.data.rows import TokenizedRows
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer
from tests.helpers.rows import WriteJsonLines

pytestmark = pytest.mark.unit

SIZES = {"plain": 40, "chats": 12, "pairs": 20}
PACKED = Layout(packs=True, full_length=False, max_length=128, pad_token_id=1)
PADDED = Layout(packs=False, full_length=False, max_length=128, pad_token_id=1)
VARLEN = Layout(packs=True, full_length=False, max_length=128, pad_token_id=1, varlen=True)


@pytest.fixture
def files(jsonl: WriteJsonLines, tmp_path: Path) -> tuple[str, ...]:
    """Write three files of different formats and types: plain, chats and pairs. Each answer names its row."""
    plain = [{"instruction": "q", "output": f"plain{n}" + " more" * (n % 7)} for n in range(SIZES["plain"])]
    turns = [
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": f"chats{n}"}]
        for n in range(SIZES["chats"])
    ]
    datasets.Dataset.from_list([{"messages": each} for each in turns]).to_parquet(str(tmp_path / "chats.parquet"))
    pairs = [{"prompt": "q", "completion": f"pairs{n}"} for n in range(SIZES["pairs"])]
    return jsonl(plain, "plain.jsonl"), str(tmp_path / "chats.parquet"), jsonl(pairs, "pairs.jsonl")


Load = Callable[..., tuple[TokenizedRows, TokenizedRows | None]]


@pytest.fixture
def load(tokenizer: Tokenizer) -> Load:
    def loaded(*names: str, seed: int = 0, **settings: Any) -> tuple[TokenizedRows, TokenizedRows | None]:
        return loader.load(tokenizer, DataSettings(dataset_name=names, max_length=128, **settings), seed)

    return loaded


def words(rows: TokenizedRows, tokenizer: Tokenizer) -> list[str]:
    """Return the first word of each answer, e.g. `plain3`."""
    return [
        tokenizer.decode(ids[labels != IGNORED]).split()[0].removesuffix("<eos>")
        for ids, labels in rows.read(list(range(len(rows))))
    ]


def named(label: str, numbers: Any) -> list[str]:
    return [f"{label}{n}" for n in numbers]


def test_all_rows_of_all_sources(files: tuple[str, ...], load: Load, tokenizer: Tokenizer) -> None:
    rows, held_out = load(*files)
    assert held_out is None
    assert words(rows, tokenizer) == [word for label, size in SIZES.items() for word in named(label, range(size))]
    assert {label: counts.given for label, counts in rows.sources.items()} == SIZES
    assert rows.counts.given == 72
    assert rows.source_of_row.tolist() == [0] * 40 + [1] * 12 + [2] * 20
    for label, part in rows.by_source().items():
        assert words(part, tokenizer) == named(label, range(SIZES[label]))
        assert part.lengths.tolist() == [len(ids) for ids, _ in part.read(range(len(part)))]


def test_one_source_stays_as_it_is(files: tuple[str, ...], load: Load) -> None:
    rows, _ = load(files[0])
    assert (rows.sources, len(rows.source_of_row), rows.by_source()) == ({}, 0, {"": rows})
    assert Batches(rows, PACKED, TrainingSettings(), rank=0, world_size=1).extent().keys() == {
        "rows",
        "tokens",
        "packs",
    }


def test_shares_and_numbers_are_drawn_with_the_seed(files: tuple[str, ...], load: Load, tokenizer: Tokenizer) -> None:
    plain, chats, pairs = files

    def taken(seed: int, *names: str) -> dict[str, list[str]]:
        return {label: words(part, tokenizer) for label, part in load(*names, seed=seed)[0].by_source().items()}

    found = taken(0, f"{plain}:0.3", f"{chats}#5", pairs)
    assert {label: len(part) for label, part in found.items()} == {"plain": 12, "chats": 5, "pairs": 20}
    assert found == taken(0, f"{plain}:0.3", f"{chats}#5", pairs)
    other = taken(1, f"{plain}:0.3", f"{chats}#5", pairs)
    assert found["plain"] != other["plain"] and found["chats"] != other["chats"]
    assert found["plain"] != named("plain", range(12))
    order = named("plain", range(40))
    assert found["plain"] == sorted(set(found["plain"]), key=order.index)  # each once, in their order in the file
    assert taken(0, f"{plain}:0.3", chats)["plain"] == found["plain"]  # whatever the other sources are
    assert set(taken(0, f"{plain}:0.1", chats)["plain"]) < set(found["plain"])
    assert len(taken(0, f"{plain}:0.001", chats)["plain"]) == 1


def test_too_many_rows_is_an_error(files: tuple[str, ...], load: Load) -> None:
    with pytest.raises(UserError, match=r"--dataset_name .*chats\.parquet#13: has only 12 rows"):
        load(f"{files[1]}#13")


@pytest.mark.parametrize("last", ["./none.jsonl", "pairs.jsonl#21"])
def test_a_mistake_in_the_last_source_shows_before_the_first_is_tokenised(
    last: str, files: tuple[str, ...], load: Load, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(files[0]).parent)
    with pytest.raises(UserError, match=f"--dataset_name {last}: "):
        load(*files[:2], last)
    assert not (own_cache / "superoffload").exists()


@pytest.mark.parametrize("held_out", [False, True])
def test_wrong_columns_of_a_later_data_set_show_before_the_first_is_tokenised(
    held_out: bool, files: tuple[str, ...], load: Load, own_cache: Path, jsonl: WriteJsonLines
) -> None:
    wrong = jsonl([{"a": "b"}], "wrong.jsonl")
    names, settings = ((files[0],), {"eval_dataset": wrong}) if held_out else ((files[0], wrong), {})
    with pytest.raises(UserError, match=r"wrong\.jsonl has the columns a, which match no known format"):
        load(*names, **settings)
    assert not (own_cache / "superoffload").exists()


def test_a_config_is_of_the_sources_that_have_configs(
    files: tuple[str, ...], load: Load, jsonl: WriteJsonLines, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "folder"
    for name in ("en", "nb"):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(f'{{"prompt": "q", "completion": "{name}0"}}\n')
    entries = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("en", "nb"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "q", "completion": "saved0"}]).save_to_disk(str(saved))
    names = (files[2], str(folder), str(saved))
    rows, _ = load(*names, dataset_config="nb")
    assert words(rows, tokenizer) == [*named("pairs", range(20)), "nb0", "saved0"]
    settings = DataSettings(dataset_name=names, dataset_config="nb")
    assert len(loader.tokenize_prompts(["hi"], tokenizer, settings).ids) == 1
    with pytest.raises(UserError, match="--dataset_name .*folder: has several configs; choose one with --dataset_conf"):
        load(*names)
    with pytest.raises(UserError, match="has no configs; leave out --dataset_config nb"):
        load(files[0], str(saved), dataset_config="nb")


def test_a_percentage_of_each_source(files: tuple[str, ...], load: Load, tokenizer: Tokenizer) -> None:
    first, _ = load(*files, dataset_percentage=25)
    assert words(first, tokenizer) == named("plain", range(10)) + named("chats", range(3)) + named("pairs", range(5))
    drawn, _ = load(*files, dataset_percentage=25, shuffle_rows=True)
    assert [len(part) for part in drawn.by_source().values()] == [10, 3, 5]
    assert words(drawn, tokenizer)[:10] != named("plain", range(10))
    half, _ = load(f"{files[0]}#20", files[1], dataset_percentage=50)
    assert [len(part) for part in half.by_source().values()] == [10, 6]


def test_shuffled_rows_of_one_source(files: tuple[str, ...], load: Load, tokenizer: Tokenizer) -> None:
    def taken(**settings: Any) -> list[str]:
        return words(load(files[0], dataset_percentage=30, **settings)[0], tokenizer)

    assert taken() == named("plain", range(12))
    assert taken(shuffle_rows=True) == taken(shuffle_rows=True) != taken()
    assert taken(shuffle_rows=True, seed=1) != taken(shuffle_rows=True)
    assert len(set(taken(shuffle_rows=True))) == 12


def test_the_cache_holds_every_choice_of_rows_once(
    files: tuple[str, ...], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    fill = cache._fill

    def record(folder: Path, make: Callable[[Path], None]) -> None:
        made.append(folder.name)
        fill(folder, make)

    monkeypatch.setattr(cache, "_fill", record)
    load(files[0])
    load(files[0], shuffle_rows=True)  # all rows, whatever the order in which they are drawn
    load(f"{files[0]}:1", files[1])
    assert len(made) == 2
    for seed in (0, 1, 0):
        load(f"{files[0]}#9", files[1], seed=seed)
    assert len(made) == len(set(made)) == 4


def test_held_out_rows_of_every_source(files: tuple[str, ...], load: Load, tokenizer: Tokenizer) -> None:
    rows, held_out = load(*files, eval_percentage=10)
    assert held_out is not None
    assert [len(part) for part in held_out.by_source().values()] == [4, 1, 2]
    assert sorted(words(rows, tokenizer) + words(held_out, tokenizer)) == sorted(words(load(*files)[0], tokenizer))
    with pytest.raises(UserError, match=r"--eval_percentage 10: none of the 1 rows of chats would be left"):
        load(files[0], f"{files[1]}#1", eval_percentage=10)


def row_words(batches: list[Batch], tokenizer: Tokenizer) -> Counter[str]:
    texts = [tokenizer.decode(batch.inputs["input_ids"].flatten()) for batch in batches]
    answers = [part for text in texts for part in text.replace("<eos>", " ").replace("<pad>", " ").split()]
    return Counter(part for part in answers if part.rstrip("0123456789") in SIZES and part[-1].isdigit())


@pytest.mark.parametrize("layout", [PACKED, PADDED], ids=["packed", "padded"])
def test_weights_decide_how_many_rows_of_each_source_an_epoch_draws(
    layout: Layout, files: tuple[str, ...], load: Load, tokenizer: Tokenizer
) -> None:
    rows, held_out = load(*files, dataset_weights=(1, 2, 1), eval_percentage=5)
    assert held_out is not None and held_out.weights == ()
    assert len(rows) == 68
    epochs = []
    for epoch in range(3):
        per_rank = [
            [micro for step in batches.epoch(epoch) for micro in step]
            for batches in (
                Batches(rows, layout, TrainingSettings(batch_size=2), rank=rank, world_size=2) for rank in (0, 1)
            )
        ]
        assert len(per_rank[0]) == len(per_rank[1])
        epochs.append(row_words(per_rank[0] + per_rank[1], tokenizer))
    for drawn in epochs:
        by_source = Counter({label: 0 for label in SIZES})
        for word, count in drawn.items():
            by_source[word.rstrip("0123456789")] += count
        assert by_source == {"plain": 17, "chats": 34, "pairs": 17}
    assert epochs[0] != epochs[1] != epochs[2]
    assert max(epochs[0].values()) > 1


def test_steps_of_epochs_with_weights(files: tuple[str, ...], load: Load) -> None:
    rows, _ = load(*files, dataset_weights=(1, 2, 1))
    training = TrainingSettings(num_train_epochs=5)
    batches = Batches(rows, PACKED, training, rank=0, world_size=1)
    steps = [len(list(batches.epoch(epoch))) for epoch in range(5)]
    assert steps == [batches.steps_in(epoch) for epoch in range(5)]
    assert len(set(steps)) > 1
    assert batches.total_steps == sum(steps)
    limited = TrainingSettings(num_train_epochs=10**9, max_steps=40)
    assert Batches(rows, PACKED, limited, rank=0, world_size=1).total_steps == 40
    again = Batches(rows, PACKED, training, rank=0, world_size=1)  # any epoch and step can be entered at once
    expected = [step[0].inputs["input_ids"].tolist() for step in batches.epoch(3)][2:]
    assert [step[0].inputs["input_ids"].tolist() for step in again.epoch(3, 2 * again.packs_per_step)] == expected


def test_a_weight_for_one_source_draws_its_rows(files: tuple[str, ...], load: Load, tokenizer: Tokenizer) -> None:
    rows, _ = load(files[1], dataset_weights=(1,))
    drawn = row_words(
        [step[0] for step in Batches(rows, PADDED, TrainingSettings(), rank=0, world_size=1).epoch(0)], tokenizer
    )
    assert drawn.total() == 12 > len(drawn)


@pytest.mark.parametrize("layout", [PACKED, PADDED, VARLEN], ids=["packed", "padded", "varlen"])
@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_the_source_of_every_target_token(
    layout: Layout, train_on_prompt: bool, files: tuple[str, ...], load: Load
) -> None:
    """Mark the targets of each source by a token of its own, and read them where `by_source` says they are."""
    rows, _ = load(*files, train_on_prompt=train_on_prompt)
    read = TokenizedRows.read

    def marked(self: TokenizedRows, indices: Any) -> Any:
        return [
            (ids, np.where(labels == IGNORED, IGNORED, 50 + rows.source_of_row[index]))
            for index, (ids, labels) in zip(indices, read(self, indices), strict=True)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizedRows, "read", marked)
        batches = Batches(rows, layout, TrainingSettings(batch_size=3), rank=0, world_size=1)
        every = [micro for step in batches.epoch(0) for micro in step]
        several = 0
        for batch in every:
            labels = batch.inputs["labels"][:, 1:].flatten()
            targets = labels[labels != IGNORED]
            assert batch.by_source is not None
            assert sum(batch.by_source.counts) == len(targets) == batch.target_tokens
            expected = np.repeat([50, 51, 52], batch.by_source.counts).tolist()
            assert targets[batch.by_source.order].tolist() == expected
            several += sum(count > 0 for count in batch.by_source.counts) > 1
    assert several > 0
    totals = np.sum([batch.by_source.counts for batch in every if batch.by_source], axis=0)
    assert totals.tolist() == [int(part.targets.sum()) for part in rows.by_source().values()]


def test_statistics_of_each_source(files: tuple[str, ...], load: Load) -> None:
    rows, _ = load(*files)
    found = Batches(rows, PACKED, TrainingSettings(), rank=0, world_size=1).statistics()
    parts = rows.by_source()
    for source in found.sources:
        part = parts[source.label]
        assert (source.rows, source.rows_per_epoch, source.counts.given) == (len(part),) * 3
        assert source.tokens == part.lengths.sum() and source.target_tokens == part.targets.sum()
        assert source.target_share == pytest.approx(part.targets.sum() / rows.targets.sum())
        assert any(line.startswith("in an epoch      ") for line in source.lines())
    assert [line.split(":")[0] for line in found.short_lines()] == ["Data", "  plain", "  chats", "  pairs"]
    assert sum(source.target_tokens for source in found.sources) == found.target_tokens
    weighted, _ = load(*files, dataset_weights=(1, 2, 1))
    found = Batches(weighted, PACKED, TrainingSettings(), rank=0, world_size=1).statistics()
    assert [source.rows_per_epoch for source in found.sources] == [18, 36, 18]
    assert sum(source.target_share for source in found.sources) == pytest.approx(1)
    assert found.fill <= 1


def test_extent_names_the_sources(files: tuple[str, ...], load: Load) -> None:
    def extent(*names: str) -> dict[str, Any]:
        return Batches(load(*names)[0], PACKED, TrainingSettings(), rank=0, world_size=1).extent()

    found = extent(files[0], f"{files[1]}#6")
    assert found["sources"]["chats"]["rows"] == 6
    assert sum(part["tokens"] for part in found["sources"].values()) == found["tokens"]
    assert found != extent(f"{files[0]}#36", f"{files[1]}#10")


def test_prompts_are_written_as_in_the_first_source(files: tuple[str, ...], tokenizer: Tokenizer) -> None:
    for order, start in ((files, "### Instruction:"), (files[1:], "### User:")):
        settings = DataSettings(dataset_name=(f"{order[0]}:0.5", *order[1:]))
        (ids,) = loader.tokenize_prompts(["q"], tokenizer, settings).ids
        assert tokenizer.decode(ids).startswith(start)


def test_a_bad_row_names_its_source(files: tuple[str, ...], jsonl: WriteJsonLines, load: Load) -> None:
    bad = jsonl([{"prompt": "q", "completion": "a"}] * 3 + [b"{"], "bad.jsonl")
    with pytest.raises(UserError, match=r"--dataset_name .*bad\.jsonl: row 4"):
        load(files[0], bad)
    rows, _ = load(files[0], bad, skip_bad_rows=True)
    assert {label: counts.bad for label, counts in rows.sources.items()} == {"plain": 0, "bad": 1}
    assert (rows.counts.bad, rows.counts.given) == (1, 44)
    assert rows.counts.first_bad.startswith("bad: row 4")


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0)])
def test_as_many_weights_as_sources(weights: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"--dataset_weights 1\.0.*: --dataset_name has 2 values; give one weight"):
        DataSettings(dataset_name=("a", "b"), dataset_weights=weights)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive(weight: float) -> None:
    with pytest.raises(UserError, match=rf"--dataset_weights 1\.0 {weight}: must be 0 < value"):
        DataSettings(dataset_name=("a", "b"), dataset_weights=(1.0, weight))
