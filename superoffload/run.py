"""What belongs to one run, and its checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superoffload import checkpoint, distributed, export
from superoffload.config import Config
from superoffload.data.loader import Batches
from superoffload.errors import UserError
from superoffload.evaluation import Evaluation
from superoffload.log import logger
from superoffload.metrics import Meter, Progress, Saved
from superoffload.requests import Requests
from superoffload.tracking import Trackers


@dataclass(slots=True, kw_only=True)
class Run:
    """The parts of a run; `progress` and `saved` change as it goes on."""

    config: Config
    engine: Any
    tokenizer: Any
    batches: Batches
    progress: Progress
    meter: Meter
    trackers: Trackers
    evaluation: Evaluation
    requests: Requests
    saved: Saved = checkpoint.NOT_ASKED
    saved_step: int = -1
    stopped: bool = False
    failed: bool = False

    @property
    def last_step(self) -> int:
        """Return the step after which the run ends."""
        total = self.batches.total_steps
        return min(total, self.config.measurement.bench_steps or total)

    def goes_on_from(self, path: Path, state: dict[str, Any]) -> None:
        """Take up the random numbers where the checkpoint left them; nothing may draw between this and a step.

        Raises `UserError` where the data set of the same name holds other rows than then.
        """
        here = self.batches.extent()
        if state["data"] != here and not self.config.checkpoint.resume_anyway:
            raise UserError(
                f"--dataset_name {self.config.data.dataset_name}: its rows have changed since {path} was saved (then "
                f"{state['data']}, now {here}); --resume none starts anew, --resume_anyway goes on with them"
            )
        self.saved, self.saved_step = Saved(path, f"Checkpoint of this step is in {path}"), self.progress.step
        if self.progress.step >= self.last_step:
            logger.info("Nothing is left to train: %s is of the last step", path)
        distributed.set_random_state(state["random"])

    def evaluate(self) -> None:
        """Evaluate and track the numbers (collective)."""
        numbers = self.evaluation.run(self.engine, self.tokenizer, self.progress.step)
        if numbers:
            self.trackers.log(self.progress.step, {"step": self.progress.step, **numbers})
        self.meter.start()  # the time of the evaluation is no step's

    def export(self) -> None:
        """Write the checkpoint of the last step as a model folder; the others wait, without a collective."""
        if self.saved.path is None or self.stopped:
            return
        with distributed.each_for_itself("export"):
            if distributed.speaks():
                target = Path(self.config.output.output_dir) / f"model_step{self.progress.step}"
                try:
                    export.export(self.saved.path, target)
                except UserError as error:
                    logger.error("NO MODEL WAS EXPORTED: %s", error)
                    self.failed = True

    def save(self) -> None:
        """Save a checkpoint of this step unless there is one (collective); `saved` says how it ended."""
        if self.saved_step == self.progress.step and not self.saved.failed:
            return
        extra = {
            "data": self.batches.extent(),
            "random": distributed.random_state(),
            "meter": self.meter.state(),
            "trackers": self.trackers.state(),
        }
        self.saved = checkpoint.save(self.engine, self.tokenizer, self.config, self.progress, extra)
        self.saved_step = self.progress.step
        self.failed = self.saved.failed
        self.meter.start()  # the time of the save is no step's
