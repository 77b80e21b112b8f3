"""Rows of every known format -> prompts and answers; pure.

| format            | columns                                     | targets                     |
| ----------------- | ------------------------------------------- | --------------------------- |
| alpaca            | `instruction`, `output`, optionally `input` | the output                  |
| messages          | `messages`: a list of `{role, content}`, or | every assistant turn        |
|                   | `conversations`: a list of `{from, value}`  |                             |
| prompt_completion | `prompt`, `completion`: texts, or lists of  | the completion              |
|                   | messages                                    |                             |
| text              | `text`                                      | every token                 |

All but text may have `system` and `tools`, messages also `documents`, and the others `history`, a list of earlier
prompts and answers, which are targets too. Pairs with one of these are read as chats.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from superoffload.config import parse_columns
from superoffload.data.messages import Turn, decode, kind_of, list_of, read_turns, text_of
from superoffload.errors import BadRow as BadRow
from superoffload.errors import UserError

# The columns that a row of each format must have. If a data set fits two formats, the first one is used.
REQUIRED = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = {
    "messages": ("system", "tools", "documents"),
    "alpaca": ("input", "history", "system", "tools"),
    "prompt_completion": ("history", "system", "tools"),
    "text": (),
}
ALSO_KNOWN_AS = {"messages": ("conversations",), "system": ("system_prompt",), "tools": ("functions",)}
IN_TURNS = ("history", "system", "tools")  # a pair with one of these is read as a chat
KNOWN = (
    "alpaca (instruction, output), messages (messages or conversations), prompt_completion (prompt, completion), "
    "text (text)"
)


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
    that the row keeps out of the loss (`weight: 0`, `train: false`, ...). given: indices of those in the prompt.
    """

    turns: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    documents: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()
    given: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Text:
    """A text of which every token is a target."""

    text: str


Conversation = Pair | Chat | Text


@dataclass(frozen=True, slots=True)
class Shape:
    """The format of a data set's rows: its name, and which column holds each part that was found."""

    name: str
    columns: Mapping[str, str]

    def get(self, row: Mapping[str, Any], part: str) -> Any:
        """Return a part of a row, None if it is missing."""
        if part in self.columns:
            return row.get(self.columns[part])
        return next((row[name] for name in _names(part) if row.get(name) is not None), None)

    def column(self, part: str) -> str:
        """Return the name of the column that holds a part."""
        return self.columns.get(part, part)


def has_format(found: Sequence[str]) -> bool:
    """Return whether columns are those of a known format."""
    return any(all(set(_names(part)) & set(found) for part in parts) for parts in REQUIRED.values())


def detect(found: Sequence[str], dataset_format: str, renamed: str | None, source: str = "the data set") -> Shape:
    """Recognise the format of rows that have the columns `found`; `source` names their data set in errors.

    `dataset_format` is `--dataset_format`, `renamed` is `--columns`. Raises `UserError`, which names the columns and
    the known formats, if no format fits or if the columns are not those of `dataset_format`.
    """
    names = _renamed(found, renamed, source)
    # The parts that --columns names decide the format, whatever other columns there are.
    parts_named = [shape for shape in REQUIRED if set(names) & set(REQUIRED[shape])]
    candidates = parts_named if dataset_format == "auto" else [dataset_format]
    for shape in candidates or REQUIRED:
        columns = {part: names.get(part) or _column(part, found) for part in (*REQUIRED[shape], *OPTIONAL[shape])}
        if all(columns[part] for part in REQUIRED[shape]):
            return Shape(shape, {part: column for part, column in columns.items() if column})
    if dataset_format != "auto":
        needs = ", ".join(REQUIRED[dataset_format])
        raise UserError(
            f"--dataset_format {dataset_format}: needs the columns {needs}, but {source} has {_listed(found)}; "
            f"name them with --columns, e.g. {REQUIRED[dataset_format][0]}={next(iter(found), 'column')}"
        )
    if {"chosen", "rejected"} <= set(found):
        raise UserError(
            f"--dataset_format auto: {source} has the columns {_listed(found)}, pairs of a preferred and a rejected "
            "answer, which are for another method (DPO); to train on the preferred answers, use --columns "
            "messages=chosen for lists of messages, text=chosen for whole texts, or completion=chosen beside a column "
            "prompt"
        )
    raise UserError(
        f"--dataset_format auto: {source} has the columns {_listed(found)}, which match no known format; known formats "
        f"are {KNOWN}; name the columns with --columns, e.g. prompt=question,completion=answer"
    )


def _renamed(found: Sequence[str], renamed: str | None, source: str) -> dict[str, str]:
    """Return the column of each part that --columns names."""
    parts = {part for shape in REQUIRED for part in (*REQUIRED[shape], *OPTIONAL[shape])}
    part_of = {name: part for part in parts for name in _names(part)}
    names = parse_columns(renamed)
    for name, column in names.items():
        if name not in part_of:
            raise UserError(
                f"--columns {renamed}: no format has a part {name}; the parts are {', '.join(sorted(parts))}"
            )
        if column not in found:
            raise UserError(f"--columns {renamed}: {source} has no column {column}; its columns are {_listed(found)}")
    return {part_of[name]: column for name, column in names.items()}


