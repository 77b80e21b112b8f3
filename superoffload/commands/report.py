"""`superoffload report`: the report of a run, made again."""

from pathlib import Path

import click

from superoffload import cli
from superoffload.errors import UserError, first_line


@click.command("report")
@click.argument("run", type=cli.UserPath(path_type=Path))
@click.option("--out", type=cli.UserPath(path_type=Path), help="File to write.  [default: RUN/report.html]")
def command(run: Path, out: Path | None) -> None:
    """Write the report of a run as one HTML file.

    RUN is the output folder of a run, also of one that is still running or died.
    """
    from superoffload.reporting import report

    try:
        click.echo(report.write(run, out or run / report.REPORT_FILE))
    except UserError:
        raise
    except report.FAILURES as error:
        raise UserError(
            f"{run}: its records have another form than this version writes ({first_line(error)}); use the version of "
            "superoffload that made the run"
        ) from error
