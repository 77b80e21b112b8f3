"""Each recipe fits the device that it is meant for, by the arithmetic of tests/benchmarks/device_budget.py."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from tests.benchmarks import device_budget
from tests.benchmarks.device_budget import DEVICE_BYTES, GIB, SHAPES, Model, Recipe, budget, device_sub_groups
from tests.helpers import documents
from tests.helpers.ranks import REPOSITORY
from tests.helpers.recipes import RECIPES

pytestmark = pytest.mark.unit

PARAMETERS = {
    "llama-8b": 8_030_261_248,
    "phi-4": 14_659_507_200,
    "qwen3-14b": 14_768_307_200,
    "gpt-oss-20b": 20_914_757_184,
    "qwen3-30b-a3b": 30_532_122_624,
    "seed-oss-36b": 36_151_104_512,
    "llama-70b": 70_553_706_496,
}
UPSTREAM = {name: 0.8 if name == "llama-8b" else 0.9 for name in RECIPES}


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: device_budget.make_model(name) for name in SHAPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_and_keeps_upstreams_ratio_if_that_fits(name: str, models: dict[str, Model]) -> None:
    recipe, model = device_budget.read_recipe(name), models[name]
    assert model.parameters == PARAMETERS[name]
    assert budget(model, recipe)["sum"] <= DEVICE_BYTES
    at_upstreams_ratio = budget(model, replace(recipe, ratio=UPSTREAM[name]))["sum"]
    assert (at_upstreams_ratio <= DEVICE_BYTES) == (recipe.ratio == UPSTREAM[name])


def test_llama_8b_by_hand(models: dict[str, Model]) -> None:
    """4 packs of 4096 tokens; 3 of 19 sub-groups on the device, the first of which is the embedding alone."""
    parts = {
        key: value / GIB for key, value in budget(models["llama-8b"], device_budget.read_recipe("llama-8b")).items()
    }
    embedding, layer = 128256 * 4096, 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336
    assert parts["weights"] == pytest.approx(2 * PARAMETERS["llama-8b"] / GIB)
    assert parts["optimizer"] == pytest.approx(16 * (embedding + 4 * layer) / GIB, rel=0.02)
    assert parts["checkpoints"] == 4.0
    assert 4.0 < parts["working"] < 8.0
    assert 1.5 < parts["other"] < 5.0


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("bucket", [100, 1000, 10**6])
def test_sub_groups_are_those_of_deepspeed(ranks: int, bucket: int) -> None:
    groups = ((300, 40, 700, 55, 1, 999, 1000, 12, 88), (5, 5, 5))
    theirs = []
    for group in groups:
        params = [SimpleNamespace(partition_numel=lambda numel=numel: -(-numel // ranks)) for numel in group]
        zero = SimpleNamespace(sub_group_size=bucket)
        for sub_group in DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups(zero, params):
            theirs.append(sum(param.partition_numel() for param in sub_group))
    model = Model(groups=groups, config=None)
    assert device_sub_groups(model, ranks, bucket, 0.0) == theirs
    assert device_sub_groups(model, ranks, bucket, 0.5) == theirs[: len(theirs) // 2]
    assert device_sub_groups(model, ranks, bucket, 1.0) == []


def test_more_of_anything_takes_more(models: dict[str, Model]) -> None:
    model, recipe = models["llama-8b"], device_budget.read_recipe("llama-8b")
    size = budget(model, recipe)["sum"]
    changes: tuple[dict[str, float], ...] = ({"batch": 8}, {"length": 8192}, {"ratio": 0.7})
    assert all(budget(model, replace(recipe, **change))["sum"] > size for change in changes)  # type: ignore[arg-type]
    assert (
        budget(model, Recipe(ranks=2, batch=2, length=4096, bucket=recipe.bucket, ratio=0.8, eager=False))["sum"] < size
    )


def test_the_documented_table_is_what_the_program_writes() -> None:
    written = documents.tables(documents.read(REPOSITORY / "tests/benchmarks/results/device_budget.md"))
    shown = documents.tables(documents.read(REPOSITORY / "docs/memory.md"))
    assert written[0] == documents.tables(device_budget.report())[0]
    assert written[0] in shown
