"""FLOPs by hand, and compared with those that torch counts."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from superoffload.model import architecture, tiled_mlp
from superoffload.model.flops import (
    ModelShape,
    causal_pairs,
    count_parameters,
    hardware_flops,
    model_flops,
    numel,
    setting,
    shape_of,
    tiled_parameters,
)
from tests.helpers.families import FAMILIES
from tests.helpers.models import SIZES, make_model

pytestmark = pytest.mark.unit


def test_pairs_under_a_causal_mask() -> None:
    assert causal_pairs(10) == 50
    assert causal_pairs(10, window=100) == 50
    assert causal_pairs(10, window=4) == 8 + 24


def test_formula_by_hand() -> None:
    shape = ModelShape(active_parameters=1000, attention_width=16, attention_windows=(0, 0))
    assert model_flops(shape, [10]) == 6 * 1000 * 10 + 2 * 12 * 16 * 50
    assert model_flops(shape, [10, 10]) == 2 * model_flops(shape, [10])
    assert hardware_flops(6.0, recomputed=True) == 8.0
    assert hardware_flops(6.0, recomputed=False) == 6.0
    assert hardware_flops(6.0, recomputed=False, tiles=1.5) == 7.5
    assert hardware_flops(6.0, recomputed=True, tiles=1.5) == 8.0  # the MLP is among what is recomputed


def test_the_formula_agrees_with_counted_flops_of_a_real_model() -> None:
    llama = make_model("llama", "float32")
    llama.set_attn_implementation("eager")
    length = 64
    ids = torch.zeros((1, length), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        llama(ids, attention_mask=None).logits.sum().backward()
    shape = shape_of(llama)
    # The eager kernel multiplies every pair of a row, masked or not: twice the causal half.
    causal = model_flops(shape, [length]) - 6 * shape.active_parameters * length
    expected = model_flops(shape, [length]) + causal
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_the_parameters_of_tiled_mlps() -> None:
    for kind, changes in (("llama", {}), ("qwen3_moe", FAMILIES["qwen3_moe"])):
        model = make_model(kind, "float32", **changes)
        assert tiled_parameters(model) == 0
        for layer in model.model.layers:
            tiled_mlp._tile(layer.mlp, 5)
        parameters = {name: p.numel() for name, p in model.named_parameters() if ".mlp." in name}
        share = model.config.num_experts_per_tok / model.config.num_experts if kind == "qwen3_moe" else 1.0
        assert tiled_parameters(model) == sum(
            numel * (share if ".experts." in name else 1) for name, numel in parameters.items()
        )


def test_experts_count_in_proportion_to_the_experts_per_token() -> None:
    changes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    sparse = make_model("qwen3_moe", "float32", **changes)
    experts = sum(p.numel() for name, p in sparse.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for p in sparse.parameters()) - experts - sparse.get_input_embeddings().weight.numel()
    assert experts > 0
    assert shape_of(sparse).active_parameters == rest + experts // 4


def test_tied_embeddings_count_once() -> None:
    tied = make_model("llama", "float32", tie_word_embeddings=True)
    total = sum(p.numel() for p in tied.parameters())
    assert shape_of(tied).active_parameters == count_parameters(tied) == total
    embedding = tied.get_input_embeddings().weight.numel()
    assert count_parameters(make_model("llama", "float32")) == total + embedding


def test_a_partitioned_parameter_has_all_its_elements() -> None:
    whole, partitioned = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.empty(0))
    partitioned.ds_numel = 12  # type: ignore[attr-defined]  # set by DeepSpeed
    assert (numel(whole), numel(partitioned)) == (6, 12)


def test_sliding_windows_are_read() -> None:
    windowed = make_model("gpt_oss", "float32", num_local_experts=4, num_experts_per_tok=2, head_dim=8,
                          sliding_window=16, layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    assert shape_of(windowed).attention_windows == (16, 0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_can_be_counted(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = architecture.empty_model(transformers.AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind]}))
    shape = shape_of(model)
    assert "FLOPs" not in caplog.text
    assert 0 < shape.active_parameters <= count_parameters(model)
    attending = {"mamba": 0, "mamba2": 0, "bamba": 1, "granitemoehybrid": 1, "jamba": 1, "qwen3_next": 1, "lfm2": 1,
                 "recurrent_gemma": 1}  # fmt: skip
    assert len(shape.attention_windows) == attending.get(kind, 2)
    assert model_flops(shape, [10, 20]) > 0


def test_a_model_that_says_nothing_is_counted_by_its_parameters(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama", "float32")
    model.config.num_experts_per_tok = model.config.num_experts = [4, 4]
    shape = shape_of(model)
    assert shape == ModelShape(
        active_parameters=count_parameters(model), attention_width=0, attention_windows=()
    )  # fmt: skip
    assert "FLOPs count every parameter" in caplog.text


def test_a_setting_in_which_layers_differ_is_the_largest_of_them() -> None:
    class Mixed:
        """As transformers reads the configuration of Gemma 4."""

        per_layer_config = (SimpleNamespace(head_dim=8), SimpleNamespace(head_dim=16))
        layers = 2

        @property
        def head_dim(self) -> int:
            raise RuntimeError("'head_dim' is a per-layer attribute and may vary across layers")

    assert [setting(Mixed(), name) for name in ("head_dim", "layers", "heads")] == [16, 2, None]
