"""A conversation -> input_ids, and labels that say which tokens are targets."""

import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from superoffload.config import DataSettings
from superoffload.data import chat, template
from superoffload.data.formats import BadRow, Chat, Conversation, Pair, Text, turns_of
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer

IGNORED = -100  # the label of a token that is not a target
CHARACTERS_AT_A_TIME = 2**20  # tokenised together: a fast tokenizer holds about 300 bytes per token until it is done
VERSION = 6  # of the encoding here and of reading in formats.py and messages.py; in the cache's key

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

    `labels[i]` is `input_ids[i]` if the token is a target, else -100. The model shifts the labels itself. The row has
    `empty` answers without a word, `untrained` turns that it keeps out of the loss itself, and `unwritten` fields that
    the template leaves out; none of them has a target.
    """

    input_ids: list[int]
    labels: list[int]
    empty: int = 0
    untrained: int = 0
    unwritten: int = 0

    @property
    def target_tokens(self) -> int:
        """Return the number of labels that are predicted; the first is not, because no token precedes it."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(IGNORED)

    @property
    def shortest(self) -> int:
        """Return the smallest length that includes a target token; 0 if the row has none."""
        return next((i + 1 for i, label in enumerate(self.labels) if i and label != IGNORED), 0)

    def head(self, max_length: int) -> "Encoded":
        """Truncate to the first `max_length` tokens, which keeps the start of an answer that is too long."""
        return replace(self, input_ids=self.input_ids[:max_length], labels=self.labels[:max_length])

    def pieces(self, max_length: int) -> "list[Encoded]":
        """Split into pieces of at most `max_length` tokens, which together have exactly the row's targets.

        A piece begins with the last token of the one before. A token is predicted from the one before it, so without
        this overlap the first token of each later piece would be lost as a target. The shared token is a target in the
        earlier piece only, since the first token of a row never is one. The first piece has the counts of the row.
        """
        if len(self.input_ids) <= max_length:
            return [self]
        result = [self.head(max_length)]
        for start in range(max_length - 1, len(self.input_ids) - 1, max_length - 1):
            ids = self.input_ids[start : start + max_length]
            result.append(Encoded(ids, [IGNORED, *self.labels[start + 1 : start + max_length]]))
        return result


def alpaca_prompt(pair: Pair) -> str:
    """Write a prompt as upstream does, in the Alpaca template; the input heading is left out if there is no input."""
    context = INPUT + pair.context if pair.context.strip() else ""
    return INSTRUCTION + pair.prompt + context + RESPONSE


def as_chat(pair: Pair) -> Chat:
    """Write a pair as a user turn and an assistant turn."""
    return Chat(turns_of(pair))


def plain_segments(turns: Chat) -> list[tuple[str, bool]]:
    """Write turns under `### System:`, `### User:`, `### Tool:` and `### Assistant:`, separated by empty lines.

    Returns texts, and for each whether it is the content of an assistant turn.
    """
    segments: list[tuple[str, bool]] = []
    given = ""
    for turn in turns.turns:
        given += PLAIN_HEADS[turn["role"]]
        if turn["role"] == "assistant":
            segments += [(given, False), (turn["content"] or "", True)]
            given = "\n\n"
        else:
            given += f"{turn['content'] or ''}\n\n"
    return [*segments, (given.rstrip(), False)] if given.strip() else segments


def _beside_plain(turns: Chat) -> list[str]:
    """List what the plain template leaves out of a row."""
    beside = [name for name, value in (("tools", turns.tools), ("documents", turns.documents)) if value]
    for index, turn in enumerate(turns.turns):
        if turn["role"] == "assistant":
            fields = ["tool_calls"] if turn.get("tool_calls") else []
            fields += [name] if (name := template.reasoning_name(turn)) else []
            beside += [f"{field} of message {index + 1}" for field in fields]
    return beside


