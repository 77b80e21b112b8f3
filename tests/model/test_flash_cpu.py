"""Attention to packs on the CPU by torch's flash kernel, compared with sdpa for each document alone."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from superoffload.model import attention, flash_cpu

pytestmark = pytest.mark.unit

MIXED = (40, 1, 23, 300, 7, 16)  # the longest is above FLOAT32_LENGTH, the last is padding
CASES: dict[str, tuple[tuple[int, ...], int, int | None]] = {  # lengths, heads of key and value, window
    "mixed": (MIXED, 4, None),
    "fewer heads of key and value": (MIXED, 2, None),
    "window": (MIXED, 4, 9),
    "fewer heads, window": (MIXED, 1, 9),
    "one document": ((50,), 2, None),
    "one position": ((1,), 2, None),
}


def states(lengths: tuple[int, ...], heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Make query, key and value in the layout of a model: heads lie within positions."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), count, 16) for count in (4, heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def results(attend: Any, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output and the gradients of query, key and value."""
    output = attend(given)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, given, weights)]


def by_sdpa(lengths: tuple[int, ...], window: int | None, scale: float | None, **options: Any) -> Any:
    def attend(given: list[torch.Tensor]) -> torch.Tensor:
        module = torch.nn.Module()
        module.num_key_value_groups = given[0].shape[1] // given[1].shape[1]  # type: ignore[assignment]
        given_options = {"document_lengths": lengths, "sliding_window": window, "scaling": scale, **options}
        output: torch.Tensor = attention.attend(module, *given, None, **given_options)[0]
        return output

    return attend


@pytest.fixture
def only_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_cpu, "_has_amx", lambda: True)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("lengths", "heads", "window"), CASES.values(), ids=CASES.keys())
def test_float32_equals_sdpa(lengths: tuple[int, ...], heads: int, window: int | None, scale: float | None) -> None:
    given = states(lengths, heads, torch.float32)
    found = results(lambda given: flash_cpu.attend(given, lengths, window, scale), given)
    expected = results(by_sdpa(lengths, window, scale), given)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("lengths", "heads", "window"), CASES.values(), ids=CASES.keys())
def test_bf16_outputs_are_those_of_sdpa_and_gradients_are_closer_to_the_truth(
    lengths: tuple[int, ...], heads: int, window: int | None, only_sdpa: None
) -> None:
    given = states(lengths, heads, torch.bfloat16)
    found = results(lambda given: flash_cpu.attend(given, lengths, window, None), given)
    theirs = results(by_sdpa(lengths, window, None), given)
    assert torch.equal(found[0], theirs[0])
    exact = results(by_sdpa(lengths, window, None), [state.detach().double().requires_grad_() for state in given])
    for mine, other, truth in zip(found[1:], theirs[1:], exact[1:], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - truth).norm() <= 1.05 * (other - truth).norm() + 1e-9


def test_without_float32_the_gradients_are_those_of_sdpa(monkeypatch: pytest.MonkeyPatch, only_sdpa: None) -> None:
    monkeypatch.setattr(flash_cpu, "FLOAT32_LENGTH", 0)
    given = states(MIXED, 2, torch.bfloat16)
    found = results(lambda given: flash_cpu.attend(given, MIXED, 9, None), given)
    for mine, theirs in zip(found, results(by_sdpa(MIXED, 9, None), given), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-2)  # sdpa repeats key and value if there is a mask


def test_results_repeat() -> None:
    given = states(MIXED, 2, torch.bfloat16)
    first, second = (results(by_sdpa(MIXED, None, None), given) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_goes_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only plain causal attention in bf16 on a CPU without AMX takes the kernel directly."""
    taken: list[tuple[int, ...]] = []

    def watched(given: list[torch.Tensor], lengths: tuple[int, ...], *_: Any) -> torch.Tensor:
        taken.append(lengths)
        return given[0].transpose(1, 2)

    def takes(given: list[torch.Tensor], **options: Any) -> bool:
        taken.clear()
        by_sdpa((5, 3), None, None, **options)(given)
        return bool(taken)

    monkeypatch.setattr(flash_cpu, "attend", watched)
    monkeypatch.setattr(flash_cpu, "_has_amx", lambda: False)
    given = states((5, 3), 2, torch.bfloat16)
    assert takes(given)
    assert not takes(given, dropout=0.5)
    assert not takes(given, is_causal=False)
    assert not takes([given[0], given[1], given[2][..., :8]])
    assert not takes(states((5, 3), 2, torch.float32))
    monkeypatch.setattr(flash_cpu, "_has_amx", lambda: True)
    assert not takes(given)
    monkeypatch.setattr(flash_cpu, "_has_amx", lambda: False)
    spread = torch.zeros(1, 2, 8, 32, dtype=torch.bfloat16)[..., ::2]  # the kernel would read what lies between
    assert not takes([given[0], spread, given[2]])


@pytest.mark.parametrize("amx", [True, False])
def test_empty_documents_change_nothing(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    monkeypatch.setattr(flash_cpu, "_has_amx", lambda: amx)
    given = states((20, 33), 2, torch.bfloat16)
    found = results(by_sdpa((0, 20, 0, 0, 33, 0), 9, None), given)
    expected = results(by_sdpa((20, 33), 9, None), given)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", flash_cpu.KNOWN)
@pytest.mark.parametrize("what", ["operator", "arguments"])
def test_without_torchs_operators_as_they_are_known_sdpa_is_used(
    monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.setattr(flash_cpu, "_has_amx", lambda: False)
    given = states((5, 3), 2, torch.bfloat16)
    flash_cpu._has_known_operators.cache_clear()
    assert flash_cpu.suits(*given)
    arguments, results_ = flash_cpu.KNOWN[name]
    changed = {"missing": (arguments, results_)} if what == "operator" else {name: (arguments[:-1], results_)}
    monkeypatch.setattr(flash_cpu, "KNOWN", changed)
    flash_cpu._has_known_operators.cache_clear()
    assert not flash_cpu.suits(*given)
    flash_cpu._has_known_operators.cache_clear()


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_in_backward_the_gradients_are_the_same(reentrant: bool) -> None:
    def attend(*given: torch.Tensor) -> torch.Tensor:
        return flash_cpu.attend(given, MIXED, 9, None)

    found = []
    for recompute in (True, False):
        given = states(MIXED, 2, torch.bfloat16)
        output = checkpoint(attend, *given, use_reentrant=reentrant) if recompute else attend(*given)
        output.sum().backward()  # the gradient of the output has strides of 0
        found.append([output.detach(), *(state.grad for state in given)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_second_derivative_is_refused() -> None:
    given = states((5, 3), 2, torch.bfloat16)
    output = flash_cpu.attend(given, (5, 3), None, None)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(output.sum(), given, create_graph=True)
