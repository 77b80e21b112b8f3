"""Models and jobs to plan for."""

from dataclasses import replace
from typing import Any

from superoffload import config, ds_config
from superoffload.model.flops import ModelShape
from superoffload.planning import fits
from superoffload.planning.budget import job
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.shape import Shape, built_in


def plain_shape(**changes: Any) -> Shape:
    """Return a model of ten matrices of 100 million elements, whose attention costs nothing."""
    shape = replace(
        built_in("llama-8b"),
        name="plain",
        groups=((10**8,) * 10,),
        frozen=0,
        flops=ModelShape(active_parameters=10**9, attention_width=0, attention_windows=()),
    )
    return replace(shape, **changes)


def job_of(ranks: int = 1, nodes: int = 1, mode: str = "superoffload", **flags: Any) -> Job:
    """Return the job of a run with these flags."""
    flags = {"model_name": "m", "output_dir": "", "deepspeed_config": f"configs/{mode}.json", **flags}
    settings = config.build(flags)
    merged = ds_config.merge_flags(ds_config.read_ds_config(settings), settings, ranks * nodes)
    return job.of(merged.config, merged.ds_config, ranks * nodes, ranks)


def recipe(name: str, **changes: Any) -> tuple[Shape, Job]:
    """Return the model of a recipe, and its job with some fields changed."""
    shape, wanted = fits.recipe_job(name)
    return shape, replace(wanted, **changes)
