"""`superoffload push`: an exported model, or the newest of a run, to the hub."""

from pathlib import Path

import click

from superoffload import cli
from superoffload.errors import UserError


@click.command("push")
@click.argument("run_or_export", type=cli.UserPath(path_type=Path))
@click.argument("repo")
@click.option("--public", is_flag=True, help="Create a public repository; default: a private one.")
@click.option("--dry_run", is_flag=True, help="Show what would be uploaded, without the network.")
@click.option("--export", is_flag=True, help="Export the newest checkpoint first if it has not been exported.")
def command(run_or_export: Path, repo: str, public: bool, dry_run: bool, export: bool) -> None:
    """Upload a model to the Hugging Face hub.

    RUN_OR_EXPORT is an exported model, or the output folder of a run or one of its checkpoints, whose export
    OUTPUT_DIR/model_stepN is taken. REPO is owner/name, or a name for the account that is logged in. The model is
    checked first. A repository that exists gets a new revision. The model card is README.md of the export: edit it
    there.
    """
    from superoffload.export import push

    checkpoint, folder = push.exported(run_or_export)
    if checkpoint is not None:
        if dry_run or not export:
            raise UserError(
                f"{run_or_export}: its checkpoint is not exported; add --export, or run: "
                f"superoffload export {checkpoint} {folder}"
            )
        from superoffload import log
        from superoffload.export import weights

        log.setup("INFO")
        weights.export(checkpoint, folder)
    upload = push.prepare(folder, repo, private=not public)
    if dry_run:
        click.echo("\n".join(upload.lines()))
    else:
        click.echo(push.push(upload, lambda line: click.echo(line, err=True)))
