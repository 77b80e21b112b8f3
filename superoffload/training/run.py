"""What belongs to one run, and its checkpoint and export."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from superoffload import distributed
from superoffload.checkpoint import save
from superoffload.checkpoint.resume import Source
from superoffload.checkpoint.trust import Trust
from superoffload.config import Config
from superoffload.data.loader import Batches
from superoffload.errors import UserError
from superoffload.export import weights
from superoffload.log import logger
from superoffload.model.head import Loss
from superoffload.protocols import Engine, Tokenizer
from superoffload.setting import shown
from superoffload.training import metrics
from superoffload.training import progress as outcomes
from superoffload.training.evaluation import Evaluation
from superoffload.training.metrics import Meter
from superoffload.training.progress import Progress, Saved
from superoffload.training.run_control import RunControl
from superoffload.training.tracking import Trackers

LAUNCHER_PATIENCE_S = 30  # DeepSpeed's launcher kills its ranks this long after Ctrl-C
LONG_SAVE_S = LAUNCHER_PATIENCE_S / 2


@dataclass(slots=True, kw_only=True)
class Run:
    """The parts of a run; `progress` and the fields after `control` change during it."""

    config: Config
    engine: Engine
    loss: Loss
    tokenizer: Tokenizer
    batches: Batches
    progress: Progress
    meter: Meter
    trackers: Trackers
    evaluation: Evaluation
    control: RunControl
    samples: Trackers = field(default_factory=lambda: Trackers({}))
    saved: Saved = outcomes.NOT_REQUESTED
    saved_step: int = -1
    resumed_step: int = -1
    stopped: bool = False
    failed: bool = False
    bad_steps: int = 0

    @property
    def last_step(self) -> int:
        """Return the step after which the run ends."""
        total = self.batches.total_steps
        return min(total, self.config.measurement.bench_steps or total)

    def restore_rng_and_check_data(self, source: Source, state: dict[str, Any]) -> None:
        """Restore every RNG state from a checkpoint; nothing may draw between this and the next step.

        Raises `UserError` if the data set has other rows than when the checkpoint was saved.
        """
        path, extent = source.path, self.batches.extent()
        if state["data"] != extent and not self.config.checkpoint.resume_anyway:
            raise UserError(
                f"--dataset_name {shown(self.config.data.dataset_name)}: its rows have changed since {path} was saved "
                f"(checkpoint has {state['data']}, this run has {extent}); --resume_anyway resumes with the new rows, "
                "--resume none starts from the model"
            )
        self.saved = Saved(path, f"Checkpoint of this step is in {path}")
        self.resumed_step = self.progress.step
        if not source.universal and path.resolve().parent == Path(self.config.output.output_dir).resolve():
            self.saved_step = self.progress.step  # or else this run saves one of its own, even if no step is left
        left = self.last_step - self.progress.step
        if left > 0:
            logger.info("%d steps of %d rows or packs are left", left, self.batches.packs_per_step)
        else:
            logger.info("Nothing is left to train: %s was saved after the last step", path)
        distributed.restore_rng_state(state["random"])
        if source.universal and self.config.training.neftune_alpha:  # all ranks have the state of the first
            distributed.seed_rank(self.config.training.seed + self.progress.step)

    def watch_loss(self, bad_losses: int) -> None:
        """Count the steps in a row whose loss is infinite or NaN, given how many ranks had one in the step before.

        Raises `UserError` after `--stop_on_nan` of them.
        """
        self.bad_steps = self.bad_steps + 1 if bad_losses else 0
        if self.bad_steps == 1:
            logger.warning("The loss of step %d is infinite or NaN", self.progress.step - 1)
        if self.bad_steps and self.bad_steps == self.config.training.stop_on_nan:
            raise self._diverged(self.progress.step - 1)

    def summarize(self) -> None:
        """Write `summary.json` and log the last lines of the run (collective)."""
        summary = self.meter.summary(self.config.measurement.warmup_steps)
        summary["stopped_by"] = self.control.stopped_by if self.stopped else None
        metrics.report(summary, self.progress, self.saved, self.config.output.output_dir)

    def check_last_loss(self) -> None:
        """Raise `UserError` if the loss of the last step is infinite or NaN on any rank (collective)."""
        if distributed.all_reduce_sum(self.meter.bad_loss.clone()).item():
            self.bad_steps += 1
            raise self._diverged(self.progress.step)

    def _diverged(self, step: int) -> UserError:
        training, steps = self.config.training, self.bad_steps
        flag = f"stop_on_nan {steps}" if steps == training.stop_on_nan else f"lr {training.lr:g}"
        good = f"resume from {self.saved.path}, the last good checkpoint," if self.saved.path else "start again"
        return UserError(
            f"--{flag}: the loss was infinite or NaN in {steps} step(s) in a row, the last of them step {step}; "
            f"{good} with a lower --lr"
        )

    def evaluate(self) -> None:
        """Evaluate and track the numbers (collective)."""
        numbers = self.evaluation.run(self.engine, self.loss, self.tokenizer, self.progress.step)
        if numbers:
            self.trackers.log(self.progress.step, {"step": self.progress.step, **numbers})
        if samples := self.evaluation.samples():
            self.samples.log(self.progress.step, {"step": self.progress.step, **samples})
        self.meter.start()  # the evaluation's time belongs to no step

    def export(self) -> None:
        """Export the last step's checkpoint on rank 0 if asked to; the others wait without a collective."""
        if not self.config.checkpoint.export or self.saved.path is None or self.stopped:
            return
        with distributed.wait_without_collective("export"):
            if distributed.is_rank_0():
                target = Path(self.config.output.output_dir) / f"model_step{self.progress.step}"
                if target.is_dir() and self.progress.step == self.resumed_step:  # and complete, or it would not exist
                    logger.info("The model of this step is in %s", target)
                    return
                # If nothing was left to train, this is the checkpoint that was resumed from.
                trust = Trust(files=self.config.checkpoint.trust_checkpoint, code=self.config.model.trust_remote_code)
                try:
                    weights.export(self.saved.path, target, trust=trust)
                except UserError as error:
                    logger.error("NO MODEL WAS EXPORTED: %s", error)
                    self.failed = True

    def save(self) -> None:
        """Save a checkpoint of this step unless there is one (collective); `saved` describes the outcome.

        Spoiled weights are not saved: the checkpoint would displace a good one.
        """
        if self.saved_step == self.progress.step and not self.saved.failed:
            return
        if distributed.all_reduce_sum(self.meter.bad_loss.clone()).item() or self._bad_gradient():
            self.saved, self.failed = outcomes.spoiled(self.progress.step, self.saved), True
            logger.warning("%s", self.saved.sentence)
            return
        extra = {
            "data": self.batches.extent(),
            "random": distributed.capture_rng_state(),
            "meter": self.meter.state(),
            "trackers": self.trackers.state(),
        }
        began = time.monotonic()
        path = save.save(self.engine, self.tokenizer, self.config, asdict(self.progress), extra)
        if (took_s := time.monotonic() - began) > LONG_SAVE_S:
            logger.warning(
                "Saving took %.0f s; after Ctrl-C, `deepspeed` started without a recipe kills the ranks within %d s: "
                "use a recipe, or stop the run with SIGTERM to a rank",
                took_s, LAUNCHER_PATIENCE_S,
            )  # fmt: skip
        self.saved, self.saved_step = outcomes.saved_in(path), self.progress.step
        self.failed = self.saved.failed
        if not (self.failed or self.stopped or self.progress.step == self.last_step):  # or else the summary says it
            logger.info("%s", self.saved.sentence)
        self.meter.start()  # the save's time belongs to no step

    def _bad_gradient(self) -> bool:
        """Return whether the last step's gradient has spoiled the weights; float16 training leaves such steps out."""
        norm = self.engine.get_global_grad_norm()
        return norm is not None and not math.isfinite(norm) and not getattr(self.engine.optimizer, "overflow", False)
