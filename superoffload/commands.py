"""The command `superoffload`: what goes round a run."""

import json
from pathlib import Path

import click

from superoffload import tiny


@click.group()
def main() -> None:
    """Tools round finetune_zero3.py."""


@main.group("tiny")
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
    from superoffload import checkpoint
    from superoffload.model import load_whole

    rows = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    model, tokenizer = load_whole(folder / "model")
    before = tiny.score(model, tokenizer, rows)
    checkpoint.load_weights(model, output_dir)
    after = tiny.score(model, tokenizer, rows)
    click.echo(f"{'Held-out prompt':34} {'right answer':14} {'before':14} after")
    for row, first, second in list(zip(rows, before, after, strict=True))[: len(tiny.TASKS)]:
        prompt = f"{row['instruction']} {row['input']}"
        click.echo(f"{prompt:34} {row['output']:14} {repr(first)[:13]:14} {second}")
    shares = [f"{tiny.share_right(rows, answers):.0%}" for answers in (before, after)]
    click.echo(f"Answered right: {shares[0]} of {len(rows)} held-out prompts before, {shares[1]} after")
