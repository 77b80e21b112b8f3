"""`superoffload preview`: rows as the model will see them, and the statistics of a data set."""

import sys
from typing import Any

import click

from superoffload import cli, config
from superoffload.setting import settings_of

GROUPS = {"model": config.ModelSettings, "data": config.DataSettings, "training": config.TrainingSettings}
OPTIONS = ("model_name", "revision", "trust_remote_code", "batch_size", "gradient_accumulation_steps", "seed")


def _show(rows: int, **values: Any) -> None:
    """Show rows as the model will see them.

    Tokens in the loss (targets) are marked. Statistics of the whole data set follow.
    """
    settings = config.build({**values, "output_dir": ""})
    from superoffload import log
    from superoffload.data import collate, loader
    from superoffload.data.preview import shown_rows
    from superoffload.model.tokenizer import load_tokenizer

    log.setup("WARNING")
    model = settings.model
    tokenizer = load_tokenizer(model.model_name, model.revision, model.trust_remote_code)
    train, held_out = loader.load(tokenizer, settings.data, settings.training.seed)
    layout = collate.choose_layout(settings.data, tokenizer.pad_token_id, False)
    parts = {"": train} if held_out is None else {"Training rows": train, "Held-out rows": held_out}
    statistics = {
        title: loader.Batches(part, layout, settings.training, rank=0, world_size=1).statistics()
        for title, part in parts.items()
    }
    for label, part in train.by_source().items():
        for line in ([label] if label else []) + list(shown_rows(part, tokenizer, rows, sys.stdout.isatty())):
            click.echo(line)
    for title, found in statistics.items():
        click.echo("\n".join(["", *([title] if title else []), *found.lines()]))
        for source in found.sources:
            click.echo("\n".join(["", ", ".join(filter(None, (title, source.label))), *source.lines()]))


def _options() -> list[click.Parameter]:
    """Derive the options from the settings: all of the data's, and those that determine the number of steps."""
    rows = click.Option(
        ["-n", "--rows"], type=click.IntRange(min=0), default=3, show_default=True, help="Number of rows to show."
    )
    return [
        cli.config_option(),
        rows,
        *(
            cli.option(spec)
            for name, settings in GROUPS.items()
            for spec in settings_of(settings)
            if name == "data" or spec.name in OPTIONS
        ),
    ]


command = cli.Command("preview", params=_options(), callback=_show, help=_show.__doc__)
