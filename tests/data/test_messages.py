"""Messages in every form become turns in one form."""

import json
from typing import Any

import pytest

from superoffload.data.messages import TRAINED, decode, read_turns
from superoffload.errors import BadRow

pytestmark = pytest.mark.unit

ARGUMENTS = {"city": "Oslo", "days": 2, "unit": None}
FUNCTION = {"name": "weather", "arguments": ARGUMENTS}
CALL = {"type": "function", "function": FUNCTION}
TEXT = json.dumps(ARGUMENTS)


def turns_of(*messages: Any) -> list[dict[str, Any]]:
    return read_turns(list(messages))[0]


@pytest.mark.parametrize(
    ("given", "role"),
    [
        ("system", "system"), ("developer", "developer"), ("user", "user"), ("human", "user"),
        ("assistant", "assistant"), ("gpt", "assistant"), ("model", "assistant"), ("Model", "assistant"),
        ("tool", "tool"), ("ipython", "tool"), ("function", "tool"), ("observation", "tool"), ("tool_response", "tool"),
    ],
)  # fmt: skip
def test_roles(given: str, role: str) -> None:
    assert turns_of({"role": given, "content": "x"}) == [{"role": role, "content": "x"}]
    assert turns_of({"from": given, "value": "x", "role": None, "content": None}) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    "content",
    [
        "ab",
        ["a", "b"],
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        [{"type": "text", "value": "a"}, {"type": "text", "content": "b"}],
        [{"text": "a", "value": None, "image": None}, "b"],
        {"type": "text", "text": "ab"},
        {"type": "text", "value": "ab"},
        {"type": "text", "content": "ab", "text": None},
    ],
)
def test_forms_of_content(content: Any) -> None:
    assert turns_of({"role": "user", "content": content}) == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"type": "text"}, "content of message 1 is dict, not text"),
        ({"temperature": 20}, "content of message 1 is dict, not text"),
        ([{"type": "text"}], "a part of message 1 is missing"),
        ([{"type": "text", "text": "a", "value": "b"}], "a part with several texts"),
        ([{"type": "image_url", "image_url": "x"}], "type 'image_url'"),
        ([["a"]], "content of message 1 is list"),
        (None, "content of message 1 is missing"),
        ("\udcff", "invalid UTF-8"),
    ],
)
def test_content_that_is_not_text(content: Any, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        turns_of({"role": "user", "content": content})


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"type": "function", "function": {**FUNCTION, "arguments": TEXT}}]},
        {"tool_calls": [{"function": FUNCTION}]},
        {"tool_calls": [FUNCTION]},
        {"tool_calls": [{"name": "weather", "arguments": TEXT}]},
        {"tool_calls": [{"name": "weather", "parameters": ARGUMENTS}]},
        {"tool_calls": [json.dumps(FUNCTION)]},
        {"tool_calls": FUNCTION},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "weather", "arguments": TEXT}, "tool_calls": None},
        {"function_call": FUNCTION, "tool_calls": []},
        {"tool_calls": [CALL], "function_call": None},
    ],
)
def test_forms_of_calls(fields: dict[str, Any]) -> None:
    for content in (None, "", "Let me look."):
        [turn] = turns_of({"role": "assistant", "content": content, **fields})
        assert turn == {"role": "assistant", "content": content, "tool_calls": [CALL]}
    assert turns_of({"role": "assistant", **fields})[0]["content"] is None


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize(
    "value", [json.dumps(FUNCTION), FUNCTION, [FUNCTION], json.dumps([FUNCTION]), json.dumps(CALL)]
)
def test_a_turn_that_is_a_call(role: str, value: Any) -> None:
    turns = turns_of(
        {"from": "human", "value": "q"}, {"from": role, "value": value}, {"from": "observation", "value": "r"}
    )
    assert turns[1:] == [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "r"},
    ]


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_without_arguments(arguments: Any) -> None:
    [turn] = turns_of({"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": arguments}}]})
    assert turn["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_the_other_fields_of_a_call_and_of_a_turn_stay() -> None:
    call = {"id": "abc", "index": 0, **CALL}
    message = {"role": "assistant", "reasoning_content": "hm", "content": "x", "tool_calls": [call], "refusal": None}
    result = {"role": "tool", "content": "r", "tool_call_id": "abc", "name": "weather"}
    assert turns_of(message, result) == [
        {"role": "assistant", "content": "x", "reasoning_content": "hm", "tool_calls": [call]},
        result,
    ]
    flat = {"id": "abc", "type": "function", "index": None, **FUNCTION}
    assert turns_of({"role": "assistant", "tool_calls": [flat]})[0]["tool_calls"] == [{"id": "abc", **CALL}]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{'a': 1}"}}]}, "call of message 1 holds broken JSON"),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "has arguments of the type list, not a record"),
        ({"tool_calls": [{"name": "f", "arguments": '"{}"'}]}, "has arguments of the type str, not a record"),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}, "has the key 'a' twice"),
        ({"tool_calls": [{"name": "f", "input": {"a": 1}}]}, "has no arguments, but input"),
        ({"tool_calls": [{"id": 1}]}, "a tool call of message 1 has no name"),
        ({"tool_calls": [{"function": "f", "arguments": {}}]}, "has no name"),
        ({"tool_calls": ["f"]}, "a tool call of message 1 holds broken JSON"),
        ({"tool_calls": [7]}, "is int, not a record"),
        ({"tool_calls": "f()"}, "the tool_calls of message 1 are text, but not JSON"),
        ({"tool_calls": [CALL], "function_call": FUNCTION}, "has tool_calls and a function_call"),
        ({"tool_calls": []}, "content of message 1 is missing"),
        ({"role": "function_call", "content": "f()"}, "message 1 is a function call, but not JSON"),
        ({"role": "function_call", "content": None}, "a tool call of message 1 is missing"),
    ],
)
def test_malformed_calls(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow, match=words):
        turns_of({"role": "assistant", **fields})


