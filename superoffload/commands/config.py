"""`superoffload config`: check a file of settings, or print its JSON schema."""

import json

import click

from superoffload import cli, config, config_file
from superoffload.errors import UserError


@click.command("config")
@click.option("--schema", is_flag=True, help="Print a JSON schema of such files, for editors.")
@click.option("--check", type=cli.PathText(), metavar="FILE", help="Check the settings of a file.")
def command(schema: bool, check: str | None) -> None:
    """Check a file of settings for --config, or print its JSON schema."""
    if schema == (check is not None):
        raise UserError("superoffload config: give either --schema or --check FILE")
    if check is None:
        click.echo(json.dumps(config_file.schema(), indent=2))
        return
    values = config_file.read(check)
    config.build({"model_name": "", "output_dir": "", **values})
    click.echo(f"{check}: {len(values)} settings, all valid")
