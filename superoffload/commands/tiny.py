"""`superoffload tiny`: create and score the example of scripts/finetune_tiny_cpu.sh."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from superoffload import cli
from superoffload import tiny as example
from superoffload.errors import UserError


@click.group("tiny")
def command() -> None:
    """Create and score the small example.

    Two CPU cores train it in minutes: bash scripts/finetune_tiny_cpu.sh superoffload
    """


@command.command()
@click.argument("folder", type=cli.UserPath(path_type=Path))
def write(folder: Path) -> None:
    """Write a small random model, its tokenizer and generated rows to FOLDER."""
    from superoffload import log

    log.setup("WARNING")
    try:
        example.write(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


@command.command()
@click.argument("folder", type=cli.UserPath(exists=True, path_type=Path))
@click.argument("output_dir", type=cli.UserPath(exists=True, path_type=Path))
def score(folder: Path, output_dir: Path) -> None:
    """Score the model in FOLDER and the checkpoint in OUTPUT_DIR on the held-out rows."""
    from superoffload import log

    log.setup("WARNING")  # before the libraries are imported
    from superoffload.export import weights
    from superoffload.model.load import load_whole

    try:
        rows = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: has no held_out.json; give what `superoffload tiny write` wrote") from error
    before = example.score(*load_whole(folder / "model"), rows)
    with TemporaryDirectory() as exports:
        trained = Path(exports) / "model"
        weights.export(output_dir, trained, "float32")
        after = example.score(*load_whole(trained), rows)
    click.echo(f"{'Held-out prompt':34} {'right answer':14} {'before':14} after")
    for row, first, second in list(zip(rows, before, after, strict=True))[: len(example.TASKS)]:
        prompt = f"{row['instruction']} {row['input']}"
        click.echo(f"{prompt:34} {row['output']:14} {repr(first)[:13]:14} {second}")
    shares = [f"{example.share_right(rows, answers):.0%}" for answers in (before, after)]
    click.echo(f"Answered right: {shares[0]} of {len(rows)} held-out prompts before, {shares[1]} after")
