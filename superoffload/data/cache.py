"""Tokenise a data set once per machine; the other ranks read the result from disk."""

import hashlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock, Timeout

from superoffload.config import DataSettings
from superoffload.data import formats, sources
from superoffload.data.encode import VERSION, Encoded, Encoder
from superoffload.data.formats import BadRow
from superoffload.data.long_rows import fit, lost_tokens
from superoffload.data.packing import Indices
from superoffload.data.rows import RowCounts, TokenizedRows
from superoffload.errors import UserError
from superoffload.log import logger, shows_bars
from superoffload.protocols import Tokenizer

COUNTS_FILE = "superoffload_counts.json"
NUMBERS = ("length", "targets", "number", "piece")
# Columns that the cache does not keep. Of a row that was split, its first piece has them.
ONLY_COUNTED = ("split", "too_long", "shortest", "lost", "empty", "untrained", "unwritten")
POLL_S = 0.1
ROWS_AT_A_TIME = 100  # tokenised together; of long rows, more would take gigabytes
# After the lock has been free for this long, a rank other than the machine's first one tokenises.
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """A data set to tokenise: its name, split and config, and which of its rows to use.

    Of the rows, or of as many as `share` (a fraction) or `count` takes, it uses `percentage`. These are the first ones;
    with `share`, `count` or `shuffled`, they are drawn with `seed`. `flag` is the flag that named the data set; error
    messages begin with it.
    """

    name: str
    split: str
    percentage: float = 100.0
    share: float | None = None
    count: int | None = None
    shuffled: bool = False
    seed: int = 0
    flag: str = "dataset_name"
    config: str | None = None


def load_tokenized(spec: DatasetSpec, tokenizer: Tokenizer, settings: DataSettings) -> TokenizedRows:
    """Return the tokenised rows of a data set; the first rank of each machine makes them, the others wait.

    The others wait for a folder to appear, not in a collective, so tokenising may take any amount of time. The
    key of the cache covers the rows, the tokenizer, the template's text and every setting that matters. Raises
    `UserError` if a row is malformed, or if more than half of the rows have no target token.
    """
    rows, numbers = _chosen(spec)
    encoder = Encoder(tokenizer, settings)
    encode_rows = _RowEncoder(encoder, rows, numbers, spec, settings)
    key = _key(rows, tokenizer, encoder.template, settings)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "superoffload" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _once(folder, lambda target: _tokenize(rows, encode_rows, target, key))
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror or error}); "
            "set HF_DATASETS_CACHE to another folder"
        ) from error
    found = _read(folder, spec, settings)
    if found.counts.split and encode_rows.has_prompts:
        logger.warning(
            "--long_rows split: %s of the rows of %s are longer than --max_length; their later pieces are trained on "
            "without the prompt and what was said before",
            f"{found.counts.split:,}",
            spec.name,
        )
    return found


def check(spec: DatasetSpec, settings: DataSettings) -> None:
    """Raise `UserError` if a data set cannot be read, has fewer rows than `count`, or has no known format."""
    rows, _ = _chosen(spec)
    _shape(rows, spec, settings)


def _shape(rows: datasets.Dataset, spec: DatasetSpec, settings: DataSettings) -> formats.Shape:
    return formats.detect(sources.columns_of(rows), settings.dataset_format, settings.columns, spec.name)


def _chosen(spec: DatasetSpec) -> tuple[datasets.Dataset, range | Indices]:
    """Open a data set and select the rows to use, in their order, at least one; return their numbers (from 0) too."""
    rows = sources.open_rows(spec.name, spec.split, spec.flag, spec.config)
    count = len(rows) if spec.count is None else spec.count
    if count > len(rows):
        raise UserError(f"--{spec.flag} {spec.name}#{count}: has only {len(rows)} rows")
    if spec.share is not None:
        count = max(1, round(count * spec.share))
    count = max(1, int(count * spec.percentage / 100))
    if count == len(rows) or not (spec.shuffled or spec.share is not None or spec.count is not None):
        return rows.select(range(count)), range(count)
    drawn = np.sort(np.random.default_rng([spec.seed, 2**32 + 1]).permutation(len(rows))[:count])
    return rows.select(drawn), drawn


