"""Where a finished model is, and the settings of the run that made it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import config, config_file
from superoffload.errors import UserError
from superoffload.model.architecture import empty_model
from superoffload.use import device, finished, held_out
from superoffload.use.finished import Source
from tests.helpers.runs import make_checkpoint

pytestmark = pytest.mark.unit


def write_settings(folder: Path, **values: Any) -> None:
    folder.mkdir(exist_ok=True)
    text = config_file.write(config.build({"model_name": "m", "output_dir": str(folder), **values}))
    (folder / "config.yaml").write_text(text)


def empty(folder: Path) -> str:
    folder.mkdir()
    return "neither a model (no config.json) nor a checkpoint, nor the output folder of a run"


def nothing_saved(folder: Path) -> str:
    write_settings(folder)
    return "this run has saved no checkpoint; runs with --save_checkpoint or --save_steps do"


def interrupted(folder: Path) -> str:
    (make_checkpoint(folder, 3, 1.0) / "incomplete").touch()
    return "global_step3: incomplete: saving it was interrupted"


def damaged(folder: Path) -> str:
    make_checkpoint(folder, 3, 1.0)
    return "model_states.pt: damaged or truncated"


@pytest.mark.parametrize("make", [empty, nothing_saved, interrupted, damaged])
def test_what_cannot_be_used_is_one_line(make: Callable[[Path], str], tmp_path: Path) -> None:
    expected = make(tmp_path / "out")
    with pytest.raises(UserError) as error:
        finished.find(str(tmp_path / "out"))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 3, 1.0)
    write_settings(tmp_path)
    with pytest.raises(UserError, match="global_step9: no such folder; the checkpoints of this run are global_step3$"):
        finished.find(str(tmp_path / "global_step9"))
    with pytest.raises(UserError, match="config.yaml: is a file; give a model folder, a checkpoint, or"):
        finished.find(str(tmp_path / "config.yaml"))


def test_an_export_in_the_output_folder_knows_its_run(tmp_path: Path) -> None:
    write_settings(tmp_path, chat_template="plain")
    for name in ("model_step3", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    run = finished.find(str(tmp_path / "model_step3")).run
    assert run is not None and run.data.chat_template == "plain"
    assert finished.find(str(tmp_path / "other")).run is None
    assert finished.find("owner/name", "main").model.origin == ("owner/name", "main", False)


def test_a_model_that_memory_cannot_hold_is_refused_before_its_weights_are_read(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "BYTES_PER_PARAMETER", 2**40)
    with pytest.raises(UserError, match=r"its weights need .* GB and the host has .* GB free$"):
        finished.load_model(finished.find(str(model_folder)), torch.device("cpu"))


def test_errors_name_the_model_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        finished.tokenizer_of(finished.find(str(tmp_path)))
    assert str(error.value).startswith(f"{tmp_path}: no tokenizer")


def test_blank_models_have_the_tensors_of_the_skeleton(model_folder: Path) -> None:
    from superoffload.model import architecture, load

    settings = load.load_config(str(model_folder))
    blank, skeleton = architecture.blank_model(settings, False, None), empty_model(settings)
    whole = load.load_unsharded(finished.find(str(model_folder)).model, settings, skeleton, None)
    assert [(name, t.shape, t.dtype) for name, t in blank.state_dict().items()] == [
        (name, t.shape, t.dtype) for name, t in whole.state_dict().items()
    ]
    for (name, mine), (_, other) in zip(blank.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(mine, other), name


def run_of(**values: Any) -> Source:
    run = config.build({"model_name": "m", "output_dir": "o", "dataset_name": ("a.json",), **values})
    return Source(name="out", model=run.model, run=run)


def test_losses_are_of_the_held_out_rows_of_the_run() -> None:
    found = held_out.settings_of(run_of(eval_percentage=5.0, eval_steps=2, max_length=64), {"packing": False})
    assert (found.data.eval_percentage, found.data.max_length, found.data.packing) == (5.0, 64, False)


def test_another_data_set_keeps_how_rows_are_tokenised_but_not_which_rows_there_were() -> None:
    run = run_of(eval_percentage=5.0, eval_steps=2, max_length=64, dataset_split="train[:9]", columns="text=t")
    found = held_out.settings_of(run, {"dataset_name": ("b.json",)}).data
    assert (found.dataset_name, found.max_length, found.dataset_split) == (("b.json",), 64, "train")
    assert (found.columns, found.eval_percentage) == (None, 0)


def test_settings_that_would_make_held_out_rows_of_those_trained_on_are_refused() -> None:
    for name, value in {"seed": 1, "dataset_percentage": 50.0, "dataset_split": "test", "shuffle_rows": True}.items():
        with pytest.raises(UserError, match=f"--{name} {value}: would take rows that the run has trained on"):
            held_out.settings_of(run_of(eval_percentage=5.0), {name: value})
        held_out.settings_of(run_of(eval_percentage=5.0, **{name: value}), {name: value})
        held_out.settings_of(run_of(eval_dataset="b.json"), {name: value})


def test_without_rows_there_is_no_loss() -> None:
    with pytest.raises(UserError, match="out: its run held out no rows; give --dataset_name"):
        held_out.settings_of(run_of(), {})
    with pytest.raises(UserError, match="out: no run of it is known, so no held-out rows; give --dataset_name"):
        held_out.settings_of(Source(name="out", model=run_of().model), {})


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "other")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device.choose("auto")
    with pytest.raises(UserError, match="--device cuda: torch finds no CUDA device; use auto or cpu"):
        device.choose("cuda")
