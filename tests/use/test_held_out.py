"""Which rows a finished model is evaluated on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from superoffload import config
from superoffload.checkpoint.rank_files import RankFiles
from superoffload.data import loader
from superoffload.errors import UserError
from superoffload.use import held_out
from superoffload.use.finished import Source
from tests.helpers import models

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run_of(**values: Any) -> Source:
    run = config.build({"model_name": "m", "output_dir": "o", "dataset_name": ("a.json",), **values})
    return Source(name="out", model=run.model, run=run)


def test_losses_are_of_the_held_out_rows_of_the_run() -> None:
    found = held_out.settings_of(run_of(eval_percentage=5.0, eval_steps=2, max_length=64), {"packing": False})
    assert (found.data.eval_percentage, found.data.max_length, found.data.packing) == (5.0, 64, False)


def test_settings_that_would_make_held_out_rows_of_those_trained_on_are_refused() -> None:
    for name, value in {"seed": 1, "dataset_percentage": 50.0, "dataset_split": "test", "shuffle_rows": True}.items():
        with pytest.raises(UserError, match=f"--{name} {value}: would take rows that the run has trained on"):
            held_out.settings_of(run_of(eval_percentage=5.0), {name: value})
        held_out.settings_of(run_of(eval_percentage=5.0, **{name: value}), {name: value})
        held_out.settings_of(run_of(eval_dataset="b.json"), {name: value})


def test_other_settings_keep_the_held_out_rows_though_they_leave_out_others(tmp_path: Path) -> None:
    names = [str(models.write_rows(tmp_path / f"{n}.json", seed=n)) for n in (1, 2)]
    source = run_of(dataset_name=names, eval_percentage=30.0, max_length=2048)
    tokenizer = models.make_tokenizer()

    def texts(**given: Any) -> set[str]:
        settings = held_out.settings_of(source, given)
        rows = held_out.rows_of(source, tokenizer, settings, every_row=False)
        return {tokenizer.decode(ids) for ids, _ in rows.read(range(len(rows)))}

    short = texts(max_length=120, long_rows="drop")
    assert len(texts()) == 24 and 0 < len(short) < 24 and short < texts()


def test_rows_that_changed_since_the_run_are_refused(tmp_path: Path) -> None:
    path = models.write_rows(tmp_path / "rows.json")
    tokenizer = models.make_tokenizer()
    source = run_of(dataset_name=[str(path)], eval_percentage=30.0)
    settings = held_out.settings_of(source, {})
    trained_on, _ = loader.load(tokenizer, settings.data, 42)
    extent = {"rows": len(trained_on), "tokens": int(trained_on.lengths.sum()), "packs": 1}
    files = RankFiles(folder=tmp_path, output_dir=tmp_path, tensors={}, config={}, progress={}, data=extent)
    source = replace(source, checkpoint=files)
    assert len(held_out.rows_of(source, tokenizer, settings, every_row=False)) == 12
    models.write_rows(path, count=41)
    with pytest.raises(UserError, match=r"its rows are no longer those of the run \(then 28 rows of .* now 29 "):
        held_out.rows_of(source, tokenizer, settings, every_row=False)


def test_another_data_set_keeps_how_rows_are_tokenised_but_not_which_rows_there_were() -> None:
    run = run_of(eval_percentage=5.0, eval_steps=2, max_length=64, dataset_split="train[:9]", columns="text=t")
    found = held_out.settings_of(run, {"dataset_name": ("b.json",)}).data
    assert (found.dataset_name, found.max_length, found.dataset_split) == (("b.json",), 64, "train")
    assert (found.columns, found.eval_percentage) == (None, 0)


def test_without_rows_there_is_no_loss() -> None:
    with pytest.raises(UserError, match="out: its run held out no rows; give --dataset_name"):
        held_out.settings_of(run_of(), {})
    with pytest.raises(UserError, match="out: no run of it is known, so no held-out rows; give --dataset_name"):
        held_out.settings_of(Source(name="out", model=run_of().model), {})
