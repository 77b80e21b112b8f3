"""Batches: their shapes, and documents that do not see each other in real models."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from superoffload.config import DataSettings
from superoffload.data.collate import Layout, Row, choose_layout, collate, take_targets, targets_by_source
from superoffload.data.encode import IGNORED
from superoffload.model.head import summed_loss
from tests.helpers.packs import DOCUMENTS, KINDS, PACKED, PACKS, PADDED, VARLEN, document, tiny

pytestmark = pytest.mark.unit


def test_packed_batch() -> None:
    batch = collate(PACKS, 3, PACKED)
    assert {name: tuple(value.shape) for name, value in batch.inputs.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (3, 32)
    )
    assert batch.lengths == (9, 1, 17, 8)
    assert batch.positions == 96
    positions = batch.inputs["position_ids"]
    assert positions[0].tolist() == [*range(9), 0, *range(22)]
    assert positions[1].tolist() == [*range(17), *range(8), *range(7)]
    assert positions[2].tolist() == list(range(32))
    labels = batch.inputs["labels"]
    assert labels[0, 9] == labels[1, 17] == labels[1, 0] == IGNORED
    assert batch.target_tokens == sum(int((labels[1:] != IGNORED).sum()) for _, labels in DOCUMENTS)
    assert (labels[2] == IGNORED).all()


def test_one_row_with_bounds_for_variable_length_kernels() -> None:
    inputs = collate(PACKS, 2, VARLEN).inputs
    assert inputs["input_ids"].shape == (1, 40)
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 9, 10, 27, 35, 40]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 17
    assert inputs["document_lengths"] == (9, 1, 17, 8, 5)
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert starts == [0, 9, 10, 27, 35]
    assert "attention_mask" not in inputs
    full = collate([[document(16, 0)]], 2, VARLEN).inputs
    assert full["cu_seq_lens_q"].tolist() == [0, 16]


def test_padded_batch() -> None:
    batch = collate([[row] for row in DOCUMENTS[:3]], 4, PADDED)
    assert batch.inputs["input_ids"].shape == (4, 24)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [9, 1, 17, 1]
    assert batch.lengths == (9, 1, 17)
    full = Layout(packs=False, full_length=True, max_length=48, pad_token_id=1)
    assert collate([[DOCUMENTS[0]]], 1, full).inputs["input_ids"].shape == (1, 48)


@pytest.mark.parametrize("packs", [True, False])
def test_parts_of_a_row_have_all_its_positions_targets_and_tokens(packs: bool) -> None:
    layout = replace(VARLEN, packs=packs, parts=3)
    documents = PACKS if packs else [[document] for document in DOCUMENTS]
    by_source = targets_by_source(np.array([1, 0, 0, 1]), np.array([7, 0, 12, 7]), 3)
    whole = collate(documents, 4, layout, by_source)
    assert whole.inputs["input_ids"].shape == (1, 48)  # a multiple of 3 times 8
    parts = [whole.part(index, 3) for index in range(3)]
    for name in ("input_ids", "position_ids"):
        assert torch.equal(torch.cat([part.inputs[name] for part in parts], dim=1), whole.inputs[name])
    targets = take_targets(dict(whole.inputs))
    assert targets[0, 15] == targets[0, 16 - 1] != IGNORED  # the last position of the first part has a target
    assert torch.equal(torch.cat([take_targets(dict(part.inputs)) for part in parts], dim=1), targets)
    assert [part.target_tokens for part in parts] == [(targets[0, i : i + 16] != IGNORED).sum() for i in (0, 16, 32)]
    assert [part.lengths for part in parts] == [whole.lengths, (), ()]
    assert all(part.inputs["document_lengths"] == whole.inputs["document_lengths"] for part in parts)
    start, sources = 0, np.repeat([1, 0, 0, 1], [7, 0, 12, 7])
    for part in parts:
        assert part.by_source is not None
        own = sources[start : start + part.target_tokens]
        assert own[part.by_source.order].tolist() == sorted(own)
        assert part.by_source.counts == tuple(np.bincount(own, minlength=3))
        start += part.target_tokens
    assert start == 26
    assert collate(PACKS, 4, VARLEN).part(0, 1).inputs.keys() == collate(PACKS, 4, VARLEN).inputs.keys()


def test_rows_of_full_length_are_one_row_with_padding_of_at_most_that_length() -> None:
    layout = Layout(packs=False, full_length=True, max_length=20, pad_token_id=1, varlen=True, parts=2)
    inputs = collate([[document] for document in DOCUMENTS[:2]], 3, layout).inputs
    assert inputs["input_ids"].shape == (1, 64)  # 60, rounded up
    assert inputs["document_lengths"] == (9, 1, 20, 20, 14)
    assert int(inputs["position_ids"].max()) == 19
    assert (inputs["position_ids"][0] == 0).nonzero().flatten().tolist() == [0, 9, 10, 30, 50]


@pytest.mark.parametrize("layout", [PACKED, PADDED, VARLEN])
def test_filler_alone_is_finite_and_holds_no_target(layout: Layout) -> None:
    batch = collate([], 2, layout)
    assert batch.target_tokens == 0 and batch.lengths == ()
    inputs = {
        name: value for name, value in batch.on("cpu").items() if not name.startswith(("cu_", "max_", "document_"))
    }
    labels = inputs.pop("labels")
    logits = tiny("llama")(**inputs).logits
    assert torch.isfinite(logits).all()
    assert float(summed_loss(logits.detach(), labels)) == 0.0


@pytest.mark.parametrize(
    ("settings", "takes_documents", "packs", "varlen"),
    [
        ({}, False, True, False),
        ({}, True, True, True),
        ({"packing": False}, True, False, False),
        ({"padding": "max_length"}, False, False, False),
    ],
)
def test_layout_follows_settings_and_attention(
    settings: dict[str, Any], takes_documents: bool, packs: bool, varlen: bool
) -> None:
    assert choose_layout(DataSettings(**settings), 0, True, 2).varlen
    layout = choose_layout(DataSettings(**settings), 0, takes_documents)
    assert (layout.packs, layout.varlen) == (packs, varlen)
    assert layout.full_length is (settings.get("padding") == "max_length")


def run(model: Any, packs: Sequence[Sequence[Row]], layout: Layout) -> tuple[Any, list[torch.Tensor]]:
    """Return the summed loss and each document's logits."""
    inputs = collate(packs, len(packs), layout).on("cpu")
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    found = []
    for row, pack in enumerate(packs):
        start = 0
        for ids, _ in pack:
            found.append(logits[row, start : start + len(ids)])
            start += len(ids)
    return summed_loss(logits, labels), found


