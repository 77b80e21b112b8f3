"""A conversation on the terminal, or answers to the prompts of a script."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress

import click

from superoffload.errors import UserError
from superoffload.use.speaker import Speaker

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def answer_all(speakers: Sequence[Speaker], prompts: Iterable[str]) -> None:
    """Print the answers to prompts, each on its own; with several speakers, each answer under its name."""
    for prompt in prompts:
        if prompt.strip():
            for speaker in speakers:
                speaker.reset()
            _answer(speakers, prompt)


def talk(speakers: Sequence[Speaker]) -> None:
    """Hold a conversation on the terminal until the user leaves."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and recalled
    for speaker in speakers:
        kept = "earlier turns are kept" if speaker.keeps_turns else "each prompt stands alone"
        click.echo(f"{speaker.title}: {speaker.template}, {kept}", err=True)
    click.echo(HELP, err=True)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo(f"\n{HELP}", err=True)
            continue
        command = prompt.strip()
        if command == "/quit":
            return
        if command:
            _obey(speakers, command)


def _obey(speakers: Sequence[Speaker], prompt: str) -> None:
    """Answer a prompt, or carry out a command; a mistake, or Ctrl-C, does not end the conversation."""
    if prompt == "/reset":
        for speaker in speakers:
            speaker.reset()
    elif prompt.startswith("/") and " " not in prompt:
        click.echo(f"{prompt}: no such command; {HELP}", err=True)
    else:
        try:
            _answer(speakers, prompt)
        except KeyboardInterrupt:
            click.echo()
        except UserError as error:
            click.echo(f"Error: {error}", err=True)


def _answer(speakers: Sequence[Speaker], prompt: str) -> None:
    for speaker in speakers:
        if len(speakers) > 1:
            click.echo(f"--- {speaker.title}")
        speaker.ask(prompt, _write)
        click.echo()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
