"""`superoffload env`: the versions that a bug report needs."""

import json

import click


@click.command("env")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(as_json: bool) -> None:
    """Print versions, machine and variables for a bug report.

    Keys, tokens, passwords and user names are not shown.
    """
    from superoffload.planning import environment

    report = environment.collect()
    click.echo(json.dumps(report, indent=1) if as_json else "\n".join(environment.lines(report)))
