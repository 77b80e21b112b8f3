"""Rows of every known format -> prompts and answers; pure.

| format            | columns                                     | targets                     |
| ----------------- | ------------------------------------------- | --------------------------- |
| alpaca            | `instruction`, `output`, optionally `input` | the output                  |
| messages          | `messages`: a list of `{role, content}`, or | every assistant turn        |
|                   | `conversations`: a list of `{from, value}`  |                             |
| prompt_completion | `prompt`, `completion`                      | the completion              |
| text              | `text`                                      | every token                 |
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superoffload.config import parse_columns
from superoffload.errors import UserError

# The columns that a row of each format must have. If a data set fits two formats, the first one is used.
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
    """What is wrong with one row, without its number, which the caller adds."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, the text it refers to (may be empty), and the answer to learn."""

    prompt: str
    context: str
    answer: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns with `role`, `content` (None if a turn has only tool calls) and any other fields a template may use.

    tools, documents: what the row offers the model, for templates that take them. untrained: indices of assistant turns
    that the row keeps out of the loss (`weight: 0`, `train: false`, ...).
    """

    turns: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    documents: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Text:
    """A text of which every token is a target."""

    text: str


Conversation = Pair | Chat | Text


@dataclass(frozen=True, slots=True)
class Shape:
    """The format of a data set's rows: its name, and which column holds each part."""

    name: str
    columns: Mapping[str, str]

    def get(self, row: Mapping[str, Any], part: str) -> Any:
        """Return a part of a row, None if it is missing."""
        return row.get(self.columns.get(part, part))


def detect(found: Sequence[str], dataset_format: str, renamed: str | None) -> Shape:
    """Recognise the format of rows that have the columns `found`.

    `dataset_format` is `--dataset_format`, `renamed` is `--columns`. Raises `UserError`, which names the columns and
    the known formats, if no format fits or if the columns are not those of `dataset_format`.
    """
    names = parse_columns(renamed)
    parts = {part for shape in REQUIRED for part in (*REQUIRED[shape], *OPTIONAL.get(shape, ()))}
    for part, column in names.items():
        if part not in parts and part not in ALSO_KNOWN_AS.values():
            raise UserError(
                f"--columns {renamed}: no format has a part {part}; the parts are {', '.join(sorted(parts))}"
            )
        if column not in found:
            raise UserError(f"--columns {renamed}: no column {column}; the columns are {_listed(found)}")
    names = {next((to for to, alias in ALSO_KNOWN_AS.items() if alias == part), part): c for part, c in names.items()}
    # The parts that --columns names decide the format, whatever other columns there are.
    parts_named = [shape for shape in REQUIRED if set(names) & set(REQUIRED[shape])]
    candidates = parts_named if dataset_format == "auto" else [dataset_format]
    for shape in candidates or REQUIRED:
        columns = {part: _column(part, found, names) for part in (*REQUIRED[shape], *OPTIONAL.get(shape, ()))}
        if all(columns[part] in found for part in REQUIRED[shape]):
            return Shape(shape, columns)
    if dataset_format != "auto":
        needs = ", ".join(REQUIRED[dataset_format])
        raise UserError(
            f"--dataset_format {dataset_format}: needs the columns {needs}, but the data set has {_listed(found)}; "
            f"name them with --columns, e.g. {REQUIRED[dataset_format][0]}={next(iter(found), 'column')}"
        )
    raise UserError(
        f"--dataset_format auto: the columns {_listed(found)} match no known format; known formats are {KNOWN}; "
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
    """Read a row of a known format. Raises `BadRow` if a part is missing or of the wrong type."""
    if shape.name == "messages":
        return Chat(_turns(shape.get(row, "messages")))
    if shape.name == "text":
        return Text(_text(shape.get(row, "text"), shape.columns["text"]))
    if shape.name == "prompt_completion":
        prompt_part, answer_part = "prompt", "completion"
        context = None
    else:
        prompt_part, answer_part = "instruction", "output"
        context = shape.get(row, "input")
    return Pair(
        prompt=_text(shape.get(row, prompt_part), shape.columns[prompt_part]),
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
    if isinstance(value, str):  # a CSV column can hold a list only as JSON
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow("the messages are text, but not JSON") from None
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
        raise BadRow(f"message {number} has the role {role!r}; known roles are {', '.join(ROLES)}")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    # Arrow gives every record the fields of all records; fields that a record does not have are None.
    known = ("role", "from", "content", "value")
    more = {key: item for key, item in turn.items() if key not in known and item is not None}
    if content is None and more.get("tool_calls"):
        return {"role": ROLES[role.lower()], "content": "", **more}
    return {"role": ROLES[role.lower()], "content": _content(content, number), **more}


def _content(content: Any, number: int) -> str:
    """Join content given as a list of parts, `{"type": "text", "text": ...}` or strings, into one text."""
    if not isinstance(content, (list, tuple)):
        return _text(content, f"content of message {number}")
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise BadRow(f"message {number} holds a part of type {part['type']!r}; only text can be trained on")
        texts.append(_text(part.get("text") if isinstance(part, Mapping) else part, f"a part of message {number}"))
    return "".join(texts)
