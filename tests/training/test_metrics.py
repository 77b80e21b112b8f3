"""The numbers of a step, the summary of a run, and its last log lines."""

import json
import logging
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import config, distributed
from superoffload.data.collate import Batch
from superoffload.model.flops import ModelShape
from superoffload.training import metrics
from superoffload.training.progress import Progress, Saved
from tests.helpers.ranks import run_ranks

SHAPE = ModelShape(active_parameters=10**9, attention_width=64, attention_windows=(0,))


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def batch(lengths: tuple[int, ...], target_tokens: int, positions: int) -> Batch:
    inputs = {"input_ids": torch.zeros((1, positions), dtype=torch.int64)}
    return Batch(inputs=inputs, lengths=lengths, target_tokens=target_tokens)


def meter(clock: Clock, recomputed: str = "none") -> metrics.Meter:
    values = {"model_name": "m", "output_dir": "o", "activation_checkpointing": recomputed}
    made = metrics.Meter(config.build(values), SHAPE, clock=clock)
    made.start()
    return made


def step(made: metrics.Meter, clock: Clock, seconds: float, loss: float, targets: int = 10) -> None:
    made.add(batch((30, 10), targets, 80), torch.tensor(loss * targets))
    clock.now += seconds
    made.end_step()


@pytest.mark.parametrize("recomputed", ["full", "offload"])
def test_a_logged_step_averages_its_interval(recomputed: str, one_rank: None) -> None:
    clock = Clock()
    made = meter(clock, recomputed)
    step(made, clock, 1.0, loss=2.0, targets=30)
    step(made, clock, 3.0, loss=6.0, targets=10)
    read = made.read(Progress(step=2, epoch=1, packs_in_epoch=2), lr=1e-4, grad_norm=0.5, packs_per_epoch=8)
    values = read.as_dict()
    assert list(values) == [
        "step", "epoch", "loss", "lr", "grad_norm", "step_time_s", "tokens_per_s", "target_tokens_per_s",
        "padding_share", "tflops_per_gpu", "hardware_tflops_per_gpu",
    ]  # fmt: skip
    assert values["loss"] == pytest.approx(3.0)  # by token: (30 * 2 + 10 * 6) / 40
    assert values["epoch"] == 1.25
    assert values["step_time_s"] == 2.0
    assert values["tokens_per_s"] == 20.0
    assert values["target_tokens_per_s"] == 10.0
    assert values["padding_share"] == 0.5
    flops = 6e9 * 80 + 12 * 64 * 2 * (450 + 50)
    assert values["tflops_per_gpu"] == pytest.approx(flops / 4.0 / 1e12)
    assert values["hardware_tflops_per_gpu"] == pytest.approx(values["tflops_per_gpu"] * 4 / 3)
    assert read.line() == (
        "Step 2 | Loss: 3.0000 | LR: 1.00e-04 | Grad norm: 0.500 | Time: 2000ms | TFLOPS/GPU: 0.12 | "
        "Tokens/s: 20 | Target tokens/s: 10"
    )


@pytest.mark.parametrize(("norm", "text"), [(float("inf"), "inf"), (float("nan"), "nan")])
def test_a_norm_that_is_not_finite_is_logged(norm: float, text: str, one_rank: None) -> None:
    clock = Clock()
    made = meter(clock)
    step(made, clock, 1.0, loss=2.0)
    read = made.read(Progress(step=1), lr=1e-4, grad_norm=norm, packs_per_epoch=1)
    assert f"| Grad norm: {text} |" in read.line()


def test_a_new_interval_starts_after_reading(one_rank: None) -> None:
    clock = Clock()
    made = meter(clock)
    step(made, clock, 5.0, loss=9.0)
    made.read(Progress(step=1), lr=1.0, grad_norm=1.0, packs_per_epoch=1)
    step(made, clock, 1.0, loss=4.0)
    read = made.read(Progress(step=2), lr=1.0, grad_norm=1.0, packs_per_epoch=1)
    assert read.loss == pytest.approx(4.0)
    assert read.rates.step_time_s == 1.0


