"""A loss that is infinite or NaN ends the run with an error, and spoils no checkpoint."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from superoffload import config
from superoffload.errors import UserError
from superoffload.training.progress import Progress, Saved
from superoffload.training.run import Run
from tests.helpers.forked import launch
from tests.helpers.models import write_model


def make_run(saved: Path | None, bad: float = 0.0, norm: float = 1.0, **flags: Any) -> Run:
    """Make a run that is between two steps; `bad` is what its meter says of the last loss."""
    meter = SimpleNamespace(bad_loss=torch.tensor(bad).double())
    engine = SimpleNamespace(get_global_grad_norm=lambda: norm, optimizer=SimpleNamespace())
    rest: Any = dict.fromkeys(("loss", "tokenizer", "batches", "trackers", "evaluation", "control"))
    return Run(
        config=config.build({"model_name": "m", "output_dir": "out", **flags}), engine=engine, meter=meter,  # type: ignore[arg-type]
        progress=Progress(step=9), saved=Saved(saved, ""), **rest,
    )  # fmt: skip


@pytest.mark.unit
def test_only_steps_in_a_row_count() -> None:
    run = make_run(Path("out/global_step4"), stop_on_nan=3)
    for bad_losses in (1, 2, 0, 1, 1, 0):
        run.watch_loss(bad_losses)
    run.watch_loss(2)
    run.watch_loss(1)
    with pytest.raises(UserError, match=r"--stop_on_nan 3: the loss was .* NaN in 3 step\(s\) in a row, .*step 8;"):
        run.watch_loss(1)


@pytest.mark.unit
def test_the_error_names_the_last_good_checkpoint() -> None:
    for saved, words in (
        (Path("out/global_step4"), "resume from out/global_step4, the last good"),
        (None, "start again"),
    ):
        run = make_run(saved, stop_on_nan=1)
        with pytest.raises(UserError, match=f"; {words}.* with a lower --lr"):
            run.watch_loss(1)


@pytest.mark.unit
def test_zero_never_stops() -> None:
    run = make_run(None, stop_on_nan=0)
    for _ in range(20):
        run.watch_loss(1)


def test_spoiled_weights_are_not_saved(one_rank: None) -> None:
    for bad, norm in ((1.0, 1.0), (0.0, float("nan")), (0.0, float("inf"))):
        run = make_run(Path("out/global_step4"), bad, norm)
        run.save()
        assert run.saved == Saved(Path("out/global_step4"), run.saved.sentence, failed=True)
        assert run.saved.sentence.startswith("NO CHECKPOINT WAS SAVED of step 9")
        assert run.failed


def overflowing(folder: Path) -> Path:
    """Write a model whose weights are finite and whose logits are not."""
    write_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    weights["model.norm.weight"].fill_(1e30)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_runs_whose_loss_is_nan(rows_file: Path, tmp_path: Path) -> None:
    model = overflowing(tmp_path / "model")
    flags = ["--model_name", str(model), "--dataset_name", str(rows_file), "--max_length", "64", "--save_checkpoint",
             "--export", "--no_packing", "--save_steps", "1"]  # fmt: skip
    stopped = launch(2, *flags, "--output_dir", str(tmp_path / "stopped"), "--stop_on_nan", "3")
    assert stopped.returncode == 2, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr
    assert "Error: --stop_on_nan 3: the loss was infinite or NaN in 3 step(s) in a row" in stopped.stderr
    written = {"config.yaml", "metrics.jsonl", "report.html", "run.json", "run.log"}
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == written
    ended = launch(1, *flags, "--output_dir", str(tmp_path / "ended"), "--max_steps", "2")
    assert ended.returncode == 2, ended.stderr[-3000:]
    assert "Error: --lr 1e-05: the loss was infinite or NaN in 2 step(s) in a row" in ended.stderr
    assert {path.name for path in (tmp_path / "ended").iterdir()} == {*written, "summary.json"}

    for name, error in (("stopped", "--stop_on_nan 3: the loss was "), ("ended", "--lr 1e-05: the loss was ")):
        assert json.loads((tmp_path / name / "run.json").read_text())["error"].startswith(error)
        page = (tmp_path / name / "report.html").read_text()
        assert "Failed; step " in page and error in page

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    for path in tmp_path.glob("*/*.json*"):
        if path.parent.name in ("stopped", "ended"):
            text = path.read_text()
            for document in text.splitlines() if path.suffix == ".jsonl" else [text]:
                json.loads(document, parse_constant=refuse)

    packed = launch(1, *(flag for flag in flags if flag != "--no_packing"), "--output_dir", str(tmp_path / "packed"))
    assert packed.returncode == 2
    assert f"Error: --model_name {model}: its logits are infinite or NaN" in packed.stderr
