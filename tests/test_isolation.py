"""Packing is refused by trying, not by a list of models."""

import pytest
import torch
import transformers

from superoffload import isolation
from superoffload.data.collate import Layout
from superoffload.errors import UserError
from tests.data.test_collate import PACKED, PADDED, tiny


class Engine(torch.nn.Module):
    """Stands for DeepSpeed's engine."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(isolation.distributed, "agree", lambda ok: ok)
    monkeypatch.setattr(isolation.distributed, "device", lambda: torch.device("cpu"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_models_that_isolate_pass(kind, dtype, attention):
    engine = Engine(tiny(kind, attention).to(dtype))
    engine.train()
    isolation.check(engine, PACKED)
    assert engine.training and engine.module.training


class SeesAll(torch.nn.Module):
    """A model that hands its inputs on with a mask that hides nothing."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.config = model.config

    def forward(self, input_ids, position_ids=None):
        return self.inner(input_ids=input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_that_leaks_is_refused(dtype):
    engine = Engine(SeesAll(tiny("llama")).to(dtype))
    with pytest.raises(UserError, match=r"--packing: SeesAll with sdpa attention lets a packed row see .*--no_packing"):
        isolation.check(engine, PACKED)
    isolation.check(engine, PADDED)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    ],
    ids=["mamba", "bloom"],
)
def test_architectures_that_cannot_are_refused(config):
    torch.manual_seed(0)
    engine = Engine(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match=r"--packing: .*--no_packing"):
        isolation.check(engine, PACKED)
    assert engine.training


def test_model_that_does_not_take_the_bounds_is_refused():
    how = Layout(packs=True, full_length=False, max_length=48, pad_token_id=1, varlen=True)
    with pytest.raises(UserError, match=r"takes no packed rows; use --no_packing"):
        isolation.check(Engine(SeesAll(tiny("llama"))), how)
