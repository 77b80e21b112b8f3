"""What the assistant says, piece by piece, and where each piece is in the text of a template.

A *piece* is a text of an assistant turn: content, reasoning, the name of a call, or a text in its arguments. In a
skeleton, each piece is replaced by a placeholder. The rendered skeleton shows which pieces a template writes, where,
and what it writes around them; the rendered conversation must be the same text with the pieces filled in.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superoffload.data.formats import BadRow
from superoffload.data.template import REASONING, Turn, reasoning_name

PREFIX = "Qx7zPiece"  # letters and digits only: no escaping changes them, and no row contains them
PLACEHOLDER = re.compile(PREFIX + r"(\d+)Zj")
TAG = re.compile(r"(</?(?:think|thinking|thought|reasoning)>)")


@dataclass(frozen=True, slots=True)
class Piece:
    """A text of the assistant: in which turn (from 0) and field, without the white space around it."""

    turn: int
    field: str
    text: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece is in a text: the characters from `start` to `end`."""

    piece: int
    start: int
    end: int


class Skeleton:
    """Turns with placeholders instead of the pieces.

    White space around a piece, and tags of reasoning inside content, stay as they are, because templates look for
    them. With `keep_empty`, an assistant turn that says nothing has one empty piece, else none.
    """

    def __init__(self, turns: Sequence[Turn], keep_empty: bool) -> None:
        self.pieces: list[Piece] = []
        self.turns = [
            self._assistant(turn, index, keep_empty) if turn["role"] == "assistant" else turn
            for index, turn in enumerate(turns)
        ]

    def _assistant(self, turn: Turn, index: int, keep_empty: bool) -> Turn:
        before = len(self.pieces)
        result = dict(turn)
        name = reasoning_name(turn)
        if name is not None:
            result |= dict.fromkeys([key for key in REASONING if key in turn], self._text(turn[name], index, name))
        if isinstance(turn.get("content"), str):
            result["content"] = self._content(turn["content"], index)
        if turn.get("tool_calls"):
            result["tool_calls"] = [self._call(call, index) for call in turn["tool_calls"]]
        if len(self.pieces) == before and keep_empty:
            result["content"] = (turn.get("content") or "") + self._placeholder("", index, "content")
        return result

    def _placeholder(self, text: str, index: int, field: str) -> str:
        self.pieces.append(Piece(index, field, text))
        return f"{PREFIX}{len(self.pieces) - 1}Zj"

    def _text(self, text: str, index: int, field: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        return text[:start] + self._placeholder(core, index, field) + text[start + len(core) :]

    def _content(self, content: str, index: int) -> str:
        parts = TAG.split(content)
        result = ""
        for number, part in enumerate(parts):
            closes = number + 1 < len(parts) and parts[number + 1].startswith("</")
            result += part if number % 2 else self._text(part, index, "reasoning in content" if closes else "content")
        return result

    def _call(self, call: Any, index: int) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"], index)}
        result = dict(call)
        if isinstance(call.get("name"), str):
            result["name"] = self._text(call["name"], index, "tool_calls")
        if "arguments" in call:
            result["arguments"] = self._argument(call["arguments"], index)
        return result

    def _argument(self, value: Any, index: int) -> Any:
        if isinstance(value, str):
            return self._text(value, index, "tool_calls")
        if isinstance(value, Mapping):
            return {key: self._argument(item, index) for key, item in value.items()}
        return [self._argument(item, index) for item in value] if isinstance(value, (list, tuple)) else value


def writes_arguments(calls: Any, said: str) -> bool:
    """Return whether a text holds the names of all arguments and the values that are not text, which are no pieces."""
    if isinstance(calls, (list, tuple)):
        return all(writes_arguments(call, said) for call in calls)
    if not isinstance(calls, Mapping):
        return isinstance(calls, str) or str(calls) in said or json.dumps(calls, default=str) in said
    if "function" in calls or "arguments" in calls:
        return writes_arguments(calls.get("function", calls.get("arguments")), said)
    return all(is_written(str(key), said) and writes_arguments(value, said) for key, value in calls.items())


def prints_python(value: Any, text: str) -> bool:
    """Return whether a text holds a mapping or list as Python prints it, which differs from JSON."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    if any(prints_python(item, text) for item in items):
        return True
    return bool(items) and str(value) in text and str(value) != json.dumps(value, ensure_ascii=False, default=str)


class Drawn:
    """A rendered skeleton: `literals[i]` comes before placeholder `pieces[i]`; the last literal ends the text."""

    def __init__(self, text: str) -> None:
        split = PLACEHOLDER.split(text)
        self.text = text
        self.literals = split[::2]
        self.pieces = [int(number) for number in split[1::2]]

    def of_turn(self, pieces: Sequence[Piece], turn: int) -> list[int]:
        """Return the positions in `pieces` of the placeholders of one turn."""
        return [at for at, piece in enumerate(self.pieces) if pieces[piece].turn == turn]


def align(text: str, drawn: Drawn, pieces: Sequence[Piece]) -> list[Place]:
    """Find every piece in a text, which must be the skeleton's text with the pieces filled in.

    A piece may be escaped, as texts in JSON are. Raises `BadRow`, which names the message, if the texts differ.
    """
    if PREFIX in text:
        raise BadRow(f"it holds the text {PREFIX}, which this program uses itself")
    places: list[Place] = []
    position = 0
    if not text.startswith(drawn.literals[0]):
        raise BadRow("the chat template writes other text depending on what the assistant says")
    for piece, before, after in zip(drawn.pieces, drawn.literals, drawn.literals[1:], strict=False):
        start = position + len(before)
        length = _length(text, start, pieces[piece].text, after)
        if length < 0:
            raise BadRow(f"the chat template changes {pieces[piece].field} of message {pieces[piece].turn + 1}")
        position = start + length
        places.append(Place(piece, start, position))
    if position + len(drawn.literals[-1]) != len(text):
        raise BadRow("the chat template writes other text depending on what the assistant says")
    return places


def _length(text: str, start: int, piece: str, after: str) -> int:
    """Return the length that a piece has at `start`, -1 if it is not there with `after` behind it."""
    for written in (piece, *_escaped(piece)):
        if text.startswith(written, start) and text.startswith(after, start + len(written)):
            return len(written)
    return -1


def _escaped(piece: str) -> list[str]:
    quoted = piece.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return [json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1], quoted]


def is_written(content: str, text: str) -> bool:
    """Return whether a template has written the content of a turn, perhaps escaped or without the space around it."""
    core = content.strip()
    return core in text or any(written in text for written in _escaped(core))


def unwritten(contents: Sequence[str], text: str) -> list[int]:
    """List the positions of contents that have no place of their own in a text, each perhaps escaped or stripped."""
    result = []
    for index in sorted(range(len(contents)), key=lambda index: -len(contents[index])):
        core = contents[index].strip()
        written = core if core in text else next((other for other in _escaped(core) if other in text), None)
        if written is None:
            result.append(index)
        elif written:
            text = text.replace(written, "\n", 1)
    return sorted(result)


def missing(drawn: Drawn, pieces: Sequence[Piece]) -> list[tuple[int, str]]:
    """List the turns and fields of which the template leaves out a piece."""
    written = set(drawn.pieces)
    return sorted({(piece.turn, piece.field) for index, piece in enumerate(pieces) if index not in written})


def without(turns: Sequence[Turn], fields: Sequence[tuple[int, str]]) -> list[Turn]:
    """Remove fields of turns, given as `missing` does."""
    result = list(turns)
    for index, field in fields:
        turn = result[index]
        if field == "content":
            result[index] = {**turn, "content": ""}
        elif field == "reasoning in content":
            result[index] = {**turn, "content": TAG.split(turn["content"])[-1].lstrip()}
        else:
            gone = REASONING if field in REASONING else (field,)
            result[index] = {key: value for key, value in turn.items() if key not in gone}
    return result
