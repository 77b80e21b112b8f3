"""The messages of a row -> turns in one form, whatever form the row has; pure.

| field        | forms                                                                                     |
| ------------ | ----------------------------------------------------------------------------------------- |
| `role`       | one of `ROLES`; also `from`                                                               |
| `content`    | text, a part `{"type": "text", "text": ...}`, or a list of them; also `value`             |
| `tool_calls` | `{"function": {"name", "arguments"}}` or `{"name", "arguments"}`; also `function_call`    |
| `weight`     | 0 keeps a turn out of the loss; also the other names in `TRAINED`                         |

The arguments of a call are a record, or JSON text of one. A turn with calls may have no content. Other fields stay as
they are. Null is the same as absent.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from superoffload.errors import BadRow

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
CALLING_ROLES = ("function_call", "tool_call")  # the content of such a turn is the call, as JSON
# Fields that say whether a turn is trained on, and whether true means that it is.
TRAINED = {
    "weight": True,
    "train": True,
    "trainable": True,
    "training": True,
    "loss": True,
    "loss_mask": True,
    "masked": False,
}
READ = ("role", "from", "content", "value", "tool_calls", "function_call", *TRAINED)
TEXT_OF_PART = ("text", "value", "content")

Turn = dict[str, Any]


def decode(text: str | bytes) -> Any:
    """Parse JSON. Raises `ValueError` if it is broken, and `BadRow` if it is nested too deeply or has a key twice.

    If a record has a key twice, any choice would lose the other value.
    """
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode().removeprefix("\ufeff"))
    except RecursionError:
        raise BadRow("JSON nested too deeply") from None


def _record(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) < len(items):
        keys = [key for key, _ in items]
        raise BadRow(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_record)


def text_of(value: Any, name: str) -> str:
    """Return a value that must be text. Raises `BadRow` if it is not."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind_of(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} holds invalid UTF-8") from None
    return value


def kind_of(value: Any) -> str:
    """Name the type of a value."""
    return "missing" if value is None else type(value).__name__


def list_of(value: Any, name: str) -> Sequence[Any]:
    """Return a list that may be given as JSON text, as in CSV. Raises `BadRow` if it is neither."""
    if isinstance(value, str):
        try:
            value = decode(value)
        except ValueError:
            raise BadRow(f"{name} are text, but not JSON") from None
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"{name} are {kind_of(value)}, not a list")
    return value


def read_turns(value: Any, name: str = "the messages") -> tuple[list[Turn], frozenset[int]]:
    """Read a list of messages; return its turns, and the indices of assistant turns that are kept out of the loss.

    Each turn has `role`, `content` (None if it has only calls) and the other fields of its message. Raises `BadRow`.
    """
    messages = list_of(value, name)
    if not messages:
        raise BadRow(f"the list of {name.removeprefix('the ')} is empty")
    turns = [_turn(message, number) for number, message in enumerate(messages, 1)]
    untrained = {
        index
        for index, (message, turn) in enumerate(zip(messages, turns, strict=True))
        if turn["role"] == "assistant" and not _is_trained(message, index + 1)
    }
    return turns, frozenset(untrained)


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, Mapping):
        raise BadRow(f"message {number} is {kind_of(message)}, not a record of role and content")
    role = _first(message, ("role", "from"))
    if role is None:
        raise BadRow(f"message {number} has no role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow(f"message {number} has the role {role!r}; known roles are {', '.join(ROLES)}")
    turn = {"role": ROLES[role.lower()], "content": _first(message, ("content", "value"))}
    turn |= {key: value for key, value in message.items() if key not in READ and value is not None}
    calls = _calls(message, number)
    if role.lower() in CALLING_ROLES and not calls:
        calls, turn["content"] = _written_calls(turn["content"], number), None
    if calls and turn["role"] != "assistant":
        raise BadRow(f"message {number} has tool calls, but its role is {role}; only the assistant's are read")
    if calls:
        turn["tool_calls"] = calls
    if turn["content"] is not None or not calls:
        turn["content"] = _content(turn["content"], number)
    return turn


def _first(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _is_trained(message: Mapping[str, Any], number: int) -> bool:
    given = {name: message[name] for name in TRAINED if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise BadRow(f"message {number} has the {name} {value!r}; only 0 and 1 (or false and true) can be used")
    return all(bool(value) == TRAINED[name] for name, value in given.items())


def _content(content: Any, number: int) -> str:
    """Join content given as a part, or as a list of parts or texts, into one text."""
    name = f"content of message {number}"
    if isinstance(content, Mapping) and any(key in content for key in TEXT_OF_PART):
        content = [content]
    if not isinstance(content, (list, tuple)):
        return text_of(content, name)
    return "".join(_part(part, number) if isinstance(part, Mapping) else text_of(part, name) for part in content)


def _part(part: Mapping[str, Any], number: int) -> str:
    if part.get("type", "text") != "text":
        raise BadRow(f"message {number} holds a part of type {part['type']!r}; only text can be trained on")
    texts = [part[key] for key in TEXT_OF_PART if part.get(key) is not None]
    if len(texts) > 1:
        raise BadRow(f"message {number} holds a part with several texts")
    return text_of(next(iter(texts), None), f"a part of message {number}")


def _calls(message: Mapping[str, Any], number: int) -> list[Any]:
    """Return the tool calls of a message, with those of the older form `function_call`."""
    calls, old = message.get("tool_calls"), message.get("function_call")
    if isinstance(calls, Mapping):
        calls = [calls]
    calls = [] if calls is None or calls == "" else list_of(calls, f"the tool_calls of message {number}")
    if calls and old is not None:
        raise BadRow(f"message {number} has tool_calls and a function_call")
    return [_call(call, number) for call in ([old] if old is not None else calls)]


def _written_calls(content: Any, number: int) -> list[Any]:
    """Return the calls that are the content of a turn with the role function_call."""
    try:
        calls = decode(content) if isinstance(content, str) else content
    except ValueError:
        raise BadRow(f"message {number} is a function call, but not JSON of the form name, arguments") from None
    calls = list(calls) if isinstance(calls, (list, tuple)) else [calls]
    return [_call(call, number) for call in calls]


def _call(call: Any, number: int) -> dict[str, Any]:
    """Write a call as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, whatever its form."""
    name = f"a tool call of message {number}"
    call = _decoded(call, name) if isinstance(call, str) else call
    if not isinstance(call, Mapping):
        raise BadRow(f"{name} is {kind_of(call)}, not a record")
    outer = {key: value for key, value in call.items() if value is not None}
    inner = outer.pop("function", None)
    if not isinstance(inner, Mapping):
        inner = {key: outer.pop(key) for key in list(outer) if key not in ("id", "type", "index")}
    function = {key: value for key, value in inner.items() if value is not None}
    if not isinstance(function.get("name"), str):
        raise BadRow(f"{name} has no name")
    given = next((key for key in ("arguments", "parameters") if key in function), None)
    if given is None and len(function) > 1:  # they may have another name
        raise BadRow(f"{name} has no arguments, but {', '.join(key for key in function if key != 'name')}")
    arguments = function.pop(given) if given else {}
    arguments = _decoded(arguments or "{}", name) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, Mapping):
        raise BadRow(f"{name} has arguments of the type {kind_of(arguments)}, not a record")
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def _decoded(text: str, name: str) -> Any:
    try:
        return decode(text)
    except ValueError:
        raise BadRow(f"{name} holds broken JSON") from None
