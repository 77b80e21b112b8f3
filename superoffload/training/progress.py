"""How far a run has come, and how its last save ended."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run has come, as every checkpoint records it.

    `step` counts finished optimizer steps, `epoch` finished passes over the data, `packs_in_epoch` the packs of the
    current pass that have been trained on (rows, if they are not packed), `tokens` the tokens trained on, padding
    excluded; all over all ranks.
    """

    step: int = 0
    epoch: int = 0
    packs_in_epoch: int = 0
    tokens: int = 0

    def advance(self, tokens: int, packs: int) -> None:
        """Count one more step, its tokens and its packs; those missing in an incomplete last step count as well."""
        self.step += 1
        self.packs_in_epoch += packs
        self.tokens += tokens

    def next_epoch(self) -> None:
        """Start the next pass over the data."""
        self.epoch += 1
        self.packs_in_epoch = 0


@dataclass(frozen=True, slots=True)
class Saved:
    """How a save ended: the checkpoint's folder, None if there is none, and a sentence for the log."""

    path: Path | None
    sentence: str
    failed: bool = False


NOT_REQUESTED = Saved(None, "No checkpoint was saved: --save_checkpoint was not given")


def saved_in(path: Path | None) -> Saved:
    """Describe the outcome of a save that returned `path`, None for a failure."""
    if path is None:
        return Saved(None, "NO CHECKPOINT WAS SAVED: writing it failed, see the errors above", failed=True)
    return Saved(path, f"Checkpoint saved in {path}")


def spoiled(step: int, last: Saved) -> Saved:
    """Describe the outcome of a save that was left out because of the step's loss; `last` is the save before."""
    return Saved(
        last.path, f"NO CHECKPOINT WAS SAVED of step {step}: its loss or gradient is infinite or NaN", failed=True
    )
