"""Whether a model keeps packed documents apart is tested, not looked up in a list."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from superoffload import distributed
from superoffload.errors import UserError
from superoffload.model import isolation
from tests.helpers.packs import PACKED, PADDED, VARLEN, StandIn, make_engine, tiny

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_ranks_ok", lambda ok: ok)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_models_that_isolate_pass(kind: str, dtype: torch.dtype, attention: str) -> None:
    engine = make_engine(tiny(kind, attention).to(dtype))
    engine.train()
    isolation.check(engine, PACKED)
    assert engine.training and engine.module.training


@pytest.mark.parametrize("broken", [False, True], ids=["finite", "with a NaN"])
def test_the_change_is_the_median_and_needs_no_operation_that_is_not_deterministic(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same value as torch's median along a dimension, which raises on CUDA under `--deterministic`."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 3 * isolation.LENGTH, 64, generator=rng)
    if broken:
        logits[1, 0, 2] = torch.nan
    spread = (logits[0] - logits[1:, 0]).square().mean(dim=-1).sqrt().view(2, 3, isolation.LENGTH)
    expected = spread.median(dim=2).values / logits[0].square().mean().sqrt()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("median CUDA with indices output does not have a deterministic implementation")

    answers = iter(logits)
    engine = make_engine(tiny("llama"))
    monkeypatch.setattr(StandIn, "forward", lambda *_, **__: SimpleNamespace(logits=next(answers)))
    monkeypatch.setattr(torch.Tensor, "median", refuse)
    changes = isolation._changes(engine, PACKED)
    assert changes == pytest.approx((float(expected[0, 0]), float(expected[:, 2].max())), rel=0, abs=0, nan_ok=True)


class SeesAll(torch.nn.Module):
    """A model whose attention mask hides nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.config = model.config

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_leaks_is_refused(dtype: torch.dtype) -> None:
    engine = make_engine(SeesAll(tiny("llama")).to(dtype))
    with pytest.raises(UserError, match=r"--packing: SeesAll with sdpa attention lets a packed row see .*--no_packing"):
        isolation.check(engine, PACKED)
    isolation.check(engine, PADDED)


class SeesStart(SeesAll):
    """A model that looks tokens up by their position, as if each document were the first of its pack."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> Any:
        assert position_ids is not None
        result = self.inner(input_ids=input_ids, position_ids=position_ids)
        found = self.inner.get_input_embeddings()(input_ids.gather(1, position_ids))
        return SimpleNamespace(logits=result.logits + self.inner.lm_head(found))


def test_a_model_that_counts_from_the_start_of_a_pack_is_refused() -> None:
    with pytest.raises(UserError, match=r"--packing: SeesStart .* lets a packed row see the one before it"):
        isolation.check(make_engine(SeesStart(tiny("llama"))), PACKED)


def test_a_change_that_does_not_repeat_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny("llama"))
    changes = iter([(0.0, 0.007), (0.0, 0.0)])
    monkeypatch.setattr(isolation, "_changes", lambda *_: next(changes))
    isolation.check(engine, PACKED)
    monkeypatch.setattr(isolation, "_changes", lambda *_: (0.0, 0.007))
    with pytest.raises(UserError, match=r"its logits change by 0\.7%"):
        isolation.check(engine, PACKED)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    ],
    ids=["mamba", "bloom"],
)
def test_architectures_that_cannot_isolate_are_refused(config: Any) -> None:
    torch.manual_seed(0)
    engine = make_engine(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match=r"--packing: .*--no_packing"):
        isolation.check(engine, PACKED)
    assert engine.training


def test_a_model_that_does_not_accept_the_documents_is_refused() -> None:
    with pytest.raises(UserError, match=r"does not accept packed rows; use --no_packing"):
        isolation.check(make_engine(SeesAll(tiny("llama"))), VARLEN)
