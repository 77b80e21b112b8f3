"""Conversations that went wrong in some template: each has the right targets, or is refused with the reason."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from superoffload.config import DataSettings
from superoffload.data.encode import IGNORED, Encoded, Encoder
from superoffload.data.formats import BadRow, Chat, Conversation, Pair, Text
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer
from tests.helpers import chat_templates
from tests.helpers.tokenizers import decode_targets, make_chat_tokenizer, make_trained_tokenizer

pytestmark = pytest.mark.unit

each_kind = pytest.mark.parametrize("kind", ["gpt2", "metaspace", "llama2"])
Turn = dict[str, Any]

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# The headings of Mistral and Llama 2: nothing asks for an answer, and a blank precedes it.
BLANK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
# A header that asks for an answer without the blank that the turn has.
COLON = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}",
)
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for d in documents %}{{ d.text }}\n{% endfor %}" + CALLS
ADDED = ("<|start|>", "<|end|>", "<|message|>", "[INST]", "[/INST]")

WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": 'Oslo\'s "centre"', "days": 2}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city"}}


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> Turn:
    return {"role": "assistant", "content": text, **more}


def encode(tokenizer: Tokenizer, row: Conversation | Sequence[Turn], **settings: Any) -> Encoded:
    conversation = Chat(tuple(row)) if isinstance(row, (list, tuple)) else row
    return Encoder(tokenizer, DataSettings(**settings))(conversation)  # type: ignore[arg-type]


def targets(template: str, row: Conversation | Sequence[Turn], kind: str = "gpt2", **settings: Any) -> list[str]:
    tokenizer = make_trained_tokenizer(kind, ADDED, template)
    return decode_targets(encode(tokenizer, row, **settings), tokenizer)


@each_kind
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (BLANK, [" Yes <eos>", " Fine, and you? <eos>"]),
        (BLANK.replace(" {{ eos", "{{ eos"), [" Yes<eos>", " Fine, and you?<eos>"]),
        (COLON, [" Yes<|end|>", " Fine, and you?<|end|>"]),
        (COLON.partition("{% if add")[0], [" Yes<|end|>", " Fine, and you?<|end|>"]),  # nothing asks for an answer
    ],
)
def test_first_word_after_a_blank_of_the_template_is_a_target(template: str, expected: list[str], kind: str) -> None:
    row = [user("Is water wet?"), assistant("Yes"), user("How are you?"), assistant("Fine, and you?")]
    found = targets(template, row, kind)
    if kind != "gpt2":  # SentencePiece adds blanks and removes them
        expected, found = [[text.replace(" ", "") for text in texts] for texts in (expected, found)]
    assert found == expected


@pytest.mark.parametrize(("kind", "token"), [("gpt2", "\u0120Yes"), ("metaspace", "\u2581Y"), ("llama2", "\u2581")])
def test_token_of_the_first_word_takes_the_blank(kind: str, token: str) -> None:
    tokenizer = make_trained_tokenizer(kind, ADDED, BLANK)
    encoded = encode(tokenizer, [user("Is water wet?"), assistant("Yes")])
    first = next(label for label in encoded.labels if label >= 0)
    assert tokenizer.convert_ids_to_tokens([first])[0].startswith(token)  # type: ignore[attr-defined]


def test_marks_around_an_empty_answer_belong_to_no_other_turn() -> None:
    marks = CHATML.replace(
        "{{ m.content }}<|end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% generation %}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}",
    )
    turns = [user("q"), assistant("Yes"), user("q"), assistant(""), user("q"), assistant("No")]
    assert targets(marks, turns) == ["Yes<|end|>", "No<|end|>"]
    assert targets(marks, turns[2:4]) == []
    assert targets(marks, turns, keep_empty_answers=True) == ["Yes<|end|>", "<|end|>", "No<|end|>"]


@pytest.mark.parametrize("turns", [2, 4])
def test_marks_around_other_turns_are_refused(turns: int) -> None:
    template = "{% generation %}" + CHATML.replace("{% if add", "{% endgeneration %}{% if add")
    row = [user("q"), assistant("Yes"), user("q2"), assistant("No")][:turns]
    with pytest.raises(BadRow, match=r"message 2\) cannot be found .*: its generation marks enclose other turns too"):
        targets(template, row)
    with pytest.raises(BadRow, match="enclose other turns too"):
        targets(template, [assistant("Yes"), assistant("No")])


@pytest.mark.parametrize("choice", ["auto", "plain"])
def test_answers_in_the_prompt_are_targets_only_with_the_prompt(choice: str) -> None:
    turns = (user("Is water wet?"), assistant("Yes"), user("How are you?"), assistant("Fine"))
    row = Chat(turns, given=frozenset({1}))
    end = "<|end|>" if choice == "auto" else "<eos>"
    assert targets(CHATML, row, chat_template=choice) == [f"Fine{end}"]
    [every] = targets(CHATML, row, chat_template=choice, train_on_prompt=True)
    assert "Yes" in every
    kept_out = replace(row, untrained=frozenset({1}))
    assert "Yes" not in "".join(targets(CHATML, kept_out, chat_template=choice, train_on_prompt=True))


def test_two_answers_one_after_the_other() -> None:
    turns = [user("q"), assistant("Yes"), assistant("No"), user("q")]
    assert targets(CHATML, turns) == ["Yes<|end|>", "No<|end|>"]


def test_offsets_without_white_space_give_the_same_targets() -> None:
    row = [user("Is water wet?"), assistant("Yes\n\nNo "), user("How are you?"), assistant(" Fine")]
    for template in (BLANK, COLON, CHATML):
        tokenizer = make_trained_tokenizer("gpt2", ADDED, template)
        whole = encode(tokenizer, row)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        assert encode(tokenizer, row) == whole


def test_token_that_holds_header_and_answer_is_refused() -> None:
    asks_with_blank = COLON.replace("assistant:{%", "assistant: {%")
    with pytest.raises(BadRow, match="one token holds the start of message 2 and the text before it"):
        targets(asks_with_blank, [user("Is water wet?"), assistant("Yes")])
    with pytest.raises(BadRow, match="one token holds the start of message 2 and the text before it"):
        targets(
            "{% for m in messages %}{{ m.role }} wat{{ m.content }}<|end|>{% endfor %}", [user("q"), assistant("er")]
        )
    with pytest.raises(BadRow, match="one token holds the end of message 2 and the text after it"):
        between = "{% for m in messages %}{% if not loop.first %}er {% endif %}{{ m.role }} {{ m.content }}{% endfor %}"
        targets(between, [user("q"), assistant("wat"), user("q")])


@each_kind
def test_call_is_a_target_with_and_without_text(kind: str) -> None:
    called = '<call>weather {"city": "Oslo\'s \\"centre\\"", "days": 2}</call><|end|>'
    for text in (None, "", "Let me look."):
        row = [user("q"), assistant(text, tool_calls=[WEATHER]), {"role": "tool", "content": "rain"}, assistant("Yes")]
        found = [text.replace(" ", "") if kind == "llama2" else text for text in targets(CALLS, row, kind)]
        expected = [(text or "") + called, "Yes<|end|>"]
        assert found == [text.replace(" ", "") if kind == "llama2" else text for text in expected]


# The calls of Mistral: no header asks for an answer, and a blank precedes content only.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls is defined and m.tool_calls is not none %}<call> [{% for c in m.tool_calls %}"
    "{% set out = c.function | tojson %}{{ out[:-1] + ', \"id\": \"' + c.id + '\"}' }}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}<result> {{ m.content }}</result>{% endif %}{% endfor %}"
)


@each_kind
def test_call_in_a_template_that_asks_for_no_answer(kind: str) -> None:
    row = [
        user("q"),
        assistant(None, tool_calls=[{**WEATHER, "id": "abcde1234"}]),
        {"role": "tool", "content": "rain"},
        assistant("Yes"),
    ]
    call = '{"name": "weather", "arguments": {"city": "Oslo\'s \\"centre\\"", "days": 2}'
    blank = {"gpt2": " ", "metaspace": "", "llama2": ""}[kind]
    expected = [f'<call> [{call}, "id": "abcde1234"}}]<eos>', f"{blank}Yes<eos>"]
    assert [text.replace("> [", ">[") for text in targets(BRACKETS, row, kind)] == [
        text.replace("> [", ">[") for text in expected
    ]
    named = COLON.partition("{% if add")[0].replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}({{ c.function | tojson }}){% endfor %}"
    )
    found = [text.lstrip() for text in targets(named, row, kind)]
    assert found == [f"({call}}})<|end|>", "Yes<|end|>"]


def test_conversation_may_start_with_the_assistant_in_a_template_that_asks_for_no_answer() -> None:
    turns = [assistant("Yes"), user("How are you?"), assistant("Fine")]
    for template, end in ((COLON.partition("{% if add")[0], "<|end|>"), (BLANK, " <eos>")):
        assert targets(template, turns) == [f" Yes{end}", f" Fine{end}"]


def test_template_that_rejects_the_turns_before_an_answer() -> None:
    """Nothing then shows where a call starts, so it is refused; content starts where it stands."""
    rejects = "{% if messages[-1].role != 'assistant' %}{{ raise_exception('no answer') }}{% endif %}"
    for template in (CALLS, BRACKETS.replace(" {{ m.content | trim", "{{ m.content | trim")):
        assert targets(rejects + template, [user("q"), assistant("Yes")])[0].startswith("Yes<")
        call = assistant(None, tool_calls=[{**WEATHER, "id": "abcde1234"}])
        try:
            found = targets(rejects + template, [user("q"), call])
        except BadRow as refused:
            assert "cannot be found" in str(refused)
        else:
            assert found == targets(template, [user("q"), call])


def test_call_that_the_template_does_not_write() -> None:
    row = [user("q"), assistant("Yes", tool_calls=[WEATHER]), user("q"), assistant(None, tool_calls=[WEATHER])]
    for settings in ({}, {"chat_template": "plain"}):
        with pytest.raises(BadRow, match=r"does not write tool_calls of message 2.*--drop_unrendered"):
            targets(CHATML, row, **settings)
        tokenizer = make_trained_tokenizer("gpt2", ADDED, CHATML)
        encoded = encode(tokenizer, row, drop_unrendered=True, **settings)
        assert decode_targets(encoded, tokenizer)[0].startswith("Yes<") and len(decode_targets(encoded, tokenizer)) == 1
        assert (encoded.unwritten, encoded.empty) == (2, 1)


def test_result_of_a_tool_inside_a_turn_is_not_a_target() -> None:
    result = "</call>{% endfor %}{% if m.tool_calls and not loop.last %}[{{ messages[loop.index].content }}]{% endif %}"
    inside = CALLS.replace("{{ m.content }}", "", 1).replace("</call>{% endfor %}", result + "{{ m.content }}")
    inside = inside.replace("{% for m in messages %}", "{% for m in messages %}{% if m.role != 'tool' %}")
    inside = inside.replace("<|end|>\n", "<|end|>\n{% endif %}")
    row = [user("q"), assistant("No", tool_calls=[WEATHER]), {"role": "tool", "content": "rain"}, assistant("Yes")]
    with pytest.raises(BadRow, match="the template writes it otherwise depending on what follows"):
        targets(inside, row)
    assert targets(inside, row[:2])[0].endswith("</call>No<|end|>")


@pytest.mark.parametrize("arguments", [{"days": 2}, {"is_wet": True, "since": None}, {"range": [1, 2]}, {"days": {}}])
def test_arguments_that_the_template_does_not_write(arguments: dict[str, Any]) -> None:
    row = [user("q"), assistant(None, tool_calls=[{"function": {"name": "weather", "arguments": arguments}}])]
    assert targets(CALLS, row) == [f"<call>weather {json.dumps(arguments)}</call><|end|>"]
    keys = CALLS.replace("c.function.arguments |", "c.function.arguments.keys() | list |")
    for template in (CALLS.replace("{{ c.function.arguments | tojson }}", ""), keys):
        if template != keys or arguments != {"days": {}}:
            with pytest.raises(BadRow, match="does not write tool_calls of message 2"):
                targets(template, row)


def test_null_content_reaches_a_template_that_asks_for_it() -> None:
    asks = CALLS.replace("{{ m.content }}", "{% if m.content is none %}nothing{% else %}{{ m.content }}{% endif %}", 1)
    assert targets(asks, [user("q"), assistant(None, tool_calls=[WEATHER])])[0].startswith("nothing<call>")
    assert targets(asks, [user("q"), assistant("", tool_calls=[WEATHER])])[0].startswith("<call>")
    prints = CALLS.replace("{{ m.content }}", "{{ m.content }}{{ '' if m.content is none }}", 1)
    assert targets(prints, [user("q"), assistant(None, tool_calls=[WEATHER])])[0].startswith("<call>")


@pytest.mark.parametrize("text", [None, ""])
def test_call_with_empty_content_in_a_template_that_asks_for_null(text: str | None) -> None:
    row = [user("q"), assistant(text, tool_calls=[WEATHER]), {"role": "tool", "content": "rain"}, assistant("Yes")]
    found = chat_templates.found("deepseek_r1_distill", row).targets
    assert "weather" in found[0] and found[1] == "Yes<｜end▁of▁sentence｜>"


def test_arguments_are_text_where_the_template_wants_text() -> None:
    text = '{"city": "Oslo\'s \\"centre\\"", "days": 2}'
    row = [user("q"), assistant(None, tool_calls=[WEATHER])]
    wants_text = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
    assert targets(wants_text, row) == [f"<call>weather {text}</call><|end|>"]
    prints = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")
    assert targets(prints, row) == [f"<call>weather {text}</call><|end|>"]
    items = CALLS.replace(
        "{{ c.function.arguments | tojson }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }} {% endfor %}",
    )
    assert targets(items, row) == ['<call>weather city=Oslo\'s "centre" days=2 </call><|end|>']


def test_tools_and_documents_reach_the_template() -> None:
    turns = (user("q"), assistant("Yes"))
    tokenizer = make_trained_tokenizer("gpt2", ADDED, TOOLS)
    encoded = encode(tokenizer, Chat(turns, tools=(TOOL,), documents=({"title": "t", "text": "wet paper"},)))
    assert tokenizer.decode(encoded.input_ids).startswith(json.dumps([TOOL]) + "\nwet paper\n<|start|>user")
    assert decode_targets(encoded, tokenizer) == ["Yes<|end|>"]
    for row, name in ((Chat(turns, tools=(TOOL,)), "tools"), (Chat(turns, documents=({"text": "x"},)), "documents")):
        for settings in ({}, {"chat_template": "plain"}):
            with pytest.raises(BadRow, match=f"does not write {name}"):
                targets(CHATML, row, **settings)
            tokenizer = make_trained_tokenizer("gpt2", ADDED, CHATML)
            assert encode(tokenizer, row, drop_unrendered=True, **settings).unwritten == 1


def test_content_of_others_that_the_template_does_not_write() -> None:
    template = "{% for m in messages if m.role != 'system' %}" + CHATML.split("%}", 1)[1]
    for system in ("Be brief.", "brief", "Yes", "q"):  # other turns may say the same
        row = [{"role": "system", "content": system}, user("Be q, brief"), assistant("Yes")]
        with pytest.raises(BadRow, match=r"does not write content of message 1 \(system\)"):
            targets(template, row)
        assert targets(template, row, drop_unrendered=True) == ["Yes<|end|>"]
        assert targets(CHATML, row) == ["Yes<|end|>"]
    twice = [user("q"), assistant("Yes"), user("q"), assistant("No")]
    assert targets(CHATML, twice) == ["Yes<|end|>", "No<|end|>"]
    once = "{% for m in messages[:2] + messages[3:] %}"
    with pytest.raises(BadRow, match=r"does not write content of message 3 \(user\)"):
        targets(once + CHATML.split("%}", 1)[1], twice)


def test_reasoning_that_the_template_does_not_write() -> None:
    row = [user("2+2?"), assistant("4", reasoning_content="Two and two are four.")]
    for settings in ({}, {"chat_template": "plain"}):
        with pytest.raises(BadRow, match="does not write reasoning_content of message 2"):
            targets(CHATML, row, **settings)
    assert targets(CHATML, row, drop_unrendered=True) == ["4<|end|>"]


def test_only_what_the_template_leaves_out_in_every_form_is_dropped() -> None:
    """This template takes arguments as text and null content, and writes no reasoning."""
    tokenizer = make_trained_tokenizer(
        "gpt2", chat_templates.special_tokens(), chat_templates.template("deepseek_r1_distill")
    )
    row = [user("q"), assistant(None, tool_calls=[WEATHER], reasoning_content="Let me look.")]
    encoded = encode(tokenizer, row, drop_unrendered=True)
    assert encoded.unwritten == 1 and "weather" in decode_targets(encoded, tokenizer)[0]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_any_name(name: str, read: str) -> None:
    template = CHATML.replace(
        "{{ m.content }}", "{% if m." + read + " %}<think>{{ m." + read + " }}</think>{% endif %}{{ m.content }}"
    )
    assert targets(template, [user("q"), assistant("4", **{name: "hm"})]) == ["<think>hm</think>4<|end|>"]


def test_reasoning_is_a_target_where_the_header_opens_it() -> None:
    row = [user("2+2?"), assistant("4", reasoning_content="Two and two are four.")]
    expected = ["<think>\nTwo and two are four.\n</think>\n\n4<|im_end|>"]
    assert chat_templates.found("qwen3_5_think", row).targets == expected


def test_reasoning_inside_content_is_kept_or_refused() -> None:
    row = [user("2+2?"), assistant("<think>\nTwo and two are four.\n</think>\n\n4")]
    for name in ("deepseek_r1_distill", "deepseekv3"):
        assert "does not write reasoning in content of message 2" in chat_templates.found(name, row).refused
    kept = chat_templates.found("deepseek_r1_distill_training", row).targets
    assert kept == ["<｜Assistant｜><think>\nTwo and two are four.\n</think>\n\n4<｜end▁of▁sentence｜>"]
    assert chat_templates.found("qwen3", row).targets == ["<think>\nTwo and two are four.\n</think>\n\n4<|im_end|>"]


def test_turn_that_the_row_keeps_out_of_the_loss() -> None:
    turns = (user("q"), assistant("No"), user("wrong"), assistant("Yes"))
    tokenizer = make_trained_tokenizer("gpt2", ADDED, CHATML)
    whole = encode(tokenizer, Chat(turns))
    marks = CHATML.replace("{{ m.content }}<|end|>", "{% generation %}{{ m.content }}{% endgeneration %}<|end|>")
    for template, end in ((CHATML, "<|end|>"), (marks, "<|end|>"), ("plain", "<eos>")):
        if template == "plain":
            encoded = encode(tokenizer, Chat(turns, untrained=frozenset({1})), chat_template="plain")
        else:
            tokenizer = make_trained_tokenizer("gpt2", ADDED, template)
            encoded = encode(tokenizer, Chat(turns, untrained=frozenset({1})))
            assert encoded.input_ids == whole.input_ids
        assert decode_targets(encoded, tokenizer) == [f"Yes{end}"]
        assert encoded.untrained == 1
    last = Chat(turns, untrained=frozenset({3}))
    assert targets(CHATML.replace("<|end|>", ""), last) == ["No\n"]  # no end-of-sequence token is trained on


@pytest.mark.parametrize("template", [CHATML, "plain"])
def test_turn_that_the_row_keeps_out_of_the_loss_stays_out_when_prompts_are_trained_on(template: str) -> None:
    row = Chat((user("q"), assistant("No"), user("wrong"), assistant("Yes")), untrained=frozenset({1}))
    tokenizer = make_trained_tokenizer("gpt2", ADDED, None if template == "plain" else template)
    encoded = encode(tokenizer, row, train_on_prompt=True)
    kept_out = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == IGNORED]
    assert tokenizer.decode(kept_out) == ("No<eos>" if template == "plain" else "No<|end|>")


def test_empty_answers_are_counted_and_not_trained_on() -> None:
    tokenizer = make_trained_tokenizer("gpt2", ADDED, CHATML)
    turns = [user("q"), assistant(""), user("q"), assistant("Yes"), user("q"), assistant("  ")]
    for settings, end in (({}, "<|end|>"), ({"chat_template": "plain"}, "<eos>")):
        encoded = encode(tokenizer, turns, **settings)
        assert decode_targets(encoded, tokenizer) == [f"Yes{end}"]
        assert encoded.empty == 2
        kept = encode(tokenizer, turns, keep_empty_answers=True, **settings)
        assert decode_targets(kept, tokenizer) == [end, f"Yes{end}", f"  {end}"]
        assert kept.input_ids == encoded.input_ids and kept.empty == 0
    for row in (Pair("q", "", ""), Pair("q", "", " \n"), Text("")):
        encoded = encode(tokenizer, row)
        assert (encoded.empty, encoded.target_tokens) == (1, 0)
    assert encode(tokenizer, Pair("q", "", ""), keep_empty_answers=True).target_tokens == 1
    assert encode(tokenizer, Pair("", "", "Yes")).target_tokens > 1


def with_bos(**names: str) -> Tokenizer:
    """Make a tokenizer that begins each text with its token for that."""
    tokenizer = make_trained_tokenizer("gpt2", ADDED, None, **names)
    bos = tokenizer.convert_tokens_to_ids(["<bos>"])[0]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


@pytest.mark.parametrize("text", ["<bos>hello<eos>", "hello<eos>", "<bos>hello", "hello"])
def test_text_has_one_beginning_and_one_end(text: str) -> None:
    tokenizer = with_bos()
    assert tokenizer.decode(encode(tokenizer, Text(text)).input_ids) == "<bos>hello<eos>"


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_pair_has_one_beginning_and_one_end(template: str) -> None:
    tokenizer = with_bos()
    written = encode(tokenizer, Pair("<bos>Q: hi\nA:", "", " hello<eos>"), chat_template=template)
    assert written == encode(tokenizer, Pair("Q: hi\nA:", "", " hello"), chat_template=template)
    assert tokenizer.decode(written.input_ids).count("<bos>") == 1


def test_header_of_the_next_turn_does_not_end_a_turn() -> None:
    row = chat_templates.CONVERSATIONS["multi-turn"]
    assert chat_templates.found("glm4moe", row).targets[0] == "\n<think></think>\nYes"
    call = [user("q"), assistant(None, tool_calls=[WEATHER]), {"role": "tool", "content": "rain"}, assistant("Yes")]
    assert chat_templates.found("glm4moe", call).targets[0].endswith("</tool_call>")
    kept = make_trained_tokenizer(
        "gpt2", ADDED, "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}{% endfor %}"
    )
    encoded = encode(kept, [user("q"), assistant(""), user("q"), assistant("Yes")], keep_empty_answers=True)
    assert decode_targets(encoded, kept) == ["Yes<eos>"]


def test_tokenizer_that_cannot_write_the_answer() -> None:
    tokenizer = make_trained_tokenizer("gpt2", ADDED, CHATML)
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    del inner["model"]["vocab"]["z"]
    tokenizer.backend_tokenizer.from_str(json.dumps(inner))
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(inner))  # type: ignore[attr-defined]
    for row in ([user("q"), assistant("a z b")], Pair("q", "", "a z b"), Text("a z b")):
        with pytest.raises(BadRow, match="the tokenizer cannot write what the assistant says: it becomes"):
            encode(tokenizer, row)


def test_data_that_holds_a_placeholder_is_refused() -> None:
    with pytest.raises(BadRow, match="which this program uses itself"):
        targets(CHATML, [user("Qx7zPiece0Zj"), assistant("Yes")])


def test_template_in_a_tokenizers_configuration(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    tokenizer = make_chat_tokenizer()
    row = [user("q"), assistant("hi there")]
    for held in (CHATML, {"default": CHATML, "other": "x"}, [{"name": "default", "template": CHATML}]):
        file.write_text(json.dumps({"chat_template": held}), encoding="utf-8-sig")
        assert decode_targets(encode(tokenizer, row, chat_template=str(file)), tokenizer) == ["hi there<|end|>"]
    for text in ("{}", "[]", "{", '{"chat_template": 1}'):
        file.write_text(text)
        with pytest.raises(UserError, match="holds no chat_template"):
            encode(tokenizer, row, chat_template=str(file))


def test_byte_order_mark_is_not_part_of_a_template(tmp_path: Path) -> None:
    (tmp_path / "bom.jinja").write_text(CHATML, encoding="utf-8-sig")
    tokenizer = make_chat_tokenizer()
    encoded = encode(tokenizer, [user("q"), assistant("hi")], chat_template=str(tmp_path / "bom.jinja"))
    assert tokenizer.decode(encoded.input_ids).startswith("<|start|>user")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("{% for m in messages %}{{ m.content }}\n{% endfr %}", "line 2 is not valid Jinja: .*endfr"),
        ("{% for m in messages %}{{ m.content | nosuch }}{% endfor %}", "line 1 is not valid Jinja: .*nosuch"),
    ],
)
def test_template_that_cannot_be_used(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "own.jinja").write_text(text)
    with pytest.raises(UserError, match=f"--chat_template .*own.jinja: .*{reason}"):
        encode(make_chat_tokenizer(), Text("x"), chat_template=str(tmp_path / "own.jinja"))


def test_named_templates() -> None:
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = {"short": CHATML, "long": COLON}
    row = [user("q"), assistant("hi there")]
    for choice in ("auto", "tokenizer"):
        with pytest.raises(UserError, match="several chat templates and no default; name one: long, short"):
            encode(tokenizer, row, chat_template=choice)
    assert decode_targets(encode(tokenizer, row, chat_template="short"), tokenizer) == ["hi there<|end|>"]
    assert decode_targets(encode(tokenizer, row, chat_template="long"), tokenizer) == [" hi there<|end|>"]
    tokenizer.chat_template = {"default": CHATML, "long": COLON}
    assert decode_targets(encode(tokenizer, row), tokenizer) == ["hi there<|end|>"]


def test_prompts_are_written_as_the_rows_are() -> None:
    tokenizer = with_bos()
    tokenizer.chat_template = CHATML
    encoder = Encoder(tokenizer, DataSettings())
    kinds = {"text": Text, "alpaca": Pair, "messages": Chat}
    written = {name: tokenizer.decode(encoder.prompt_ids("hi", kind)) for name, kind in kinds.items()}
    assert written == {
        "text": "<bos>hi",
        "alpaca": "<bos>### Instruction:\nhi\n\n### Response:\n",
        "messages": "<|start|>user\nhi<|end|>\n<|start|>assistant\n",
    }
    assert tokenizer.decode(encoder.prompt_ids("<bos>hi", Text)) == "<bos>hi"
    assert tokenizer.decode(encoder.prompt_ids("<bos>hi", Pair)) == written["alpaca"]
