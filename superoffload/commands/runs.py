"""`superoffload runs`: the runs below a folder, and how far they are."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import click

from superoffload import cli


@click.command("runs")
@click.argument("folder", type=cli.UserPath(path_type=Path), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print the runs as JSON.")
def command(folder: Path, as_json: bool) -> None:
    """List the runs below a folder, the last active first.

    Without FOLDER, below the current one. A run is running, has finished, was stopped by a signal, or died: it ended
    without its last line, because of an error or because it was killed. `saved` is the step of the last checkpoint.
    """
    from superoffload.reporting import runs, runs_table

    notes: list[str] = []
    found, now = runs.find(folder, notes), time.time()
    for note in notes:
        click.echo(note, err=True)
    if as_json:
        click.echo(json.dumps([run.as_dict(now) for run in found], indent=1))
        return
    if not found:
        click.echo(f"{folder}: no runs below it", err=True)
        return
    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else None
    colours = on_terminal and not os.environ.get("NO_COLOR")
    click.echo("\n".join(runs_table.lines(found, folder, now, width, colours=colours)))
