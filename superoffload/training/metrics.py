"""The numbers of a step, the summary of a run, and their log lines."""

import contextlib
import logging
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from superoffload import distributed
from superoffload.checkpoint.manifest import replace_text
from superoffload.config import Config
from superoffload.data.collate import Batch
from superoffload.log import logger
from superoffload.model.flops import ModelShape, hardware_flops, model_flops
from superoffload.training.progress import Progress, Saved
from superoffload.training.source_losses import SourceLosses
from superoffload.training.step_parts import StepParts
from superoffload.training.trackers.json_lines import to_json

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The speed over some steps: tokens per second of the whole job, TFLOP/s per device."""

    step_time_s: float
    tokens_per_s: float
    target_tokens_per_s: float
    padding_share: float
    tflops_per_gpu: float
    hardware_tflops_per_gpu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """A logged step; loss, rates and parts cover the steps since the previous logged one.

    parts: seconds per step on rank 0, by the names of `StepParts`.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    rates: Rates
    parts: dict[str, float] = field(default_factory=dict)
    by_source: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """Return the log line."""
        rates = self.rates
        means = {key: value for key, value in self.by_source.items() if key.startswith("loss/")}
        return "".join([self._line(rates), *(f" | {key}: {value:.4f}" for key, value in means.items())])

    def _line(self, rates: Rates) -> str:
        return (
            f"Step {self.step} | Loss: {self.loss:.4f} | LR: {self.lr:.2e} | Grad norm: {self.grad_norm:.3f} | "
            f"Time: {rates.step_time_s * 1000:.0f}ms | TFLOPS/GPU: {rates.tflops_per_gpu:.2f} | "
            f"Tokens/s: {rates.tokens_per_s:.0f} | Target tokens/s: {rates.target_tokens_per_s:.0f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers by name, as in `metrics.jsonl`."""
        values = asdict(self)
        rates, parts, by_source = (values.pop(name) for name in ("rates", "parts", "by_source"))
        return {**values, **rates, **{f"{part}_s": seconds for part, seconds in parts.items()}, **by_source}


@dataclass(slots=True)
class _Work:
    """What this rank did over some steps."""

    steps: int = 0
    time_s: float = 0.0
    tokens: float = 0.0
    target_tokens: float = 0.0
    positions: float = 0.0
    flops: float = 0.0

    def add(self, other: "_Work") -> None:
        """Add the work of more steps."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Meter:
    """Counts and times each step without synchronising with the device.

    A step costs some host arithmetic and one addition on the device; values are read back when a line is logged. The
    host's clock follows the device, because offloading waits for each step's gradients.
    """

    def __init__(  # noqa: PLR0913 - the clock is a test's
        self,
        config: Config,
        shape: ModelShape,
        state: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sources: Sequence[str] = (),
        parts: StepParts | None = None,
        tiled: int = 0,
    ) -> None:
        """Start counting; `state` is the result of `state()` of the run being resumed, whose log interval continues.

        `sources` are the labels of the sources if there are several. `parts` divides the time of a step. `tiled` are
        the parameters of MLPs in tiles, as `flops.tiled_parameters` counts them.
        """
        self.parts = parts or StepParts()
        self._recomputed = config.model.recomputes
        self._tiled = tiled
        self._shape = shape
        self._clock = clock
        self._mark = clock()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=distributed.device())
        self._by_source = SourceLosses(sources, (state or {}).get("sources"))
        self._step_loss_sum = torch.zeros_like(self._loss_sum)
        self.bad_loss = torch.zeros_like(self._loss_sum)
        """1 if this rank's loss of the last step is infinite or NaN, else 0; float64 `[]` on the device."""
        self._current, self._interval = _Work(), _Work()
        self._steps: list[_Work] = []
        self.last_loss = float("nan")
        if state is not None:
            self._interval = _Work(**state["interval"])
            self._loss_sum += state["loss_sum"]
            self.last_loss = state["last_loss"]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold so that a resumed run can log the current interval as a whole."""
        return {
            "interval": asdict(self._interval),
            "loss_sum": self._loss_sum.item(),
            "last_loss": self.last_loss,
            **({"sources": self._by_source.state()} if self._by_source.sources else {}),
        }

    def start(self) -> None:
        """Start the clock of the next step."""
        self._mark = self._clock()
        self.parts.start()

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        """Count one micro-batch and the losses of its target tokens, summed as `Loss` returns them, detached."""
        loss_sum = losses.sum()
        self._loss_sum += loss_sum
        self._step_loss_sum += loss_sum
        self._by_source.add(batch, losses)
        self._current.tokens += sum(batch.lengths)
        self._current.target_tokens += batch.target_tokens
        self._current.positions += batch.positions
        self._current.flops += model_flops(self._shape, batch.lengths)

    def end_step(self) -> None:
        """Finish an optimizer step and record its time."""
        self.bad_loss = (~self._step_loss_sum.isfinite()).double()
        self._step_loss_sum.zero_()
        now = self._clock()
        self._current.steps, self._current.time_s = 1, now - self._mark
        self._mark = now
        self.parts.end_step()
        self._steps.append(self._current)
        self._interval.add(self._current)
        self._current = _Work()

    def read(self, progress: Progress, lr: float, grad_norm: float, packs_per_epoch: int) -> StepMetrics:
        """Return the numbers of the steps since the last call (collective; waits for the device)."""
        rates, targets, (loss_sum, *by_source) = self._rates(
            self._interval, torch.cat([self._loss_sum[None], self._by_source.take()])
        )
        self.last_loss = loss_sum / targets
        self._interval = _Work()
        self._loss_sum.zero_()
        return StepMetrics(
            step=progress.step,
            epoch=progress.epoch + min(1.0, progress.packs_in_epoch / packs_per_epoch),
            loss=self.last_loss,
            lr=lr,
            grad_norm=grad_norm,
            rates=rates,
            parts=self.parts.take(),
            by_source=self._by_source.numbers(by_source),
        )

    def _rates(self, work: _Work, more: torch.Tensor) -> tuple[Rates, float, list[float]]:
        """Sum some steps, and `more` of their numbers, float64 on the device, over all ranks (collective).

        Returns rates, the number of target tokens, and the sums of `more`.
        """
        counted = [work.tokens, work.target_tokens, work.positions, work.flops]
        sums = torch.cat([torch.tensor(counted, dtype=torch.float64, device=more.device), more])
        tokens, targets, positions, flops, *more_sums = distributed.all_reduce_sum(sums).tolist()
        tflops = flops / work.time_s / distributed.world_size() / 1e12
        rates = Rates(
            step_time_s=work.time_s / work.steps,
            tokens_per_s=tokens / work.time_s,
            target_tokens_per_s=targets / work.time_s,
            padding_share=1 - tokens / positions,
            tflops_per_gpu=tflops,
            hardware_tflops_per_gpu=hardware_flops(
                tflops, self._recomputed, 2.0 * self._tiled * tokens / work.time_s / distributed.world_size() / 1e12
            ),
        )
        return rates, targets, more_sums

    def summary(self, warmup_steps: int) -> dict[str, Any]:
        """Summarise the run without its first `warmup_steps` (collective).

        A shorter run is measured over its last half, which the summary notes.
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
            result["note"] = f"{steps} steps do not exceed --warmup_steps {warmup_steps}: measured over the last half"
        result["final_loss"] = self.last_loss
        rates, *_ = self._rates(measured, torch.zeros_like(self._loss_sum)[None])
        result["median_step_time_s"] = statistics.median(work.time_s for work in self._steps[left_out:])
        result.update({key: value for key, value in asdict(rates).items() if key != "step_time_s"})
        result.update(peak_memory())
        return result


def peak_memory() -> dict[str, int]:
    """Measure the peak memory so far (collective): on one device, and on the host over all ranks.

    A rank's host memory is its own peak of resident memory plus the unshared memory that its child processes hold now.
    In superoffload mode one of them is the optimizer process, whose memory is at its peak from the first step on.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_host = torch.tensor([peak + _unshared_bytes_of_children()], dtype=torch.int64, device=distributed.device())
    return {
        "peak_device_bytes": distributed.peak_device_bytes(),
        "peak_host_bytes": int(distributed.all_reduce_sum(on_host).item()),
    }


def _unshared_bytes_of_children() -> int:
    total = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended, or access is denied
            total += child.memory_full_info().uss
    return total


def report(summary: dict[str, Any], progress: Progress, saved: Saved, folder: str) -> None:
    """Write `summary.json` on rank 0 and log the last lines of the run.

    `steps` in the summary are those of this process, `global_step` those since the start from the model.
    """
    summary = {
        "global_step": progress.step,
        **summary,
        "ended_at": time.time(),
        "checkpoint": str(saved.path) if saved.path else None,
        "checkpoint_note": saved.sentence,
    }
    if distributed.is_rank_0():
        try:
            replace_text(Path(folder) / "summary.json", to_json(summary, indent=2) + "\n")
        except OSError as error:
            logger.error("summary.json could not be written: %s", error)
    resumed = f" ({summary['steps']} of them since the resume)" if summary["steps"] < progress.step else ""
    logger.info("Finished after %d steps%s, final loss %.4f", progress.step, resumed, summary["final_loss"])
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
