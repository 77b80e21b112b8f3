"""The numbers of a step, the summary of a run, and the lines that print them."""

import contextlib
import json
import logging
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from superoffload import distributed
from superoffload.config import Config
from superoffload.data.collate import Batch
from superoffload.flops import ModelShape, hardware_flops, model_flops
from superoffload.log import logger

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Saved:
    """How saving ended: the checkpoint's folder, or None and a sentence that says why there is none."""

    path: Path | None
    sentence: str
    failed: bool = False


@dataclass(slots=True, kw_only=True)
class Progress:
    """All that changes as a run goes on, and what a checkpoint carries.

    `step` counts optimizer steps done, `epoch` passes over the data done, `step_in_epoch` the steps done of
    the pass under way, `tokens` the tokens trained on over all ranks, padding left out.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    tokens: int = 0

    def advance(self, tokens: int) -> None:
        """Count one more step and the tokens it was trained on."""
        self.step += 1
        self.step_in_epoch += 1
        self.tokens += tokens

    def next_epoch(self) -> None:
        """Begin the next pass over the data."""
        self.epoch += 1
        self.step_in_epoch = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast a stretch of steps went: the whole job's tokens per second, TFLOP/s per device."""

    step_time_s: float
    tokens_per_s: float
    target_tokens_per_s: float
    padding_share: float
    tflops_per_gpu: float
    hardware_tflops_per_gpu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """A logged step; loss and rates are those of the interval since the last logged one."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    rates: Rates

    def line(self) -> str:
        """Write the log line."""
        rates = self.rates
        return (
            f"Step {self.step} | Loss: {self.loss:.4f} | LR: {self.lr:.2e} | Grad norm: {self.grad_norm:.3f} | "
            f"Time: {rates.step_time_s * 1000:.0f}ms | TFLOPS/GPU: {rates.tflops_per_gpu:.2f} | "
            f"Tokens/s: {rates.tokens_per_s:.0f} | Target tokens/s: {rates.target_tokens_per_s:.0f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """List the numbers by name, as in `metrics.jsonl`."""
        values = asdict(self)
        return {**{key: value for key, value in values.items() if key != "rates"}, **values["rates"]}


@dataclass(slots=True)
class _Work:
    """What this rank did over a stretch of steps."""

    steps: int = 0
    time_s: float = 0.0
    tokens: float = 0.0
    target_tokens: float = 0.0
    positions: float = 0.0
    flops: float = 0.0

    def add(self, other: "_Work") -> None:
        """Lengthen the stretch."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Meter:
    """Counts what each step does and times it, without making the device wait.

    Per step only host arithmetic and one addition on the device; values are read back when a line is logged.
    Where a step hands its gradients to the host, as offloading does, the host's clock follows the device.
    """

    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        state: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start counting; `state` is what an earlier run's `state()` gave, whose interval then goes on."""
        self._recomputed = config.model.activation_checkpointing
        self._shape = shape
        self._clock = clock
        self._mark = clock()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=distributed.device())
        self._current, self._interval = _Work(), _Work()
        self._steps: list[_Work] = []
        self.last_loss = float("nan")
        if state is not None:
            self._interval = _Work(**state["interval"])
            self._loss_sum += state["loss_sum"]
            self.last_loss = state["last_loss"]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold so that the interval that is open can be logged whole."""
        return {
            "interval": asdict(self._interval),
            "loss_sum": self._loss_sum.item(),
            "last_loss": self.last_loss,
        }

    def start(self) -> None:
        """Start the clock of the first step."""
        self._mark = self._clock()

    def add(self, batch: Batch, loss_sum: torch.Tensor) -> None:
        """Count one micro-batch; `loss_sum` is the detached sum of its target tokens' losses."""
        self._loss_sum += loss_sum
        self._current.tokens += sum(batch.lengths)
        self._current.target_tokens += batch.target_tokens
        self._current.positions += batch.positions
        self._current.flops += model_flops(self._shape, batch.lengths)

    def end_step(self) -> None:
        """Close an optimizer step and take its time."""
        now = self._clock()
        self._current.steps, self._current.time_s = 1, now - self._mark
        self._mark = now
        self._steps.append(self._current)
        self._interval.add(self._current)
        self._current = _Work()

    def read(self, progress: Progress, lr: float, grad_norm: float, steps_per_epoch: int) -> StepMetrics:
        """Give the numbers of the steps since the last reading (collective; waits for the device)."""
        rates, loss_sum, targets = self._rates(self._interval, self._loss_sum)
        self.last_loss = loss_sum / targets
        self._interval = _Work()
        self._loss_sum.zero_()
        return StepMetrics(
            step=progress.step,
            epoch=progress.epoch + progress.step_in_epoch / steps_per_epoch,
            loss=self.last_loss,
            lr=lr,
            grad_norm=grad_norm,
            rates=rates,
        )

    def _rates(self, work: _Work, loss_sum: torch.Tensor) -> tuple[Rates, float, float]:
        """Add a stretch up over all ranks (collective): rates, sum of losses, target tokens."""
        mine = [work.tokens, work.target_tokens, work.positions, work.flops]
        everyone = torch.tensor(mine, dtype=torch.float64, device=loss_sum.device)
        tokens, targets, positions, flops, losses = distributed.total(torch.cat([everyone, loss_sum[None]])).tolist()
        tflops = flops / work.time_s / distributed.world_size() / 1e12
        rates = Rates(
            step_time_s=work.time_s / work.steps,
            tokens_per_s=tokens / work.time_s,
            target_tokens_per_s=targets / work.time_s,
            padding_share=1 - tokens / positions,
            tflops_per_gpu=tflops,
            hardware_tflops_per_gpu=hardware_flops(tflops, self._recomputed),
        )
        return rates, losses, targets

    def summary(self, warmup_steps: int) -> dict[str, Any]:
        """Sum the run up, its first `warmup_steps` left out (collective).

        A run without more steps than that is measured over its last half, and the summary says so.
        """
        steps = len(self._steps)
        if not steps:
            return {"steps": 0, "final_loss": self.last_loss, **peak_memory()}
        left_out = warmup_steps if steps > warmup_steps else steps // 2
        measured = _Work()
        for work in self._steps[left_out:]:
            measured.add(work)
        result: dict[str, Any] = {"steps": steps, "measured_steps": measured.steps}
        if left_out != warmup_steps:
            result["note"] = f"{steps} steps are not more than the {warmup_steps} of --warmup_steps: last half measured"
        result["final_loss"] = self.last_loss
        rates, *_ = self._rates(measured, torch.zeros_like(self._loss_sum))
        result["median_step_time_s"] = statistics.median(work.time_s for work in self._steps[left_out:])
        result.update({key: value for key, value in asdict(rates).items() if key != "step_time_s"})
        result.update(peak_memory())
        return result


