"""The choice of the attention kernel, and packs attended to document by document."""

import pytest
import torch
import transformers

from superoffload import attention, config
from superoffload.data.collate import Layout, collate
from superoffload.errors import UserError
from superoffload.loss import summed_loss
from tests.data.test_collate import DOCUMENTS, KINDS, PACKED, PACKS, tiny

DOCUMENT = {"bf16": {"enabled": True}}
VARLEN = Layout(packs=True, full_length=False, max_length=48, pad_token_id=1, varlen=True)
WINDOWED = {
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}


def choose(kind, packs=True, **values):
    settings = config.build({"model_name": "m", "output_dir": "o", **values}).model
    return attention.choose(settings, transformers.AutoConfig.for_model(kind), DOCUMENT, packs)


def test_attention_is_chosen_for_the_device_the_rows_and_the_model():
    assert choose("llama") == "sdpa_varlen"
    assert choose("llama", packs=False) is None
    # No sdpa; no flash attention either; no attention functions but its own.
    assert choose("gpt_oss") is choose("bloom") is choose("falcon") is None
    assert choose("llama", attn_implementation="eager") == "eager"
    with pytest.raises(UserError, match="flash-attn is not installed"):
        choose("llama", attn_implementation="flash_attention_2")


def test_flash_attention_is_taken_where_it_can_run(monkeypatch):
    class Cuda:
        def device_name(self):
            return "cuda"

    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(UserError, match="needs a CUDA device"):
        choose("llama", attn_implementation="flash_attention_2")
    monkeypatch.setattr(attention, "get_accelerator", Cuda)
    assert choose("llama") == choose("llama", packs=False) == "flash_attention_2"
    assert choose("bloom") is None


def test_which_kernels_are_told_the_documents():
    told = [
        name for name in (None, "eager", "sdpa", "sdpa_varlen", "flash_attention_2") if attention.takes_documents(name)
    ]
    assert told == ["sdpa_varlen", "flash_attention_2"]


def pair(kind, more=None):
    """Return the same model twice: with our attention and with transformers' own."""
    ours = tiny(kind, attention.SDPA_VARLEN, **(more or {}))
    plain = tiny(kind, **(more or {}))
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def split(packed):
    """Take the one row of logits apart into its documents."""
    lengths = [len(ids) for ids, _ in DOCUMENTS]
    return packed[: sum(lengths)].split(lengths)


@pytest.mark.parametrize(("kind", "more"), [*((kind, {}) for kind in KINDS), *WINDOWED.items()])
def test_packed_logits_and_gradients_are_those_of_each_document_alone(kind, more):
    ours, plain = pair(kind, more)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = collate(PACKS, 2, VARLEN).inputs
    labels = inputs.pop("labels")
    logits = ours(**inputs).logits
    summed_loss(logits, labels).backward()
    for (ids, targets), found in zip(DOCUMENTS, split(logits[0]), strict=True):
        alone = plain(input_ids=torch.as_tensor(ids)[None]).logits
        torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=0)
        summed_loss(alone, torch.as_tensor(targets)[None]).backward()
    for (name, mine), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_no_mask_over_all_pairs_is_built(monkeypatch):
    model = tiny("llama", attention.SDPA_VARLEN)
    seen = []
    inner = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, *more, **how: seen.append((query.shape[2], how["attn_mask"])) or inner(query, *more, **how),
    )
    inputs = collate(PACKS, 2, VARLEN).inputs
    del inputs["labels"]
    model(**inputs)
    assert seen == [(length, None) for length in (9, 1, 17, 8, 5)] * 2


@pytest.mark.parametrize(("kind", "more"), [("llama", {}), *WINDOWED.items()])
def test_generation_is_that_of_sdpa(kind, more):
    ours, plain = pair(kind, more)
    ids = torch.as_tensor(DOCUMENTS[2][0])[None]
    how = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "attention_mask": torch.ones_like(ids)}
    with attention.without_packs(ours):
        assert torch.equal(ours.eval().generate(ids, **how), plain.eval().generate(ids, **how))
    assert ours.config._attn_implementation == "sdpa_varlen"


def test_a_model_that_does_not_hand_on_the_documents_is_refused():
    """Rather than let documents see each other: `isolation.check` then says that packing cannot be had."""
    ours, _ = pair("llama")
    inputs = collate(PACKS, 2, PACKED).inputs
    with pytest.raises(KeyError, match="document_lengths"):
        ours(**inputs)
