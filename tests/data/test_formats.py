"""Recognising and reading rows of every format."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from superoffload.data.formats import Chat, Conversation, Pair, Shape, Text, detect, read
from superoffload.errors import BadRow, UserError

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
    text = '[{"role": "assistant", "content": null, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]'
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert read({"messages": text}, MESSAGES) == Chat(({"role": "assistant", "content": None, "tool_calls": [call]},))


def test_text_shape() -> None:
    assert read({"text": "t"}, detect(["text"], "auto", None)) == Text("t")


SYSTEM = {"role": "system", "content": "s"}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}


def read_as(columns: Sequence[str], **row: Any) -> Conversation:
    return read(row, detect(columns, "auto", None))


@pytest.mark.parametrize("column", ["tools", "functions"])
@pytest.mark.parametrize(
    "tools",
    [
        [TOOL], [FUNCTION], [{"type": "function", **FUNCTION}], [json.dumps(TOOL)], json.dumps([TOOL]),
        json.dumps([FUNCTION]),
    ],
)  # fmt: skip
def test_tools_of_a_row(column: str, tools: Any) -> None:
    chat = read_as(["messages", column], messages=[USER, ANSWER], **{column: tools})
    assert chat == Chat((USER, ANSWER), tools=(TOOL,))


@pytest.mark.parametrize("tools", [None, "", " ", "[]", "null", []])
def test_no_tools(tools: Any) -> None:
    assert read_as(["messages", "tools"], messages=[USER, ANSWER], tools=tools) == Chat((USER, ANSWER))


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("tools", "f()", "the tools are text, but not JSON"),
        ("tools", TOOL, "the tools are dict, not a list"),
        ("tools", [7], "a tool is int, not a record"),
        ("tools", ["f()"], "a tool is text, but not JSON"),
        ("documents", [7], "a document is int, not text"),
        ("system", ["s"], "system is list, not text"),
        ("system", "other", "the column system and the system message of the conversation differ"),
    ],
)
def test_malformed_parts_beside_messages(column: str, value: Any, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        read_as(["messages", column], messages=[SYSTEM, USER, ANSWER], **{column: value})


@pytest.mark.parametrize("documents", [[{"text": "x"}], ["x"], '[{"text": "x"}]'])
def test_documents_of_a_row(documents: Any) -> None:
    chat = read_as(["messages", "documents"], messages=[USER, ANSWER], documents=documents)
    assert chat == Chat((USER, ANSWER), documents=({"text": "x"},))


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_message_beside_a_conversation(column: str) -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "bad", "weight": 0},
        {"from": "gpt", "value": "a"},
    ]
    bad = {"role": "assistant", "content": "bad"}
    columns = ["conversations", column]
    chat = read_as(columns, conversations=turns, **{column: "s"})
    assert chat == Chat((SYSTEM, USER, bad, ANSWER), untrained=frozenset({2}))
    for nothing in (None, "", " "):
        assert read_as(columns, conversations=turns, **{column: nothing}) == Chat(
            (USER, bad, ANSWER), untrained=frozenset({1})
        )
    same = [SYSTEM, USER, ANSWER]
    assert read_as(["messages", column], messages=same, **{column: "s "}) == Chat((SYSTEM, USER, ANSWER))


@pytest.mark.parametrize("history", [[["q0", "a0"]], '[["q0", "a0"]]', [("q0", "a0")]])
def test_pairs_with_a_system_message_and_a_history(history: Any) -> None:
    columns = ["instruction", "input", "output", "system", "history"]
    chat = read_as(columns, instruction="q", input="x", output="a", system="s", history=history)
    asked = {"role": "user", "content": "q\n\nx"}
    earlier = ({"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"})
    assert chat == Chat((SYSTEM, *earlier, asked, ANSWER))
    # Every row of such a data set is a chat, so that all are written in the same template.
    assert read_as(columns, instruction="q", input="", output="a", system="", history=None) == Chat((USER, ANSWER))
    columns = ["prompt", "completion", "tools"]
    assert read_as(columns, prompt="q", completion="a", tools=[TOOL]) == Chat((USER, ANSWER), tools=(TOOL,))


@pytest.mark.parametrize("part", [{"system": "s"}, {"history": [["q0", "a0"]]}, {"tools": [TOOL]}])
def test_a_row_that_would_be_the_first_chat_among_pairs_is_refused(part: dict[str, Any]) -> None:
    """The rows before it were written as pairs, in another template."""
    with pytest.raises(BadRow, match="which none of the first rows has; give the first row that column too, empty"):
        read_as(["prompt", "completion"], prompt="q", completion="a", **part)
    empty = dict.fromkeys(part)
    assert read_as(["prompt", "completion"], prompt="q", completion="a", **empty) == Pair("q", "", "a")


@pytest.mark.parametrize("history", [[["q0"]], ["q0", "a0"], [["q0", None]], {"q0": "a0"}, "q0"])
def test_malformed_history(history: Any) -> None:
    with pytest.raises(BadRow, match="history"):
        read_as(["instruction", "output", "history"], instruction="q", output="a", history=history)


def test_prompts_and_completions_that_are_messages() -> None:
    earlier = [USER, {"role": "assistant", "content": "given"}, USER]
    columns = ["prompt", "completion", "tools"]
    chat = read_as(columns, prompt=earlier, completion=[ANSWER, {**ANSWER, "weight": 0}], tools=[FUNCTION])
    assert chat == Chat((*earlier, ANSWER, ANSWER), tools=(TOOL,), untrained=frozenset({4}), given=frozenset({1}))
    with pytest.raises(BadRow, match="the messages of the completion are text, but not JSON"):
        read_as(columns, prompt=[USER], completion="a")
    with pytest.raises(BadRow, match="the list of messages of the completion is empty"):
        read_as(columns, prompt=[USER], completion=[])


def test_pairs_of_preferences_are_refused_with_a_hint() -> None:
    for columns in (["prompt", "chosen", "rejected"], ["chosen", "rejected"]):
        with pytest.raises(UserError, match=r"preferred and a rejected answer.*messages=chosen.*completion=chosen"):
            detect(columns, "auto", None)
    assert detect(["chosen", "rejected"], "auto", "messages=chosen").name == "messages"
    assert detect(["prompt", "chosen", "rejected"], "auto", "completion=chosen").name == "prompt_completion"


def test_an_answer_labelled_as_bad_is_refused() -> None:
    columns = ["prompt", "completion", "label"]
    for label in (True, None, "no", 0):
        assert read_as(columns, prompt="q", completion="a", label=label) == Pair("q", "", "a")
    with pytest.raises(BadRow, match="label is false"):
        read_as(columns, prompt="q", completion="a", label=False)


def test_errors_name_the_data_set() -> None:
    with pytest.raises(UserError, match=r"--columns prompt=q: eval\.jsonl has no column q; its columns are a, b"):
        detect(["a", "b"], "auto", "prompt=q", "eval.jsonl")
    for name in ("auto", "text"):
        with pytest.raises(UserError, match=f"--dataset_format {name}: .*eval.jsonl has"):
            detect(["a", "b"], name, None, "eval.jsonl")


def test_optional_parts_under_other_names() -> None:
    shape = detect(["q", "a", "s", "t"], "auto", "prompt=q,completion=a,system=s,functions=t")
    assert read({"q": "q", "a": "a", "s": "s", "t": [TOOL]}, shape) == Chat((SYSTEM, USER, ANSWER), tools=(TOOL,))


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
