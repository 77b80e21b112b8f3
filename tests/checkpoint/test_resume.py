"""Runs that are interrupted and resumed: the real launcher, real signals, real files."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from superoffload import config
from superoffload.checkpoint import folder_lock, resume
from superoffload.errors import UserError
from superoffload.export import weights
from superoffload.training import schedule
from tests.helpers.forked import Launched, launch
from tests.helpers.models import write_model
from tests.helpers.ranks import REPOSITORY, environment, free_port, run_ranks
from tests.helpers.runs import damage, flags, logged, make_checkpoint
from tests.helpers.states import assert_equal_states


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_resumed_run_is_the_same_run_bit_for_bit(
    ranks: int, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--neftune_alpha", "1", "--label_smoothing", "0.05", "--freeze", r"layers\.0\.mlp"]
    steps = ["--max_steps", "12", *options]  # packs of 128 tokens, clipped and accumulated
    assert launch(ranks, *flags(model_folder, rows_file, whole, *steps, "--save_checkpoint")).returncode == 0
    first = launch(ranks, *flags(model_folder, rows_file, parts, *steps, "--save_steps", "5", "--bench_steps", "7"))
    assert first.returncode == 0, first.stderr[-3000:]
    settings = str(parts / "config.yaml")  # the second run repeats the first, but for what flags change
    second = launch(ranks, "--config", settings, "--save_steps", "0", "--bench_steps", "0", "--save_checkpoint")
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"Resuming from {parts / 'global_step5'}: step 5" in second.stderr
    assert "Loss kernel: chunked" in second.stderr  # compared without label smoothing

    norms = [line["grad_norm"] for line in logged(whole) if "grad_norm" in line]
    assert [line["step"] for line in logged(whole) if "eval_loss" in line] == [4, 8, 12]
    assert min(norms) < 1.75 < max(norms)  # some steps are clipped, some are not
    assert logged(parts) == logged(whole)
    assert_equal_states(whole, parts)
    assert_frozen_weights_are_exported(whole, model_folder, tmp_path / "exported")


def assert_frozen_weights_are_exported(out: Path, model: Path, target: Path) -> None:
    """Compare an export with the model that training started from: the frozen weights are the same, others are not."""
    weights.export(out, target)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, target))
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name].bfloat16())}
    assert after.keys() == before.keys()
    assert same == {name for name in after if "layers.0.mlp" in name} and same


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def lines_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_signal_to_one_rank_saves_and_ends_the_run(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    run = Launched(2, *flags(model_folder, rows_file, tmp_path, "--num_train_epochs", "500"))
    try:
        wait_for(lambda: lines_of(tmp_path) >= 2)
        (tmp_path / "save_now").touch()
        wait_for(lambda: not (tmp_path / "save_now").exists())
        assert (tmp_path / "latest").exists()
        os.kill(run.ranks[-1].pid, signal.SIGUSR1)
        done = run.wait(60)
    finally:
        run.kill()
    assert done.returncode == 0, done.stderr[-3000:]
    step = int((tmp_path / "latest").read_text().removeprefix("global_step"))
    assert f"Stopped by another rank's signal: saving after step {step}" in done.stderr
    saved_line, report_line = done.stderr.rstrip().splitlines()[-2:]
    assert saved_line.endswith(f"Checkpoint saved in {tmp_path / f'global_step{step}'}")
    assert report_line.endswith(f"Report: {tmp_path / 'report.html'}")
    assert json.loads((tmp_path / "summary.json").read_text())["stopped_by"] == "another rank's signal"
    assert f"Stopped by another rank&#39;s signal after {step} of " in (tmp_path / "report.html").read_text()


def test_ctrl_c_saves(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """The terminal signals every process of the group, and the launcher then SIGTERMs all below each rank."""
    command = ["deepspeed", "--num_gpus", "1", "--master_port", str(free_port())]
    command += [str(REPOSITORY / "finetune_zero3.py"), *flags(model_folder, rows_file, tmp_path)]
    command += ["--num_train_epochs", "500"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment(),
                               start_new_session=True)  # fmt: skip
    try:
        wait_for(lambda: lines_of(tmp_path) >= 2)
        os.killpg(process.pid, signal.SIGINT)
        wait_for(lambda: (tmp_path / "summary.json").exists(), timeout_s=25)
        _, err = process.communicate(timeout=60)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()
    step = int((tmp_path / "latest").read_text().removeprefix("global_step"))
    assert f"Stopped by SIGINT: saving after step {step}" in err
    assert f"Checkpoint saved in {tmp_path / f'global_step{step}'}" in err


def test_a_second_run_into_the_same_folder_is_refused(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    first = Launched(1, *flags(model_folder, rows_file, tmp_path, "--num_train_epochs", "500"))
    try:
        wait_for(lambda: lines_of(tmp_path) >= 1)
        second = launch(1, *flags(model_folder, rows_file, tmp_path))
        assert second.returncode == 2
        assert f"Error: --output_dir {tmp_path}: another run is writing there" in second.stderr
    finally:
        first.kill()
    wait_for(lambda: is_free(tmp_path), timeout_s=10)  # a killed run leaves no lock behind


def is_free(folder: Path) -> bool:
    try:
        folder_lock.unlock(folder_lock.lock(str(folder)))
    except UserError:
        return False
    return True


def find(out: Path, **values: Any) -> resume.Source | None:
    asked = config.build(
        {"model_name": "m", "output_dir": str(out), "resume": "auto", "trust_checkpoint": True, **values}
    )
    return resume.first_intact(asked, resume.find(asked))


@pytest.fixture
def two(tmp_path: Path, one_rank: None) -> tuple[Path, Path]:
    return make_checkpoint(tmp_path, 3, 1.0), make_checkpoint(tmp_path, 6, 2.0)


def test_nothing_to_resume(tmp_path: Path, one_rank: None) -> None:
    assert find(tmp_path) is None
    with pytest.raises(UserError, match="no complete checkpoint there"):
        find(tmp_path, resume=str(tmp_path))


def test_latest_is_used(two: tuple[Path, Path]) -> None:
    source = find(two[0].parent)
    assert source is not None
    assert source.path == two[1]
    named = find(two[0].parent, resume=str(two[0]))
    assert named is not None
    assert named.path == two[0]
    assert find(two[0].parent, resume="none") is None


@pytest.mark.parametrize("content", [None, "", "global_step99", "\xff\xfe"])
def test_latest_that_leads_nowhere(content: str | None, two: tuple[Path, Path]) -> None:
    latest = two[0].parent / "latest"
    latest.unlink()
    if content is not None:
        latest.write_text(content, encoding="latin-1")
    source = find(two[0].parent)
    assert source is not None
    assert source.path == two[1]


@pytest.mark.parametrize(
    ("how", "words"),
    [("short", "has 500 bytes instead of 1000"), ("flipped", "does not match its checksum"), ("gone", "No such")],
)
def test_a_damaged_file_is_named_and_the_older_checkpoint_used(
    how: str, words: str, two: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    damage(two[1], how)
    source = find(two[0].parent)
    assert source is not None
    assert source.path == two[0]
    assert f"{two[1]} cannot be used: zero_pp_rank_0_mp_rank_00_model_states.pt" in caplog.text
    assert words in caplog.text
    damage(two[0], how)
    with pytest.raises(UserError, match="every checkpoint is damaged .*--resume none starts from the model"):
        find(two[0].parent)
    with pytest.raises(UserError, match=words):
        find(two[0].parent, resume=str(two[1]))


def test_a_checkpoint_without_its_manifest_is_not_used(two: tuple[Path, Path]) -> None:
    (two[1] / "manifest.json").write_text("{")
    source = find(two[0].parent)
    assert source is not None
    assert source.path == two[0]


def test_a_different_run_is_not_resumed(two: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError) as raised:
        find(two[0].parent, seed=1, max_length=64, log_interval=7)
    assert f"{two[1]} belongs to a different run" in str(raised.value)
    assert "--seed: checkpoint has 42, this run has 1" in str(raised.value)
    assert "--max_length: checkpoint has 2048, this run has 64" in str(raised.value)
    assert "log_interval" not in str(raised.value)
    assert find(two[0].parent, seed=1, resume_anyway=True) is not None
    assert "differ from the checkpoint's: --seed: checkpoint has 42, this run has 1" in caplog.text


def test_settings_are_compared_before_files_are_read(two: tuple[Path, Path]) -> None:
    damage(two[0], "flipped")
    damage(two[1], "flipped")
    with pytest.raises(UserError, match="belongs to a different run"):
        resume.find(config.build({"model_name": "m", "output_dir": str(two[0].parent), "resume": "auto", "lr": 0.5}))


@pytest.mark.parametrize(
    ("saved", "now", "accepted"),
    [
        ({"max_steps": 10}, {"max_steps": 20}, True),
        ({"max_steps": 10}, {"max_steps": 0}, True),
        ({"num_train_epochs": 1}, {"num_train_epochs": 3}, True),
        ({"max_steps": 10}, {"max_steps": 20, "num_train_epochs": 2}, True),
        ({"max_steps": 10}, {"max_steps": 9}, False),
        ({"max_steps": 0}, {"max_steps": 100}, False),
        ({"max_steps": 10, "num_train_epochs": 2}, {"max_steps": 20, "num_train_epochs": 1}, False),
        ({"max_steps": 10}, {"max_steps": 20, "lr": 0.5}, False),
    ],
)
def test_a_longer_run_is_the_same_run(
    saved: dict[str, Any], now: dict[str, Any], accepted: bool, tmp_path: Path, one_rank: None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    made = make_checkpoint(tmp_path, 3, 1.0, **saved)
    if accepted:
        source = find(tmp_path, **now)
        assert source is not None and source.path == made
        assert "Training longer than the run of" in caplog.text
    else:
        with pytest.raises(UserError, match="belongs to a different run"):
            find(tmp_path, **now)


def test_another_optimizer_state_is_another_run(two: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="--optimizer_state: checkpoint has fp32, this run has bf16"):
        find(two[0].parent, optimizer_state="bf16")
    assert find(two[0].parent, optimizer_state="bf16", resume_anyway=True) is not None
    assert find(two[0].parent, offload_params=True) is not None  # where the weights are changes no result


def test_a_converted_checkpoint_takes_any_batch(tmp_path: Path, one_rank: None) -> None:
    made = make_checkpoint(tmp_path, 3, 1.0, batch_size=4, gradient_accumulation_steps=3)
    with pytest.raises(UserError, match="--batch_size: checkpoint has 4, this run has 5"):
        find(tmp_path, batch_size=5)
    described = json.loads((made / "manifest.json").read_text())
    described |= {"universal": True, "world_size": 2, "progress": {"step": 3, "packs_in_epoch": 48}}
    (made / "manifest.json").write_text(json.dumps(described))
    source = find(tmp_path, batch_size=5, gradient_accumulation_steps=1)
    assert resume.progress_of(source) == {"step": 3, "packs_in_epoch": 48}
    described["progress"] = {"step": 3, "epoch": 1, "step_in_epoch": 2, "tokens": 9}  # as release 0.1.0 wrote it
    (made / "manifest.json").write_text(json.dumps(described))
    source = find(tmp_path, batch_size=5, gradient_accumulation_steps=1)
    assert resume.progress_of(source) == {"step": 3, "epoch": 1, "packs_in_epoch": 2 * 24, "tokens": 9}
    assert resume.progress_of(None) == {}


def test_other_groups_of_ranks_may_share_rows_if_a_step_has_as_many_packs(
    tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_checkpoint(tmp_path, 3, 1.0, batch_size=4, sequence_parallel_size=2)
    described = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps(described | {"world_size": 4}))
    monkeypatch.setattr("superoffload.distributed.world_size", lambda: 4)

    def find_it(**values: int) -> list[resume.Source]:
        return resume.find(config.build({"model_name": "m", "output_dir": str(tmp_path), "resume": "auto", **values}))

    assert len(find_it(batch_size=2, sequence_parallel_size=1)) == 1
    assert len(find_it(batch_size=8, sequence_parallel_size=4)) == 1
    with pytest.raises(UserError, match="--sequence_parallel_size: checkpoint has 2, this run has 4"):
        find_it(batch_size=4, sequence_parallel_size=4)


def test_another_number_of_ranks_is_refused(two: tuple[Path, Path]) -> None:
    manifest = json.loads((two[1] / "manifest.json").read_text())
    (two[1] / "manifest.json").write_text(json.dumps({**manifest, "world_size": 2}))
    with pytest.raises(UserError, match="was saved by 2 ranks, this run has 1"):
        find(two[0].parent, resume_anyway=True)


def test_a_checkpoint_can_be_moved(two: tuple[Path, Path], tmp_path: Path) -> None:
    moved = shutil.copytree(two[1], tmp_path / "elsewhere" / "global_step6")
    source = find(tmp_path / "new", resume=str(moved))
    assert source is not None
    assert source.path == moved


def resume_with_new_values(model: str, out: str, mode: str) -> dict[str, Any]:
    """Train two steps and save; resume with other values, and return what the next steps use. Runs on a rank."""
    from superoffload.checkpoint import save
    from tests.helpers.runs import make_engine, random_steps

    common = {"resume": "auto", "resume_anyway": True, "deepspeed_config": str(REPOSITORY / f"configs/{mode}.json")}
    first, tokenizer, chosen = make_engine(model, out, lr=1e-3, weight_decay=0.01, **common)
    random_steps(first, 2)
    assert save.save(first, tokenizer, chosen, {"step": 2, "epoch": 0}, {}) is not None
    first.destroy()  # type: ignore[attr-defined]
    values = {"lr": 4e-3, "weight_decay": 0.1, "lr_scheduler": "linear", "warmup": 0.5, **common}
    engine, _, chosen = make_engine(model, out, **values)
    source = resume.first_intact(chosen, resume.find(chosen))
    assert source is not None
    resume.restore(engine, source, trusted=False)
    mapped = [
        value.untyped_storage().filename
        for state in engine.optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    rates = [list(engine.get_lr())]
    for _ in range(2):
        random_steps(engine, 1)
        rates.append(list(engine.get_lr()))
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    steps = {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    engine.destroy()  # type: ignore[attr-defined]
    return {"rates": rates, "decays": decays, "steps": steps, "mapped": set(mapped)}


@pytest.mark.parametrize("mode", ["superoffload", "zerooffload"])
def test_new_values_hold_from_the_first_resumed_step(mode: str, model_folder: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(1, resume_with_new_values, str(model_folder), str(tmp_path), mode)
    expected = [4e-3 * schedule.Schedule(kind="linear", warmup=5, total=10).factor(step) for step in (2, 3, 4)]
    assert found["rates"] == [[rate] * 2 for rate in expected]
    assert found["decays"] == [0.1, 0.0]
    assert found["steps"] == {4}
    assert found["mapped"] == {None}  # nothing that training changes lies in the checkpoint's files


def resume_with_another_engine(model: str, other: str, out: str, **values: Any) -> str:
    """Save a checkpoint of one engine, resume another from it, and return the error. Runs on a rank."""
    from superoffload.checkpoint import save
    from tests.helpers.runs import make_engine

    first, tokenizer, chosen = make_engine(model, out, resume="auto", resume_anyway=True)
    assert save.save(first, tokenizer, chosen, {"step": 0, "epoch": 0}, {}) is not None
    first.destroy()  # type: ignore[attr-defined]
    engine, _, chosen = make_engine(other, out, resume="auto", resume_anyway=True, **values)
    source = resume.first_intact(chosen, resume.find(chosen))
    assert source is not None
    try:
        resume.restore(engine, source, trusted=False)
    except UserError as error:
        return str(error)
    finally:
        engine.destroy()  # type: ignore[attr-defined]
    return ""


def test_another_model_is_refused_in_one_line(model_folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", num_hidden_layers=3)
    for error in run_ranks(2, resume_with_another_engine, str(model_folder), str(other), str(tmp_path / "out")):
        assert "belongs to a different model: model.layers.2." in error
        assert "has the shape (none) there" in error


def resume_with_sub_groups_of(size: int, model: str, out: str) -> str:
    return resume_with_another_engine(model, model, out, sub_group_size=size)


def test_other_sub_groups_are_refused_in_one_line(model_folder: Path, tmp_path: Path) -> None:
    for error in run_ranks(2, resume_with_sub_groups_of, 3000, str(model_folder), str(tmp_path)):
        assert error.startswith("--sub_group_size 3000: divides the optimizer's state differently from")
        assert "saved with 400000000; use 400000000, or convert it: superoffload convert" in error
    assert run_ranks(1, resume_with_sub_groups_of, 500_000_000, str(model_folder), str(tmp_path / "one")) == [""]
