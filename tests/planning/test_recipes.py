"""Each recipe fits the device that it is meant for, by the command that it runs."""

from dataclasses import replace

import pytest

from superoffload.planning import fits as tables
from superoffload.planning import recipes
from superoffload.planning.budget.device import device_bytes
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.shape import Shape, built_in
from tests.benchmarks import plan_device
from tests.benchmarks.plan_device import DEVICE_BYTES
from tests.helpers import documents
from tests.helpers.ranks import REPOSITORY
from tests.helpers.recipe_jobs import recipe_job
from tests.helpers.recipes import RECIPES

UPSTREAM = {name: 0.8 if name.startswith("llama-8b") else 0.9 for name in RECIPES}


def fits(shape: Shape, job: Job) -> bool:
    return sum(device_bytes(shape, job).values()) <= DEVICE_BYTES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_and_keeps_upstreams_ratio_if_that_fits(name: str) -> None:
    shape, job = built_in(RECIPES[name][0]), recipe_job(name)
    assert built_in(name.removesuffix("_longcontext")) == shape
    assert (job.ranks, job.ratio, job.sub_group) == (RECIPES[name][1], RECIPES[name][4], RECIPES[name][3])
    assert job.recompute
    assert job.chunked_loss
    assert fits(shape, job)
    assert fits(shape, replace(job, ratio=UPSTREAM[name])) == (job.ratio == UPSTREAM[name])


@pytest.mark.parametrize("name", RECIPES)
def test_zerooffload_fits_too(name: str) -> None:
    job = recipe_job(name, "zerooffload")
    assert (job.mode, job.ratio) == ("zerooffload", 1.0)
    assert fits(built_in(RECIPES[name][0]), job)


def test_rows_that_are_not_packed_are_assumed_to_be_as_long_as_those_of_the_data() -> None:
    assert recipe_job("gpt-oss-20b").length == 1024
    assert recipe_job("llama-8b").length == 4096


def test_the_documented_table_is_what_the_program_writes() -> None:
    found = documents.tables(plan_device.recipes())[0]
    written = documents.tables(documents.read(plan_device.RESULTS / "plan_device.md"))
    assert written[0] == found
    assert found in documents.tables(documents.read(REPOSITORY / "docs/memory.md"))


@pytest.mark.unit
def test_the_table_of_the_longest_rows_is_what_the_program_writes() -> None:
    written = tables.longest_table()
    found = documents.tables(written)[0]
    assert {row[0].strip("`") for row in found[1:]} == set(recipes.names())
    assert written in documents.read(REPOSITORY / "docs/long_context.md"), f"the table is now:\n{written}"
