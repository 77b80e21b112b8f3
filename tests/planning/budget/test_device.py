"""The arithmetic of device memory: DeepSpeed's sub-groups, a calculation by hand, steps counted on the meta device."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from superoffload.model import head
from superoffload.planning.budget import activations, memory, shape
from superoffload.planning.budget.device import (
    device_bytes,
    gathered_elements,
    held_elements,
    moments,
    on_device,
    sub_groups,
)
from tests.benchmarks import plan_device
from tests.benchmarks.plan_device import GIB, PLAIN, Case
from tests.helpers import builtin_shapes

pytestmark = pytest.mark.unit

LLAMA = shape.built_in("llama-8b")


def peak(model: shape.Shape = LLAMA, **changes: Any) -> int:
    return sum(device_bytes(model, replace(PLAIN, **changes)).values())


@pytest.mark.parametrize("recompute", [True, False])
def test_ranks_that_share_rows_divide_their_activations(recompute: bool) -> None:
    plain = replace(PLAIN, ranks=4, recompute=recompute)
    whole, shared = (device_bytes(LLAMA, replace(plain, parts=parts)) for parts in (1, 4))
    twice = 0 if recompute else 2 * 4096 * 32 * plain.tokens  # the result of attention in every layer
    assert shared["activations"] == (whole["activations"] + twice) / 4
    assert shared["working"] < whole["working"]
    assert {name: size for name, size in shared.items() if name not in ("activations", "working", "other")} == {
        name: size for name, size in whole.items() if name not in ("activations", "working", "other")
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", [100, 1000, 10**6])
def test_sub_groups_are_those_of_deepspeed(ranks: int, size: int) -> None:
    groups = ((300, 40, 700, 55, 1, 999, 1000, 12, 88), (5, 5, 5))
    theirs = []
    for group in groups:
        params = [SimpleNamespace(partition_numel=lambda numel=numel: -(-numel // ranks)) for numel in group]
        zero = SimpleNamespace(sub_group_size=size)
        for sub_group in DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups(zero, params):
            theirs.append(sum(param.partition_numel() for param in sub_group))
    model, job = replace(LLAMA, groups=groups), replace(PLAIN, ranks=ranks, sub_group=size)
    assert list(sub_groups(model, job)) == theirs
    assert list(on_device(model, replace(job, ratio=0.0))) == theirs
    assert list(on_device(model, replace(job, ratio=0.5))) == theirs[: len(theirs) // 2]
    assert list(on_device(model, job)) == []


def test_llama_8b_by_hand() -> None:
    """4 packs of 4096 tokens; 3 of 19 sub-groups on the device, the first of which is the embedding alone."""
    job = replace(PLAIN, ratio=0.8)
    parts = device_bytes(LLAMA, job)
    tokens, embedding, matrix = 4 * 4096, 128256 * 4096, 4096 * 14336
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * matrix
    kept = 16 * 4096 + 4 * (4096 + 1024) + 4 * 32 + 8 * 14336
    assert parts["weights"] == 2 * 8_030_261_248
    assert parts["optimizer"] == 16 * (embedding + 4 * layer)
    assert parts["bucket"] == 800_000_000
    assert parts["gathered"] == 0
    assert parts["activations"] == 4 * GIB
    assert activations.kept_bytes(LLAMA, job) == kept
    assert moments(LLAMA, job)["layer"] == tokens * (kept + 2 * 4096 + 4 * 14336)
    assert parts["working"] == max(moments(LLAMA, job).values())
    assert parts["other"] == int(0.05 * (sum(parts.values()) - parts["other"])) + GIB
    assert device_bytes(LLAMA, replace(job, bf16_state=True))["optimizer"] == parts["optimizer"] // 2


@pytest.mark.parametrize(
    ("change", "at_least"),
    [
        ({"batch": 8}, 6 * GIB),
        ({"length": 8192}, 6 * GIB),
        ({"ratio": 0.7}, 10 * GIB),
        ({"recompute": False}, 40 * GIB),
        ({"chunked_loss": False}, 15 * GIB),
        ({"eager": True}, 20 * GIB),
        ({"packed": False}, GIB // 4),
        ({"bucket": 8 * 10**8}, GIB),
    ],
)
def test_more_of_anything_takes_more(change: dict[str, Any], at_least: int) -> None:
    assert peak(**change) - peak() > at_least


@pytest.mark.parametrize(
    "change", [{"ranks": 2}, {"offload_params": True}, {"batch": 1}, {"ratio": 1.0}, {"bf16_state": True, "ratio": 0.5}]
)
def test_less_takes_less(change: dict[str, Any]) -> None:
    assert peak(**change) < peak(ratio=0.5)


def test_accumulation_takes_no_buffer_on_the_device() -> None:
    """The sums are on the host; one parameter's is copied to the device and back."""
    assert 0 <= peak(accumulation=2) - peak() <= int(1.05 * 6 * LLAMA.largest)
    assert peak(accumulation=8) == peak(accumulation=2) == peak(mode="zerooffload")


