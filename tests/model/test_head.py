"""The loss: summed from logits, and computed tile by tile inside the output head."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from superoffload.model import head
from superoffload.model.head import Objective, Transform, summed_loss, token_losses
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


IDENTITY = Transform()


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: Transform = IDENTITY,
) -> torch.Tensor:
    """Return the losses from whole logits, transformed in their own type as transformers' models do."""
    logits = functional.linear(hidden, weight, bias)
    if transform.softcap is None:
        logits = logits * transform.scale
    else:
        logits = torch.tanh(logits * (transform.scale / transform.softcap)) * transform.softcap
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits, targets, reduction="none")


Tensors = list[torch.Tensor]
FACTOR = 3 / 1021  # what the losses are multiplied with before backward


def results(kernel: Callable[..., torch.Tensor], dtype: torch.dtype, inputs: Tensors, *arguments: Any) -> Tensors:
    """Return the losses and the gradients of hidden states, weight and bias, if there is one, all in float64."""
    leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in inputs]
    hidden, weight, bias = (*leaves, None)[:3]
    losses = kernel(hidden, weight, bias, *arguments)
    (losses.sum() * FACTOR).backward()  # type: ignore[no-untyped-call]
    return [losses.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]


def make_inputs(dtype: torch.dtype, spread: float, *, bias: bool, count: int = 200) -> tuple[Tensors, torch.Tensor]:
    """Make hidden states, weight and bias, and targets; `spread` is about the spread of the logits."""
    torch.manual_seed(0)
    width, vocabulary = 64, 1500
    shapes = [(count, width), (vocabulary, width), (vocabulary,)][: 3 if bias else 2]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[1] *= spread / width**0.5
    return [tensor.to(dtype) for tensor in tensors], torch.randint(vocabulary, (count,))


