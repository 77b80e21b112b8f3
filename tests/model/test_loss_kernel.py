"""Which loss kernel suits a model is tested, not looked up in a list."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from superoffload import distributed
from superoffload.data.collate import Layout, collate, targets_by_source
from superoffload.errors import UserError
from superoffload.model import attention, head, loss_kernel
from superoffload.model.head import ChunkedLoss, Objective, PlainLoss, Transform
from tests.helpers.packs import DOCUMENTS, PACKED, PADDED, VARLEN, make_engine, tiny

pytestmark = pytest.mark.unit

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
SUITABLE: dict[str, tuple[dict[str, Any], Transform]] = {
    "llama": ({}, Transform()),
    "qwen3_moe": ({}, Transform()),
    "gpt_oss": (EXPERTS, Transform()),
    "phi": ({}, Transform()),  # its head has a bias
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 7.0}, Transform(1.0, 7.0)),  # tied, as Cohere's
    "granite": ({"logits_scaling": 6.0}, Transform(1 / 6)),
    "cohere": ({"logit_scale": 0.0625}, Transform(0.0625)),
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_ranks_ok", lambda ok: ok)


def loss_and_gradients(engine: Any, loss: Any, layout: Layout) -> tuple[float, dict[str, torch.Tensor]]:
    engine.zero_grad()
    packs = [DOCUMENTS[:2], DOCUMENTS[2:]] if layout.packs else [[document] for document in DOCUMENTS]
    value = loss(engine, collate(packs, len(packs), layout))
    value.backward()
    gradients = {name: p.grad for name, p in engine.module.named_parameters() if p.grad is not None}
    return value.item(), {name: gradient.clone() for name, gradient in gradients.items()}


def assert_equal_to_plain(engine: Any, loss: Any, layout: Layout, tolerance: float) -> None:
    expected, expected_gradients = loss_and_gradients(engine, PlainLoss(), layout)
    found, gradients = loss_and_gradients(engine, loss, layout)
    assert found == pytest.approx(expected, rel=1e-6 if tolerance < 1e-4 else 1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        size = expected_gradients[name].norm()
        assert (gradient - expected_gradients[name]).norm() <= tolerance * size + 1e-7, name


@pytest.mark.parametrize("layout", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", SUITABLE)
def test_suitable_models(kind: str, dtype: torch.dtype, tolerance: float, layout: Layout) -> None:
    changes, transform = SUITABLE[kind]
    engine = make_engine(tiny(kind, "eager", **changes).to(dtype))
    engine.train()
    loss = loss_kernel.choose("chunked", engine, layout)
    assert isinstance(loss, ChunkedLoss)
    assert loss._transform.scale == pytest.approx(transform.scale, rel=1e-6)
    assert loss._transform.softcap == transform.softcap
    assert engine.training and engine.module.training
    assert_equal_to_plain(engine, loss, layout, tolerance)
    assert "forward" not in vars(engine.module.get_output_embeddings())
    assert not engine.module._forward_hooks


OBJECTIVES = [Objective(label_smoothing=0.2), Objective(dft=True)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["smoothing", "dft"])
@pytest.mark.parametrize("kind", ["gemma2", "phi"])
def test_both_kernels_minimise_the_objective_in_training_and_evaluate_the_cross_entropy(
    kind: str, objective: Objective
) -> None:
    engine = make_engine(tiny(kind, "eager", **SUITABLE[kind][0]))
    with torch.no_grad():
        engine.module.get_output_embeddings().weight *= 20  # far from an even distribution, which smoothing keeps
    engine.train()
    plain, chunked = PlainLoss(objective), loss_kernel.choose("chunked", engine, PACKED, objective)
    expected, expected_gradients = loss_and_gradients(engine, plain, PACKED)
    found, gradients = loss_and_gradients(engine, chunked, PACKED)
    cross_entropy, other_gradients = loss_and_gradients(engine, PlainLoss(), PACKED)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found != pytest.approx(cross_entropy, rel=1e-5)
    for name, gradient in gradients.items():
        size = expected_gradients[name].norm()
        assert (gradient - expected_gradients[name]).norm() <= 3e-6 * size + 1e-7, name
    assert any(
        (gradients[name] - other_gradients[name]).norm() > 0.01 * other_gradients[name].norm() for name in gradients
    )
    engine.module.eval()  # all that DeepSpeed's engine does for its own eval()
    assert engine.training
    for loss in (plain, chunked):
        assert loss_and_gradients(engine, loss, PACKED)[0] == pytest.approx(cross_entropy, rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["smoothing", "dft"])
def test_the_losses_of_sources_are_parts_of_the_objective(objective: Objective) -> None:
    engine = make_engine(tiny("llama"))
    engine.train()
    packs = [DOCUMENTS[:2], DOCUMENTS[2:]]
    whole = collate(packs, 2, PACKED)
    targets = np.array([int((labels[1:] != -100).sum()) for _, labels in DOCUMENTS])
    sources = np.arange(len(DOCUMENTS)) % 2
    batch = collate(packs, 2, PACKED, targets_by_source(sources, targets, 2))
    for loss in (PlainLoss(objective), ChunkedLoss(Transform(), objective)):
        found = loss(engine, batch)
        assert found.shape == (2,)
        assert found.sum().item() == pytest.approx(loss(engine, whole).item(), rel=1e-6)


def test_packs_that_the_attention_takes_apart() -> None:
    engine = make_engine(tiny("llama", attention.SDPA_VARLEN))
    loss = loss_kernel.choose("chunked", engine, VARLEN)
    assert_equal_to_plain(engine, loss, VARLEN, 3e-6)


def test_a_micro_batch_without_targets_has_a_loss_and_gradients_of_zero() -> None:
    engine = make_engine(tiny("gemma2", "eager", head_dim=8))
    batch = collate([[DOCUMENTS[1]]], 2, PADDED)  # one token, which nothing predicts, and a row of padding
    assert batch.target_tokens == 0
    value = ChunkedLoss(Transform(1.0, 30.0))(engine, batch)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.item() == 0.0
    gradients = [parameter.grad for parameter in engine.module.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


class Shifted(torch.nn.Linear):
    """A head of another class, which does something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.roll(1, dims=-1))


