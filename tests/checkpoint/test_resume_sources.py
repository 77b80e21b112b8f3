"""A run on several data sets: its numbers, and that it resumes exactly."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from superoffload import config
from superoffload.checkpoint.resume import Source
from superoffload.data import collate, loader
from superoffload.errors import UserError
from superoffload.training.run import Run
from tests.helpers.forked import launch
from tests.helpers.models import make_rows, write_rows
from tests.helpers.runs import flags, logged
from tests.helpers.states import assert_equal_states
from tests.helpers.tokenizers import make_chat_tokenizer

WEIGHTS = ["--dataset_weights", "3", "1", "1"]


@pytest.fixture
def sources(rows_file: Path, tmp_path: Path) -> list[str]:
    """Write data sets of three formats, two of them with the same name; take a share of one and a number of another."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    write_rows(tmp_path / "one" / "more.json", 40, seed=1)
    lines = [{"prompt": row["instruction"], "completion": row["output"]} for row in make_rows(30, seed=2)]
    (tmp_path / "two" / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [str(rows_file), f"{tmp_path / 'one' / 'more.json'}:0.5", f"{tmp_path / 'two' / 'more.jsonl'}#25"]


def check_numbers(out: Path) -> None:
    """Assert that the numbers of the sources add up to those of all."""
    labels = ["rows", "more.json", "more.jsonl"]
    for line in logged(out):
        prefix = "eval_" if "eval_loss" in line else ""
        targets = [line[f"{prefix}target_tokens/{label}"] for label in labels]
        losses = [line[f"{prefix}loss/{label}"] or 0 for label in labels]
        mean = sum(loss * count for loss, count in zip(losses, targets, strict=True)) / sum(targets)
        assert line[f"{prefix}loss"] == pytest.approx(mean, rel=1e-6)
        assert not prefix or (line["eval_target_tokens"] == sum(targets) and min(targets) > 0)
        assert len([key for key in line if "/" in key]) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"),
    [(1, ["--shuffle_rows", "--dataset_percentage", "90"]), (2, WEIGHTS)],
    ids=["every row, 1 rank", "weights, 2 ranks"],
)
def test_a_resumed_run_on_several_data_sets_is_the_same_run_bit_for_bit(
    ranks: int, more: list[str], model_folder: Path, rows_file: Path, sources: list[str], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--dataset_name", *sources, *more, "--log_interval", "2", "--max_steps", "8", "--batch_size", "4"]
    more += ["--gradient_accumulation_steps", str(4 // ranks)]
    done = launch(ranks, *flags(model_folder, rows_file, whole, *more, "--save_checkpoint"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "INFO   more.jsonl: " in done.stderr and "Held-out loss of more.json: " in done.stderr
    first = launch(ranks, *flags(model_folder, rows_file, parts, *more, "--save_steps", "5", "--bench_steps", "6"))
    assert first.returncode == 0, first.stderr[-3000:]
    second = launch(ranks, *flags(model_folder, rows_file, parts, *more, "--save_checkpoint"))
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"Resuming from {parts / 'global_step5'}: step 5" in second.stderr  # within a log interval

    assert logged(parts) == logged(whole)
    assert max(line.get("epoch", 0) for line in logged(whole)) > 1
    check_numbers(whole)
    assert_equal_states(whole, parts)


@pytest.mark.unit
def test_other_rows_of_a_source_are_noticed(sources: list[str], tmp_path: Path) -> None:
    names = [sources[1], str(tmp_path / "two" / "more.jsonl")]
    chosen = config.build({"model_name": "m", "output_dir": "o", "dataset_name": names})

    def extent() -> dict[str, Any]:
        rows, _ = loader.load(make_chat_tokenizer(), chosen.data, chosen.training.seed)
        layout = collate.choose_layout(chosen.data, 0, takes_documents=False)
        return loader.Batches(rows, layout, chosen.training, rank=0, world_size=1).extent()

    before = extent()
    lines = Path(names[1]).read_text().splitlines()
    Path(names[1]).write_text("\n".join(lines[1:]))
    after = extent()
    run: Any = SimpleNamespace(config=chosen, batches=SimpleNamespace(extent=lambda: after))
    with pytest.raises(UserError) as raised:
        Run.restore_rng_and_check_data(run, Source(tmp_path, {}), {"data": before})
    message = str(raised.value)
    assert message.startswith(f"--dataset_name {' '.join(names)}: its rows have changed since {tmp_path}")
    assert "'more.jsonl': {'rows': 30" in message and "'more.jsonl': {'rows': 29" in message
    assert before["sources"]["more.json"] == after["sources"]["more.json"]