@pytest.mark.parametrize("tile", [1, 40_000, 10**9], ids=["many tiles", "some tiles", "one tile"])
@pytest.mark.parametrize(
    "transform", [Transform(), Transform(0.125), Transform(1.0, 5.0)], ids=["", "scale", "softcap"]
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("spread", [0.2, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_float64_than_the_plain_loss(
    dtype: torch.dtype, spread: float, bias: bool, transform: Transform, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "TILE", tile)
    inputs, targets = make_inputs(dtype, spread, bias=bias)
    exact = results(plain, torch.float64, inputs, targets, transform)
    for ours, theirs, reference in zip(
        results(token_losses, dtype, inputs, targets, transform),
        results(plain, dtype, inputs, targets, transform),
        exact,
        strict=True,
    ):
        assert len(exact) == 3 + bias
        size = float(reference.norm())
        error, plain_error = float((ours - reference).norm()) / size, float((theirs - reference).norm()) / size
        # Sums in another order differ by a few roundings of float32, which says nothing.
        assert error <= 1.1 * plain_error + 5e-8
        assert error < (1e-6 if dtype == torch.float32 else 2e-2)


def test_a_confident_model_loses_no_digits() -> None:
    """A loss of 1e-6 is the difference of two numbers near 40 only if one subtracts them."""
    hidden, weight = torch.eye(4), torch.eye(4) * torch.tensor([40.0, 14.0, 30.0, 5.0])
    inputs, targets = [hidden, weight], torch.arange(4)
    for ours, exact in zip(
        results(token_losses, torch.float32, inputs, targets),
        results(plain, torch.float64, inputs, targets),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=2e-2, atol=1e-10)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_target_and_one_target(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TILE", 500)
    inputs, targets = make_inputs(dtype, 1.0, bias=True, count=count)
    losses, *gradients = results(token_losses, dtype, inputs, targets)
    assert losses.shape == (count,)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in inputs]
    assert all(bool(gradient.abs().sum() > 0) == bool(count) for gradient in gradients if gradient.numel())


def test_frozen_weights_get_no_gradient() -> None:
    (hidden, weight, bias), targets = make_inputs(torch.float32, 1.0, bias=True)
    hidden.requires_grad_()
    token_losses(hidden, weight, bias, targets).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is None and bias.grad is None
    hidden.requires_grad_(False)
    weight.requires_grad_()
    token_losses(hidden, weight, bias, targets).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and bias.grad is None


class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the largest tensor that any operator returns, by dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in [result] if torch.is_tensor(result) else []:
            self.largest[tensor.dtype] = max(self.largest.get(tensor.dtype, 0), tensor.numel())
        return result


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TILE", 60_000)
    (hidden, weight), targets = make_inputs(torch.bfloat16, 1.0, bias=False)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Sizes() as sizes:
        token_losses(hidden, weight, None, targets).sum().backward()  # type: ignore[no-untyped-call]
    assert len(targets) * len(weight) == 300_000
    assert sizes.largest[torch.float32] <= 60_000
    assert sizes.largest[torch.bfloat16] == weight.numel()


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of the tensors that operators return, for as long as they live."""

    def __init__(self, *known: torch.Tensor) -> None:
        """Start with tensors that do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in [result] if torch.is_tensor(result) else []:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        return result

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def test_the_peak_for_a_model_of_8b_on_a_device() -> None:
    """16,384 targets and the head of Llama 3.1 8B; the meta device takes the path of CUDA."""
    hidden = torch.empty((16384, 4096), dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty((128256, 4096), dtype=torch.bfloat16, device="meta", requires_grad=True)
    targets = torch.empty(16384, dtype=torch.int64, device="meta")
    with LiveBytes(hidden, weight, targets) as live:
        states = hidden.index_select(0, targets)
        token_losses(states, weight, None, targets).sum().backward()  # type: ignore[no-untyped-call]
    assert live.peak > weight.nbytes + states.nbytes  # the gradient of the weight, and the states of the targets
    assert live.peak <= 1.5 * 2**30


def test_a_tile_may_hold_nothing_but_minus_infinity() -> None:
    (hidden, weight, bias), targets = make_inputs(torch.float32, 1.0, bias=True)
    bias[: head.MULTIPLE] = -torch.inf
    targets = targets.clamp(min=head.MULTIPLE)
    losses = token_losses(hidden, weight, bias, targets, tile=1)
    assert losses.isfinite().all()
    torch.testing.assert_close(losses, functional.cross_entropy(hidden @ weight.t() + bias, targets, reduction="none"))


def smoothed(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: Transform,
    share: float,
) -> torch.Tensor:
    """Return the losses of transformers' LabelSmoother (trainer_pt_utils.py), for each token."""
    logits = functional.linear(hidden, weight, bias) * transform.scale
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    negative = -logits.log_softmax(dim=-1)
    return (1 - share) * negative.gather(1, targets[:, None]).squeeze(1) + share * negative.mean(dim=-1)


@pytest.mark.parametrize("tile", [2000, 10**9], ids=["tiles", "one tile"])
@pytest.mark.parametrize("transform", [Transform(), Transform(0.125), Transform(0.5, 5.0)], ids=["", "scale", "cap"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("objective", [Objective(label_smoothing=0.3), Objective(dft=True)], ids=["smoothing", "dft"])
def test_objectives_have_the_loss_and_gradients_of_their_formula(
    objective: Objective, bias: bool, transform: Transform, tile: int
) -> None:
    """In float64 by autograd: smoothing as in transformers, DFT as -sg(p) log p (arXiv:2508.05629, equation 9)."""
    inputs, targets = make_inputs(torch.float32, 1.0, bias=bias)
    incoming = torch.linspace(0.5, 2.0, len(targets))

    def of_formula(tensors: list[torch.Tensor]) -> torch.Tensor:
        hidden, weight, *rest = tensors
        losses = smoothed(hidden, weight, rest[0] if rest else None, targets, transform, objective.label_smoothing)
        return (-losses).exp().detach() * losses if objective.dft else losses

    def of_kernel(tensors: list[torch.Tensor]) -> torch.Tensor:
        hidden, weight, *rest = tensors
        share = objective.label_smoothing
        return objective.weighted(
            token_losses(hidden, weight, rest[0] if rest else None, targets, transform, tile, label_smoothing=share)
        )

    def run(function: Callable[[list[torch.Tensor]], torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        losses = function(tensors)
        return [losses.detach(), *torch.autograd.grad((losses * incoming.to(dtype)).sum(), tensors)]

    for ours, exact in zip(run(of_kernel, torch.float32), run(of_formula, torch.float64), strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 2e-6


def test_objectives_of_the_plain_sum_are_those_of_transformers_and_of_the_formula() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = torch.randn(2, 9, 40), torch.randint(0, 40, (2, 9))
    labels[0, :4] = -100
    targets = int((labels[:, 1:] != -100).sum())
    theirs = LabelSmoother(epsilon=0.2)({"logits": logits}, labels, shift_labels=True)
    assert float(summed_loss(logits, labels, 0.2)) == pytest.approx(float(theirs) * targets, rel=1e-5)
    assert Objective(dft=True).weighted(torch.tensor([0.0, 2.0])).tolist() == pytest.approx([0, 2 * 0.1353353])
