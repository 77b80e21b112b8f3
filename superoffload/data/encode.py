"""A conversation -> input_ids, and labels that say which tokens are targets."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from superoffload.data import chat
from superoffload.data.formats import Chat, Conversation, Pair, Text, turns_of
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer

IGNORED = -100  # the label of a token that is not a target
VERSION = 3  # of the encoding here and of reading in formats.py and messages.py; in the cache's key

# The Alpaca template.
INSTRUCTION = "### Instruction:\n"
INPUT = "\n\n### Input:\n"
RESPONSE = "\n\n### Response:\n"
# The headings of the plain template, by role.
PLAIN_HEADS = {
    "system": "### System:\n",
    "developer": "### System:\n",
    "user": "### User:\n",
    "tool": "### Tool:\n",
    "assistant": "### Assistant:\n",
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the model sees it: `input_ids` and `labels`, int lists of equal length.

    `labels[i]` is `input_ids[i]` if the token is a target, else -100. The model shifts the labels itself.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def target_tokens(self) -> int:
        """Return the number of labels that are predicted; the first is not, because no token precedes it."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def shortest(self) -> int:
        """Return the smallest length that includes a target token; 0 if the row has none."""
        return next((i + 1 for i, label in enumerate(self.labels) if i and label != IGNORED), 0)

    def head(self, max_length: int) -> "Encoded":
        """Truncate to the first `max_length` tokens, which keeps the start of an answer that is too long."""
        return Encoded(self.input_ids[:max_length], self.labels[:max_length])


def alpaca_prompt(pair: Pair) -> str:
    """Write a prompt as upstream does, in the Alpaca template; the input heading is left out if there is no input."""
    context = INPUT + pair.context if pair.context.strip() else ""
    return INSTRUCTION + pair.prompt + context + RESPONSE


def as_chat(pair: Pair) -> Chat:
    """Write a pair as a user turn and an assistant turn."""
    return Chat(turns_of(pair))


def plain_segments(turns: Chat) -> list[tuple[str, bool]]:
    """Write turns under `### System:`, `### User:`, `### Tool:` and `### Assistant:`, separated by empty lines.

    Returns texts and whether each is a target; every target is the content of one assistant turn.
    """
    segments: list[tuple[str, bool]] = []
    given = ""
    for turn in turns.turns:
        given += PLAIN_HEADS[turn["role"]]
        if turn["role"] == "assistant":
            segments += [(given, False), (turn["content"] or "", True)]
            given = "\n\n"
        else:
            given += f"{turn['content']}\n\n"
    return [*segments, (given.rstrip(), False)] if given.strip() else segments


class Encoder:
    """Turns conversations into tokens with one tokenizer and one template.

    `chat_template` is `auto` (upstream's Alpaca headings for pairs; for chats the tokenizer's template, or the plain
    one if it has none), `tokenizer`, `plain`, or a file that holds a Jinja template. `template` is the text of the
    Jinja template, None if none is used. Raises `UserError` if the template is missing or cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: str, train_on_prompt: bool) -> None:
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
                f"--chat_template {chat_template}: needs a fast tokenizer, which reports the characters that each "
                "token covers; use --chat_template plain"
            )

    def __call__(self, conversation: Conversation) -> Encoded:
        """Encode one row without truncating it. Raises `BadRow` if the template rejects it."""
        if isinstance(conversation, Text):
            return self._segments([(conversation.text, True)])
        if isinstance(conversation, Pair) and not self._pairs_as_chat:
            return self._segments([(alpaca_prompt(conversation), False), (conversation.answer, True)])
        turns = as_chat(conversation) if isinstance(conversation, Pair) else conversation
        return self._segments(plain_segments(turns)) if self.template is None else self._chat(turns)

    def prompt_ids(self, prompt: str, in_turns: bool) -> list[int]:
        """Tokenise a prompt as in a row of the training data, up to where the answer begins.

        `in_turns` is whether the rows of the training data are chats; the prompt is then written as a user turn.
        """
        pair = Pair(prompt=prompt, context="", answer="")
        turns = as_chat(pair)
        if not (in_turns or self._pairs_as_chat):
            text = alpaca_prompt(pair)
        elif self.template is None:
            text = plain_segments(turns)[0][0]
        else:
            rendered = self._render(turns.turns[:1], True)
            return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])
        ids = list(self._tokenizer(text)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self._eos else ids

    def _segments(self, segments: Iterable[tuple[str, bool]]) -> Encoded:
        """Tokenise texts separately and end each target with the end-of-sequence token.

        Separately, so that an answer follows exactly the tokens of the prompt alone, as it does in generation.
        Targets are found by length and never by token id, so that the model learns to stop even if the padding token
        is the end-of-sequence token.
        """
        ids: list[int] = []
        is_target: list[bool] = []
        for index, (text, segment_is_target) in enumerate(segments):
            new = list(self._tokenizer(text, add_special_tokens=index == 0)["input_ids"])
            if index == 0 and new and new[-1] == self._eos:
                new.pop()
            if segment_is_target:
                new.append(self._eos)
            ids += new
            is_target += [segment_is_target] * len(new)
        return self._encoded(ids, is_target)

    def _chat(self, turns: Chat) -> Encoded:
        if self._marks:
            assert self.template is not None
            return self._encoded(*chat.marked_tokens(self._tokenizer, self.template, turns.turns, self._special))
        text, spans = chat.answer_spans(turns.turns, self._render, self._special)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, is_target = list(encoded["input_ids"]), _covered(encoded["offset_mapping"], spans)
        answered_last = bool(spans) and not text[spans[-1][1] :].strip()
        if answered_last and not chat.is_closed(text[slice(*spans[-1])], self._special):
            # The template does not close the last turn; without an end the model would never learn to stop.
            ids, is_target = [*ids, self._eos], [*is_target, True]
        return self._encoded(ids, is_target)

    def _encoded(self, ids: list[int], is_target: list[bool]) -> Encoded:
        if self._train_on_prompt:
            return Encoded(ids, list(ids))
        return Encoded(ids, [token if target else IGNORED for token, target in zip(ids, is_target, strict=True)])


def _covered(offsets: Iterable[tuple[int, int]], spans: list[chat.Span]) -> list[bool]:
    """Return for each token whether it starts inside one of the spans, which are sorted and do not overlap.

    A token that starts in the header and reaches into the answer is not a target: the header is given.
    """
    is_target = []
    index = 0
    for start, end in offsets:
        while index < len(spans) and start >= spans[index][1]:
            index += 1
        is_target.append(index < len(spans) and spans[index][0] <= start < end)
    return is_target


def _template(tokenizer: Tokenizer, chat_template: str) -> str | None:
    """Return the text of the Jinja template in use; None for the plain template."""
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
            f"--chat_template {chat_template}: not a readable file; use auto, tokenizer, plain, or a file that holds "
            "a Jinja template"
        ) from error
