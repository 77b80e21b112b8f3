"""How many parameters DeepSpeed keeps gathered, predicted and measured, with its limits made as small as the models."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from superoffload.planning.budget import shape
from superoffload.planning.budget.device import held_elements
from tests.benchmarks.plan_device import PLAIN
from tests.helpers import gathered
from tests.helpers.models import make_model
from tests.helpers.ranks import run_ranks

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "vocab_size": 512}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A small model, and DeepSpeed's limits, in elements."""

    kind: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict)
    max_live: int = 60_000
    prefetch: int = 5_000
    reuse: int = 60_000
    recompute: bool = True
    offload_params: bool = False


SEVERAL = [
    Setting(),
    Setting(reuse=300_000, recompute=False),  # the last layers stay until backward
    Setting(max_live=10_000, reuse=0),  # nothing is fetched ahead
    Setting(kind="qwen3_moe", changes=EXPERTS, max_live=160_000, reuse=160_000),
]
ALONE = [Setting(offload_params=True, changes={"vocab_size": 64}, reuse=0)]


def measure(settings: list[Setting]) -> list[int]:
    """Measure each setting (collective)."""
    found = []
    for setting in settings:
        zero: dict[str, Any] = {
            "stage3_max_live_parameters": setting.max_live,
            "stage3_prefetch_bucket_size": setting.prefetch,
            "stage3_max_reuse_distance": setting.reuse,
            "offload_param": {"device": "cpu" if setting.offload_params else "none"},
        }
        found.append(gathered.measure(setting.kind, {**SIZES, **setting.changes}, zero, setting.recompute))
    return found


def predict(setting: Setting, ranks: int) -> int:
    found = shape.of_model(setting.kind, make_model(setting.kind, **{**SIZES, **setting.changes}))
    job = replace(
        PLAIN, ranks=ranks, max_live=setting.max_live, prefetch=setting.prefetch, reuse=setting.reuse,
        recompute=setting.recompute, offload_params=setting.offload_params,
    )  # fmt: skip
    return held_elements(found, job)


@pytest.mark.parametrize(("ranks", "settings"), [(2, SEVERAL), (1, ALONE)], ids=["two ranks", "weights on the host"])
def test_no_more_is_gathered_than_predicted_and_not_much_less(ranks: int, settings: list[Setting]) -> None:
    for found in run_ranks(ranks, measure, settings):
        for setting, measured in zip(settings, found, strict=True):
            predicted = predict(setting, ranks)
            assert measured <= predicted <= 1.15 * measured, (setting, measured, predicted)
