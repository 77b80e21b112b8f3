"""`superoffload plan`: whether a run fits, what would make it fit, and about how long a step takes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from superoffload import cli, config, ds_config
from superoffload.errors import UserError
from superoffload.planning import machine, plan, ratio, recipes, remedies, speed, words
from superoffload.planning.budget import job, shape
from superoffload.setting import AUTO, settings_of, shown

# The flags of a run that memory or time depend on; of the other groups, all.
MODEL = (
    "model_name",
    "revision",
    "trust_remote_code",
    "freeze",
    "attn_implementation",
    "activation_checkpointing",
    "loss_kernel",
    "tiled_mlp",
)
SETTINGS = {
    config.ModelSettings: MODEL,
    config.DataSettings: ("max_length", "packing", "padding"),
    config.TrainingSettings: ("batch_size", "gradient_accumulation_steps", "sequence_parallel_size"),
    config.OffloadSettings: (
        "deepspeed_config", "offload_ratio", "optimizer_state", "offload_params", "sub_group_size"
    ),
    config.CheckpointSettings: ("save_checkpoint", "save_steps", "save_minutes", "keep_checkpoints", "export"),
}  # fmt: skip


def _show(**values: Any) -> int:
    """Say whether a run fits on a machine.

    Needs no weights, and for well-known models no network either: llama-8b, llama-70b, qwen3-14b and others. Says what
    does not fit and which flags would make it fit, and estimates the time of a step. What is not given is that of this
    machine. Exit status 0: it fits, 1: it does not.
    """
    if values["plot"] is not None and Path(values["plot"]).suffix.lower() != ".png":
        raise UserError(f"--plot {values['plot']}: must be the name of a PNG file, such as plan.png")
    explicit = cli.explicit(values)
    asks_devices = not values["gpu_memory"] or not (values["gpus"] or values["recipe"])
    here = machine.look(devices=None if asks_devices else ())  # does not wait for nvidia-smi in vain
    settings, merged, ranks_per_node, ranks = _settings(values, explicit, len(here.devices))
    wanted = replace(
        job.of(settings, merged, ranks, ranks_per_node),
        on_cpu=not (here.devices or values["gpu_memory"] or values["link"]),
        pinned_rounding=not values["recipe"] and job.rounds_pinned_memory(),
        divided=recipes.batch(values["recipe"]) if values["recipe"] and "batch_size" not in explicit else 0,
    )
    capacity, model = _capacity(values, explicit, here), _shape(settings.model)
    if model.heads % wanted.parts:
        raise UserError(
            f"--sequence_parallel_size {wanted.parts}: the {model.heads} attention heads of {model.name} cannot be "
            f"divided among {wanted.parts} ranks; use a divisor of their number"
        )
    if settings.offload.offload_ratio == AUTO:
        wanted = replace(wanted, ratio=ratio.auto(model, wanted, capacity.device)[0])
    found = plan.make(model, wanted, capacity, _hardware(values, here, ranks_per_node))
    if values["plot"]:
        from superoffload.planning import picture

        picture.draw(found, values["plot"])
    if values["json"]:
        click.echo(json.dumps(plan.as_json(found), indent=1))
    else:
        looked = None if values["host_memory"] or values["gpu_memory"] else here
        click.echo("\n".join(words.lines(found, looked, settings.data.packs, values["tokens"])))
    return 0 if found.fits else 1


def _settings(
    values: dict[str, Any], explicit: frozenset[str], devices: int
) -> tuple[config.Config, ds_config.DsConfig, int, int]:
    """Return the merged settings, and the ranks per machine and altogether; a recipe replaces the defaults."""
    recipe = values["recipe"]
    name = values["model_name"] or (recipe and recipes.model(recipe))
    if not name:
        raise UserError("--model_name: no model is given; give one, or a --recipe")
    flat = {**values, "model_name": name, "output_dir": ""}
    found = ds_config.read_ds_config(config.build(flat, explicit))
    per_node = values["gpus"] or (recipes.devices(recipe) if recipe else max(1, devices))
    ranks = per_node * values["nodes"]
    if recipe:
        offload = found["zero_optimization"]["offload_optimizer"]
        of_recipe = recipes.settings(recipe, bool(offload.get("super_offload")))
        flat |= {key: value for key, value in of_recipe.items() if key not in explicit}
        if "batch_size" not in explicit:
            flat["batch_size"] = _divided(recipe, ranks)
    merged = ds_config.merge_flags(found, config.build(flat, explicit), ranks)
    return merged.config, merged.ds_config, per_node, ranks


def _divided(recipe: str, ranks: int) -> int:
    """Return the batch of a rank, as scripts/_launch.sh divides that of a recipe; it refuses a remainder."""
    batch, rest = divmod(recipes.batch(recipe), ranks)
    if rest:
        raise UserError(
            f"--recipe {recipe}: its batch of {recipes.batch(recipe)} cannot be divided among {ranks} devices; "
            "give the batch of one, e.g. --batch_size 1"
        )
    return batch


def _shape(model: config.ModelSettings) -> shape.Shape:
    known = model.model_name in shape.built_in_names() and not Path(model.model_name).is_dir()
    if known and not model.freeze:
        return shape.built_in(model.model_name)
    if known and "/" not in model.model_name:
        raise UserError(
            f"--freeze {shown(model.freeze)}: the names of parameters are not known of {model.model_name}; give "
            "--model_name a folder or a hub id"
        )
    return shape.load(*model.origin, model.freeze)


def _capacity(values: dict[str, Any], explicit: frozenset[str], here: machine.Machine) -> remedies.Capacity:
    device = values["gpu_memory"] or min((device.total_bytes for device in here.devices), default=None)
    disk = machine.disk_free_bytes(Path(values["output_dir"])) if "output_dir" in explicit else None
    return remedies.Capacity(device=device, host=values["host_memory"] or here.host_bytes, disk=disk)


def _hardware(values: dict[str, Any], here: machine.Machine, devices: int) -> speed.Hardware:
    """Take this machine's rates only if it has the device that is planned for."""
    own = here.devices and not values["gpu_memory"]
    rates = machine.measured_rates(here) if own else None
    return speed.hardware(here.devices[0].name if own else None, values["link"], devices, rates)


