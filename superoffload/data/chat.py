"""Find the assistant's turns in a rendered chat template, exactly or not at all."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from superoffload.data import skeleton
from superoffload.data.formats import BadRow, Chat
from superoffload.data.skeleton import Drawn, Skeleton
from superoffload.data.template import OPENED, Form, Span, Template, Turn, in_form, shared

# What a template writes if it does not expect null content.
PRINTED_NULL = re.compile(r"\b(None|null|Undefined)\b")


@dataclass(frozen=True, slots=True)
class Said:
    """What the assistant says in one turn: the characters from `start` to `end` of the text.

    `given` is where the prompt ends that asks for it; the template writes only white space between `given` and
    `start`, or a header that no prompt has. `closed` is whether the end-of-turn token is in the span.
    """

    turn: int
    given: int
    start: int
    end: int
    closed: bool


@dataclass(frozen=True, slots=True)
class Found:
    """The text of a conversation, what the assistant says in it, and how many fields the template leaves out."""

    text: str
    said: list[Said]
    unwritten: int = 0


@dataclass(frozen=True, slots=True)
class Special:
    """The special tokens of a tokenizer: a pattern that matches any of them, and the end-of-sequence token."""

    pattern: re.Pattern[str]
    eos: str

    def at_end(self, text: str) -> bool:
        """Return whether a text ends with a special token."""
        return any(match.end() == len(text) for match in self.pattern.finditer(text))


def special_tokens(tokens: Sequence[str], eos: str) -> Special:
    """Make the pattern of special tokens; the longest one that fits wins."""
    ordered = sorted({*tokens, eos}, key=lambda token: (-len(token), token))
    return Special(re.compile("|".join(re.escape(token) for token in ordered)), eos)


def find(row: Chat, template: Template, special: Special, *, keep_empty: bool, drop_unrendered: bool) -> Found:
    """Render a conversation and find what the assistant says in it.

    The row is handed over in each form that the template may take, until one is written completely. With
    `drop_unrendered`, fields that the template leaves out are dropped instead of refused, in the form in which they are
    fewest; with `keep_empty`, turns that say nothing are found too. Raises `BadRow` if the template rejects the row,
    leaves out a field, or writes a turn in a way that cannot be told apart from what is around it.
    """
    forms = template.forms(row.turns)
    problems: list[BadRow] = []
    for drop in (False, True) if drop_unrendered else (False,):
        found: list[Found] = []
        for form in forms:
            try:
                found.append(_Search(row, template, special, form, keep_empty).found(drop))
            except BadRow as problem:
                problems.append(problem)
            if found and not found[-1].unwritten:
                return found[-1]
        if found:
            return min(found, key=lambda one: one.unwritten)
    raise problems[0]


class _Search:
    """The search in one rendering of one row."""

    def __init__(self, row: Chat, template: Template, special: Special, form: Form, keep_empty: bool) -> None:
        self._row, self._template, self._special, self._form = row, template, special, form
        self._keep_empty = keep_empty
        self._options: dict[str, Any] = {}
        if row.tools:
            self._options["tools"] = list(row.tools)
        if row.documents:
            self._options["documents"] = list(row.documents)
        self._use(list(row.turns))

    def _use(self, turns: list[Turn]) -> None:
        self._turns = in_form(turns, self._form)
        self._skeleton = Skeleton(turns, self._keep_empty)
        self._bare = in_form(self._skeleton.turns, self._form)
        self._pieces = self._skeleton.pieces

    def found(self, drop: bool) -> Found:
        """Find every turn of the assistant. Raises `BadRow` if one cannot be found."""
        drawn = Drawn(self._template.render(self._bare, **self._options))
        calls = [turn["tool_calls"] for turn in self._bare if turn.get("tool_calls")]
        if calls and skeleton.prints_python(calls, drawn.text):
            raise BadRow("the chat template writes the arguments of tool calls as Python, not as JSON")
        lost = skeleton.missing(drawn, self._pieces)
        if lost and not drop:
            raise BadRow(_unwritten(lost[0][1], lost[0][0], self._turns[lost[0][0]]["role"]))
        if lost:
            self._use(skeleton.without(self._row.turns, lost))
            drawn = Drawn(self._template.render(self._bare, **self._options))
            if skeleton.missing(drawn, self._pieces):
                raise BadRow("the chat template writes the assistant's turns otherwise without the fields it left out")
        marks: list[Span] | None = None
        if self._template.marked:
            self._text, marks = self._template.render_marked(self._turns, **self._options)
        else:
            self._text = self._template.render(self._turns, **self._options)
        others = self._unwritten_beside(drawn)
        if others and not drop:
            raise BadRow(others[0])
        self._drawn, self._places = drawn, skeleton.align(self._text, drawn, self._pieces)
        said: list[Said] = []
        for turn in sorted({piece.turn for piece in self._pieces}):
            floor = said[-1].end if said else 0
            said += [self._turn(turn, floor)] if marks is None else self._marked(turn, floor, marks)
        self._check_arguments(said)
        return Found(self._text, said, len(lost) + len(others))

    def _check_arguments(self, said: Sequence[Said]) -> None:
        for index, turn in enumerate(self._turns):
            if turn.get("tool_calls") and turn["role"] == "assistant":
                words = "".join(self._text[part.start : part.end] for part in said if part.turn == index)
                if not skeleton.writes_arguments(self._row.turns[index]["tool_calls"], words):
                    raise BadRow(_unwritten("tool_calls", index, turn["role"]))

    def _unwritten_beside(self, drawn: Drawn) -> list[str]:
        """List what the template leaves out of the row besides the assistant's turns."""
        turns = [(index, turn) for index, turn in enumerate(self._turns) if turn["role"] != "assistant"]
        lost = skeleton.unwritten([turn["content"] or "" for _, turn in turns], drawn.text)
        result = [_unwritten("content", turns[at][0], turns[at][1]["role"]) for at in lost]
        return result + [_unwritten(name) for name in self._options if self._without(name) == self._text]

    def _without(self, name: str) -> str:
        others = {key: value for key, value in self._options.items() if key != name}
        try:
            return self._template.render(self._turns, **others)
        except BadRow:
            return ""

    def _turn(self, turn: int, floor: int) -> Said:
        first, last, footer = self._extent(turn)
        given, start = self._start(turn, floor, self._places[first].start)
        end, closed = self._end(turn, self._places[last].end, footer)
        if not floor <= start <= self._places[first].start:
            raise BadRow(_not_found(turn, "it overlaps with the turn before"))
        if self._turns[turn].get("content") is None:
            written = [self._text[start : self._places[first].start], *self._drawn.literals[first + 1 : last + 1]]
            if PRINTED_NULL.search(" ".join(written)):
                raise BadRow(_not_found(turn, "the template prints its null content"))
        return Said(turn, given, start, end, closed)

    def _extent(self, turn: int) -> tuple[int, int, str]:
        """Return the first and last place of a turn's pieces, and what the template writes after them to end it.

        The conversation up to the turn shows what belongs to it: whatever else stands between its pieces in the whole
        conversation does not, and then the turn cannot be found.
        """
        alone = self._drawn
        if turn + 1 < len(self._bare):
            alone = Drawn(self._template.render(self._bare[: turn + 1], **self._options))
        own = alone.of_turn(self._pieces, turn)
        here = self._drawn.of_turn(self._pieces, turn)
        if not own or own != list(range(own[0], len(alone.pieces))):
            raise BadRow(_not_found(turn, "it is written in several places"))
        first, last = here[0], here[0] + len(own) - 1
        same = [alone.pieces[at] for at in own] == self._drawn.pieces[first : last + 1]
        between = alone.literals[own[0] + 1 : own[-1] + 1] == self._drawn.literals[first + 1 : last + 1]
        if not (same and between):
            raise BadRow(_not_found(turn, "the template writes it otherwise depending on what follows"))
        seen: set[int] = set()
        for at in here:
            piece = self._drawn.pieces[at]
            # A call may name its function twice, and so may the result that answers it.
            if piece in seen and self._pieces[piece].field != "tool_calls":
                raise BadRow(_not_found(turn, f"its {self._pieces[piece].field} is written twice"))
            seen.add(piece)
        return first, last, alone.literals[-1]

    def _start(self, turn: int, floor: int, limit: int) -> tuple[int, int]:
        """Return where the prompt for a turn ends and where the turn starts, at most `limit`."""
        try:
            asked = self._template.render(self._turns[:turn], ask=True, **self._options) if turn else ""
        except BadRow:
            asked = ""
        prompt = OPENED.sub("", asked)
        if asked and self._text.startswith(prompt) and floor <= len(prompt) <= limit:
            at = self._after(self._template.header, len(prompt), limit)
            if at is not None:  # a header that the prompt does not have here
                return at, at
            if self._template.header.strip() or not self._text[len(prompt) : limit].strip():
                return len(prompt), len(prompt)
            at = self._after(self._template.before_answer, len(prompt), limit)
            if at is None and self._template.before_answer.strip():
                raise BadRow(_not_found(turn, "the header before it is not that of other answers"))
            return len(prompt), len(prompt) if at is None else at
        header = asked[shared(self._closed_before(turn), asked) :] if asked else self._template.header
        unasked = not OPENED.sub("", header).strip()
        if unasked:
            header = self._template.before_answer
            first = next(piece.field for piece in self._pieces if piece.turn == turn)
            if first == "content" and not header.strip():
                return floor, limit
        at = self._after(header, floor, limit)
        if at is None:
            raise BadRow(_not_found(turn, "the header before it is not that of other answers"))
        return len(self._text[:at].rstrip()) if unasked else at, at

    def _after(self, header: str, start: int, end: int) -> int | None:
        """Return where the last header of a part of the text ends; white space around it may differ."""
        header = OPENED.sub("", header)
        core = header.strip()
        at = self._text.rfind(core, start, end) if core else -1
        if at < 0:
            return None
        at += len(core)
        return at + shared(header[len(header.rstrip()) :], self._text[at:end])

    def _closed_before(self, turn: int) -> str:
        try:
            return self._template.render(self._turns[:turn], **self._options) if turn else ""
        except BadRow:
            return ""

    def _end(self, turn: int, start: int, footer: str) -> tuple[int, bool]:
        """Return where a turn ends whose last piece ends at `start`, and whether that is after an end-of-turn token.

        `footer` is what the template writes after the turn if nothing follows. If something follows, it may write
        less, another token, or the token only then.
        """
        text, special = self._text, self._special
        if text.startswith(footer, start):
            said = footer.rstrip()
            if special.at_end(said):
                return start + len(said), True
            return self._next_token(turn, start + len(footer)) or (start + len(footer), False)
        common = shared(footer, text[start : start + len(footer)])
        matches = list(special.pattern.finditer(footer))
        within = [match.end() for match in matches if match.end() <= common]
        if within:
            return start + within[-1], True
        differs = min([match.start() for match in matches if match.start() <= common], default=0)
        found = self._next_token(turn, start + differs)
        if found is None and not matches and footer.strip():
            raise BadRow(_not_found(turn, "the template ends it otherwise depending on what follows"))
        return found or (start + differs, False)

    def _next_token(self, turn: int, position: int) -> tuple[int, bool] | None:
        """Return the end of the special token at a position if it ends turns; None if it opens the next one.

        The token ends turns if it is the end-of-sequence token, or if it also ends the turn before or a user turn.
        """
        while position < len(self._text) and self._text[position].isspace():
            position += 1
        match = self._special.pattern.match(self._text, position)
        if match is None:
            return None
        ended = (self._special.eos, self._template.closed.rstrip(), self._closed_before(turn).rstrip())
        return (match.end(), True) if any(text.endswith(match.group()) for text in ended) else None

    def _marked(self, turn: int, floor: int, marks: Sequence[Span]) -> list[Said]:
        """Return the marked spans of a turn. If they leave out its end-of-turn token, it is part of the last one."""
        places = [self._places[at] for at in self._drawn.of_turn(self._pieces, turn)]
        inside = [[p.piece for p in places if start <= p.start and p.end <= end] for start, end in marks]
        if {piece for pieces in inside for piece in pieces} != {place.piece for place in places}:
            raise BadRow(_not_found(turn, "its generation marks do not enclose it"))
        own = [number for number, pieces in enumerate(inside) if pieces and marks[number][0] >= floor]
        if not own or self._holds_turn_before(turn, marks[own[0]][0], places[0].start):
            raise BadRow(_not_found(turn, "its generation marks enclose other turns too"))
        first, last = own[0], own[-1]
        # A mark beside these with nothing between belongs to the turn as well, e.g. one around the end-of-turn token.
        while first and marks[first - 1][0] >= floor and not self._text[marks[first - 1][1] : marks[first][0]].strip():
            first -= 1
        while last + 1 < len(marks) and not self._text[marks[last][1] : marks[last + 1][0]].strip():
            last += 1
        spans = [mark for mark in marks[first : last + 1] if mark[0] < mark[1]]
        said = [Said(turn, 0, start, end, self._special.at_end(self._text[start:end].rstrip())) for start, end in spans]
        if not said[-1].closed:
            _, last, footer = self._extent(turn)
            end, closed = self._end(turn, self._places[last].end, footer)
            if closed and end > said[-1].end:
                said[-1] = Said(turn, 0, said[-1].start, end, True)
        return said

    def _holds_turn_before(self, turn: int, start: int, end: int) -> bool:
        """Return whether the text from `start` to `end` includes what the turn before this one says."""
        words = str(self._turns[turn - 1].get("content") or "").strip() if turn else ""
        if not words or words not in self._text[start:end]:
            return False
        before = self._closed_before(turn)
        return self._text.startswith(before.rstrip()) and words in self._text[start : len(before)]


def _unwritten(field: str, turn: int | None = None, role: str = "") -> str:
    where = f" of message {turn + 1} ({role})" if turn is not None else ""
    return (
        f"the chat template does not write {field}{where}; choose another with --chat_template, "
        "or leave such fields out with --drop_unrendered"
    )


def _not_found(turn: int, reason: str) -> str:
    return (
        f"the assistant's answer (message {turn + 1}) cannot be found in the text of the chat template: {reason}; "
        "use --chat_template plain, or a template with {% generation %} marks"
    )
