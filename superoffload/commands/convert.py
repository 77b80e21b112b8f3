"""`superoffload convert`: a checkpoint for another number of ranks."""

from pathlib import Path

import click

from superoffload import cli


@click.command("convert")
@click.argument("checkpoint", type=cli.UserPath(exists=True, path_type=Path))
@click.argument("target", type=cli.UserPath(path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Parallel processes.")
@click.option("--trust_checkpoint", is_flag=True, help="Load files that could run code, e.g. of other programs.")
def command(checkpoint: Path, target: Path, workers: int, trust_checkpoint: bool) -> None:
    """Convert a checkpoint for any number of ranks.

    CHECKPOINT is a folder global_stepN of a run, TARGET a new folder; resume from it with --resume TARGET.
    """
    from superoffload.checkpoint import convert as conversion

    conversion.convert(checkpoint, target, workers, trusted=trust_checkpoint)
    click.echo(f"{target}: resume from it with --resume {target} on any number of ranks")