def peak_memory() -> dict[str, int]:
    """Measure the most memory in use so far (collective): of one device, and of all ranks on the host.

    A rank's is the most it held resident itself, and what its child processes hold now without sharing it with
    another process: the optimizer's, in SuperOffload mode, has its largest memory from the first step to the last.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_host = torch.tensor([peak + _unshared_bytes_of_children()], dtype=torch.int64, device=distributed.device())
    return {
        "peak_device_bytes": distributed.peak_device_bytes(),
        "peak_host_bytes": int(distributed.total(on_host).item()),
    }


def _unshared_bytes_of_children() -> int:
    total = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended since, or may not be looked into
            total += child.memory_full_info().uss
    return total


def report(summary: dict[str, Any], saved: Saved, folder: str) -> None:
    """Write `summary.json` and log the last lines of the run; rank 0 speaks."""
    summary = {**summary, "checkpoint": str(saved.path) if saved.path else None, "checkpoint_note": saved.sentence}
    if distributed.speaks():
        try:
            (Path(folder) / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            logger.error("summary.json could not be written: %s", error)
    logger.info("Finished after %d steps, final loss %.4f", summary["steps"], summary["final_loss"])
    if "note" in summary:
        logger.info("%s", summary["note"])
    if summary["steps"]:
        _report_rates(summary)
    logger.info(
        "Peak memory: device %.2f GiB, host %.2f GiB",
        summary["peak_device_bytes"] / GIB,
        summary["peak_host_bytes"] / GIB,
    )
    logger.log(logging.ERROR if saved.failed else logging.INFO, "%s", saved.sentence)


def _report_rates(summary: dict[str, Any]) -> None:
    logger.info(
        "Measured over %d steps: median step %.0f ms, %.0f tokens/s, %.0f target tokens/s, %.2f TFLOPS/GPU, "
        "%.1f%% padding",
        summary["measured_steps"],
        summary["median_step_time_s"] * 1000,
        summary["tokens_per_s"],
        summary["target_tokens_per_s"],
        summary["tflops_per_gpu"],
        summary["padding_share"] * 100,
    )
