"""Attention to packs by one call of torch's `varlen_attn`.

Its kernel needs CUDA, so here a stand-in computes it; `tests/benchmarks/attention_speed.py` runs the kernel itself.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from superoffload import config
from superoffload.data.collate import collate
from superoffload.model import attention, recomputation
from superoffload.model.head import summed_loss
from tests.helpers.packs import DOCUMENTS, KINDS, PACKS, VARLEN, tiny
from tests.helpers.varlen import reference

pytestmark = pytest.mark.unit

BF16 = {"bf16": {"enabled": True}}
LENGTHS = (9, 1, 6)
BOUNDS = torch.tensor([0, 9, 10, 16], dtype=torch.int32)
REAL = attention.varlen_attn
needs_varlen = pytest.mark.skipif(REAL is None, reason="this torch has no varlen_attn")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the kernel, and list its calls."""
    calls: list[dict[str, Any]] = []

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return reference(*arguments, **options)

    recorded.__signature__ = inspect.signature(reference)  # type: ignore[attr-defined]
    monkeypatch.setattr(attention, "varlen_attn", recorded)
    return calls


@pytest.fixture
def any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let float32 through, so that results can be compared closely."""
    before = attention._problem_of_call

    def without_dtype(*arguments: Any) -> str | None:
        found = before(*arguments)
        return None if found == "torch.float32" else found

    monkeypatch.setattr(attention, "_problem_of_call", without_dtype)


def states(size: int = 8, value_size: int = 8, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> list[Any]:
    shapes = [(1, 4, 16, size), (1, 2, 16, size), (1, 2, 16, value_size)]
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def call(kernel: Callable[..., Any], query_key_value: list[Any], **options: Any) -> torch.Tensor:
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    given = {"document_lengths": LENGTHS, "cu_seq_lens_q": BOUNDS, "max_length_q": 9, **options}
    output: torch.Tensor = kernel(module, *query_key_value, None, **given)[0]
    return output


@needs_varlen
def test_the_stand_in_has_the_signature_of_torch() -> None:
    def names(function: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    real = names(REAL)  # torch 2.11 has fewer parameters
    assert names(reference)[: len(real)] == real


@needs_varlen
@pytest.mark.parametrize("window", [None, 4])
def test_torch_accepts_the_arguments(window: int | None) -> None:
    """On the meta device torch checks the arguments and computes shapes, forward and backward."""
    given = states(device="meta")
    output = call(attention.attend_at_once, given, sliding_window=window, cu_seq_lens_q=BOUNDS.to("meta"))
    assert output.shape == (1, 16, 4, 8)
    output.sum().backward()  # type: ignore[no-untyped-call]
    assert [state.grad.shape for state in given] == [state.shape for state in given]


@pytest.mark.parametrize("options", [{}, {"scaling": 0.2}, {"sliding_window": 4}, {"sliding_window": 1}])
def test_one_call_equals_one_call_per_document(options: dict[str, Any], stand_in: list[Any], any_dtype: None) -> None:
    results = []
    for kernel in (attention.attend_at_once, attention.attend):
        given = states(dtype=torch.float32)
        output = call(kernel, given, **options)
        output.square().sum().backward()  # type: ignore[no-untyped-call]
        results.append([output.detach(), *(state.grad for state in given)])
    assert len(stand_in) == 1
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_packed_logits_and_gradients_equal_those_of_sdpa(kind: str, stand_in: list[Any], any_dtype: None) -> None:
    changes = {"sliding_window": 6} if kind == "mistral" else {}
    results = []
    for name in (attention.TORCH_VARLEN, attention.SDPA_VARLEN):
        model = tiny(kind, name, **changes)
        recomputation.enable(model, "full")
        inputs = collate(PACKS, 2, VARLEN).inputs
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        summed_loss(logits, labels).backward()  # type: ignore[no-untyped-call]
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    assert len(stand_in) == 4  # two layers, computed again in backward
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout": 0.5}, "dropout"),
        ({"position_bias": torch.zeros(1, 1, 1, 1)}, "position_bias"),
        ({"is_causal": False}, "attention that is not causal"),
        ({"states": states(value_size=16)}, "heads of 8 and 16"),
        ({"states": states(size=4, value_size=4)}, "heads of 4"),
        ({"states": states(size=264, value_size=264)}, "heads of 264"),
        ({"states": states(dtype=torch.float32)}, "torch.float32"),
        ({"states": [*states()[:2], *states(dtype=torch.float32)[2:]]}, "several dtypes"),
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
    ],
)
def test_what_the_kernel_cannot_express_is_left_to_sdpa(
    change: dict[str, Any], reason: str, stand_in: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    called: list[dict[str, Any]] = []

    def attend(*_: Any, **options: Any) -> tuple[None, None]:
        called.append(options)
        return None, None

    monkeypatch.setattr(attention, "attend", attend)
    attention._say.cache_clear()
    with caplog.at_level(logging.INFO, "superoffload"):
        for _ in range(2):
            given = dict(change)
            call(attention.attend_at_once, given.pop("states", None) or states(), **given)
    assert stand_in == [] and len(called) == 2
    assert called[0]["document_lengths"] == LENGTHS
    assert [record.getMessage() for record in caplog.records] == [
        f"Module attends to packs one document at a time: torch's varlen_attn does not take {reason}"
    ]


class Cuda:
    """An accelerator that says it is CUDA, and computes on the CPU."""

    def device_name(self) -> str:
        return "cuda"

    def current_device_name(self) -> str:
        return "cpu"


def choose(kind: str = "llama", ds_config: dict[str, Any] = BF16, **changes: Any) -> str | None:
    settings = config.build({"model_name": "m", "output_dir": "o"}).model
    return attention.choose(settings, transformers.AutoConfig.for_model(kind, **changes), ds_config, True)


def test_the_kernel_is_chosen_on_cuda_where_it_gives_the_numbers_of_sdpa(
    stand_in: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose() == "sdpa_varlen" and stand_in == []  # on the CPU it is not tried
    monkeypatch.setattr(attention, "get_accelerator", Cuda)
    before = torch.get_rng_state()
    assert choose() == "torch_varlen"
    assert torch.equal(before, torch.get_rng_state())
    assert [options["window_size"] for options in stand_in] == [(-1, 0), (6, 0)]
    assert choose(ds_config={}) == "sdpa_varlen"  # float32
    assert choose("llama", hidden_size=32 * 260) == "sdpa_varlen"  # heads of 260
    assert choose("gpt_oss") is None  # sinks: transformers has no sdpa for it


def fails(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.")


def forgets_documents(query: Any, key: Any, value: Any, bounds: Any, *rest: Any, **options: Any) -> torch.Tensor:
    whole = torch.tensor([0, len(query)], dtype=torch.int32)
    return reference(query, key, value, whole, whole, len(query), len(query), **options)


def forgets_window(*arguments: Any, **options: Any) -> torch.Tensor:
    return reference(*arguments, **{**options, "window_size": (-1, 0)})


def old(query: Any, key: Any, value: Any, a: Any, b: Any, c: int, d: int, is_causal: bool = False) -> torch.Tensor:
    raise AssertionError("not to be called")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (None, "has no varlen_attn with scale, window_size"),
        (old, "has no varlen_attn with scale, window_size"),
        (fails, "torch's varlen_attn failed: USE_FLASH_ATTENTION was not enabled for build."),
        (forgets_documents, "torch's varlen_attn differs from sdpa by"),
        (forgets_window, "torch's varlen_attn differs from sdpa by"),
    ],
)
def test_a_kernel_that_is_missing_fails_or_errs_is_not_chosen(
    kernel: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    if kernel not in (None, old):
        kernel.__signature__ = inspect.signature(reference)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "get_accelerator", Cuda)
    with caplog.at_level(logging.INFO, "superoffload"):
        assert choose() == "sdpa_varlen"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Packs are attended to one document at a time: ") and reason in message


def test_a_kernel_without_the_parameter_for_grouped_heads_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.11."""

    def kernel(
        query: Any, key: Any, value: Any, a: Any, b: Any, c: int, d: int, *, scale: Any = None, window_size: Any = None
    ) -> torch.Tensor:
        return reference(query, key, value, a, b, c, d, scale=scale, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "get_accelerator", Cuda)
    assert choose() == "torch_varlen"


@pytest.mark.parametrize("name", [attention.TORCH_VARLEN, attention.SDPA_VARLEN])
def test_generation_uses_sdpa_and_the_kernel_returns_afterwards(name: str, stand_in: list[Any]) -> None:
    model = tiny("llama", name)
    ids = torch.as_tensor(DOCUMENTS[2][0])[None]
    with attention.without_packs(model):
        model.eval().generate(ids, max_new_tokens=2, do_sample=False)
    assert stand_in == [] and model.config._attn_implementation == name
