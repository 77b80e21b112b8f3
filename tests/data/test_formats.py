"""Recognising and reading rows of every format."""

from typing import Any

import pytest

from superoffload.data.formats import BadRow, Chat, Pair, Shape, Text, detect, read
from superoffload.errors import UserError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["output", "instruction"], "alpaca"),
        (["messages"], "messages"),
        (["prompt", "prompt_id", "messages"], "messages"),
        (["id", "conversations"], "messages"),
        (["prompt", "completion"], "prompt_completion"),
        (["text", "url"], "text"),
    ],
)
def test_shapes_are_recognised(columns: list[str], name: str) -> None:
    assert detect(columns, "auto", None).name == name


def test_unknown_shape_names_the_columns_and_the_known_shapes() -> None:
    with pytest.raises(UserError) as error:
        detect(["question", "answer"], "auto", None)
    for word in ("question, answer", "alpaca", "messages", "prompt_completion", "text", "--columns"):
        assert word in str(error.value)


def test_columns_under_other_names() -> None:
    shape = detect(["question", "answer", "text"], "auto", "prompt=question,completion=answer")
    assert shape.name == "prompt_completion"
    assert read({"question": "q", "answer": "a", "text": "t"}, shape) == Pair("q", "", "a")
    shape = detect(["dialog"], "auto", "conversations=dialog")
    chat = read({"dialog": [{"from": "human", "value": "q"}]}, shape)
    assert isinstance(chat, Chat) and chat.turns[0]["role"] == "user"


@pytest.mark.parametrize("columns", ["prompt=missing", "nonsense=question", "prompt", "prompt="])
def test_wrong_columns_name_the_flag(columns: str) -> None:
    with pytest.raises(UserError, match="--columns"):
        detect(["question", "answer"], "auto", columns)


def test_requested_format_must_fit() -> None:
    with pytest.raises(UserError, match="--dataset_format alpaca: needs the columns instruction, output"):
        detect(["text"], "alpaca", None)
    assert detect(["text", "messages"], "text", None).name == "text"


@pytest.mark.parametrize("row", [{}, {"input": None}, {"input": ""}])
def test_input_of_alpaca_may_be_empty_null_or_absent(row: dict[str, Any]) -> None:
    shape = detect(["instruction", "output"], "auto", None)
    assert read({"instruction": "i", "output": "o", **row}, shape) == Pair("i", "", "o")


MESSAGES = detect(["messages"], "auto", None)


def test_sharegpt_roles_and_text_parts() -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "h"},
        {"from": "gpt", "value": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"from": "function", "value": "f"},
        {"from": "observation", "value": "o"},
        {"role": "assistant", "content": "end", "name": None},
    ]
    chat = read({"conversations": turns}, detect(["conversations"], "auto", None))
    assert isinstance(chat, Chat)
    assert [(turn["role"], turn["content"]) for turn in chat.turns] == [
        ("system", "s"),
        ("user", "h"),
        ("assistant", "ab"),
        ("tool", "f"),
        ("tool", "o"),
        ("assistant", "end"),
    ]
    assert "name" not in chat.turns[-1]


def test_messages_as_json_text_and_tool_calls() -> None:
    text = '[{"role": "assistant", "content": null, "tool_calls": [{"id": 1}]}]'
    assert read({"messages": text}, MESSAGES) == Chat(
        ({"role": "assistant", "content": "", "tool_calls": [{"id": 1}]},)
    )


def test_text_shape() -> None:
    assert read({"text": "t"}, detect(["text"], "auto", None)) == Text("t")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "empty"),
        ({"messages": None}, "missing"),
        ({"messages": {"role": "user"}}, "not a list"),
        ({"messages": ["hello"]}, "message 1 is str"),
        ({"messages": [{"content": "x"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "narrator", "content": "x"}]}, "narrator"),
        ({"messages": [{"role": "user", "content": None}]}, "content of message 1 is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "is int, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type 'image'"),
        ({"messages": "not json"}, "not JSON"),
    ],
)
def test_malformed_messages(row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow, match=words):
        read(row, MESSAGES)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": 5, "output": "o"}, "instruction is int"),
        ({"instruction": "i"}, "output is missing"),
        ({"instruction": "i", "output": None}, "output is missing"),
        ({"instruction": "i", "output": "o", "input": ["x"]}, "input is list"),
        ({"instruction": "i", "output": "\udcff"}, "invalid UTF-8"),
    ],
)
def test_malformed_pairs(row: dict[str, Any], words: str) -> None:
    shape = Shape("alpaca", {"instruction": "instruction", "output": "output", "input": "input"})
    with pytest.raises(BadRow, match=words):
        read(row, shape)
