"""`superoffload doctor`: what on this machine would break or slow a run, and the fix."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TextIO

import click

from superoffload import cli

MIN_WIDTH = 60
"""Columns; below them, text beside verdict and name is too narrow to read."""


@click.command("doctor")
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks on this machine. Default: number of devices, or 1.")
@click.option(
    "--output_dir",
    type=cli.UserPath(path_type=Path),
    default=".",
    show_default=True,
    help="Folder whose disk is tested.",
)
@click.option("--quick", is_flag=True, help="Compile and measure nothing; takes seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(ranks: int | None, output_dir: Path, quick: bool, as_json: bool) -> int:
    """Check this machine for what would break or slow a run.

    Prints one line per check: good, slow or broken, and the fix. The exit status is 1 if something is broken. Compiles
    the operators if necessary and saves the measured rates, which `superoffload plan` uses; changes nothing else.
    """
    from superoffload.planning import doctor

    shows_progress = sys.stderr.isatty() and not as_json
    width = max(MIN_WIDTH, min(shutil.get_terminal_size().columns, 110))

    def starting(name: str) -> None:
        if shows_progress:
            click.echo(f"\r\x1b[Kchecking {name} ...", err=True, nl=False)

    around = doctor.surroundings(ranks, output_dir, quick=quick)
    report = doctor.diagnose(around, starting=starting)
    if shows_progress:
        click.echo("\r\x1b[K", err=True, nl=False)
    if as_json:
        click.echo(json.dumps(doctor.to_json(report), indent=1))
    else:
        shown = doctor.lines(report.findings, width, colours=_takes_colours(sys.stdout))
        click.echo("\n".join([*shown, "", *doctor.summary(report, quick=quick)]))
    return int(report.is_broken)


def _takes_colours(stream: TextIO) -> bool:
    """Return whether a stream is a terminal and colours are not switched off (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")
