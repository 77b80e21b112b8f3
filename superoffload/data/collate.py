"""Rows -> the tensors of one micro-batch: packed, or padded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from superoffload.config import DataSettings
from superoffload.data.encode import IGNORED

MULTIPLE = 8  # lengths are rounded up to a multiple of this many tokens, which matrix kernels like

Row = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # input_ids and labels of one document, int `[length]`


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How rows become batches.

    `packs`: several documents a row, at most `max_length` tokens together; else one document a row, padded
    to the longest of the batch or, with `full_length`, to `max_length`. `varlen`: the attention in use is told the
    documents, so that packs are laid out as one row.
    """

    packs: bool
    full_length: bool
    max_length: int
    pad_token_id: int
    varlen: bool = False


def layout(settings: DataSettings, pad_token_id: int, takes_documents: bool) -> Layout:
    """Choose the layout for the settings and for whether the model's attention is told the documents of a pack."""
    return Layout(
        packs=settings.packs,
        full_length=settings.padding == "max_length",
        max_length=settings.max_length,
        pad_token_id=pad_token_id,
        varlen=settings.packs and takes_documents,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of one micro-batch on one rank.

    `inputs` holds what the model takes and `labels`, int64 `[batch, length]`: padded rows come with
    `attention_mask`, packed ones with `position_ids` and no mask, and for attention that is told the documents
    with `document_lengths` (ints) and, for variable-length kernels, the same as `cu_seq_lens_q`, `cu_seq_lens_k`
    (int32 `[documents + 1]`) and `max_length_q`, `max_length_k` (int). `lengths` are the documents' lengths
    without padding, `target_tokens` counts the labels that are predicted.
    """

    inputs: dict[str, Any]
    lengths: tuple[int, ...]
    target_tokens: int

    @property
    def positions(self) -> int:
        """Count the positions that are computed, padding included."""
        return int(self.inputs["input_ids"].numel())

    def on(self, device: torch.device | str) -> dict[str, Any]:
        """Return the inputs with every tensor on a device."""
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in self.inputs.items()}


def collate(packs: Sequence[Sequence[Row]], size: int, how: Layout) -> Batch:
    """Make a batch of up to `size` packs of documents; without packing a pack holds one document.

    Where packs are missing (the last step of an epoch), filler whose labels are all -100 takes their place:
    every rank then runs as many micro-batches of as many rows, and nothing counts twice.
    """
    if how.varlen:
        documents = [document for pack in packs for document in pack]
        inputs = _packed([documents], 1, how) | _documents(documents)
    elif how.packs:
        inputs = _packed(packs, size, how)
    else:
        inputs = _padded(packs, size, how)
    return Batch(
        inputs=inputs,
        lengths=tuple(len(ids) for pack in packs for ids, _ in pack),
        target_tokens=int((inputs["labels"][:, 1:] != IGNORED).sum()),
    )


def _rounded(length: int) -> int:
    return max(MULTIPLE, -(-length // MULTIPLE) * MULTIPLE)


def _blank(size: int, length: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.full((size, length), pad_token_id, dtype=torch.int64),
        "labels": torch.full((size, length), IGNORED, dtype=torch.int64),
    }


def _padded(packs: Sequence[Sequence[Row]], size: int, how: Layout) -> dict[str, torch.Tensor]:
    longest = max((len(ids) for pack in packs for ids, _ in pack), default=1)
    inputs = _blank(size, how.max_length if how.full_length else _rounded(longest), how.pad_token_id)
    mask = torch.zeros_like(inputs["input_ids"])
    mask[len(packs) :, 0] = 1  # a filler row attends to itself: no softmax over nothing
    for place, [(ids, labels)] in enumerate(packs):
        inputs["input_ids"][place, : len(ids)] = torch.as_tensor(ids)
        inputs["labels"][place, : len(ids)] = torch.as_tensor(labels)
        mask[place, : len(ids)] = 1
    return {**inputs, "attention_mask": mask}


def _packed(packs: Sequence[Sequence[Row]], size: int, how: Layout) -> dict[str, torch.Tensor]:
    """Lay documents one behind the other, one pack a row, positions from 0 on in each.

    The first label of a document is -100: the model shifts labels by one, and would else predict it from the
    document before. What is left of a row is one more document, of padding, whose labels do not count.
    """
    length = _rounded(max((sum(len(ids) for ids, _ in pack) for pack in packs), default=1))
    inputs = _blank(size, length, how.pad_token_id)
    positions = torch.arange(length).repeat(size, 1)
    for place, pack in enumerate(packs):
        start = 0
        for ids, labels in pack:
            end = start + len(ids)
            inputs["input_ids"][place, start:end] = torch.as_tensor(ids)
            inputs["labels"][place, start + 1 : end] = torch.as_tensor(labels[1:])
            positions[place, start:end] = torch.arange(end - start)
            start = end
        positions[place, start:] = torch.arange(length - start)
    return {**inputs, "position_ids": positions}


def _documents(documents: Sequence[Row]) -> dict[str, Any]:
    """Tell the documents of the one row, its padding being one more."""
    lengths = [len(ids) for ids, _ in documents]
    rest = _rounded(sum(lengths)) - sum(lengths)
    lengths += [rest] if rest else []
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    longest = max(lengths)
    return {
        "document_lengths": tuple(lengths),
        **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest},
    }
