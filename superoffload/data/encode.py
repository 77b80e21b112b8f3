"""A conversation -> input_ids, and labels that say which of them count."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superoffload.data import chat
from superoffload.data.formats import Chat, Conversation, Pair, Text
from superoffload.errors import UserError

IGNORED = -100  # the label of a position that does not count in the loss
VERSION = 2  # of what this file and formats.py make of a row; part of the cache's key
PLAIN_HEADS = {
    "system": "### System:\n",
    "developer": "### System:\n",
    "user": "### User:\n",
    "tool": "### Tool:\n",
    "assistant": "### Assistant:\n",
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the model sees it: `input_ids` and `labels`, int lists of one length.

    `labels[i]` is `input_ids[i]` where the token counts and -100 elsewhere; the model shifts them itself.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def target_tokens(self) -> int:
        """Count the labels that will be predicted: the first position has nothing before it."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def shortest(self) -> int:
        """Return the least length that holds a target token; 0 where the row has none."""
        return next((i + 1 for i, label in enumerate(self.labels) if i and label != IGNORED), 0)

    def head(self, max_length: int) -> "Encoded":
        """Cut to the first `max_length` tokens: of an answer that is too long its head stays."""
        return Encoded(self.input_ids[:max_length], self.labels[:max_length])


def alpaca_prompt(pair: Pair) -> str:
    """Write a request as upstream does: instruction and, where there is one, input under `###` headings."""
    middle = f"### Input:\n{pair.context}\n\n" if pair.context.strip() else ""
    return f"### Instruction:\n{pair.request}\n\n{middle}### Response:\n"


def as_chat(pair: Pair) -> Chat:
    """Write a pair as a turn of the user and one of the assistant."""
    asked = f"{pair.request}\n\n{pair.context}" if pair.context.strip() else pair.request
    return Chat(({"role": "user", "content": asked}, {"role": "assistant", "content": pair.answer}))


def plain_segments(turns: Chat) -> list[tuple[str, bool]]:
    """Write turns under `### System:`, `### User:`, `### Tool:` and `### Assistant:`, an empty line between.

    Returns texts and whether they count; each text that counts is the content of an assistant's turn.
    """
    segments: list[tuple[str, bool]] = []
    given = ""
    for turn in turns.turns:
        given += PLAIN_HEADS[turn["role"]]
        if turn["role"] == "assistant":
            segments += [(given, False), (turn["content"], True)]
            given = "\n\n"
        else:
            given += f"{turn['content']}\n\n"
    return [*segments, (given.rstrip(), False)] if given.strip() else segments


class Encoder:
    """Turns conversations into tokens with one tokenizer and one template.

    `chat_template` is `auto` (upstream's headings for pairs, the tokenizer's template for turns, the plain one
    where it has none), `tokenizer`, `plain`, or a file that holds a Jinja template. `template` is its text,
    None where no Jinja template is used. Raises `UserError` where the template cannot be had.
    """

    def __init__(self, tokenizer: Any, chat_template: str, train_on_prompt: bool) -> None:
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_token_id
        self._train_on_prompt = train_on_prompt
        self._pairs_as_chat = chat_template != "auto"
        self.template = _template(tokenizer, chat_template)
        self._marks = self.template is not None and "{% generation" in self.template.replace("{%-", "{%")
        self._render = chat.renderer(tokenizer, self.template)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self._special = tuple(sorted(special, key=lambda text: (-len(text), text)))
        if self.template is not None and not tokenizer.is_fast:
            raise UserError(
                f"--chat_template {chat_template}: the tokenizer cannot tell which characters a token covers "
                "(it is not a fast one); use --chat_template plain"
            )

    def __call__(self, conversation: Conversation) -> Encoded:
        """Encode one row, untruncated. Raises `BadRow` where the template refuses it."""
        if isinstance(conversation, Text):
            return self._segments([(conversation.text, True)])
        if isinstance(conversation, Pair) and not self._pairs_as_chat:
            return self._segments([(alpaca_prompt(conversation), False), (conversation.answer, True)])
        turns = as_chat(conversation) if isinstance(conversation, Pair) else conversation
        return self._segments(plain_segments(turns)) if self.template is None else self._chat(turns)

    def prompt_ids(self, request: str, in_turns: bool) -> list[int]:
        """Tokenise a request as a row's prompt is, ready to be answered.

        `in_turns`: the rows trained on are conversations, so the request is a turn of one.
        """
        turns = as_chat(Pair(request=request, context="", answer=""))
        if not (in_turns or self._pairs_as_chat):
            text = alpaca_prompt(Pair(request=request, context="", answer=""))
        elif self.template is None:
            text = plain_segments(turns)[0][0]
        else:
            rendered = self._render(turns.turns[:1], True)
            return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])
        ids = list(self._tokenizer(text)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self._eos else ids

    def _segments(self, segments: Iterable[tuple[str, bool]]) -> Encoded:
        """Tokenise texts apart and end each one that counts with the end-of-sequence token.

        Apart, so that an answer follows the very tokens that the prompt alone has when the model is used. What
        counts goes by length and never by token id: a tokenizer whose padding token is its end-of-sequence
        token still learns to stop.
        """
        ids: list[int] = []
        counts: list[bool] = []
        for place, (text, is_target) in enumerate(segments):
            new = list(self._tokenizer(text, add_special_tokens=place == 0)["input_ids"])
            if place == 0 and new and new[-1] == self._eos:
                new.pop()
            if is_target:
                new.append(self._eos)
            ids += new
            counts += [is_target] * len(new)
        return self._encoded(ids, counts)

    def _chat(self, turns: Chat) -> Encoded:
        if self._marks:
            assert self.template is not None
            return self._encoded(*chat.marked_tokens(self._tokenizer, self.template, turns.turns, self._special))
        text, spans = chat.answer_spans(turns.turns, self._render, self._special)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, counts = list(encoded["input_ids"]), _covered(encoded["offset_mapping"], spans)
        answered_last = bool(spans) and not text[spans[-1][1] :].strip()
        if answered_last and not chat.is_closed(text[slice(*spans[-1])], self._special):
            # The template does not close the last turn: without an end the model would never stop.
            ids, counts = [*ids, self._eos], [*counts, True]
        return self._encoded(ids, counts)

    def _encoded(self, ids: list[int], counts: list[bool]) -> Encoded:
        if self._train_on_prompt:
            return Encoded(ids, list(ids))
        return Encoded(ids, [token if count else IGNORED for token, count in zip(ids, counts, strict=True)])


def _covered(offsets: Iterable[tuple[int, int]], spans: list[chat.Span]) -> list[bool]:
    """Tell for each token whether it starts inside one of the spans (sorted, apart from each other).

    A token that reaches from the header into the answer does not count: the header is given.
    """
    counts = []
    place = 0
    for start, end in offsets:
        while place < len(spans) and start >= spans[place][1]:
            place += 1
        counts.append(place < len(spans) and spans[place][0] <= start < end)
    return counts


def _template(tokenizer: Any, chat_template: str) -> str | None:
    """Return the text of the Jinja template in use; None for the plain one."""
    if chat_template == "plain":
        return None
    if chat_template in ("auto", "tokenizer"):
        own = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if own is None and chat_template == "tokenizer":
            raise UserError("--chat_template tokenizer: the tokenizer has no chat template; use plain, or name a file")
        return own
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat_template {chat_template}: neither auto, tokenizer or plain nor a file that can be read"
        ) from error
