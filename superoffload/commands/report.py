"""`superoffload report`: the report of a run, made again."""

from pathlib import Path

import click

from superoffload import cli


@click.command("report")
@click.argument("run", type=cli.UserPath(path_type=Path))
@click.option("--out", type=cli.UserPath(path_type=Path), help="File to write.  [default: RUN/report.html]")
def command(run: Path, out: Path | None) -> None:
    """Write the report of a run as one HTML file.

    RUN is the output folder of a run, also of one that is still running or died.
    """
    from superoffload.reporting import report

    click.echo(report.write(run, out or run / report.REPORT_FILE))