def test_frozen_parameters_are_weights_and_nothing_else() -> None:
    more = {
        key: device_bytes(replace(LLAMA, frozen=10**9), replace(PLAIN, ratio=0.8))[key] - size
        for key, size in device_bytes(LLAMA, replace(PLAIN, ratio=0.8)).items()
    }
    assert {key for key, size in more.items() if size} == {"weights", "other"}
    assert more["weights"] == 2 * 10**9


def test_what_is_gathered() -> None:
    large, sparse = shape.built_in("llama-70b"), shape.built_in("qwen3-30b-a3b")
    assert held_elements(large, PLAIN) == gathered_elements(large, PLAIN) == 0
    two = replace(PLAIN, ranks=2)
    assert held_elements(large, two) == 10**9 + large.head
    assert held_elements(LLAMA, replace(two, max_live=10**10)) == LLAMA.parameters
    # 50 million elements fetched ahead together, of which the last is a matrix of the MLP, are there twice.
    assert gathered_elements(large, two) == 10**9 + large.head + 50_000_000 + 8192 * 28672
    # One rank copies each parameter from the host to its place.
    alone = replace(PLAIN, offload_params=True)
    assert gathered_elements(large, alone) == held_elements(large, alone) == 10**9 + large.head
    assert device_bytes(large, alone)["weights"] == 0
    assert gathered_elements(sparse, two) == 10**9 + sparse.largest + sparse.unit
    # The head, and layers with less than 7 of them between forward and backward: 3 passes of 2 layers.
    few = replace(two, prefetch=0, reuse=2 * large.head + 3 * large.layer + 1)
    assert gathered_elements(large, few) == large.head + 2 * large.layer


def test_a_tile_has_the_size_of_the_loss_kernel() -> None:
    assert activations.TILE == head.TILE


COUNTED = [
    Case(model="llama-8b", layers=1, changes={"batch": 4}),
    Case(model="llama-1b", layers=2, changes={"length": 2048, "recompute": False}),
    Case(model="qwen3-4b", layers=1, changes={"chunked_loss": False, "length": 1024}),
    Case(model="mistral-7b", layers=1, changes={"packed": False}),
    Case(model="llama-8b", layers=8, changes={"offload_activations": True, "batch": 1, "length": 65536}),
    Case(model="phi-4", layers=2, changes={"eager": True, "length": 512}),
    Case(model="qwen3-30b-a3b", layers=1, changes={"batch": 2}),
    Case(model="seed-oss-36b", layers=4, changes={"batch": 2}),  # its bucket is full where a layer holds the most
    Case(model="gpt-oss-20b", layers=2, changes={"length": 1024, "eager": True, "bucket": 800_000_000}),
    Case(model="llama-3b", layers=2, changes={"batch": 1, "length": 32768, "tiled": "auto"}),
    Case(model="mixtral-8x7b", layers=1, changes={"batch": 1, "length": 32768, "tiled": 32}),
]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.model)
def test_prediction_and_count_agree(case: Case) -> None:
    row = plan_device.measure(case)
    assert abs(row.error) <= 0.1, row


def test_the_results_are_those_of_this_code_and_within_ten_percent() -> None:
    rows = [plan_device.Row(**row) for row in json.loads((plan_device.RESULTS / "plan_device.json").read_text())]
    assert [(row.model, row.layers) for row in rows] == [(case.model, case.layers) for case in plan_device.CASES]
    assert [row.predicted for row in rows] == [plan_device.predict(case) for case in plan_device.CASES]
    assert max(abs(row.error) for row in rows) <= 0.1


@pytest.mark.parametrize("offload_params", [True, False])
@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (4, 4), (8, 4)])
def test_deepspeeds_own_estimate(offload_params: bool, ranks: int, per_node: int) -> None:
    host, device, _ = stage3.estimate_zero3_model_states_mem_needs(
        LLAMA.parameters, LLAMA.unit, per_node, ranks // per_node, cpu_offload_params=offload_params
    )
    job = replace(PLAIN, ranks=ranks, ranks_per_node=per_node, offload_params=offload_params)
    assert memory.deepspeed_estimate(LLAMA, job) == {"device": device, "host": host}


@pytest.mark.parametrize("name", ["llama-8b", "qwen3-30b-a3b"])
def test_deepspeeds_largest_layer_is_our_unit(name: str) -> None:
    _, layer = stage3.model_to_params(builtin_shapes.skeleton(name))
    assert layer == pytest.approx(shape.built_in(name).unit, rel=1e-3)  # it leaves out the router of a block
