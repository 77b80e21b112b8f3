"""Data set -> tokenised rows on disk -> the batches of each step, a function of (seed, epoch)."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock

from superoffload import hub
from superoffload.config import DataSettings, TrainingSettings
from superoffload.data import formats
from superoffload.data.encode import IGNORED, encode
from superoffload.errors import UserError
from superoffload.log import logger, shows_bars

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
MULTIPLE = 8  # rows are padded to a multiple of this many tokens, which matrix kernels like


def load_rows(settings: DataSettings) -> datasets.Dataset:
    """Load the split `train` of a hub id, a folder, or a file.

    Raises `UserError` where it cannot be found or read, is empty, or lacks the columns it needs.
    """
    if not shows_bars():
        datasets.disable_progress_bars()
    name = settings.dataset_name
    path = Path(name).expanduser()
    try:
        rows = _read(path, name)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"--dataset_name {name}: {_reason(error)}") from error
    formats.check_columns(rows.column_names, name)
    if len(rows) == 0:
        raise UserError(f"--dataset_name {name}: holds no rows")
    return rows.select(range(max(1, int(len(rows) * settings.dataset_percentage / 100))))


def _read(path: Path, name: str) -> datasets.Dataset:
    if path.is_file():
        if path.suffix not in READERS:
            raise UserError(
                f"--dataset_name {name}: unknown file type {path.suffix or '(none)'}; known are {', '.join(READERS)}"
            )
        if path.stat().st_size == 0:
            raise UserError(f"--dataset_name {name}: is an empty file")
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    if path.is_dir() and (path / "dataset_info.json").exists():
        return datasets.load_from_disk(str(path))
    if path.is_dir():
        return datasets.load_dataset(str(path), split="train")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in READERS:
        raise UserError(f"--dataset_name {name}: no such file or folder")
    cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    hub.check("dataset_name", name, "dataset", cached)
    return datasets.load_dataset(name, split="train")


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # datasets wraps the reader's own words, which say more
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def tokenised(rows: datasets.Dataset, tokenizer: Any, settings: DataSettings) -> datasets.Dataset:
    """Return the rows as `input_ids` and `labels` (int32 lists), tokenised once per machine.

    The first rank of a machine to hold the lock writes the cache, the others wait for the file lock and read
    it: no collective is pending meanwhile. The key covers the rows, the tokenizer, the template and every
    setting that matters. Raises `UserError` where most rows have nothing to learn from.
    """
    key = _cache_key(rows, tokenizer, settings)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "superoffload" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(f".{os.getpid()}")
            _tokenise(rows, tokenizer, settings).save_to_disk(str(partial))
            partial.rename(folder)
    result = datasets.load_from_disk(str(folder))
    _report(len(rows), len(result), settings)
    return result


def _cache_key(rows: datasets.Dataset, tokenizer: Any, settings: DataSettings) -> str:
    parts = {
        "rows": rows._fingerprint,
        "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer),
        "eos": tokenizer.eos_token_id,
        "template": formats.TEMPLATE_VERSION,
        "max_length": settings.max_length,
        "train_on_prompt": settings.train_on_prompt,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenise(rows: datasets.Dataset, tokenizer: Any, settings: DataSettings) -> datasets.Dataset:
    def one(row: dict[str, Any], number: int) -> dict[str, Any]:
        text = formats.example(row, number)
        done = encode(text, tokenizer, settings.max_length, settings.train_on_prompt)
        return {"input_ids": done.input_ids, "labels": done.labels, "targets": done.target_tokens}

    ids = datasets.Sequence(datasets.Value("int32"))
    features = datasets.Features({"input_ids": ids, "labels": ids, "targets": datasets.Value("int32")})
    done = rows.map(
        one,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,
        load_from_cache_file=False,
        desc="Tokenising",
    )
    return done.filter(lambda targets: targets > 0, input_columns="targets", load_from_cache_file=False)


def _report(given: int, kept: int, settings: DataSettings) -> None:
    dropped = given - kept
    if kept == 0 or dropped > given / 2:
        raise UserError(
            f"--max_length {settings.max_length}: {dropped} of {given} rows have no answer left within "
            "that length; raise it"
        )
    if dropped:
        logger.warning(
            "%d of %d rows dropped: no answer left within --max_length %d", dropped, given, settings.max_length
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of one micro-batch on one rank, padded on the right.

    `inputs` holds what the model takes: `input_ids`, `attention_mask` and `labels`, int64 `[batch, length]`.
    `lengths` are the rows' lengths without padding (0 for a filler row), `target_tokens` counts the labels
    that are predicted, `positions` is batch times length.
    """

    inputs: dict[str, torch.Tensor]
    lengths: tuple[int, ...]
    target_tokens: int

    @property
    def positions(self) -> int:
        """Count the positions that are computed, padding included."""
        return int(self.inputs["input_ids"].numel())


