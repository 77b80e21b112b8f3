"""Prompts and turns -> answers of a finished model, in the template of its training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TextStreamer

from superoffload.config import DataSettings
from superoffload.data import loader
from superoffload.data.encode import Encoder
from superoffload.data.formats import Chat, Conversation, Pair, Text
from superoffload.errors import BadRow, UserError
from superoffload.log import logger
from superoffload.protocols import Model, Tokenizer
from superoffload.training import evaluation
from superoffload.use.finished import Source

KINDS: dict[str, type[Conversation]] = {
    "alpaca": Pair, "prompt_completion": Pair, "messages": Chat, "text": Text
}  # fmt: skip
Write = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How to answer: `temperature` 0 is greedy; `max_new_tokens` is the most tokens of an answer."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    system: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How prompts are written: as rows read as `kind` are, with these settings."""

    kind: type[Conversation]
    settings: DataSettings


def template_of(source: Source, tokenizer: Tokenizer, chosen: dict[str, Any]) -> Template:
    """Return the template of the run that made a model.

    chosen: `dataset_format` and `chat_template` that the user asks for instead. Of a model without a run, the
    tokenizer's chat template is used, or else the plain text.
    """
    settings = replace(source.run.data if source.run else DataSettings(), **chosen)
    if "dataset_format" in chosen and settings.dataset_format in KINDS:
        return Template(kind=KINDS[settings.dataset_format], settings=settings)
    by_tokenizer = Chat if tokenizer.chat_template or "chat_template" in chosen else Text
    if source.run is None:
        return Template(kind=by_tokenizer, settings=settings)
    try:
        return Template(kind=loader.kind_of_rows(settings), settings=settings)
    except UserError as error:
        kind = KINDS.get(settings.dataset_format, by_tokenizer)
        logger.warning(
            "The rows of training cannot be read (%s): prompts are written as %s; --dataset_format chooses", error,
            "pairs" if kind is Pair else "chats" if kind is Chat else "plain text",
        )  # fmt: skip
        return Template(kind=kind, settings=settings)


class Speaker:
    """A model that answers, and its conversation so far."""

    def __init__(self, title: str, model: Model, tokenizer: Tokenizer, template: Template, manner: Manner) -> None:
        """Raise `UserError` if the template cannot be used, or has no place for a system message that is given."""
        self.title = title
        self._model, self._tokenizer, self._manner = model, tokenizer, manner
        self._encoder = Encoder(tokenizer, template.settings)
        self._kind = template.kind
        self.keeps_turns = self._encoder.takes_turns(template.kind)
        if manner.system is not None and not self.keeps_turns:
            raise UserError(f"--system: {self.template} has no place for a system message")
        self._ends = self._encoder.end_ids(template.kind)
        self.reset()

    @property
    def template(self) -> str:
        """Return what the template in use is called."""
        if self.keeps_turns:
            return "the plain template" if self._encoder.template is None else "the chat template"
        return "plain text" if self._kind is Text else "the Alpaca template"

    def reset(self) -> None:
        """Forget the conversation."""
        system = self._manner.system
        self._turns: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, prompt: str, write: Write) -> str:
        """Answer a prompt, and give `write` the text as it is generated.

        KeyboardInterrupt ends the answer; the conversation keeps what was said until then.

        Raises `UserError` if the template rejects the conversation, or the model has no positions left for an answer.
        """
        try:
            ids = self._encoder.prompt_ids(prompt, self._kind, self._turns)
        except BadRow as error:
            raise UserError(f"{prompt!r}: {error}") from error
        room = self._room(len(ids))
        streamer = _Streamer(self._tokenizer, write)
        try:
            evaluation.generate_ids(
                self._model,
                self._tokenizer,
                ids,
                end_ids=self._ends,
                max_new_tokens=room,
                streamer=streamer,
                **self._sampling(),
            )
        except KeyboardInterrupt:
            streamer.end()
            raise
        finally:
            if self.keeps_turns:
                self._turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": streamer.text}]
        return streamer.text

    def _room(self, length: int) -> int:
        known = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(known, int) or known <= 0:
            return self._manner.max_new_tokens
        if length >= known:
            again = ", or /reset the conversation" if len(self._turns) > 1 else ""
            raise UserError(f"the prompt has {length} tokens, and the model {known} positions; shorten it{again}")
        return min(self._manner.max_new_tokens, known - length)

    def _sampling(self) -> dict[str, Any]:
        if not self._manner.temperature:
            return {}
        return {"do_sample": True, "temperature": self._manner.temperature, "top_p": self._manner.top_p, "top_k": 0}


class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped
    """Hands over the text of an answer as it is generated, and keeps it."""

    def __init__(self, tokenizer: Tokenizer, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take a piece of text that later tokens no longer change."""
        self.text += text
        self._write(text)


def seed(value: int) -> None:
    """Seed what answers are drawn with."""
    torch.manual_seed(value)