def flattened(packs: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Put all documents into one pack, as for variable-length kernels, which take their bounds as well."""
    return [[row for pack in packs for row in pack]]


@pytest.mark.parametrize("one_row", [False, True], ids=["rows", "one_row"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_are_those_of_each_document_alone(kind: str, attention: str, one_row: bool) -> None:
    model = tiny(kind, attention).eval()
    with torch.no_grad():
        _, packed = run(model, flattened(PACKS) if one_row else PACKS, PACKED)
        for row, logits in zip(DOCUMENTS, packed, strict=True):
            alone = model(input_ids=torch.as_tensor(row[0])[None]).logits[0]
            torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_gradient_is_the_sum_over_documents(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    run(model, PACKS, PACKED)[0].backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row in DOCUMENTS:
        run(model, [[row]], PADDED)[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_all_ones_mask_would_leak() -> None:
    """Packed rows have no mask for this reason: given one, transformers sees a single document."""
    model = tiny("llama").eval()
    inputs = collate(PACKS, 2, PACKED).on("cpu")
    del inputs["labels"]
    with torch.no_grad():
        right = model(**inputs).logits
        leaky = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits
    assert (right - leaky)[1, 17:25].abs().max() > 1e-3


def varlen_reference(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **bounds: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as a variable-length kernel does: document by document, by the bounds alone."""
    assert attention_mask is None
    assert bounds["max_length_q"] == max(bounds["cu_seq_lens_q"].diff().tolist())
    edges = bounds["cu_seq_lens_q"].tolist()
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        for start, end in itertools.pairwise(edges)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_reach_the_attention_of_every_layer_and_isolate(kind: str) -> None:
    transformers.AttentionInterface.register("varlen_reference", varlen_reference)
    model, plain = tiny(kind, "varlen_reference").eval(), tiny(kind).eval()
    inputs = collate(PACKS, 2, VARLEN).on("cpu")
    del inputs["labels"]
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        for (ids, _), start in zip(DOCUMENTS, [0, 9, 10, 27], strict=True):
            alone = plain(input_ids=torch.as_tensor(ids)[None]).logits[0]
            torch.testing.assert_close(logits[start : start + len(ids)], alone, atol=1e-5, rtol=0)
