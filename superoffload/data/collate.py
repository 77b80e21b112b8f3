"""Rows -> the tensors of one micro-batch, packed or padded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from superoffload.config import DataSettings
from superoffload.data.encode import IGNORED

MULTIPLE = 8  # lengths are rounded up to a multiple of this many tokens; matrix kernels are faster on such shapes

Row = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # input_ids and labels of one document, int `[length]`


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How rows are laid out in a batch.

    With `packs`, a row of the batch holds several documents of at most `max_length` tokens together. Without, it
    holds one document, padded to the longest of the batch or, with `full_length`, to `max_length`. With `varlen`, the
    attention receives the lengths of the documents, so all documents are laid out as one row, packed or not. `parts` is
    the number of equal parts into which that row is cut.
    """

    packs: bool
    full_length: bool
    max_length: int
    pad_token_id: int
    varlen: bool = False
    parts: int = 1

    def rounded(self, length: int) -> int:
        """Round a length up, for each part to a multiple of `MULTIPLE`."""
        multiple = MULTIPLE * self.parts
        return max(multiple, -(-length // multiple) * multiple)


def choose_layout(settings: DataSettings, pad_token_id: int, takes_documents: bool, parts: int = 1) -> Layout:
    """Choose the layout; `takes_documents` is whether the model's attention receives the documents' lengths."""
    return Layout(
        packs=settings.packs,
        full_length=settings.padding == "max_length",
        max_length=settings.max_length,
        pad_token_id=pad_token_id,
        varlen=takes_documents and (settings.packs or parts > 1),
        parts=parts,
    )


@dataclass(frozen=True, slots=True)
class TargetsBySource:
    """From which source each target token of a micro-batch comes.

    `order`, int64 `[targets]` on the host, lists the target tokens source by source, as positions among the target
    tokens of the batch. `counts` is their number in each source.
    """

    order: torch.Tensor
    counts: tuple[int, ...]

    def part(self, start: int, end: int) -> "TargetsBySource":
        """Return the same of the target tokens from `start` to `end`."""
        of_target = np.empty(len(self.order), dtype=np.int64)
        of_target[self.order.numpy()] = np.repeat(np.arange(len(self.counts)), self.counts)
        return _grouped(of_target[start:end], len(self.counts))


def targets_by_source(
    sources: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], number_of_sources: int
) -> TargetsBySource:
    """Group the target tokens of a batch, given the source and the number of targets of each document in order."""
    return _grouped(np.repeat(sources, targets), number_of_sources)


def _grouped(of_target: np.ndarray[Any, Any], number_of_sources: int) -> TargetsBySource:
    counts = np.bincount(of_target, minlength=number_of_sources)
    return TargetsBySource(torch.as_tensor(np.argsort(of_target, kind="stable")), tuple(counts.tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of one micro-batch on one rank, or a part of their positions.

    `inputs` holds the model's arguments and `labels`, int64 `[batch, length]`. Padded rows come with
    `attention_mask`, packed rows with `position_ids` and no mask. If the attention receives the documents, there are
    also `document_lengths` (ints) and, with the same content for variable-length kernels, `cu_seq_lens_q` and
    `cu_seq_lens_k` (int32 `[documents + 1]`), `max_length_q` and `max_length_k` (int). `lengths` are the documents'
    lengths without padding; `target_tokens` is the number of labels that are predicted. `by_source` is given if the
    rows come from several sources.

    A part has the documents of the whole row, `sequence_parts`, the number of parts, and instead of `labels` the
    `targets`, which its positions predict: the last one predicts a label of the next part. `lengths` are those of the
    whole row in the first part and empty in the others, so that a sum over all ranks counts each document once.
    """

    inputs: dict[str, Any]
    lengths: tuple[int, ...]
    target_tokens: int
    by_source: TargetsBySource | None = None

    @property
    def positions(self) -> int:
        """Return the number of positions that are computed, including padding."""
        return int(self.inputs["input_ids"].numel())

    def on(self, device: torch.device | str) -> dict[str, Any]:
        """Return the inputs with every tensor on `device`, without waiting for the device."""
        values = self.inputs.items()
        return {
            name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for name, value in values
        }

    def part(self, index: int, parts: int) -> "Batch":
        """Return one of `parts` equal parts of a batch that is laid out as one row."""
        if parts == 1:
            return self
        inputs = dict(self.inputs)
        targets = take_targets(inputs)
        length = targets.shape[1] // parts
        cut = slice(index * length, (index + 1) * length)
        own = targets[:, cut]
        before, count = (int((part != IGNORED).sum()) for part in (targets[:, : cut.start], own))
        named = {"input_ids": inputs["input_ids"][:, cut], "position_ids": inputs["position_ids"][:, cut]}
        return Batch(
            inputs={**inputs, **named, "targets": own, "sequence_parts": parts},
            lengths=self.lengths if index == 0 else (),
            target_tokens=count,
            by_source=self.by_source and self.by_source.part(before, before + count),
        )


def following(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each position predicts, -100 where it predicts none; int64 `[batch, length]` both."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def take_targets(inputs: dict[str, Any]) -> torch.Tensor:
    """Remove the labels from the inputs of a batch; return what each position predicts, int64 `[batch, length]`."""
    targets: torch.Tensor | None = inputs.pop("targets", None)
    return following(inputs.pop("labels")) if targets is None else targets


def collate(
    packs: Sequence[Sequence[Row]], size: int, layout: Layout, by_source: TargetsBySource | None = None
) -> Batch:
    """Make a batch of up to `size` packs of documents; without packing, a pack holds one document.

    If there are fewer packs (in the last step of an epoch), the batch is filled with rows whose labels are all
    -100. Every rank then runs the same number of micro-batches of the same number of rows, and no row is trained on
    twice.
    """
    if layout.varlen:
        documents = [document for pack in packs for document in pack]
        length = _packed_length([documents], size if layout.full_length else 0, layout)
        inputs = _packed([documents], 1, length, layout) | _documents(documents, length, layout)
    elif layout.packs:
        inputs = _packed(packs, size, _packed_length(packs, 0, layout), layout)
    else:
        inputs = _padded(packs, size, layout)
    return Batch(
        inputs=inputs,
        lengths=tuple(len(ids) for pack in packs for ids, _ in pack),
        target_tokens=int((inputs["labels"][:, 1:] != IGNORED).sum()),
        by_source=by_source,
    )


def _blank(size: int, length: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.full((size, length), pad_token_id, dtype=torch.int64),
        "labels": torch.full((size, length), IGNORED, dtype=torch.int64),
    }


def _padded(packs: Sequence[Sequence[Row]], size: int, layout: Layout) -> dict[str, torch.Tensor]:
    longest = max((len(ids) for pack in packs for ids, _ in pack), default=1)
    inputs = _blank(size, layout.max_length if layout.full_length else layout.rounded(longest), layout.pad_token_id)
    mask = torch.zeros_like(inputs["input_ids"])
    mask[len(packs) :, 0] = 1  # a filler row attends to its first token, so that no softmax is over an empty set
    for index, [(ids, labels)] in enumerate(packs):
        inputs["input_ids"][index, : len(ids)] = torch.as_tensor(ids)
        inputs["labels"][index, : len(ids)] = torch.as_tensor(labels)
        mask[index, : len(ids)] = 1
    return {**inputs, "attention_mask": mask}


def _packed_length(packs: Sequence[Sequence[Row]], full_rows: int, layout: Layout) -> int:
    """Return the length of rows that hold the longest pack, and at least `full_rows` rows of `max_length`."""
    longest = max((sum(len(ids) for ids, _ in pack) for pack in packs), default=1)
    return layout.rounded(max(longest, full_rows * layout.max_length))


def _packed(packs: Sequence[Sequence[Row]], size: int, length: int, layout: Layout) -> dict[str, torch.Tensor]:
    """Lay out documents one after the other, one pack per row; positions start at 0 in each document.

    The first label of a document is -100: the model shifts labels by one and would otherwise predict the first token
    from the document before. The rest of a row is more documents, of padding, which hold no targets.
    """
    inputs = _blank(size, length, layout.pad_token_id)
    positions = torch.arange(length).repeat(size, 1)
    for index, pack in enumerate(packs):
        start = 0
        for ids, labels in pack:
            end = start + len(ids)
            inputs["input_ids"][index, start:end] = torch.as_tensor(ids)
            inputs["labels"][index, start + 1 : end] = torch.as_tensor(labels[1:])
            positions[index, start:end] = torch.arange(end - start)
            start = end
        positions[index, start:] = torch.arange(length - start) % layout.max_length
    return {**inputs, "position_ids": positions}


def _documents(documents: Sequence[Row], length: int, layout: Layout) -> dict[str, Any]:
    """Return the lengths and bounds of the documents in the one row, its padding included."""
    lengths = [len(ids) for ids, _ in documents]
    whole, rest = divmod(length - sum(lengths), layout.max_length)
    lengths += [layout.max_length] * whole + ([rest] if rest else [])
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    longest = max(lengths)
    return {
        "document_lengths": tuple(lengths),
        **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest},
    }
