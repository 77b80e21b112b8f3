"""Rows of every known shape -> what was asked and what was answered; pure.

| shape             | columns                                             | trained on                      |
| ----------------- | --------------------------------------------------- | ------------------------------- |
| alpaca            | `instruction`, `output`, and `input` where there is | the output                      |
| messages          | `messages`: a list of `{role, content}`, or         | every turn of the assistant     |
|                   | `conversations`: a list of `{from, value}`          |                                 |
| prompt_completion | `prompt`, `completion`                              | the completion                  |
| text              | `text`                                              | every token                     |
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superoffload.config import parse_columns
from superoffload.errors import UserError

# The columns that a row of the shape must have. The order decides where a data set has the columns of two.
REQUIRED = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = {"alpaca": ("input",)}
ALSO_KNOWN_AS = {"messages": "conversations"}
KNOWN = (
    "alpaca (instruction, output), messages (messages or conversations), prompt_completion (prompt, completion), "
    "text (text)"
)
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class BadRow(Exception):
    """Says what is wrong with one row; whoever knows the row's number adds it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A request, perhaps with a text it refers to, and the answer to learn."""

    request: str
    context: str
    answer: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns of `role`, `content` (text, or None beside tool calls) and what else a template may know."""

    turns: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A text to continue: every token of it counts."""

    text: str


Conversation = Pair | Chat | Text


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a data set's rows: its name, and the column that holds each part."""

    name: str
    columns: Mapping[str, str]

    def get(self, row: Mapping[str, Any], part: str) -> Any:
        """Return a part of a row; None where the row lacks it."""
        return row.get(self.columns.get(part, part))


def detect(found: Sequence[str], requested: str, renamed: str | None) -> Shape:
    """Recognise the shape of rows that have the columns `found`.

    `requested` is `--dataset_format`, `renamed` is `--columns`. Raises `UserError` that names what was seen
    and what is known where no shape fits or the requested one does not.
    """
    names = parse_columns(renamed)
    parts = {part for shape in REQUIRED for part in (*REQUIRED[shape], *OPTIONAL.get(shape, ()))}
    for part, column in names.items():
        if part not in parts and part not in ALSO_KNOWN_AS.values():
            raise UserError(f"--columns {renamed}: no shape has a part {part}; parts are {', '.join(sorted(parts))}")
        if column not in found:
            raise UserError(f"--columns {renamed}: no column {column}; the columns are {_listed(found)}")
    names = {next((to for to, alias in ALSO_KNOWN_AS.items() if alias == part), part): c for part, c in names.items()}
    # What --columns names says which shape is meant, whatever other columns there are.
    candidates = [requested] if requested != "auto" else [s for s in REQUIRED if set(names) & set(REQUIRED[s])]
    for shape in candidates or REQUIRED:
        columns = {part: _column(part, found, names) for part in (*REQUIRED[shape], *OPTIONAL.get(shape, ()))}
        if all(columns[part] in found for part in REQUIRED[shape]):
            return Shape(shape, columns)
    if requested != "auto":
        needs = ", ".join(REQUIRED[requested])
        raise UserError(
            f"--dataset_format {requested}: needs the columns {needs}, the data set has {_listed(found)}; "
            f"name them with --columns, e.g. {REQUIRED[requested][0]}={next(iter(found), 'column')}"
        )
    raise UserError(
        f"--dataset_format auto: the columns {_listed(found)} are of no known shape; known are {KNOWN}; "
        "name the columns with --columns, e.g. prompt=question,completion=answer"
    )


def _column(part: str, found: Sequence[str], names: Mapping[str, str]) -> str:
    if part in names:
        return names[part]
    alias = ALSO_KNOWN_AS.get(part)
    return alias if alias and part not in found and alias in found else part


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) or "(none)"


def read(row: Mapping[str, Any], shape: Shape) -> Conversation:
    """Read a row of a known shape; raise `BadRow` where a part is missing or of the wrong type."""
    if shape.name == "messages":
        return Chat(_turns(shape.get(row, "messages")))
    if shape.name == "text":
        return Text(_text(shape.get(row, "text"), shape.columns["text"]))
    if shape.name == "prompt_completion":
        request, context = shape.get(row, "prompt"), None
        answer_part = "completion"
    else:
        request, context = shape.get(row, "instruction"), shape.get(row, "input")
        answer_part = "output"
    request_part = REQUIRED[shape.name][0]
    return Pair(
        request=_text(request, shape.columns[request_part]),
        context="" if context is None else _text(context, shape.columns["input"]),
        answer=_text(shape.get(row, answer_part), shape.columns[answer_part]),
    )


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} holds invalid UTF-8") from None
    return value


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def _turns(value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):  # a column of a csv file can hold a list as JSON only
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow("the messages are text that is not JSON") from None
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"the messages are {_kind(value)}, not a list")
    if not value:
        raise BadRow("the list of messages is empty")
    return tuple(_turn(turn, number) for number, turn in enumerate(value, 1))


def _turn(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRow(f"message {number} is {_kind(turn)}, not a record of role and content")
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    if role is None:
        raise BadRow(f"message {number} has no role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    # Arrow gives every record every field that any record has; what a record lacks is None there.
    known = ("role", "from", "content", "value")
    more = {key: item for key, item in turn.items() if key not in known and item is not None}
    if content is None and more.get("tool_calls"):
        return {"role": ROLES[role.lower()], "content": "", **more}
    return {"role": ROLES[role.lower()], "content": _content(content, number), **more}


def _content(content: Any, number: int) -> str:
    """Join content given as parts, `{"type": "text", "text": ...}` or plain strings, to one text."""
    if not isinstance(content, (list, tuple)):
        return _text(content, f"content of message {number}")
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise BadRow(f"message {number} holds a part of type {part['type']!r}; only text can be trained on")
        texts.append(_text(part.get("text") if isinstance(part, Mapping) else part, f"a part of message {number}"))
    return "".join(texts)
