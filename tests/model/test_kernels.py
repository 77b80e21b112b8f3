"""The choice of fused kernels, and what of a model they replace.

Liger's kernels need CUDA: plain functions stand in for them. tests/training/test_kernels.py runs the real ones in
Triton's interpreter where both packages are installed, and compiled kernels.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from superoffload import distributed
from superoffload.data.collate import collate
from superoffload.errors import UserError
from superoffload.model import kernels, recomputation
from superoffload.model.head import summed_loss
from tests.helpers.packs import DOCUMENTS, PACKS, VARLEN, tiny

pytestmark = pytest.mark.unit

PLAIN = kernels.Kernels(kernels.rms_norm, kernels.swiglu, kernels.rotate)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_ranks_ok", lambda ok: ok)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let Liger be there, with plain functions for its kernels; list the calls."""
    found: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found.append(name)
            return getattr(PLAIN, name)(*arguments)

        return call

    monkeypatch.setattr(kernels, "_liger_is_missing", lambda: None)
    monkeypatch.setattr(kernels, "liger", lambda: kernels.Kernels(*map(recorded, PLAIN._fields)))
    return found


def said(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "superoffload"]


def gradients(model: Any, recompute: bool = False) -> list[torch.Tensor]:
    if recompute:
        recomputation.enable(model, "full")
    inputs = collate(PACKS, 2, VARLEN).inputs
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    summed_loss(logits, labels).backward()  # type: ignore[no-untyped-call]
    return [logits.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


SERVED = {
    "llama": "2 LlamaAttention, 2 LlamaMLP, 5 LlamaRMSNorm",
    "qwen3": "2 Qwen3Attention, 9 Qwen3RMSNorm, 2 Qwen3MLP",  # also the norms of queries and keys
    "mistral": "2 MistralAttention, 2 MistralMLP, 5 MistralRMSNorm",
    "phi3": "2 Phi3Attention, 5 Phi3RMSNorm",  # its MLP has one product for gate and up
    "gemma2": "2 Gemma2Attention",  # its norm adds one to the weight, its MLP has another activation
    "gpt_oss": "5 GptOssRMSNorm",  # its cosines have half the width
    "cohere": "2 CohereMLP",  # it rotates neighbouring numbers
}


@pytest.mark.parametrize("kind", SERVED)
def test_kernels_are_used_where_they_give_the_numbers_of_the_model(kind: str, calls: list[str], caplog: Any) -> None:
    changes = {"pad_token_id": 0} if kind in ("phi3", "cohere") else {}
    plain, model = tiny(kind, "eager", **changes), tiny(kind, "eager", **changes)
    names = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    random = torch.get_rng_state()
    with caplog.at_level("INFO", "superoffload"):
        kernels.use("auto", model)
    assert said(caplog) == [f"Kernels: liger, in {SERVED[kind]}"]
    assert torch.equal(random, torch.get_rng_state())
    assert [(name, parameter.shape) for name, parameter in model.named_parameters()] == names
    assert list(model.state_dict()) == list(plain.state_dict())
    del calls[:]
    results = gradients(model, recompute=True)
    assert calls
    torch.testing.assert_close(results, gradients(plain), atol=1e-5, rtol=1e-4)
    del calls[:]
    gradients(plain)  # another model of the same classes
    assert calls == []


def test_generation_uses_them_too(calls: list[str]) -> None:
    ids = torch.as_tensor(DOCUMENTS[2][0])[None]
    plain, model = tiny("llama").eval(), tiny("llama").eval()
    kernels.use("liger", model)
    del calls[:]
    answers = [one.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True) for one in (plain, model)]
    assert torch.equal(*answers) and set(calls) == {"norm", "swiglu", "rotary"}


