"""NEFTune's noise: its size by the length of each document, in training alone."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from superoffload.config import TrainingSettings
from superoffload.data.collate import Layout, collate
from superoffload.model import attention, neftune
from tests.helpers.packs import DOCUMENTS, PACKED, PADDED, VARLEN, make_engine, tiny

pytestmark = pytest.mark.unit
ALPHA = 5.0
TRAINING = TrainingSettings(neftune_alpha=ALPHA)
WIDTH = 32


def embeddings(engine: Any, layout: Layout) -> tuple[torch.Tensor, dict[str, Any]]:
    """Run a batch; return what the embedding gives the first layer, and the batch's inputs."""
    packs = [DOCUMENTS[:2], DOCUMENTS[2:]] if layout.packs else [[document] for document in DOCUMENTS]
    inputs = collate(packs, len(packs), layout).inputs
    inputs.pop("labels")
    seen: list[torch.Tensor] = []
    handle = engine.module.get_input_embeddings().register_forward_hook(lambda *call: seen.append(call[2].detach()))
    engine(**inputs)
    handle.remove()
    return seen[0], inputs


@pytest.mark.parametrize("layout", [PACKED, PADDED, VARLEN], ids=["packed", "padded", "varlen"])
def test_the_noise_has_the_size_of_each_document(layout: Layout) -> None:
    engine = make_engine(tiny("llama", attention.SDPA_VARLEN if layout.varlen else "sdpa"))
    clean, inputs = embeddings(engine, layout)
    neftune.install(engine, TRAINING)
    engine.train()
    torch.manual_seed(0)
    noisy = torch.stack([embeddings(engine, layout)[0] for _ in range(20)])
    lengths = neftune.document_lengths(inputs)
    real = [len(ids) for ids, _ in DOCUMENTS]
    assert set(real) <= set(lengths.flatten().int().tolist())
    assert clean.shape[-1] == WIDTH
    share = (noisy - clean) / (ALPHA / torch.sqrt(lengths * WIDTH))[..., None]
    assert float(share.abs().max()) <= 1 + 1e-5
    for length in real:
        own = share[:, lengths == length]
        assert float(own.square().mean()) == pytest.approx(1 / 3, rel=0.15)  # the variance of uniform(-1, 1)


def test_a_part_of_a_row_has_the_lengths_of_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate([DOCUMENTS], 1, replace(VARLEN, parts=2))
    whole = neftune.document_lengths(batch.inputs)
    for rank in range(4):
        monkeypatch.setattr("superoffload.distributed.rank", lambda rank=rank: rank)
        own = neftune.document_lengths(batch.part(rank % 2, 2).inputs)
        assert torch.equal(own, whole.chunk(2, dim=1)[rank % 2])


def test_a_single_document_gets_the_noise_of_transformers() -> None:
    """A row as long as its document: neftune_post_forward_hook (transformers/integrations/neftune.py)."""
    model: Any = tiny("llama").train()
    engine = make_engine(model)
    neftune.install(engine, TRAINING)
    embedding = model.get_input_embeddings()
    ids = torch.arange(5, 21)[None]
    torch.manual_seed(1)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))  # sets the lengths
    torch.manual_seed(1)
    ours = embedding(ids)
    plain = embedding.weight[ids]
    embedding.neftune_noise_alpha = ALPHA
    torch.manual_seed(1)
    torch.testing.assert_close(ours, neftune_post_forward_hook(embedding, None, plain), rtol=1e-5, atol=1e-6)


def test_evaluation_has_no_noise_and_draws_nothing() -> None:
    engine = make_engine(tiny("llama"))
    neftune.install(engine, TRAINING)
    engine.eval()
    state = torch.get_rng_state()
    first, _ = embeddings(engine, PACKED)
    second, _ = embeddings(engine, PACKED)
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_ranks_have_noise_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny("llama").train())
    neftune.install(engine, TRAINING)
    first = embeddings(engine, PACKED)[0]
    engine = make_engine(tiny("llama").train())
    monkeypatch.setenv("RANK", "1")
    neftune.install(engine, TRAINING)
    assert not torch.equal(first, embeddings(engine, PACKED)[0])


def test_without_alpha_nothing_is_installed() -> None:
    engine = make_engine(tiny("llama"))
    neftune.install(engine, TrainingSettings())
    assert not engine.module._forward_pre_hooks
    assert not engine.module.get_input_embeddings()._forward_hooks


def test_lengths_of_a_row_with_padding() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert neftune.document_lengths({"position_ids": positions}).tolist() == [[3, 3, 3, 2, 2, 1], [6] * 6]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert neftune.document_lengths({"attention_mask": mask}).tolist() == [[2] * 3, [3] * 3]
    assert math.isfinite(float(neftune.document_lengths({"attention_mask": mask}).sum()))