@pytest.mark.parametrize("name", TRAINED)
def test_a_turn_that_is_kept_out_of_the_loss(name: str) -> None:
    trained = TRAINED[name]
    for yes, no in ((trained, not trained), (int(trained), int(not trained)), (float(trained), float(not trained))):
        turns, untrained = read_turns(
            [
                {"role": "user", "content": "q", name: no},
                {"role": "assistant", "content": "bad", name: no},
                {"role": "assistant", "content": "good", name: yes},
                {"role": "assistant", "content": "usual", name: None},
            ]
        )
        assert untrained == {1}
        assert all(set(turn) == {"role", "content"} for turn in turns)
    for value in (0.5, 2, "0", [0, 1]):
        with pytest.raises(BadRow, match=f"message 1 has the {name} .*; only 0 and 1"):
            read_turns([{"role": "assistant", "content": "x", name: value}])


def test_one_field_is_enough_to_keep_a_turn_out_of_the_loss() -> None:
    assert read_turns([{"role": "assistant", "content": "x", "weight": 1, "train": False}])[1] == {0}


def test_a_key_that_appears_twice_is_refused_at_any_depth() -> None:
    assert decode(b'\xef\xbb\xbf{"a": {"b": 1}, "b": 2}') == {"a": {"b": 1}, "b": 2}
    with pytest.raises(BadRow, match="has the key 'b' twice"):
        decode('{"a": [{"b": 1, "c": 0, "b": 2}]}')
    with pytest.raises(BadRow, match="nested too deeply"):
        decode("[" * 100_000)
    with pytest.raises(ValueError, match="Expecting"):
        decode("{")


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_calls_of_others_are_refused(role: str) -> None:
    calls = [{"name": "f", "arguments": {}}]
    for content in ("text", None):
        with pytest.raises(BadRow, match=f"message 1 has tool calls, but its role is {role}"):
            read_turns([{"role": role, "content": content, "tool_calls": calls}])
    assert read_turns([{"role": role, "content": "text", "tool_calls": []}])[0] == [{"role": role, "content": "text"}]


def test_null_in_arguments_stays() -> None:
    [turn] = turns_of({"role": "assistant", "tool_calls": [FUNCTION]})
    assert turn["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo", "days": 2, "unit": None}