def test_without_cuda_or_liger_auto_is_silent(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    model = tiny("llama")
    with caplog.at_level("INFO", "superoffload"):
        for requested in ("auto", "none"):
            kernels.use(requested, model)
    assert caplog.records == [] and not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(UserError, match="--kernels liger: they need a CUDA device; use auto or none"):
        kernels.use("liger", model)

    class Cuda:
        def device_name(self) -> str:
            return "cuda"

    monkeypatch.setattr(kernels, "get_accelerator", Cuda)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"liger-kernel is not installed; `pip install \"superoffload\[liger\]\"`"):
        kernels.use("liger", model)
    asked = []

    def all_ranks_ok(ok: bool) -> bool:
        asked.append(ok)
        return ok

    monkeypatch.setattr(distributed, "all_ranks_ok", all_ranks_ok)
    kernels.use("auto", model)  # a rank whose node has it would wait for this one's answer
    assert asked == [False] and caplog.records == []


def fails(*_: Any) -> Any:
    raise RuntimeError("no kernel image is available")


def scaled(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return 1.01 * kernels.rms_norm(states, weight, epsilon)


def wrong_gradient(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return kernels.swiglu(gate.detach() + (gate - gate.detach()) * 0.5, up)


def not_a_number(*_: Any) -> Any:
    return PLAIN.swiglu(*_) * torch.nan


@pytest.mark.parametrize(
    ("broken", "left"),
    [
        ({"norm": fails}, "2 LlamaAttention, 2 LlamaMLP"),
        ({"norm": scaled}, "2 LlamaAttention, 2 LlamaMLP"),
        ({"swiglu": wrong_gradient}, "2 LlamaAttention, 5 LlamaRMSNorm"),
        ({"swiglu": not_a_number}, "2 LlamaAttention, 5 LlamaRMSNorm"),
        ({"rotary": lambda q, k, cos, sin: (k, q)}, "2 LlamaMLP, 5 LlamaRMSNorm"),
    ],
)
def test_a_kernel_that_fails_or_errs_is_not_used(
    broken: dict[str, Any], left: str, calls: list[str], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(kernels, "liger", lambda: PLAIN._replace(**broken))
    with caplog.at_level("INFO", "superoffload"):
        kernels.use("auto", tiny("llama"))
    assert said(caplog) == [f"Kernels: liger, in {left}"]


def test_a_model_that_no_kernel_suits(calls: list[str], monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    gpt2 = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("gpt2", n_embd=32, n_head=2, n_layer=1, vocab_size=64)
    )
    with pytest.raises(UserError, match="--kernels liger: GPT2LMHeadModel has no RMSNorm, SwiGLU or rotary embedding"):
        kernels.use("liger", gpt2)
    monkeypatch.setattr(kernels, "liger", lambda: kernels.Kernels(fails, fails, fails))
    with caplog.at_level("INFO", "superoffload"):
        kernels.use("auto", tiny("llama"))
    (message,) = said(caplog)
    assert message.startswith("Kernels: the model's own, because liger's do not suit (LlamaAttention: no kernel image")


def test_ranks_agree(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_ranks_ok", lambda ok: False)
    model = tiny("llama")
    with pytest.raises(UserError, match="--kernels liger: another rank rejected them; use auto or none"):
        kernels.use("liger", model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_options_of_the_rotary_function_are_left_to_the_model(calls: list[str]) -> None:
    model = tiny("llama")
    kernels.use("liger", model)
    del calls[:]
    rotary = model.model.layers[0].self_attn.forward.__func__.__globals__[kernels.ROTARY]
    states = torch.randn(1, 3, 2, 8)
    cos = sin = torch.randn(1, 3, 8)
    expected = inspect.unwrap(type(model.model.layers[0].self_attn).forward).__globals__[kernels.ROTARY]
    torch.testing.assert_close(
        rotary(states, states, cos, sin, unsqueeze_dim=2), expected(states, states, cos, sin, unsqueeze_dim=2)
    )
    assert calls == []


def test_compiled_kernels_that_cannot_be_compiled_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compiled", lambda: kernels.Kernels(fails, fails, fails))
    with pytest.raises(UserError, match="--kernels compiled: LlamaAttention: no kernel image is available; ") as error:
        kernels.use("compiled", tiny("llama"))
    assert "\n" not in str(error.value) and str(error.value).endswith("use auto or none")
