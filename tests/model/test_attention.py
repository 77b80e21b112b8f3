"""The choice of the attention kernel, and attention to packs document by document."""

from typing import Any

import pytest
import torch
import transformers

from superoffload import config
from superoffload.data.collate import collate
from superoffload.errors import UserError
from superoffload.model import attention, recomputation
from superoffload.model.head import summed_loss
from tests.helpers.packs import DOCUMENTS, KINDS, PACKED, PACKS, VARLEN, tiny

pytestmark = pytest.mark.unit

BF16 = {"bf16": {"enabled": True}}
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}


def choose(kind: str, packs: bool = True, **values: Any) -> str | None:
    settings = config.build({"model_name": "m", "output_dir": "o", **values}).model
    return attention.choose(settings, transformers.AutoConfig.for_model(kind), BF16, packs)


def test_the_choice_depends_on_device_rows_and_model() -> None:
    assert choose("llama") == "sdpa_varlen"
    assert choose("llama", packs=False) is None
    # gpt_oss has no sdpa, bloom neither sdpa nor flash attention, falcon only attention functions of its own.
    assert choose("gpt_oss") is choose("bloom") is choose("falcon") is None
    assert choose("llama", attn_implementation="eager") == "eager"
    with pytest.raises(UserError, match="flash-attn is not installed"):
        choose("llama", attn_implementation="flash_attention_2")


def test_flash_attention_is_chosen_if_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        def device_name(self) -> str:
            return "cuda"

    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(UserError, match="needs a CUDA device"):
        choose("llama", attn_implementation="flash_attention_2")
    monkeypatch.setattr(attention, "get_accelerator", Cuda)
    assert choose("llama") == choose("llama", packs=False) == "flash_attention_2"
    assert choose("bloom") is None


@pytest.mark.parametrize(
    ("kind", "values", "parts", "words"),
    [
        ("llama", {}, 3, "--sequence_parallel_size 3: the 32 attention heads of llama cannot be divided among 3 ranks"),
        ("gemma2", {}, 2, "--sequence_parallel_size 2: gemma2 does not attend document by document; use 1"),
        ("mamba", {}, 2, "--sequence_parallel_size 2: mamba does not attend document by document; use 1"),
        ("llama", {"attn_implementation": "sdpa"}, 2, "--attn_implementation sdpa: is not available with --sequence"),
        ("llama", {}, 2, ""),
    ],
)
def test_ranks_that_share_rows_need_heads_and_documents(
    kind: str, values: dict[str, Any], parts: int, words: str
) -> None:
    settings = config.build({"model_name": "m", "output_dir": "o", **values}).model
    described = transformers.AutoConfig.for_model(kind)
    if not words:
        assert attention.choose(settings, described, BF16, False, parts) == "sdpa_varlen"
        return
    with pytest.raises(UserError, match=f"^{words}"):
        attention.choose(settings, described, BF16, False, parts)


def test_which_kernels_take_documents() -> None:
    names = (None, "eager", "sdpa", "sdpa_varlen", "torch_varlen", "flash_attention_2")
    assert [name for name in names if attention.takes_documents(name)] == list(names[3:])


def make_pair(kind: str, **changes: Any) -> tuple[Any, Any]:
    """Return the same model twice: with our attention and with transformers' own."""
    ours = tiny(kind, attention.SDPA_VARLEN, **changes)
    plain = tiny(kind, **changes)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def split(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split the one row of logits into its documents."""
    lengths = [len(ids) for ids, _ in DOCUMENTS]
    return torch.split(packed[: sum(lengths)], lengths)


@pytest.mark.parametrize(("kind", "changes"), [*((kind, {}) for kind in KINDS), *WINDOWED.items()])
def test_packed_logits_and_gradients_equal_those_of_each_document_alone(kind: str, changes: dict[str, Any]) -> None:
    ours, plain = make_pair(kind, **changes)
    recomputation.enable(ours, "full")
    inputs = collate(PACKS, 2, VARLEN).inputs
    labels = inputs.pop("labels")
    logits = ours(**inputs).logits
    summed_loss(logits, labels).backward()  # type: ignore[no-untyped-call]
    for (ids, targets), found in zip(DOCUMENTS, split(logits[0]), strict=True):
        alone = plain(input_ids=torch.as_tensor(ids)[None]).logits
        torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=0)
        summed_loss(alone, torch.as_tensor(targets)[None]).backward()  # type: ignore[no-untyped-call]
    for (name, mine), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_no_mask_over_all_pairs_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", attention.SDPA_VARLEN)
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *states: Any, **options: Any) -> torch.Tensor:
        seen.append((query.shape[2], options["attn_mask"]))
        return sdpa(query, *states, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    inputs = collate(PACKS, 2, VARLEN).inputs
    del inputs["labels"]
    model(**inputs)
    assert seen == [(length, None) for length in (9, 1, 17, 8, 5)] * 2


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), *WINDOWED.items()])
def test_generation_equals_that_of_sdpa(kind: str, changes: dict[str, Any]) -> None:
    ours, plain = make_pair(kind, **changes)
    ids = torch.as_tensor(DOCUMENTS[2][0])[None]
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "attention_mask": torch.ones_like(ids)}
    with attention.without_packs(ours):
        assert torch.equal(ours.eval().generate(ids, **options), plain.eval().generate(ids, **options))
    assert ours.config._attn_implementation == "sdpa_varlen"


def test_a_model_that_does_not_pass_on_the_documents_raises() -> None:
    """Otherwise documents would see each other; `isolation.check` turns the error into advice."""
    ours, _ = make_pair("llama")
    inputs = collate(PACKS, 2, PACKED).inputs
    with pytest.raises(KeyError, match="document_lengths"):
        ours(**inputs)