def join(parts: Mapping[str, TokenizedRows]) -> TokenizedRows:
    """Put the rows of several sources, given by their labels, one after the other; a single source stays as it is."""
    every = list(parts.values())
    if len(every) == 1:
        return every[0]
    counts = {label: part.counts for label, part in parts.items()}
    firsts = np.cumsum([0, *(part.counts.given for part in every[:-1])])
    return TokenizedRows(
        table=datasets.concatenate_datasets([part.table for part in every]).with_format("numpy"),
        lengths=np.concatenate([part.lengths for part in every]),
        targets=np.concatenate([part.targets for part in every]),
        numbers=np.concatenate([part.numbers + first for part, first in zip(every, firsts, strict=True)]),
        pieces=np.concatenate([part.pieces for part in every]),
        counts=RowCounts.total(counts),
        sources=counts,
        source_of_row=np.repeat(np.arange(len(every)), [len(part) for part in every]),
    )


def _key(rows: datasets.Dataset, tokenizer: Tokenizer, template: str | None, settings: DataSettings) -> str:
    parts = {
        "rows": rows._fingerprint,
        "tokenizer": tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else sorted(tokenizer.get_vocab().items()),
        "class": type(tokenizer).__name__,
        "special": tokenizer.special_tokens_map,
        "eos": tokenizer.eos_token_id,
        "template": template,
        "version": VERSION,
        "libraries": [version("transformers"), version("tokenizers")],
        "settings": {
            name: getattr(settings, name)
            for name in (
                "dataset_format",
                "columns",
                "chat_template",
                "max_length",
                "long_rows",
                "train_on_prompt",
                "skip_bad_rows",
                "drop_unrendered",
                "keep_empty_answers",
            )
        },
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _once(folder: Path, make: Callable[[Path], None]) -> None:
    """Let one process of this machine fill the folder, which appears only when complete; return once it exists.

    The first rank of the machine fills it. The others poll for it, and fill it themselves only if no process has held
    the lock for `PATIENCE_S`. If the first rank failed, they then raise the same error, unless the launcher has
    already ended them.
    """
    lock = FileLock(f"{folder}.lock")
    first = os.environ.get("LOCAL_RANK", "0") in ("0", "-1")
    idle_since = time.monotonic()
    while not folder.exists():
        try:
            with lock.acquire(timeout=-1 if first else 0):
                if not folder.exists() and (first or time.monotonic() - idle_since > PATIENCE_S):
                    _fill(folder, make)
        except Timeout:
            idle_since = time.monotonic()
        if not folder.exists():
            time.sleep(POLL_S)


def _fill(folder: Path, make: Callable[[Path], None]) -> None:
    for left_over in folder.parent.glob(f"{folder.name}.partial*"):
        shutil.rmtree(left_over, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial_{socket.gethostname()}_{os.getpid()}")
    try:
        make(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():  # another machine on a shared disk may have been faster
            raise


class _RowEncoder:
    """Encodes a batch of rows; can be pickled, so that it runs in any process."""

    def __init__(
        self,
        encoder: Encoder,
        rows: datasets.Dataset,
        numbers: range | Indices,
        spec: DatasetSpec,
        settings: DataSettings,
    ) -> None:
        self._encoder = encoder
        self._numbers = numbers
        self._split = spec.split
        self._shape = _shape(rows, spec, settings)
        self._features = dict(rows.features)
        self.where = f"--{spec.flag} {spec.name}"
        self.has_prompts = self._shape.name != "text"
        self._max_length, self._long_rows = settings.max_length, settings.long_rows
        self._skip_bad_rows = settings.skip_bad_rows
        self.num_proc = settings.num_proc
        self._made_by = os.getpid()

    def __call__(self, columns: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, Any]:
        """Encode the rows at `indices` (from 0) of those chosen, given by column, into the columns of the cache."""
        if os.getpid() != self._made_by:  # one of the processes that the other ends after Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        names = list(columns)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        conversations = [self._read(row) for row in rows]
        encoded = iter(self._encoder.encode([found for found in conversations if not isinstance(found, BadRow)]))
        results = [found if isinstance(found, BadRow) else next(encoded) for found in conversations]
        kept = [row for result, index in zip(results, indices, strict=True) for row in self._keep(result, index)]
        return {name: [row[name] for row in kept] for name in kept[0]}

    def _read(self, row: dict[str, Any]) -> formats.Conversation | BadRow:
        try:
            return formats.read(sources.parse(row, self._features), self._shape)
        except BadRow as error:
            return error

    def _keep(self, whole: Encoded | BadRow, index: int) -> list[dict[str, Any]]:
        """Return the row or its pieces; what is dropped has no tokens."""
        if isinstance(whole, BadRow):
            bad = f"{sources.row_name(int(self._numbers[index]), self._split)}: {whole}"
            if not self._skip_bad_rows:
                raise UserError(f"{self.where}: {bad}; fix it, or skip such rows with --skip_bad_rows") from None
            return [_columns(Encoded([], []), index, bad=bad)]
        pieces = fit(whole, self._max_length, self._long_rows)
        split = len(pieces) if len(pieces) > 1 else 0
        result = [_columns(piece, index, piece=split and number) for number, piece in enumerate(pieces, 1)]
        too_long = int(self._long_rows == "drop" and len(whole.input_ids) > self._max_length)
        shortest = 0 if split or too_long else whole.shortest
        result[0] |= {"split": split, "too_long": too_long, "shortest": shortest, "lost": lost_tokens(whole, pieces)}
        return result


def _columns(row: Encoded, number: int, piece: int = 0, bad: str = "") -> dict[str, Any]:
    return {
        "input_ids": np.array(row.input_ids, dtype=np.int32),
        "labels": np.array(row.labels, dtype=np.int32),
        "length": len(row.input_ids),
        "targets": row.target_tokens,
        "number": number,
        "piece": piece,
        "split": 0,
        "too_long": 0,
        "shortest": 0,
        "lost": 0,
        "empty": row.empty,
        "untrained": row.untrained,
        "unwritten": row.unwritten,
        "bad": bad,
    }


def _tokenize(rows: datasets.Dataset, encode_rows: _RowEncoder, target: Path, key: str) -> None:
    numbers = {name: datasets.Value("int32") for name in (*NUMBERS, *ONLY_COUNTED)}
    ids = datasets.Sequence(datasets.Value("int32"))
    features = datasets.Features({"input_ids": ids, "labels": ids, **numbers, "bad": datasets.Value("string")})
    try:
        done = rows.map(
            encode_rows,
            with_indices=True,
            batched=True,
            batch_size=ROWS_AT_A_TIME,
            remove_columns=rows.column_names,
            features=features,
            num_proc=min(encode_rows.num_proc, len(rows)) if encode_rows.num_proc > 1 else None,
            load_from_cache_file=False,
            cache_file_name=f"{target}.arrow",
            new_fingerprint=key,
            desc="Tokenising",
        )
        _save(done, target)
    except UnicodeDecodeError as error:  # a typed file (Parquet, Arrow) whose text columns are not UTF-8
        raise UserError(f"{encode_rows.where}: a text column holds invalid UTF-8 ({error.reason})") from error
    finally:
        for piece in target.parent.glob(f"{target.name}*.arrow"):
            piece.unlink(missing_ok=True)


def _save(done: datasets.Dataset, target: Path) -> None:
    """Write the rows that have a target token, and how many of the others were dropped and why."""
    columns = {name: _numbers(done, name) for name in (*NUMBERS, *ONLY_COUNTED)}
    bad = [text for text in done.with_format(None)["bad"] if text]
    has_target, is_piece = columns["targets"] > 0, columns["piece"] > 0
    kept = np.flatnonzero(has_target)
    given, too_long = int((columns["piece"] <= 1).sum()), int(columns["too_long"].sum())
    counts = RowCounts(
        given=given,
        bad=len(bad),
        dropped=given - len(np.unique(columns["number"][kept])) - len(bad) - too_long,
        truncated=int((has_target & ~is_piece & (columns["lost"] > 0)).sum()),
        first_bad=next(iter(bad), ""),
        empty_answers=int(columns["empty"].sum()),
        untrained_turns=int(columns["untrained"].sum()),
        dropped_fields=int(columns["unwritten"].sum()),
        split=int((columns["split"] > 0).sum()),
        pieces=int((has_target & is_piece).sum()),
        dropped_pieces=int((~has_target & is_piece).sum()),
        too_long=too_long,
        lost_tokens=int(columns["lost"].sum()),
    )
    lost = columns["shortest"][columns["targets"] == 0]
    done = done.select(kept).remove_columns([*ONLY_COUNTED, "bad"])
    # Not with its bar, which is drawn before TQDM_DELAY is over and then stays on the screen.
    datasets.disable_progress_bars()
    done.save_to_disk(str(target))
    if shows_bars():
        datasets.enable_progress_bars()
    record = {**asdict(counts), "shortest_of_dropped": int(lost.max()) if len(lost) else 0}
    (target / COUNTS_FILE).write_text(json.dumps(record), encoding="utf-8")


def _numbers(table: datasets.Dataset, column: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(table.data.column(column).to_numpy(), dtype=np.int64)


def _not_trained_on(counts: RowCounts) -> str:
    reasons = []
    if counts.empty_answers:
        reasons.append(f"empty answers: {counts.empty_answers}, which --keep_empty_answers would train on")
    if counts.untrained_turns:
        reasons.append(f"answers that the rows keep out of the loss themselves: {counts.untrained_turns}")
    return "".join(f"; {reason}" for reason in reasons)


def _read(folder: Path, spec: DatasetSpec, settings: DataSettings) -> TokenizedRows:
    """Open the cache. Raises `UserError` if more than half of the rows are malformed or without a target token."""
    record = json.loads((folder / COUNTS_FILE).read_text(encoding="utf-8"))
    enough = record.pop("shortest_of_dropped")
    counts = RowCounts(**record)
    where = f"--{spec.flag} {spec.name}"
    if counts.bad > counts.given / 2:
        raise UserError(f"{where}: {counts.bad} of {counts.given} rows are malformed, e.g. {counts.first_bad}")
    left = counts.given - counts.bad - counts.too_long
    if counts.too_long and counts.dropped == left:
        raise UserError(
            f"--long_rows drop: {counts.too_long} of {counts.given} rows of {spec.name} are longer than --max_length "
            f"{settings.max_length}, and none is left to train on; use a larger --max_length, or --long_rows split"
        )
    if counts.dropped > left / 2 or counts.dropped == left:
        if not enough:
            raise UserError(
                f"{where}: {counts.dropped} of {counts.given} rows have no target token at any length"
                f"{_not_trained_on(counts)}"
            )
        raise UserError(
            f"--max_length {settings.max_length}: {counts.dropped} of {counts.given} rows of {spec.name} have no "
            f"target token within this length; --max_length {enough} would keep every row that has one"
            f"{_not_trained_on(counts)}"
        )
    table = datasets.load_from_disk(str(folder))
    lengths, targets = _numbers(table, "length"), _numbers(table, "targets")
    numbers, pieces = _numbers(table, "number"), _numbers(table, "piece")
    table = table.select_columns(["input_ids", "labels"]).with_format("numpy")
    return TokenizedRows(table=table, lengths=lengths, targets=targets, numbers=numbers, pieces=pieces, counts=counts)
