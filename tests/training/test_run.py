"""What a run does around its steps: it saves, and exports what it has saved."""

import itertools
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from superoffload import config, distributed
from superoffload.checkpoint import save
from superoffload.checkpoint.resume import Source
from superoffload.checkpoint.trust import Trust
from superoffload.export import weights
from superoffload.training.progress import Progress, Saved
from superoffload.training.run import Run


def make_run(**flags: Any) -> Run:
    """Make a run that is between two steps."""
    meter = SimpleNamespace(bad_loss=torch.tensor(0.0).double(), state=dict, start=lambda: None)
    engine = SimpleNamespace(get_global_grad_norm=lambda: 1.0, optimizer=SimpleNamespace())
    rest: Any = dict.fromkeys(("loss", "tokenizer", "evaluation", "control"))
    rest |= {"batches": SimpleNamespace(extent=dict, total_steps=9), "trackers": SimpleNamespace(state=dict)}
    chosen = config.build({"model_name": "m", "output_dir": "out", **flags})
    return Run(config=chosen, progress=Progress(step=9), engine=engine, meter=meter, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(("took_s", "warned"), [(10, False), (20, True)])
def test_a_save_that_ctrl_c_would_not_wait_for_is_reported(
    took_s: int, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, one_rank: None
) -> None:
    clock = itertools.count(0, took_s)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(save, "save", lambda *_: Path("out/global_step9"))
    run = make_run()
    run.save()
    assert run.saved.path == Path("out/global_step9")
    assert ("Saving took 20 s; after Ctrl-C, `deepspeed` started without a recipe kills" in caplog.text) == warned


@pytest.mark.parametrize(
    ("folder", "universal", "saves"), [("out", False, 0), ("out", True, 1), ("elsewhere", False, 1)]
)
def test_a_checkpoint_from_another_folder_is_saved_in_this_one(
    folder: str, universal: bool, saves: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_rank: None
) -> None:
    """Also if no step is left: this run's folder is to hold its checkpoint, and an export needs it."""
    seen: list[object] = []
    monkeypatch.setattr(distributed, "restore_rng_state", lambda _: None)
    monkeypatch.setattr(save, "save", lambda *given: seen.append(given))
    run = make_run(output_dir=str(tmp_path / "out"), save_checkpoint=True)
    source = Source(tmp_path / folder / "global_step9", {"universal": universal})
    run.restore_rng_and_check_data(source, {"data": {}, "random": {}})
    run.save()
    assert len(seen) == saves


@pytest.mark.parametrize("universal", [False, True])
def test_ranks_that_resume_from_one_state_have_noise_of_their_own(
    universal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_rank: None
) -> None:
    """Every rank reads the random state of the first from a converted checkpoint."""
    saved = {"data": {}, "random": distributed.capture_rng_state()}
    drawn = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        run = make_run(output_dir=str(tmp_path), neftune_alpha=5.0)
        run.restore_rng_and_check_data(Source(tmp_path / "global_step9", {"universal": universal}), saved)
        drawn.append(torch.rand(1).item())
    assert (drawn[0] == drawn[1]) != universal


@pytest.mark.parametrize(("resumed_step", "exports"), [(9, 0), (5, 1)])
def test_a_finished_run_that_is_started_again_exports_nothing_again(
    resumed_step: int, exports: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_rank: None
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(distributed, "wait_without_collective", lambda _: nullcontext())
    monkeypatch.setattr(weights, "export", lambda *_, trust: seen.append(trust))
    run = make_run(save_checkpoint=True, export=True, output_dir=str(tmp_path))
    run.saved, run.resumed_step = Saved(tmp_path / "global_step9", ""), resumed_step
    run.export()
    (tmp_path / "model_step9").mkdir()
    run.export()
    assert len(seen) == 1 + exports
    assert not run.failed


@pytest.mark.parametrize("trusted", [False, True])
def test_an_export_trusts_what_the_run_trusts(trusted: bool, monkeypatch: pytest.MonkeyPatch, one_rank: None) -> None:
    """If nothing is left to train, the checkpoint that the run resumed from is exported."""
    seen: list[Trust] = []
    monkeypatch.setattr(distributed, "wait_without_collective", lambda _: nullcontext())
    monkeypatch.setattr(weights, "export", lambda *_, trust: seen.append(trust))
    run = make_run(save_checkpoint=True, export=True, trust_checkpoint=trusted)
    run.saved = Saved(Path("elsewhere/global_step9"), "")
    run.export()
    assert seen == [Trust(files=trusted)]