def _names(part: str) -> tuple[str, ...]:
    return (part, *ALSO_KNOWN_AS.get(part, ()))


def _column(part: str, found: Sequence[str]) -> str | None:
    return next((name for name in _names(part) if name in found), None)


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) or "(none)"


def read(row: Mapping[str, Any], shape: Shape) -> Conversation:
    """Read a row of a known format. Raises `BadRow` if a part is missing or of the wrong type."""
    if shape.name == "text":
        return Text(text_of(shape.get(row, "text"), shape.column("text")))
    if shape.name == "messages":
        turns, untrained = read_turns(shape.get(row, "messages"))
        return _chat(row, shape, turns, untrained)
    if shape.name == "prompt_completion" and row.get("label") is False:
        raise BadRow("label is false, which marks an answer that is not to be learnt")
    if isinstance(shape.get(row, "prompt"), (list, tuple)) and shape.name == "prompt_completion":
        prompt, untrained = read_turns(shape.get(row, "prompt"), "the messages of the prompt")
        completion, later = read_turns(shape.get(row, "completion"), "the messages of the completion")
        chat = _chat(row, shape, [*prompt, *completion], untrained | {len(prompt) + index for index in later})
        asked = range(len(chat.turns) - len(completion))
        return replace(chat, given=frozenset(index for index in asked if chat.turns[index]["role"] == "assistant"))
    pair = _pair(row, shape)
    late = [part for part in IN_TURNS if part not in shape.columns and shape.get(row, part)]
    if late:  # the rows before it have been written as pairs, in another form than chats
        raise BadRow(f"it has {late[0]}, which none of the first rows has; give the first row that column too, empty")
    if set(IN_TURNS) & set(shape.columns):
        history = [turn for earlier in _history(shape.get(row, "history")) for turn in turns_of(earlier)]
        return _chat(row, shape, [*history, *turns_of(pair)], frozenset())
    return pair


def _pair(row: Mapping[str, Any], shape: Shape) -> Pair:
    asked, answer = REQUIRED[shape.name]
    context = shape.get(row, "input") if shape.name == "alpaca" else None
    return Pair(
        prompt=text_of(shape.get(row, asked), shape.column(asked)),
        context="" if context is None else text_of(context, shape.column("input")),
        answer=text_of(shape.get(row, answer), shape.column(answer)),
    )


def turns_of(pair: Pair) -> tuple[Turn, Turn]:
    """Write a pair as a user turn and an assistant turn."""
    asked = f"{pair.prompt}\n\n{pair.context}" if pair.context.strip() else pair.prompt
    return {"role": "user", "content": asked}, {"role": "assistant", "content": pair.answer}


def _history(value: Any) -> Iterator[Pair]:
    for number, earlier in enumerate(_optional(value, "the history"), 1):
        if not isinstance(earlier, (list, tuple)) or len(earlier) != 2:
            raise BadRow(f"item {number} of the history is not a list of a prompt and an answer")
        prompt, answer = (text_of(text, f"item {number} of the history") for text in earlier)
        yield Pair(prompt=prompt, context="", answer=answer)


def _chat(row: Mapping[str, Any], shape: Shape, turns: Sequence[Turn], untrained: Iterable[int]) -> Chat:
    """Add what the row holds beside its turns: the system message, tools and documents."""
    system = shape.get(row, "system")
    if system is not None and text_of(system, shape.column("system")).strip():
        if turns[0]["role"] not in ("system", "developer"):
            turns = [{"role": "system", "content": system}, *turns]
            untrained = [index + 1 for index in untrained]
        elif turns[0]["content"].strip() != system.strip():
            raise BadRow(f"the column {shape.column('system')} and the system message of the conversation differ")
    return Chat(
        turns=tuple(turns),
        tools=tuple(_tool(tool) for tool in _optional(shape.get(row, "tools"), "the tools")),
        documents=tuple(_document(item) for item in _optional(shape.get(row, "documents"), "the documents"))
        if shape.name == "messages"
        else (),
        untrained=frozenset(untrained),
    )


def _optional(value: Any, name: str) -> Sequence[Any]:
    blank = value is None or (isinstance(value, str) and value.strip() in ("", "null"))
    return () if blank else list_of(value, name)


def _tool(tool: Any) -> dict[str, Any]:
    """Write a tool as `{"type": "function", "function": {...}}`, also if it is given as JSON text or not nested."""
    if isinstance(tool, str):
        try:
            tool = decode(tool)
        except ValueError:
            raise BadRow("a tool is text, but not JSON") from None
    if not isinstance(tool, Mapping):
        raise BadRow(f"a tool is {kind_of(tool)}, not a record")
    flat = "function" not in tool and isinstance(tool.get("name"), str)
    return _nested(tool) if flat else dict(tool)


def _nested(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _document(document: Any) -> dict[str, Any]:
    if isinstance(document, Mapping):
        return dict(document)
    return {"text": text_of(document, "a document")}
