"""The loss of a finished model on the rows of data sets, computed as a run's evaluation computes it."""

import io
import math
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch

from superoffload import config, distributed
from superoffload.checkpoint.rank_files import RankFiles
from superoffload.config import Config
from superoffload.data import collate, loader
from superoffload.data.rows import TokenizedRows
from superoffload.errors import UserError
from superoffload.model import attention, isolation, kernels, loss_kernel, vocabulary
from superoffload.protocols import Model, Tokenizer
from superoffload.setting import shown
from superoffload.training.evaluation import held_out_loss
from superoffload.use import finished
from superoffload.use.finished import Source

# Settings that say which rows of which data set, and so do not outlive a change of --dataset_name.
OF_A_DATA_SET = (
    "dataset_weights", "dataset_config", "dataset_split", "dataset_format", "columns", "dataset_percentage",
    "shuffle_rows", "eval_percentage", "eval_dataset", "eval_config", "eval_split", "eval_steps",
)  # fmt: skip
# Those of them that the user may give, and the seed, decide which rows `--eval_percentage` held out.
OF_THE_SPLIT = ("dataset_config", "dataset_split", "dataset_percentage", "shuffle_rows", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Mean loss per target token and number of target tokens: of everything, and of each of several sources."""

    loss: float
    target_tokens: int
    sources: dict[str, "Losses"]

    @property
    def perplexity(self) -> float:
        """Return the exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers by name, for JSON."""
        own = {"loss": self.loss, "perplexity": self.perplexity, "target_tokens": self.target_tokens}
        parts = {label: part.as_dict() for label, part in self.sources.items()}
        return {**own, "sources": parts} if parts else own

    def lines(self) -> list[str]:
        """Return a table, with one line per source if there are several."""
        named = {**self.sources, "all": self} if self.sources else {"all": self}
        width = max(len("source"), *map(len, named))
        head = f"{'source':{width}}  {'loss':>8}  {'perplexity':>10}  {'target tokens':>13}"
        return [head] + [
            f"{label:{width}}  {part.loss:8.4f}  {part.perplexity:10.3f}  {part.target_tokens:13,}"
            for label, part in named.items()
        ]


def settings_of(source: Source, given: dict[str, Any]) -> Config:
    """Merge the settings of the run that made the model, if it is known, with those that the user has given.

    Another `--dataset_name` keeps how the run's rows are tokenised, but not which rows it took. Raises `UserError` if
    there is no data set, and if a setting would make other rows than those that the run held out.
    """
    before = config.flat(source.run) if source.run else {}
    if "dataset_name" in given:
        before = {name: value for name, value in before.items() if name not in OF_A_DATA_SET}
        given = {**given, "eval_percentage": 0.0, "eval_dataset": None}
    elif source.run is None:
        raise UserError(f"{source.name}: no run of it is known, so no held-out rows; give --dataset_name")
    elif not (source.run.data.eval_percentage or source.run.data.eval_dataset):
        raise UserError(f"{source.name}: its run held out no rows; give --dataset_name")
    elif source.run.data.eval_percentage:
        for name in OF_THE_SPLIT:
            if name in given and given[name] != before[name]:
                raise UserError(
                    f"--{name} {given[name]}: would take rows that the run has trained on for held-out rows; leave it "
                    "out, or give --dataset_name"
                )
    own = {"model_name": source.model.model_name, "revision": source.model.revision, "output_dir": ""}
    return config.build({**before, **given, **own, "trust_remote_code": source.trust.code})


def losses_of(source: Source, settings: Config, every_row: bool) -> Losses:
    """Return the losses of a model on all rows of `--dataset_name`, or else on those that its run held out.

    Joins a process group of one rank. Raises `UserError`.
    """
    tokenizer = finished.tokenizer_of(source)
    rows = rows_of(source, tokenizer, settings, every_row)
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints what it has compiled
        distributed.init()
    try:
        return _losses(replace(source, model=settings.model), settings, tokenizer, rows)
    finally:
        distributed.close()


def _losses(source: Source, settings: Config, tokenizer: Tokenizer, rows: TokenizedRows) -> Losses:
    device = distributed.device()
    model = finished.load_model(source, device, packs=settings.data.packs)
    model.config.use_cache = False
    kernel = model.config._attn_implementation
    layout = collate.choose_layout(settings.data, tokenizer.pad_token_id, attention.takes_documents(kernel))
    batches = loader.Batches(rows, layout, settings.training, rank=0, world_size=1)
    vocabulary.rows_needed(settings.model, model.config, tokenizer, [batches])
    kernels.use(settings.model.kernels, model)
    engine: Any = WholeModel(model, device)
    isolation.check(engine, layout)
    loss = loss_kernel.choose(settings.model.loss_kernel, engine, layout)
    with torch.no_grad():
        numbers = held_out_loss(engine, loss, batches)
    parts = {
        label: Losses(
            loss=numbers[f"eval_loss/{label}"], target_tokens=int(numbers[f"eval_target_tokens/{label}"]), sources={}
        )
        for label in batches.sources
    }
    return Losses(loss=numbers["eval_loss"], target_tokens=int(numbers["eval_target_tokens"]), sources=parts)


def rows_of(source: Source, tokenizer: Tokenizer, settings: Config, every_row: bool) -> TokenizedRows:
    """Return all rows of `--dataset_name`, or else those that the run held out. Raises `UserError`."""
    if source.run and source.checkpoint and not every_row and settings.data.eval_percentage:
        _check_unchanged(source.run, source.checkpoint, tokenizer, settings.data.num_proc)
    rows, held_out = loader.load(tokenizer, settings.data, settings.training.seed)
    chosen = rows if every_row else held_out
    if chosen is None or not int(chosen.targets.sum()):
        raise UserError(f"--dataset_name {shown(settings.data.dataset_name)}: has no target tokens")
    return chosen


def _check_unchanged(run: Config, checkpoint: RankFiles, tokenizer: Tokenizer, num_proc: int) -> None:
    """Raise `UserError` if the data set is not as it was: its held-out rows could be ones that were trained on."""
    rows, _ = loader.load(tokenizer, replace(run.data, num_proc=num_proc), run.training.seed)
    now = {"rows": len(rows), "tokens": int(rows.lengths.sum())}
    before = {**now, **checkpoint.data}
    if any(before[name] != now[name] for name in now):
        raise UserError(
            f"--dataset_name {shown(run.data.dataset_name)}: its rows are no longer those of the run (then "
            f"{before['rows']} rows of {before['tokens']} tokens to train on, now {now['rows']} of {now['tokens']}), "
            "as after a change of the data or of this program, so the held-out ones are not known; give --dataset_name"
        )


class WholeModel:
    """A model that is whole in this process, in the place of DeepSpeed's engine where it only runs forward."""

    def __init__(self, module: Model, device: torch.device) -> None:
        """Take a model in evaluation mode, and the device that it is on."""
        self.module = module
        self.device = device
        self.training = False

    def __call__(self, **inputs: Any) -> Any:
        """Run the model forward."""
        return self.module(**inputs)  # type: ignore[operator]

    def train(self, mode: bool = True) -> None:
        """Stay in evaluation mode, which those ask for who return to the mode of before."""

    def eval(self) -> None:
        """Stay in evaluation mode."""