@dataclass(frozen=True, slots=True)
class _Segments:
    """A row as texts to tokenise separately, and for each whether it is an answer.

    Separately, so that an answer follows exactly the tokens of the prompt alone, as it does in generation. `trained`
    says which answers are targets, all of them if it is empty; `unwritten` fields are in no text.
    """

    texts: list[tuple[str, bool]]
    trained: Sequence[bool] = ()
    unwritten: int = 0


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation as the text that a template makes of it, and where the assistant speaks in it."""

    row: Chat
    found: chat.Found


class Encoder:
    """Turns conversations into tokens with one tokenizer and one template.

    `settings.chat_template` is `auto` (upstream's Alpaca headings for pairs; for chats the tokenizer's template, or
    the plain one if it has none), `tokenizer`, `plain`, the name of one of the tokenizer's templates, or a file that
    holds a template. `template` is the text of the Jinja template, None if none is used. Raises `UserError` if the
    template is missing or cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, settings: DataSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._eos = tokenizer.eos_token_id
        self._decode = tokenizer.backend_tokenizer.decode if tokenizer.is_fast else tokenizer.decode
        self._bos = getattr(tokenizer, "bos_token_id", None)
        self._bos_text = getattr(tokenizer, "bos_token", None) or ""
        self._pairs_as_chat = settings.chat_template != "auto"
        self.template = template.choose(tokenizer, settings.chat_template)
        self._jinja: template.Template | None = None
        flag = f"--chat_template {settings.chat_template}"
        if self.template is not None and not tokenizer.is_fast:
            raise UserError(
                f"{flag}: needs a fast tokenizer, which reports the characters that each token covers; "
                "use --chat_template plain"
            )
        if self.template is not None:
            self._jinja = template.Template(self.template, tokenizer, flag)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self._special = chat.special_tokens(tuple(special), tokenizer.eos_token or "")

    def __call__(self, conversation: Conversation) -> Encoded:
        """Encode one row without truncating it.

        Raises `BadRow` if the template rejects it, or if the targets would not say exactly what the row says.
        """
        [result] = self.encode([conversation])
        if isinstance(result, BadRow):
            raise result
        return result

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | BadRow]:
        """Encode rows without truncating them, tokenised together, which takes less time than one after the other.

        The result of a row that cannot be encoded is the error that `__call__` would raise.
        """
        written = [self._write(conversation) for conversation in conversations]
        in_segments = [text for text in written if isinstance(text, _Segments)]
        openings = self._tokenize([text for row in in_segments for text, _ in row.texts[:1]], special=True)
        others = self._tokenize([text for row in in_segments for text, _ in row.texts[1:]])
        rendered = [text.found.text for text in written if isinstance(text, _Rendered)]
        covering = self._tokenize_with_offsets(rendered)
        result: list[Encoded | BadRow] = []
        for row in written:
            try:
                if isinstance(row, _Segments):
                    first = [self._opening(next(openings)) for _ in row.texts[:1]]
                    result.append(self._join(row, [*first, *(next(others) for _ in row.texts[1:])]))
                elif isinstance(row, _Rendered):
                    result.append(self._label(row, *next(covering)))
                else:
                    result.append(row)
            except BadRow as error:
                result.append(error)
        return result

    def _write(self, conversation: Conversation) -> "_Segments | _Rendered | BadRow":
        """Write a row as text; return the error if that is impossible."""
        if isinstance(conversation, Text):
            return _Segments([(conversation.text, True)])
        if isinstance(conversation, Pair):
            conversation = replace(conversation, prompt=conversation.prompt.removeprefix(self._bos_text))
            if not self._pairs_as_chat:
                return _Segments([(alpaca_prompt(conversation), False), (conversation.answer, True)])
            conversation = as_chat(conversation)
        if not self._settings.train_on_prompt:
            conversation = replace(conversation, untrained=conversation.untrained | conversation.given)
        try:
            return self._plain(conversation) if self._jinja is None else self._chat(conversation, self._jinja)
        except BadRow as error:
            return error

    def takes_turns(self, kind: type[Conversation]) -> bool:
        """Return whether rows that are read as `kind` are written as turns, so that a prompt may follow others."""
        return kind is Chat or (kind is Pair and self._pairs_as_chat)

    def prompt_ids(self, prompt: str, kind: type[Conversation], before: Sequence[template.Turn] = ()) -> list[int]:
        """Tokenise a prompt as in a row that is read as `kind`, up to where the answer begins.

        `before` holds the turns before it, if `takes_turns(kind)`. Raises `BadRow` if the template rejects it.
        """
        prompt = prompt.removeprefix(self._bos_text) if kind is Pair else prompt
        turns = [*before, *as_chat(Pair(prompt=prompt, context="", answer="")).turns]
        if kind is Text:
            return self._first_ids(prompt)
        if not self.takes_turns(kind):
            return self._first_ids(alpaca_prompt(Pair(prompt=prompt, context="", answer="")))
        if self._jinja is not None:
            return next(self._tokenize([self._jinja.render(turns[:-1], ask=True)]))
        (opening, _), *others = plain_segments(Chat(tuple(turns)))[:-1]
        ids = self._first_ids(opening)
        for (_, is_answer), new in zip(others, self._tokenize([text for text, _ in others]), strict=True):
            ids += [*new, self._eos] if is_answer and new[-1:] != [self._eos] else new
        return ids

    def end_ids(self, kind: type[Conversation]) -> list[int]:
        """Return the tokens that end an answer in rows read as `kind`: what a model trained on them stops with."""
        ends = [self._eos]
        if self.takes_turns(kind) and self._jinja is not None:
            try:
                row = self(as_chat(Pair(prompt="q", context="", answer="a")))
            except BadRow:  # a template that asks for more than a question and an answer
                return ends
            targets = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
            last = targets[-1] if targets else self._eos
            if last not in ends and self._special.at_end(self._decode([last], skip_special_tokens=False)):
                ends.append(last)
        return ends

    def _first_ids(self, text: str) -> list[int]:
        return self._opening(next(self._tokenize([text], special=True)))

    def _opening(self, ids: list[int]) -> list[int]:
        """Return the tokens of the start of a row: with the beginning-of-sequence token once, and without an end."""
        if len(ids) > 1 and self._bos is not None and ids[0] == ids[1] == self._bos:
            ids = ids[1:]
        return ids[:-1] if ids and ids[-1] == self._eos else ids

    def _tokenize(self, texts: list[str], special: bool = False) -> Iterator[list[int]]:
        """Yield the tokens of each text, with `special` those that the tokenizer adds to a text of its own accord."""
        for part in _parts(texts):
            yield from self._tokenizer(
                part, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
            )["input_ids"]

    def _tokenize_with_offsets(self, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yield the tokens of each text, and the characters that each of them covers."""
        for part in _parts(texts):
            encoded = self._tokenizer(
                part,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=True,
            )
            yield from zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)

    def _plain(self, turns: Chat) -> "_Segments":
        unwritten = _beside_plain(turns)
        if unwritten and not self._settings.drop_unrendered:
            raise BadRow(
                f"the plain template does not write {unwritten[0]}; choose another with --chat_template, "
                "or leave such fields out with --drop_unrendered"
            )
        answers = [index for index, turn in enumerate(turns.turns) if turn["role"] == "assistant"]
        return _Segments(
            plain_segments(turns), [index not in turns.untrained for index in answers], unwritten=len(unwritten)
        )

    def _join(self, row: "_Segments", tokens: Sequence[list[int]]) -> Encoded:
        """Join the tokens of segments, and end each answer with the end-of-sequence token.

        Targets are found by length and never by token id, so that the model learns to stop even if the padding token
        is the end-of-sequence token.
        """
        ids: list[int] = []
        labels: list[int] = []
        number = empty = untrained = 0
        every = self._settings.train_on_prompt
        for (text, is_answer), new in zip(row.texts, tokens, strict=True):
            target = is_answer or every
            if is_answer:
                self._check(new, text.removesuffix(self._special.eos))
                if row.trained and not row.trained[number]:
                    target, untrained = False, untrained + 1
                elif not text.strip() and not self._settings.keep_empty_answers:
                    target, empty = every, empty + 1
                number += 1
                if not new or new[-1] != self._eos:
                    new.append(self._eos)
            ids += new
            labels += new if target else [IGNORED] * len(new)
        return Encoded(ids, labels, empty=empty, untrained=untrained, unwritten=row.unwritten)

    def _chat(self, row: Chat, jinja: template.Template) -> "_Rendered":
        keep_empty = self._settings.keep_empty_answers
        found = chat.find(
            row, jinja, self._special, keep_empty=keep_empty, drop_unrendered=self._settings.drop_unrendered
        )
        return _Rendered(row, found)

    def _label(self, rendered: "_Rendered", ids: list[int], offsets: Sequence[tuple[int, int]]) -> Encoded:
        """Find the targets among the tokens of a rendered conversation; `offsets` are the characters of each token."""
        row, found, text = rendered.row, rendered.found, rendered.found.text
        every = self._settings.train_on_prompt
        answers = {index for index, turn in enumerate(row.turns) if turn["role"] == "assistant"}
        labels = list(ids) if every else [IGNORED] * len(ids)
        for turn in found.said if every else [turn for turn in found.said if turn.turn not in row.untrained]:
            tokens = _covered(offsets, turn, text)
            if turn.turn in row.untrained:
                labels[tokens] = [IGNORED] * len(ids[tokens])
                continue
            self._check(ids[tokens], text[turn.start : turn.end])
            labels[tokens] = ids[tokens]
        last = found.said[-1] if found.said else None
        if last is not None and not last.closed and not text[last.end :].strip():
            # The template does not close the last turn; without an end the model would never learn to stop.
            ids.append(self._eos)
            labels.append(self._eos if last.turn not in row.untrained else IGNORED)
        return Encoded(
            ids,
            labels,
            empty=len(answers - row.untrained - {turn.turn for turn in found.said}),
            untrained=len(answers & row.untrained),
            unwritten=found.unwritten,
        )

    def _check(self, ids: Sequence[int], text: str) -> None:
        """Raise `BadRow` unless tokens say a text, apart from what a tokenizer may normalise."""
        decoded = self._decode(ids, skip_special_tokens=False)
        if text not in decoded and _loosely(text) not in _loosely(decoded):
            raise BadRow(f"the tokenizer cannot write what the assistant says: it becomes {decoded[:200]!r}")


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in lists to tokenise together; one that is long comes with few others, or alone."""
    part: list[str] = []
    size = 0
    for text in texts:
        if part and size + len(text) > CHARACTERS_AT_A_TIME:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield part


def _loosely(text: str) -> str:
    """Remove what tokenizers normalise: white space (U+2581 too, which stands for it), case, accents, other forms."""
    kept = (char for char in unicodedata.normalize("NFKD", text) if unicodedata.category(char) not in ("Mn", "Cf"))
    return "".join("".join(kept).replace("\u2581", " ").split()).lower()


def _covered(offsets: Sequence[tuple[int, int]], said: chat.Said, text: str) -> slice:
    """Return the tokens that say what is said in one turn; `offsets` are the characters that each token covers.

    A token counts if it starts inside what is said. One that starts before it counts if it only takes the white space
    that the template writes after the prompt; in generation it comes right after the prompt's tokens. Raises `BadRow`
    if a token holds a part of an answer and other text.
    """
    first = bisect_left(offsets, (said.start,))
    last = bisect_left(offsets, (said.end,), lo=first)
    while first and offsets[first - 1][1] > said.start:
        first -= 1
    while first < last:
        start, end = offsets[first]
        reached = offsets[first - 1][1] if first else 0
        # Some tokenizers leave white space out of the offsets.
        start = reached if reached < start and text[reached:start].isspace() else start
        if start >= said.start or (start >= said.given and text[start : said.start].isspace()):
            break
        if text[said.start : end].strip():
            raise BadRow(f"one token holds the start of message {said.turn + 1} and the text before it")
        first += 1
    if first < last and text[said.end : offsets[last - 1][1]].strip():
        raise BadRow(f"one token holds the end of message {said.turn + 1} and the text after it")
    return slice(first, last)