class Tokens(click.FloatRange):
    """A number of tokens; neither infinity nor what is no number, which click takes for any range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; fail if it cannot be one of tokens."""
        number = float(super().convert(value, param, ctx))
        return number if math.isfinite(number) else self.fail(f"{value!r} is not a number of tokens.", param, ctx)


def _options() -> list[click.Parameter]:
    """Derive the flags of a run from the settings, and add those of the machine."""
    run: list[click.Parameter] = []
    for group, names in SETTINGS.items():
        for spec in settings_of(group):
            if spec.name in names:
                option = cli.option(spec)
                option.required = False
                run.append(option)
    number = click.IntRange(min=1)
    size = cli.Size()
    own: list[click.Parameter] = [
        click.Option(["--recipe"], help="Start from the values of a recipe, e.g. llama-8b."),
        click.Option(["--gpus"], type=number, help="Devices of each machine.  [default: those of this one, or 1]"),
        click.Option(["--nodes"], type=number, default=1, show_default=True, help="Number of machines."),
        click.Option(["--gpu_memory"], type=size, help="Memory of a device, e.g. 80GiB.  [default: that of this one]"),
        click.Option(["--host_memory"], type=size, help="Memory of a machine.  [default: that of this one]"),
        click.Option(["--link"], type=click.Choice(list(speed.LINKS)), help="Link between device and host."),
        click.Option(
            ["--output_dir"], type=cli.PathText(), help="Check the free space of the disk with this folder, too."
        ),
        click.Option(["--tokens"], type=Tokens(min=1), help="Tokens of an epoch, as superoffload preview counts them."),
        click.Option(["--json"], is_flag=True, help="Write JSON: sizes in bytes, times in seconds."),
        click.Option(["--plot"], type=cli.PathText(), help="Draw the memory to a PNG file; needs matplotlib."),
    ]
    return [cli.config_option(), *own, *run]


command = cli.Command("plan", params=_options(), callback=_show, help=_show.__doc__)
