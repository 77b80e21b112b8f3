"""`superoffload eval`: the held-out loss of a finished model, per source."""

import json
from pathlib import Path
from typing import Any

import click

from superoffload import cli, config
from superoffload.errors import UserError
from superoffload.setting import settings_of

SETTINGS = ("revision", "trust_remote_code", "trust_checkpoint", "attn_implementation", "kernels", "loss_kernel",
            "batch_size", "seed")  # fmt: skip
LEFT_OUT = ("dataset_weights", "eval_percentage", "eval_dataset", "eval_config", "eval_split")


def _eval(model: str, device: str, json_file: Path | None, **values: Any) -> None:
    """Compute the loss of a finished model on data sets.

    MODEL is an exported model folder, a hub id, a checkpoint (OUTPUT_DIR/global_stepN), or the output folder of a run,
    whose newest checkpoint is used. Prints the mean loss over all target tokens, its perplexity and the number of
    target tokens, for each data set and for all of them.

    Without --dataset_name, the rows are those that the run held out (--eval_dataset or --eval_percentage). Settings
    that are not given are the run's; with --dataset_name, only those that say how rows are tokenised.
    """
    from superoffload import log

    log.setup("WARNING")
    from superoffload.use import device as devices

    devices.choose(device)
    from superoffload.checkpoint.trust import Trust
    from superoffload.use import finished, held_out

    given = {name: values[name] for name in cli.explicit(values)}
    trust = Trust(files=values["trust_checkpoint"], code=values["trust_remote_code"])
    source = finished.find(model, values["revision"], trust)
    losses = held_out.losses_of(source, held_out.settings_of(source, given), "dataset_name" in given)
    click.echo("\n".join([source.title, *losses.lines()]))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps({"model": model, **losses.as_dict()}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file}: cannot be written ({error.strerror})") from error


def _options() -> list[click.Parameter]:
    """Derive the flags from the settings: those of the data, and those that the loss of a row may depend on."""
    specs = [
        spec
        for name, group in config.GROUPS.items()
        for spec in settings_of(group)
        if spec.name in SETTINGS or (name == "data" and spec.name not in LEFT_OUT)
    ]
    options = [cli.option(spec) for spec in specs]
    for option in options:
        if option.name == "dataset_name":
            option.default, option.show_default = (), False
    return [
        click.Argument(["model"], type=cli.PathText()),
        click.Option(["--device"], type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
                     help="Where to compute; auto: on a CUDA device if there is one."),
        click.Option(["--json", "json_file"], type=cli.UserPath(path_type=Path), metavar="FILE",
                     help="Write the numbers to a file."),
        *options,
    ]  # fmt: skip


command = cli.Command("eval", params=_options(), callback=_eval, help=_eval.__doc__)
