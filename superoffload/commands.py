"""The command `superoffload`: what goes round a run."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from superoffload import cli, config, tiny
from superoffload.errors import UserError


@click.group(context_settings={"max_content_width": 110})
def group() -> None:
    """Tools round finetune_zero3.py."""


PREVIEW_GROUPS = {
    "model": config.ModelSettings,
    "data": config.DataSettings,
    "training": config.TrainingSettings,
}
PREVIEW_OPTIONS = ("model_name", "batch_size", "gradient_accumulation_steps", "seed")


def preview(rows: int, **values: Any) -> None:
    """Show rows as the model will see them, target tokens set apart, and the data set's statistics."""
    settings = config.build({**values, "output_dir": ""})
    from superoffload import log
    from superoffload.data import collate, loader
    from superoffload.data.preview import shown_rows
    from superoffload.tokenizer import load_tokenizer

    log.setup("WARNING")
    words = load_tokenizer(settings.model.model_name)
    train, held_out = loader.load(words, settings.data, settings.training.seed)
    for line in shown_rows(train, words, rows, sys.stdout.isatty()):
        click.echo(line)
    parts = {"": train} if held_out is None else {"Training rows": train, "Held-out rows": held_out}
    for title, part in parts.items():
        layout = collate.layout(settings.data, words.pad_token_id, False)
        batches = loader.Batches(part, layout, settings.training, (0, 1))
        click.echo("\n".join(["", *([title] if title else []), *batches.statistics().lines()]))


def _preview_options() -> list[click.Parameter]:
    """Derive the options from the settings: all of the data's, and what the number of steps depends on."""
    number = click.Option(
        ["-n", "--rows"], type=click.IntRange(min=0), default=3, show_default=True, help="Rows shown."
    )
    return [
        number,
        *(
            cli.option(spec)
            for name, settings in PREVIEW_GROUPS.items()
            for spec in config.settings_of(settings)
            if name == "data" or spec.name in PREVIEW_OPTIONS
        ),
    ]


group.add_command(click.Command("preview", params=_preview_options(), callback=preview, help=preview.__doc__))


@group.command("convert")
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes at a time.")
def convert_checkpoint(checkpoint: Path, target: Path, workers: int) -> None:
    """Make a checkpoint that another number of ranks goes on from, with --resume TARGET.

    CHECKPOINT is a folder global_stepN of a run, TARGET a new folder.
    """
    from superoffload.convert import convert

    convert(checkpoint, target, workers)
    click.echo(f"{target}: go on from it with --resume {target} on any number of ranks")


@group.command("export")
@click.argument("checkpoint_or_output_dir", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dtype", default="bfloat16", show_default=True, help="bfloat16, float32 or float16.")
@click.option("--max_shard_size", default="5GB", show_default=True, help="Size of a file of weights at most.")
def export_command(checkpoint_or_output_dir: Path, target: Path, dtype: str, max_shard_size: str) -> None:
    """Write a checkpoint as a model that transformers, vLLM and others load to the folder TARGET.

    Takes the folder of one checkpoint (OUTPUT_DIR/global_stepN), or a run's output folder and its latest.
    """
    from superoffload import export, log

    log.setup("INFO")
    export.export(checkpoint_or_output_dir, target, dtype, max_shard_size)


@group.group("tiny")
def tiny_group() -> None:
    """Make and score the example that two CPU cores train in minutes: scripts/finetune_tiny_cpu.sh."""


@tiny_group.command("write")
@click.argument("folder", type=click.Path(path_type=Path))
def tiny_write(folder: Path) -> None:
    """Write a small random model, its tokenizer and made-up rows to FOLDER."""
    tiny.write(folder)


@tiny_group.command("score")
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("output_dir", type=click.Path(exists=True, path_type=Path))
def tiny_score(folder: Path, output_dir: Path) -> None:
    """Let the model of FOLDER and the checkpoint in OUTPUT_DIR answer the held-out rows."""
    from superoffload import export, log
    from superoffload.model import load_whole

    log.setup("WARNING")
    rows = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    before = tiny.score(*load_whole(folder / "model"), rows)
    with TemporaryDirectory() as exports:
        trained = Path(exports) / "model"
        export.export(output_dir, trained, "float32")
        after = tiny.score(*load_whole(trained), rows)
    click.echo(f"{'Held-out prompt':34} {'right answer':14} {'before':14} after")
    for row, first, second in list(zip(rows, before, after, strict=True))[: len(tiny.TASKS)]:
        prompt = f"{row['instruction']} {row['input']}"
        click.echo(f"{prompt:34} {row['output']:14} {repr(first)[:13]:14} {second}")
    shares = [f"{tiny.share_right(rows, answers):.0%}" for answers in (before, after)]
    click.echo(f"Answered right: {shares[0]} of {len(rows)} held-out prompts before, {shares[1]} after")


def main() -> None:
    """Run the command; a mistake of the user's is one line and status 2."""
    try:
        status = group.main(prog_name="superoffload", standalone_mode=False)
    except click.ClickException as error:
        cli.exit_with(UserError(" ".join(error.format_message().split())))
    except UserError as error:
        cli.exit_with(error)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
