"""`--freeze`: which parameters are left out of training, and what that changes in FLOPs and memory."""

import logging
from pathlib import Path
from typing import Any

import pytest

from superoffload.errors import UserError
from superoffload.model import freezing
from superoffload.model.flops import count_parameters, shape_of
from superoffload.planning.budget import shape
from tests.helpers.models import make_model, write_model

pytestmark = pytest.mark.unit


def frozen_by(*patterns: str, **changes: Any) -> tuple[Any, frozenset[str]]:
    model = make_model("llama", **changes)
    return model, freezing.freeze(model, patterns)


def test_names_that_a_pattern_finds_are_frozen() -> None:
    model, frozen = frozen_by("embed_tokens", r"layers\.0\.")
    assert frozen == {name for name, _ in model.named_parameters() if "embed" in name or "layers.0." in name}
    assert len(frozen) > 5
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert frozen_by()[1] == frozenset()


def test_a_pattern_that_finds_nothing_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^--freeze lm_haed.weight: no parameter has such a name; did you mean lm_head"
    ):
        frozen_by("embed_tokens", "lm_haed.weight")
    with pytest.raises(
        UserError, match=r"^--freeze \^wte: no parameter has such a name; one is model.embed_tokens.wei"
    ):
        frozen_by("^wte")


def test_something_must_be_left_to_train() -> None:
    with pytest.raises(UserError, match=r"^--freeze \.: leaves nothing to train"):
        frozen_by(".")


def test_a_tied_parameter_has_two_names(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("superoffload"), "propagate", True)
    caplog.set_level(logging.INFO)
    model, frozen = frozen_by("lm_head", tie_word_embeddings=True)
    assert frozen == {"model.embed_tokens.weight"}
    assert not model.lm_head.weight.requires_grad
    assert "model.embed_tokens.weight and lm_head.weight are one tied parameter" in caplog.text


def test_the_numbers_of_both_are_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("superoffload"), "propagate", True)
    caplog.set_level(logging.INFO)
    model = make_model("llama")
    total = count_parameters(model)
    freezing.apply(model, ["lm_head.weight"])
    assert f"8,448 parameters in 1 tensors are frozen, {total - 8448:,} are trained" in caplog.text
    assert not model.lm_head.weight.requires_grad


def test_flops_of_frozen_parameters() -> None:
    """Forward is a third of a trained parameter's work, and its two gradients a third each."""
    whole = shape_of(make_model("llama")).active_parameters
    model, frozen = frozen_by("lm_head")
    head = model.lm_head.weight.numel()
    assert shape_of(model, frozen).active_parameters == int(whole - head / 3)
    model, frozen = frozen_by("embed_tokens", "layers")
    layers = sum(p.numel() for name, p in model.named_parameters() if "layers" in name)
    assert shape_of(model, frozen).active_parameters == int(whole - layers * 2 / 3)


def test_a_plan_counts_what_is_frozen(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    whole, part = shape.load(str(tmp_path)), shape.load(str(tmp_path), freeze=("embed_tokens", "layers"))
    assert part.parameters == whole.parameters
    assert part.frozen > 0 and part.trained == whole.trained - part.frozen
    assert (part.layers, part.layer, part.unit, part.head) == (whole.layers, whole.layer, whole.unit, whole.head)
    assert part.flops.active_parameters < whole.flops.active_parameters
