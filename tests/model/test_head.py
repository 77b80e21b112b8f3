"""The summed loss."""

import pytest
import torch

from superoffload.model.head import summed_loss
from tests.helpers.models import make_model

pytestmark = pytest.mark.unit


def test_equals_the_loss_that_transformers_computes() -> None:
    llama = make_model("llama", "float32")
    ids = torch.randint(0, 264, (2, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, 9:] = -100
    theirs = llama(input_ids=ids, labels=labels).loss
    targets = int((labels[:, 1:] != -100).sum())
    ours = summed_loss(llama(input_ids=ids).logits, labels)
    assert ours.item() == pytest.approx(theirs.item() * targets, rel=1e-6)


def test_without_targets_loss_and_gradient_are_zero() -> None:
    logits = torch.randn((1, 4, 8), requires_grad=True)
    loss = summed_loss(logits, torch.full((1, 4), -100))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_bf16_logits_are_summed_in_float32() -> None:
    logits = torch.randn((1, 64, 32)).bfloat16()
    labels = torch.randint(0, 32, (1, 64))
    loss = summed_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(summed_loss(logits.float(), labels)))
