"""The `superoffload` command: tools used before and after a run, one file per subcommand."""

import sys

import click

from superoffload import cli, log
from superoffload.commands import (
    bench,
    chat,
    config,
    convert,
    doctor,
    env,
    eval,
    export,
    plan,
    plot,
    preview,
    push,
    report,
    runs,
    tiny,
)
from superoffload.errors import UserError


@click.group(
    context_settings={"max_content_width": 110},
    commands=[
        bench.command,
        preview.command,
        plan.command,
        doctor.command,
        env.command,
        config.command,
        convert.command,
        export.command,
        report.command,
        plot.command,
        push.command,
        runs.command,
        chat.command,
        eval.command,
        tiny.command,
    ],
    help="Tools used before and after a run of finetune_zero3.py.",
)
def group() -> None:
    """Collect the subcommands."""


def main() -> None:
    """Run the command; a `UserError` is one line and exit status 2."""
    log.hide_choice_of_cpu()
    try:
        status = group.main(prog_name="superoffload", standalone_mode=False)
    except click.ClickException as error:
        status = cli.report(UserError(" ".join(error.format_message().split())))
    except UserError as error:
        status = cli.report(error)
    except click.Abort:  # Ctrl-C
        status = 130
    sys.exit(status if isinstance(status, int) else 0)
