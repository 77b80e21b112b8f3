"""Tables of the recipes: what each needs and whether it fits the usual devices, and the longest rows that fit.

The first is in the README, the second in docs/long_context.md. Imports no torch.

python -m superoffload.planning.fits
"""

import sys
from dataclasses import replace

from superoffload import config, ds_config
from superoffload.planning import recipes
from superoffload.planning.budget import job, shape
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.memory import budget
from superoffload.planning.budget.shape import Shape
from superoffload.planning.remedies import Capacity, Search
from superoffload.planning.words import GIB

DEVICES = (80, 96, 141)  # GB, what the names of devices promise; they have a little more
GB = 10**9


def recipe_job(name: str, mode: str = "superoffload") -> tuple[Shape, Job]:
    """Return the model and the job of a recipe as it is."""
    devices = recipes.devices(name)
    settings = config.build(
        {**recipes.settings(name, mode == "superoffload"), "output_dir": "", "deepspeed_config": f"configs/{mode}.json"}
    )
    merged = ds_config.merge_flags(ds_config.read_ds_config(settings), settings, devices)
    return shape.built_in(recipes.model(name)), job.of(merged.config, merged.ds_config, devices, devices)


def table() -> str:
    """Write the table as Markdown."""
    sizes = [f"{size} GB device" for size in DEVICES]
    heading = ["recipe", "model", "GPUs", "`MAX_LENGTH`", "host memory, GiB", "to resume", *sizes]
    rows = [heading, ["---"] * len(heading), *(_row(name) for name in _by_size())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _by_size() -> list[str]:
    return sorted(recipes.names(), key=lambda name: shape.built_in(recipes.model(name)).parameters)


def _row(name: str) -> list[str]:
    values, (model, wanted) = recipes.values(name), recipe_job(name)
    need = budget(model, wanted)
    return [
        f"`finetune_{name}_{wanted.ranks}gpu.sh`",
        values["MODEL_NAME"],
        str(wanted.ranks),
        values["MAX_LENGTH"],
        f"{sum(need.host.values()) / GIB:.0f}",
        f"{need.host_peaks['resuming'] / GIB:.0f}",
        *(_cell(Search(shape=model, capacity=Capacity(device=size * GB, host=None)), wanted) for size in DEVICES),
    ]


def _cell(search: Search, wanted: Job) -> str:
    """Say the largest batch of all devices together that fits, or the smallest change that makes the recipe fit."""
    batch = search.largest(wanted, "batch") if search.fits(wanted) else None
    if batch:
        return f"fits, batch up to {batch * wanted.ranks}"
    found, _ = search.remedies(wanted)
    return f"`{' '.join(found[0].flags)}`" if found else "does not fit"


def longest_table() -> str:
    """Write the table of the longest rows as Markdown: of one row or pack per device, else as the recipe is.

    The lengths are those without and with each of the flags of `remedies.LONGER` that the recipe does not have.
    """
    heading = ["recipe", "GPUs", *(f"{size} GB device" for size in DEVICES)]
    rows = [heading, ["---"] * len(heading), *(_longest(name) for name in _by_size())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _longest(name: str) -> list[str]:
    model, wanted = recipe_job(name)
    wanted = replace(wanted, batch=1)
    found = [Search(shape=model, capacity=Capacity(device=size * GB, host=None)).longest(wanted) for size in DEVICES]
    return [f"`{name}`", str(wanted.ranks), *(", ".join(map(_thousands, lengths.values())) for lengths in found)]


def _thousands(length: int | None) -> str:
    """Write a length in units of 1,024 tokens, rounded down."""
    return f"{length // 1024}K" if length and length >= 1024 else "none"


def main() -> None:
    """Print the tables."""
    sys.stdout.write(f"{table()}\n{longest_table()}")


if __name__ == "__main__":
    main()
