"""`superoffload chat`: talk to a finished model in the terminal, or answer the prompts of a script."""

import sys
from dataclasses import replace
from typing import Any

import click

from superoffload import cli, config
from superoffload.errors import UserError

TEMPLATE = ("dataset_format", "chat_template")
RUN_BASE = "base"


def _chat(**values: Any) -> None:
    """Talk to a finished model.

    MODEL is an exported model folder, a hub id, a checkpoint (OUTPUT_DIR/global_stepN), or the output folder of a run,
    whose newest checkpoint is used. Prompts are written as in training: in the Alpaca template, or in the chat
    template, which keeps the conversation. With --prompt, or with one prompt per line on stdin, each prompt is answered
    on its own and nothing else is printed.
    """
    from superoffload import log

    log.setup("WARNING")
    from superoffload.use import device

    device.choose(values["device"])
    from superoffload.checkpoint.trust import Trust
    from superoffload.use import dialogue, finished, speaker

    chosen = {name: values[name] for name in cli.explicit(TEMPLATE)}
    trust = Trust(files=values["trust_checkpoint"], code=values["trust_remote_code"])
    sources = [finished.find(values["model"], values["revision"], trust)]
    if values["compare"]:
        sources.append(_base(sources[0], values["compare"], trust))
    manner = speaker.Manner(**{name: values[name] for name in ("temperature", "top_p", "max_new_tokens", "system")})
    kernel = {name: values[name] for name in cli.explicit(("attn_implementation",))}
    speakers = [
        _speaker(replace(source, model=replace(source.model, **kernel)), sources[0], chosen, manner)
        for source in sources
    ]
    speaker.seed(values["seed"])
    if values["prompt"]:
        dialogue.answer_all(speakers, values["prompt"])
    elif not sys.stdin.isatty():
        try:
            dialogue.answer_all(speakers, (line.rstrip("\n") for line in sys.stdin))
        except UnicodeDecodeError as error:
            raise UserError(f"stdin: not UTF-8 text ({error.reason})") from error
    else:
        dialogue.talk(speakers)


def _base(source: Any, name: str, trust: Any) -> Any:
    """Find the model to compare with; `base` is the model that the run started from."""
    from superoffload.use import finished

    if name != RUN_BASE:
        return finished.find(name, None, trust)
    if source.run is None:
        raise UserError(f"--compare {RUN_BASE}: no run of {source.name} is known; name the model that it started from")
    started_from = source.run.model
    return finished.find(started_from.model_name, started_from.revision, trust)


def _speaker(source: Any, first: Any, chosen: dict[str, str], manner: Any) -> Any:
    """Load a model to talk to; it speaks in the template of the first one."""
    from superoffload import distributed
    from superoffload.use import finished, speaker

    tokenizer = finished.tokenizer_of(source)
    template = speaker.template_of(replace(source, run=first.run), tokenizer, chosen)
    model = finished.load_model(source, distributed.device())
    return speaker.Speaker(source.title, model, tokenizer, template, manner)


def _options() -> list[click.Parameter]:
    """List the flags; those that are settings of a run come from `config`."""
    specs = config.SPECS
    from_settings = [
        cli.option(specs[name])
        for name in (*TEMPLATE, "revision", "trust_checkpoint", "trust_remote_code", "attn_implementation", "seed")
    ]
    compare = f"Answer with this model too, a folder or hub id; {RUN_BASE}: the one that the run started from."
    most = "Maximum tokens of an answer."
    return [
        click.Argument(["model"], type=cli.PathText()),
        click.Option(["--prompt"], multiple=True, help="Answer this prompt and leave; may be repeated."),
        click.Option(["--compare"], type=cli.PathText(), metavar="BASE", help=compare),
        click.Option(["--system"], help="System message, for chat templates."),
        click.Option(["--temperature"], type=click.FloatRange(min=0), default=0.0, show_default=True,
                     help="Temperature to sample with; 0: greedy."),
        click.Option(["--top_p"], type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True,
                     help="Sample from the likeliest tokens with this much probability."),
        click.Option(["--max_new_tokens"], type=click.IntRange(min=1), default=512, show_default=True, help=most),
        click.Option(["--device"], type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
                     help="Where to compute; auto: on a CUDA device if there is one."),
        *from_settings,
    ]  # fmt: skip


command = click.Command("chat", params=_options(), callback=_chat, help=_chat.__doc__)
