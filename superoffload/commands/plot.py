"""`superoffload plot`: the curves of runs in one picture."""

from pathlib import Path

import click

from superoffload import cli


@click.command("plot")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=cli.UserPath(path_type=Path))
@click.option("--out", required=True, type=cli.UserPath(path_type=Path), help="File to write: .png, .svg or .pdf.")
def command(runs: tuple[Path, ...], out: Path) -> None:
    """Draw loss, held-out loss and throughput of runs into one picture.

    Each RUN is the output folder of a run. The legend names the settings in which the runs differ.
    """
    from superoffload.reporting import comparison, records

    comparison.draw([records.read(run) for run in runs], out)
    click.echo(out)
