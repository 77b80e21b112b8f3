"""TensorBoard."""

from datetime import datetime
from pathlib import Path
from typing import Any

from superoffload import config as settings
from superoffload.config import Config
from superoffload.training.trackers import names
from superoffload.training.trackers.json_lines import to_json


class TensorBoard:
    """Event files in `OUTPUT_DIR/tensorboard/RUN`, where the run's id is the name of its folder."""

    def __init__(self, config: Config, run_id: str | None, step: int) -> None:
        """Start a run, or resume the one with the given id; events of that name after `step` are no longer shown."""
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = run_id or names.run_name(config, datetime.now()).replace("/", "_")
        folder = Path(config.output.output_dir) / "tensorboard" / self.run_id
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
        self._writer.add_text("settings", f"```\n{to_json(settings.flat(config), indent=2)}\n```", step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the numbers of a step, so that they can be seen now."""
        for name, value in names.numbers(values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def attach(self, path: Path) -> None:
        """Store nothing: TensorBoard has no place for files."""

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()