def test_the_summary_ignores_the_warm_up(one_rank: None) -> None:
    clock = Clock()
    made = meter(clock)
    for seconds in (60.0, 60.0, 1.0, 2.0, 4.0):
        step(made, clock, seconds, loss=1.0)
    made.read(Progress(step=5), lr=1.0, grad_norm=1.0, packs_per_epoch=1)
    summary = made.summary(warmup_steps=2)
    assert (summary["steps"], summary["measured_steps"]) == (5, 3)
    assert summary["median_step_time_s"] == 2.0
    assert summary["tokens_per_s"] == pytest.approx(120 / 7)
    assert "note" not in summary
    assert summary["peak_host_bytes"] > 10**7


def test_a_run_shorter_than_its_warm_up_measures_its_last_half(one_rank: None) -> None:
    clock = Clock()
    made = meter(clock)
    for seconds in (60.0, 60.0, 1.0, 3.0):
        step(made, clock, seconds, loss=1.0)
    made.read(Progress(step=4), lr=1.0, grad_norm=1.0, packs_per_epoch=1)
    summary = made.summary(warmup_steps=20)
    assert summary["measured_steps"] == 2
    assert summary["median_step_time_s"] == 2.0
    assert summary["note"] == "4 steps do not exceed --warmup_steps 20: measured over the last half"


def read_on_two_ranks() -> dict[str, Any]:
    clock = Clock()
    made = meter(clock)
    rank = distributed.rank()
    made.add(batch((30,), 10 + 20 * rank, 40), torch.tensor(10.0 if rank == 0 else 60.0))
    clock.now += 2.0
    made.end_step()
    return made.read(Progress(step=1), lr=1.0, grad_norm=1.0, packs_per_epoch=1).as_dict()


def test_rates_are_those_of_the_whole_job() -> None:
    for values in run_ranks(2, read_on_two_ranks):
        assert values["loss"] == pytest.approx(70.0 / 40)
        assert values["tokens_per_s"] == 30.0
        assert values["target_tokens_per_s"] == 20.0
        assert values["tflops_per_gpu"] == pytest.approx((6e9 * 30 + 12 * 64 * 450) / 2.0 / 1e12)


def test_the_report_is_written_and_logged(one_rank: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "superoffload")
    clock = Clock()
    made = meter(clock)
    step(made, clock, 1.0, loss=1.5)
    made.read(Progress(step=1), lr=1.0, grad_norm=1.0, packs_per_epoch=1)
    metrics.report(
        made.summary(0), Progress(step=2), Saved(None, "NO CHECKPOINT WAS SAVED: x", failed=True), str(tmp_path)
    )
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["checkpoint"] is None
    assert written["checkpoint_note"] == "NO CHECKPOINT WAS SAVED: x"
    assert written["final_loss"] == 1.5
    last = caplog.records[-1]
    assert (last.levelname, last.message) == ("ERROR", "NO CHECKPOINT WAS SAVED: x")


def test_the_report_is_valid_json_without_a_logged_loss(one_rank: None, tmp_path: Path) -> None:
    metrics.report(meter(Clock()).summary(0), Progress(), Saved(None, "nothing to save"), str(tmp_path))
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert written["final_loss"] is None


def test_an_open_interval_continues_after_a_resume(one_rank: None) -> None:
    clock = Clock()
    first = meter(clock)
    step(first, clock, 1.0, loss=2.0, targets=30)
    values = {"model_name": "m", "output_dir": "o"}
    second = metrics.Meter(config.build(values), SHAPE, first.state(), clock)
    second.start()
    step(second, clock, 3.0, loss=6.0, targets=10)
    read = second.read(Progress(step=2), lr=1.0, grad_norm=1.0, packs_per_epoch=1)
    assert read.loss == pytest.approx(3.0)
    assert read.rates.step_time_s == 2.0


def test_a_child_counts_with_its_unshared_memory(one_rank: None, tmp_path: Path) -> None:
    """The optimizer process has memory of its own, and memory that it shares with this process."""
    size = 64 * 2**20
    file = tmp_path / "shared"
    file.write_bytes(bytes(size))
    code = (
        "import mmap, sys\n"
        f"own = b'x' * {size}\n"
        "with open(sys.argv[1], 'r+b') as file, mmap.mmap(file.fileno(), 0) as shared:\n"
        "    sum(shared[::4096])\n"
        "    print(flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as shared:
        assert not any(shared[::4096])  # every page of it is resident here
        before = metrics.peak_memory()["peak_host_bytes"]
        with subprocess.Popen(
            [sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout and child.stdout.readline()
            grown = metrics.peak_memory()["peak_host_bytes"] - before
            child.communicate()
    assert size < grown < 1.5 * size