class Wrapped(torch.nn.Module):
    """A model around a small Llama that treats its logits in a way of its own."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.inner = tiny("llama")
        self.config = self.inner.config
        self.change = change

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = self.change(output.logits)
        return output


class LastOnly(Wrapped):
    """A model that computes the logits of its last position only, and repeats them."""

    def __init__(self) -> None:
        super().__init__(lambda logits: logits.expand(-1, 24, -1))

    def forward(self, **inputs: Any) -> Any:
        return super().forward(logits_to_keep=1, **inputs)


def another_head() -> Any:
    model = tiny("llama")
    model.lm_head = Shifted(32, 64, bias=False)
    return model


UNSUITABLE: dict[str, tuple[Any, str]] = {
    "another class": (another_head, "its output layer is Shifted, not Linear"),
    "another value": (lambda: Wrapped(lambda logits: logits + torch.arange(64) / 64), "in a way that is not known"),
    "one token": (lambda: Wrapped(lambda logits: logits.index_fill(2, torch.tensor([5]), -1e9)), "in a way that is"),
    "square": (lambda: Wrapped(lambda logits: logits.square()), "in a way that is not known"),
    "zero": (lambda: Wrapped(lambda logits: logits * 0), "in a way that is not known"),
    "normalised": (
        lambda: Wrapped(lambda logits: functional.log_softmax(logits, -1) + 3),
        "in a way that is not known",
    ),
    "other positions": (lambda: Wrapped(lambda logits: logits.roll(1, dims=1)), "in a way that is not known"),
    "cut": (lambda: Wrapped(lambda logits: logits[..., :60]), "its logits are not those of its output layer"),
    "last only": (LastOnly, "gets other positions"),
    "rejects": (lambda: Wrapped(lambda logits: logits.view(2, 24, 64)), "the model rejected it"),
}


@pytest.mark.parametrize("kind", UNSUITABLE)
def test_a_model_that_it_does_not_suit_falls_back_with_one_line(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, why = UNSUITABLE[kind]
    engine = make_engine(make())
    engine.train()
    before = {name: dict(vars(module)) for name, module in engine.named_modules()}
    with caplog.at_level(logging.INFO, "superoffload"):
        assert isinstance(loss_kernel.choose("auto", engine, PADDED), PlainLoss)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Loss kernel: plain, because chunked does not suit ")
    assert why in line and "\n" not in line
    with pytest.raises(UserError, match=r"^--loss_kernel chunked: does not suit .*; use auto or plain$"):
        loss_kernel.choose("chunked", engine, PADDED)
    assert {name: vars(module) for name, module in engine.named_modules()} == before


def test_plain_runs_nothing() -> None:
    assert isinstance(loss_kernel.choose("plain", make_engine(torch.nn.Identity()), PADDED), PlainLoss)


def test_random_numbers_stay_as_they_are() -> None:
    engine = make_engine(tiny("llama"))
    before = torch.get_rng_state()
    loss_kernel.choose("auto", engine, PACKED)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_ranks_rejection_counts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(distributed, "all_ranks_ok", lambda ok: False)
    with caplog.at_level(logging.INFO, "superoffload"):
        assert isinstance(loss_kernel.choose("auto", make_engine(tiny("llama")), PADDED), PlainLoss)
    assert "another rank rejected it" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.distributed.DistError("a rank is gone")])
def test_what_one_rank_alone_can_raise_is_no_answer_of_the_model(error: Exception) -> None:
    """The other ranks would wait for this one in a collective."""

    def fail(logits: torch.Tensor) -> torch.Tensor:
        raise error

    with pytest.raises(type(error)):
        loss_kernel.choose("auto", make_engine(Wrapped(fail)), PADDED)


def test_a_backward_that_fails_is_found_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(head, "_float32_product", fail)
    with caplog.at_level(logging.INFO, "superoffload"):
        assert isinstance(loss_kernel.choose("auto", make_engine(tiny("llama")), PADDED), PlainLoss)
    assert "no kernel for this device" in caplog.text


def test_parameters_between_the_model_and_its_head_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = Wrapped(lambda logits: logits)
    model.inner.scale = torch.nn.Parameter(torch.ones(1))
    with caplog.at_level(logging.INFO, "superoffload"):
        assert isinstance(loss_kernel.choose("auto", make_engine(model), PADDED), PlainLoss)
    assert "its output layer lies in inner, which has parameters of its own" in caplog.text


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    engine = make_engine(tiny("llama"))
    batch = collate([[DOCUMENTS[0]]], 1, PADDED)
    batch.inputs["labels"][0, 2] = 64
    with pytest.raises(IndexError, match="a label is outside the vocabulary of 64"):
        ChunkedLoss(Transform())(engine, batch)


def test_a_head_that_is_called_twice_is_an_error() -> None:
    model = tiny("llama")
    forward = model.forward

    def twice(**inputs: Any) -> Any:
        forward(**inputs)
        return forward(**inputs)

    model.forward = twice
    with pytest.raises(RuntimeError, match="called its output layer 2 times; use --loss_kernel plain"):
        ChunkedLoss(Transform())(make_engine(model), collate([[DOCUMENTS[0]]], 1, PADDED))