def collate(rows: list[dict[str, list[int]]], size: int, pad_token_id: int) -> Batch:
    """Pad up to `size` rows to the longest, rounded up to a multiple of 8.

    Where rows are missing (the last step of an epoch), filler rows whose labels are all -100 take their place:
    every rank then runs the same number of rows, and nothing counts twice.
    """
    longest = max((len(row["input_ids"]) for row in rows), default=1)
    length = -(-longest // MULTIPLE) * MULTIPLE
    input_ids = torch.full((size, length), pad_token_id, dtype=torch.int64)
    labels = torch.full((size, length), IGNORED, dtype=torch.int64)
    mask = torch.zeros((size, length), dtype=torch.int64)
    mask[len(rows) :, 0] = 1  # a filler row attends to itself: no softmax over nothing
    for place, row in enumerate(rows):
        end = len(row["input_ids"])
        input_ids[place, :end] = torch.as_tensor(row["input_ids"])
        labels[place, :end] = torch.as_tensor(row["labels"])
        mask[place, :end] = 1
    return Batch(
        inputs={"input_ids": input_ids, "attention_mask": mask, "labels": labels},
        lengths=tuple(len(row["input_ids"]) for row in rows),
        target_tokens=int((labels[:, 1:] != IGNORED).sum()),
    )


class Batches:
    """The micro-batches of each optimizer step on this rank.

    The order of an epoch is a function of (seed, epoch) and can be entered at any step. Each step takes the
    next `world_size * accumulation * batch_size` rows of it; the last one takes what is left and is filled up.
    """

    def __init__(
        self, rows: datasets.Dataset, pad_token_id: int, training: TrainingSettings, place: tuple[int, int]
    ) -> None:
        """Take the tokenised rows; `place` is this rank and the number of ranks."""
        self._rows = rows
        self._pad_token_id = pad_token_id
        self._size = training.batch_size
        self._accumulation = training.gradient_accumulation_steps
        self._seed = training.seed
        self._epochs, self._max_steps = training.num_train_epochs, training.max_steps
        self._rank, self._ranks = place

    @property
    def steps_per_epoch(self) -> int:
        """Count the optimizer steps of one pass over the rows."""
        return -(-len(self._rows) // (self._size * self._accumulation * self._ranks))

    @property
    def total_steps(self) -> int:
        """Count the optimizer steps of the whole run, which the schedule spans."""
        steps = self._epochs * self.steps_per_epoch
        return min(steps, self._max_steps) if self._max_steps else steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yield, for each step of an epoch from step `start` on, this rank's micro-batches."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        per_step = self._size * self._accumulation * self._ranks
        for step in range(start, self.steps_per_epoch):
            # Dealt like cards, so that the rows of an incomplete last step are spread over ranks and micro-batches.
            mine = order[step * per_step : (step + 1) * per_step][self._rank :: self._ranks]
            yield [self._batch(mine[micro :: self._accumulation]) for micro in range(self._accumulation)]

    def _batch(self, indices: np.ndarray[Any, Any]) -> Batch:
        rows = self._rows[indices.tolist()] if len(indices) else {"input_ids": [], "labels": []}
        pairs = zip(rows["input_ids"], rows["labels"], strict=True)
        return collate([{"input_ids": i, "labels": t} for i, t in pairs], self._size, self._pad_token_id)
